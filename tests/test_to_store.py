"""A merge whose output is a folder of a bucket: the bytes of a local merge, two shards here at most, no model there
before the end; the same command continues, also on another machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import DataError, MergeToolError, OutputError, RecipeError, merge, verify
from merge_tool.output import uploader
from merge_tool.output.upload import push
from s3_replica import KEY, Replica, serve

pytest.importorskip("obstore", reason="object stores are written by obstore: pip install -e '.[cloud]'")

CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "num_hidden_layers": 8}
SIDE = {"tokenizer.json": "{}", "README.md": "# card\n"}
OUT = "s3://bucket/me/merged"
SMALL = {"max_shard_bytes": 120_000}
Pair = tuple[Path, Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """An empty bucket; this process is in an empty folder, and nobody waits long."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_ASSETS_CACHE", raising=False)
    monkeypatch.setattr(uploader, "WAITS", (0.01, 0.02))
    with serve() as replica:
        for key, value in replica.environment().items():
            monkeypatch.setenv(key, value)
        yield replica


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    for seed, (name, shards) in enumerate({"base": 2, "ft": 1}.items()):
        tensors = language_model(seed, hidden=64, layers=8)
        save_model(tmp_path / "here" / name, tensors, shards=shards, side_files=SIDE, config=CONFIG)
    return tmp_path / "here/base", tmp_path / "here/ft"


def there(store: Replica) -> dict[str, bytes]:
    return store.contents("bucket", "me/merged")


def expected(*models: str | Path, **options: object) -> dict[str, bytes]:
    """The files of the same merge into a folder."""
    merge(*models, "local", 0.4, **{**SMALL, **options})  # type: ignore[arg-type]
    try:
        return contents(Path("local"))
    finally:
        shutil.rmtree("local")


def wipe(tmp_path: Path) -> None:
    """Another machine: nothing of an earlier run is here."""
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def assert_nothing_is_left(store: Replica, tmp_path: Path) -> None:
    """No shard of this merge here, no receipt and no unfinished upload there."""
    assert not (tmp_path / "home/assets/slerp-merge").exists()
    assert not [name for name in there(store) if name.startswith(".slerp-merge")]
    assert not store.uploads


def test_a_merge_from_a_bucket_into_a_bucket_is_the_local_one(store: Replica, tmp_path: Path, pair: Pair) -> None:
    """Every file the same, each byte uploaded once, what makes a model of it last. The second time nothing is done."""
    store.put_folder("bucket", "models", pair[0].parent)
    models = ("s3://bucket/models/base", "s3://bucket/models/ft")
    report = merge(*models, OUT, 0.4, **SMALL)
    assert ([*map(str, report.outputs)], report.url, report.pull_request) == (["s3:/bucket/me/merged"], OUT, None)
    assert report.num_shards >= 4
    assert_nothing_is_left(store, tmp_path)
    written = [key for verb, key in store.asked if verb in ("PUT", "POST") and ".slerp-merge" not in key]
    assert [key.rpartition("/")[2] for key in written[-2:]] == ["config.json", "model.safetensors.index.json"]
    weights = {key: count for key, count in store.received.items() if key.endswith(".safetensors")}
    assert sum(weights.values()) == report.uploaded_bytes == report.output_bytes
    again = merge(*models, OUT, 0.4, **SMALL)
    assert again.already_complete
    assert again.summary == report.summary
    assert there(store) == expected(*pair)


@pytest.mark.slow
def test_what_is_in_a_bucket_verifies_by_ranges(store: Replica, pair: Pair) -> None:
    """Also with parents in a bucket; a changed byte is found by its tensor, and by the digest that is not there."""
    store.put_folder("bucket", "models", pair[0].parent)
    models = ("s3://bucket/models/base", "s3://bucket/models/ft")
    merge(*pair, OUT, 0.4, **SMALL)
    (found,) = verify(OUT, models, sample=0.5)
    assert not found.problems
    assert found.num_compared == found.num_elements > 100_000
    name = min(key for key in there(store) if key.endswith(".safetensors"))
    data = bytearray(there(store)[name])
    data[-1] ^= 1
    store.put("bucket", f"me/merged/{name}", bytes(data))
    (changed,) = verify(OUT, models, sample=1.0)
    assert f"{name}: its SHA-256 there is unknown, " in changed.problems[0]
    assert "is not the merge of these parents: element" in changed.problems[1]


def test_large_shards_go_up_in_parts(store: Replica, tmp_path: Path) -> None:
    models = [tmp_path / f"wide/m{seed}" for seed in range(2)]
    for seed, folder in enumerate(models):
        save_model(folder, {"w": np.random.default_rng(seed).standard_normal((2500, 2000), np.float32)})
    merge(*models, OUT, 0.4, **SMALL)
    assert ("POST", "bucket/me/merged/model.safetensors") in store.asked
    assert there(store) == expected(*models)
    assert_nothing_is_left(store, tmp_path)


def begun(store: Replica, pair: Pair, shards: int = 2, **options: object) -> None:
    """A merge that ended when so many shards were there."""
    real = store.put

    def put(bucket: str, key: str, data: bytes, etag: str = "", metadata: dict[str, str] | None = None) -> str:
        done = real(bucket, key, data, etag, metadata)
        if sum(name.endswith(".safetensors") for name in store.contents("bucket", "me/merged")) >= shards:
            store.read_only = True
        return done

    store.put = put  # type: ignore[method-assign]
    with pytest.raises(OutputError, match=r"s3://bucket/me/merged: the store does not let you do that .* 403 AccessD"):
        merge(*pair, OUT, 0.4, **{**SMALL, **options})  # type: ignore[arg-type]
    store.put, store.read_only = real, False  # type: ignore[method-assign]


def test_what_is_begun_is_no_model_and_is_continued_elsewhere(store: Replica, tmp_path: Path, pair: Pair) -> None:
    """Shards that are what their receipts say are kept; another is made again. Until then it is no input, and another
    merge is refused there."""
    begun(store, pair, shards=3)
    assert not {"config.json", "model.safetensors.index.json"} & there(store).keys()
    wipe(tmp_path)
    with pytest.raises(MergeToolError, match="holds an unfinished merge"):
        merge(OUT, pair[1], "other", 0.4)
    with pytest.raises(
        OutputError, match=r"holds an unfinished merge of another plan, .*Run that merge's command again"
    ):
        merge(*pair, OUT, 0.5, **SMALL)
    shards = sorted(name for name in there(store) if name.endswith(".safetensors"))
    changed = bytearray(there(store)[shards[0]])
    changed[-1] ^= 1
    store.put("bucket", f"me/merged/{shards[0]}", bytes(changed))
    report = merge(*pair, OUT, 0.4, **SMALL)
    assert 1 <= report.num_resumed <= 2
    assert there(store) == expected(*pair)
    assert_nothing_is_left(store, tmp_path)


@pytest.mark.slow
def test_another_merge_takes_the_place_of_what_is_begun_only_if_asked(
    store: Replica, tmp_path: Path, pair: Pair
) -> None:
    begun(store, pair, shards=3, max_shard_bytes=80_000)
    wipe(tmp_path)
    merge(*pair, OUT, 0.4, overwrite=True, **SMALL)
    assert there(store) == expected(*pair)


@pytest.mark.slow
def test_weights_of_others_are_replaced_only_if_asked(store: Replica, tmp_path: Path, pair: Pair) -> None:
    """Before a weight is read. With --overwrite the old model goes when the first new shard comes; other files stay."""
    store.put_folder("bucket", "me/merged", save_model(tmp_path / "old", language_model(2), config=CONFIG))
    store.put("bucket", "me/merged/notes.txt", b"mine")
    old = there(store)
    with pytest.raises(OutputError, match=r"s3://bucket/me/merged: has weights already \(model.safetensors\)"):
        merge(*pair, OUT, 0.4, **SMALL)
    assert there(store) == old
    said: list[str] = []
    merge(*pair, OUT, 0.4, overwrite=True, **SMALL, on_warning=said.append)
    assert said[-1].startswith("s3://bucket/me/merged also holds what was there before: notes.txt")
    assert there(store) == {**expected(*pair), "notes.txt": b"mine"}
    with pytest.raises(OutputError, match=r"s3://bucket/me/merged: holds another merge: t was 0.4, now 0.5"):
        merge(*pair, OUT, 0.5, **SMALL)


def test_who_may_not_write_is_told_before_a_weight_is_merged(store: Replica, pair: Pair) -> None:
    store.read_only = True
    with pytest.raises(OutputError, match=r"merged: the store does not let you do that .*AccessDenied\)") as failed:
        merge(*pair, OUT, 0.4)
    assert KEY not in str(failed.value)
    assert not there(store)
    store.read_only, store.forgets_metadata = False, True
    with pytest.raises(OutputError, match="the store does not keep the metadata of an object"):
        merge(*pair, OUT, 0.4)
    assert not there(store)


@pytest.mark.slow
def test_what_passes_is_tried_again(store: Replica, tmp_path: Path, pair: Pair) -> None:
    """Busy and broken in the middle of one merge: it goes on."""
    store.faults = {number: ("500", "reset", "429")[number % 3] for number in range(3, 60, 9)}
    merge(*pair, OUT, 0.4, **SMALL)
    assert there(store) == expected(*pair)
    assert_nothing_is_left(store, tmp_path)


@pytest.mark.slow
def test_values_that_cannot_be_merged_leave_nothing(store: Replica, tmp_path: Path, pair: Pair) -> None:
    path = pair[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    with pytest.raises(DataError):
        merge(*pair, OUT, 0.4, **SMALL)
    assert not there(store)
    assert_nothing_is_left(store, tmp_path)


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        (OUT, {"private": True}, "private=True is for an output on the Hub"),
        (OUT, {"publish": False}, "publish=False is for an output on the Hub"),
        (f"{OUT}/x.safetensors", {}, "an output there is a folder, not one file"),
        ("s3://bucket/models", {}, "is, or lies inside or around, an input of this merge"),
        ("s3://bucket/models/base/x", {}, "is, or lies inside or around, an input of this merge"),
    ],
)
def test_what_a_bucket_cannot_take_is_refused(store: Replica, out: str, options: dict[str, bool], said: str) -> None:
    with pytest.raises((OutputError, RecipeError), match=said):
        merge("s3://bucket/models/base", "s3://bucket/models/ft", out, **options)  # type: ignore[arg-type]
    assert not store.asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["403", "429", "500", "reset"])
def test_each_request_may_fail(store: Replica, tmp_path: Path, pair: Pair, kind: str) -> None:
    """One after the other: the merge goes on, or says one line, and the same command continues."""
    whole = expected(*pair)
    merge(*pair, OUT, 0.4, **SMALL)
    for number in range(store.count):
        store.buckets["bucket"].clear()
        wipe(tmp_path)
        store.count, store.faults = 0, {number: kind}
        said = attempt(pair)
        store.faults = {}
        assert (kind == "403") >= bool(said), said
        if said:
            assert "s3://bucket/me/merged" in said, said
            merge(*pair, OUT, 0.4, **SMALL)
        assert there(store) == whole, number
        assert_nothing_is_left(store, tmp_path)


def attempt(pair: Pair) -> str:
    """What a merge says that is refused."""
    try:
        merge(*pair, OUT, 0.4, **SMALL)
    except MergeToolError as e:
        return str(e)
    return ""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kills_of_a_merge_into_a_bucket(store: Replica, tmp_path: Path, pair: Pair) -> None:
    """Killed again and again, half of the time with an empty disk: no model before the end, then the same bytes."""
    whole, kills = expected(*pair), 0
    words = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge", *map(str, pair), OUT]
    words += ["--t", "0.4", "--max-shard-size", "120000", "--json"]
    store.latency = 0.03
    for moment in range(40):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            out, _ = process.communicate(timeout=1.0 + 0.13 * moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            time.sleep(0.1)  # a request may be on its way
            is_model = {"config.json", "model.safetensors.index.json"} <= there(store).keys()
            assert not is_model or {k: v for k, v in there(store).items() if k in whole} == whole
            if kills % 2:
                wipe(tmp_path)
            continue
        assert (process.returncode, json.loads(out)["is_published"]) == (0, True)
        assert there(store) == whole
        store.buckets["bucket"].clear()
    assert kills >= 10


def test_an_output_that_is_here_is_pushed(store: Replica, pair: Pair) -> None:
    """What is there already is not sent again; options of the Hub are refused."""
    merge(*pair, "merged", 0.4, **SMALL)
    assert (push("merged", OUT).url, there(store)) == (OUT, contents(Path("merged")))
    sent = sum(store.received.values())
    assert push("merged", OUT).uploaded_bytes == 0
    assert sum(store.received.values()) == sent
    with pytest.raises(RecipeError, match="--private is for an output on the Hub"):
        push("merged", OUT, private=True)


@pytest.mark.slow
def test_a_push_that_was_stopped_continues(store: Replica, pair: Pair) -> None:
    """And another output is refused there, unless it is to be replaced."""
    merge(*pair, "merged", 0.4, **SMALL)
    store.faults = dict.fromkeys(range(12, 40), "403")
    with pytest.raises(OutputError, match="the store does not let you do that"):
        push("merged", OUT)
    assert "config.json" not in there(store)
    store.faults = {}
    pushed = push("merged", OUT)
    assert (pushed.is_published, pushed.kept_files >= 1) == (True, True)
    assert there(store) == contents(Path("merged"))
    merge(*pair, "other", 0.5, **SMALL)
    with pytest.raises(OutputError, match="has weights already"):
        push("other", OUT)
    push("other", OUT, overwrite=True)
    assert there(store) == contents(Path("other"))
