"""A merge whose output is a repository of the Hub: the bytes of a local merge, two shards here at most, nothing visible
before the end; the same command continues, also on another machine, and refuses what cannot end well at once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import contents, language_model, save_model
from hub_replica import TOKEN, Replica, refusal, serve
from hub_writes import Pull
from merge_tool import DataError, MergeToolError, OutputError, RecipeError, merge, merge_models, verify
from merge_tool.cli import merge_tool
from merge_tool.output import uploader

CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "num_hidden_layers": 8}
SIDE = {"tokenizer.json": "{}", "README.md": "# card\n"}
OUT = "hub:me/merged"
SMALL = {"max_shard_bytes": 120_000}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    """`org/base` in two shards, `org/ft` in one file; a repository of others."""
    models = tmp_path / "hub/models/org"
    for seed, (name, shards) in enumerate({"base": 2, "ft": 1}.items()):
        tensors = language_model(seed, hidden=64, layers=8)
        save_model(models / name, tensors, shards=shards, side_files=SIDE, config=CONFIG)
    (tmp_path / "hub/models/you/model").mkdir(parents=True)
    with serve(tmp_path / "hub") as replica:
        yield replica


@pytest.fixture
def here(hub: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    """The same for this very process, in an empty folder; nobody waits long."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for key, value in hub.environment(tmp_path / "home", HF_TOKEN=TOKEN).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(uploader, "WAITS", (0.01, 0.02))
    return hub


@pytest.fixture
def pair(hub: Replica, tmp_path: Path) -> tuple[Path, Path]:
    """The same two models in folders."""
    models = tmp_path / "hub/models/org"
    base, ft = (Path(shutil.copytree(models / name, tmp_path / "here" / name)) for name in ("base", "ft"))
    return base, ft


def on_the_hub(hub: Replica, repo: str = "me/merged") -> dict[str, bytes]:
    return {k: v for k, v in contents(hub.root / "models" / repo).items() if k != ".gitattributes"}


def expected(*models: str | Path, **options: object) -> dict[str, bytes]:
    """The files of the same merge into a folder."""
    merge(*models, "local", 0.4, **{**SMALL, **options})  # type: ignore[arg-type]
    try:
        return contents(Path("local"))
    finally:
        shutil.rmtree("local")


def assert_nothing_is_left(hub: Replica, tmp_path: Path) -> None:
    """No file of this merge here, no draft there, and no receipt in what is published."""
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "home/assets/slerp-merge").exists()
    assert not {"open", "draft"} & {pull.status for pull in hub.writes.pulls["me/merged"] if pull.author == "me"}
    assert not [name for name in on_the_hub(hub) if name.startswith(".slerp-merge")]


def test_a_merge_streamed_both_ways_is_the_local_one(here: Replica, tmp_path: Path) -> None:
    """Every file the same, and each byte is uploaded once. The second time nothing is done."""
    report = merge("org/base", "org/ft", OUT, 0.4, stream=True, **SMALL)
    assert (report.is_published, report.pull_request, [*map(str, report.outputs)]) == (True, 1, [OUT])
    assert report.num_shards >= 4
    assert_nothing_is_left(here, tmp_path)
    uploaded = sum(here.writes.uploaded.values())
    assert uploaded == report.uploaded_bytes == report.output_bytes
    again = merge("org/base", "org/ft", OUT, 0.4, stream=True, **SMALL)
    assert (again.already_complete, again.is_published) == (True, True)
    assert again.summary == report.summary
    assert sum(here.writes.uploaded.values()) == uploaded
    assert on_the_hub(here) == expected("org/base", "org/ft", stream=True)


def test_what_is_published_verifies_by_ranges(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Nothing of the output is kept here."""
    merge(*pair, OUT, 0.4, **SMALL)
    (found,) = verify(OUT, pair, sample=0.5)
    assert not found.problems
    assert found.num_compared == found.num_elements > 100_000
    assert found.num_tensors == 60
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_what_is_wrong_on_the_hub_is_found_by_ranges(here: Replica, tmp_path: Path) -> None:
    """Parents of the Hub: a changed byte is found by its tensor and by the Hub's digest; so are parents swapped."""
    merge("org/base", "org/ft", OUT, 0.4, stream=True, **SMALL)
    (found,) = verify(OUT, ("org/base", "org/ft"), sample=0.5)
    assert not found.problems
    assert found.num_compared == found.num_elements > 100_000
    assert found.num_tensors == 60
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    (swapped,) = verify(OUT, ("org/ft", "org/base"))
    assert "BASE and FT are swapped" in swapped.problems[0]
    shard = min((here.root / "models/me/merged").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (changed,) = verify(OUT, ("org/base", "org/ft"), sample=1.0)
    assert f"{shard.name}: its SHA-256 there is " in changed.problems[0]
    assert "is not the merge of these parents: element" in changed.problems[1]
    with pytest.raises(OutputError, match=r"hub:org/base: holds no merge_report.json and SHA256SUMS"):
        verify("hub:org/base")


def test_at_most_two_shards_are_here(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """While the Hub is slow: the merge waits for it. The folder is looked at all the time."""
    here.latency, most, over = 0.02, [0, 0], threading.Event()

    def look() -> None:
        while not over.is_set():
            found: list[Path] = []
            with suppress(FileNotFoundError):  # a folder that was just removed
                found += [path for path in (tmp_path / "work").rglob("*.safetensors*") if "/names/" not in str(path)]
            names = {path.name.partition(".safetensors")[0] for path in found}
            most[0], most[1] = max(most[0], len(names)), most[1] + 1
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        report = merge(*pair, OUT, 0.4, work="../work", max_shard_bytes=50_000)
    finally:
        over.set()
        watcher.join()
    assert report.num_shards > 8
    assert most[0] == 2
    assert most[1] > 100
    assert not (tmp_path / "work").exists()
    assert on_the_hub(here) == expected(*pair, max_shard_bytes=50_000)


def command(*models: str | Path, more: tuple[str, ...] = ()) -> list[str]:
    words = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge", *map(str, models), OUT]
    return [*words, "--t", "0.4", "--max-shard-size", "120000", *more]


def wipe(tmp_path: Path) -> None:
    """Another machine: nothing of an earlier run is here."""
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_after_a_kill_the_same_command_continues_also_elsewhere(
    here: Replica, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """Killed while the n-th shard is on its way; half of the time the disk is then wiped: nothing is visible, no shard
    that is in the draft is uploaded or merged again, and the bytes are the same."""
    here.latency, done = 0.05, 0
    for moment, shards in enumerate((0, 2, 3)):
        process = subprocess.Popen(command(*pair), stderr=subprocess.DEVNULL)
        while (
            process.poll() is None
            and len(here.writes.uploaded) <= shards
            and here.writes.pulls.get("me/merged") is None
        ):
            time.sleep(0.005)
        while process.poll() is None and len(here.writes.uploaded) < shards:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9, moment
        assert not (here.root / "models/me/merged").exists() or on_the_hub(here) == {}
        if moment % 2:
            wipe(tmp_path)
        done = len(here.writes.uploaded)
    assert done >= 3
    here.latency = 0.0
    report = merge(*pair, OUT, 0.4, **SMALL)
    assert report.num_resumed >= 2
    assert on_the_hub(here) == expected(*pair)
    assert_nothing_is_left(here, tmp_path)
    sizes = {path.name: path.stat().st_size for path in (here.root / "models/me/merged").glob("*.safetensors")}
    assert sorted(here.writes.uploaded.values()) == sorted(sizes.values())  # each once


def attempt(hub: Replica, pair: tuple[Path, Path], number: int, kind: str) -> str:
    """What a merge says, one request of which fails."""
    hub.count, hub.faults = 0, {number: kind}
    try:
        merge(*pair, OUT, 0.4, **SMALL)
    except MergeToolError as e:
        return str(e)
    finally:
        hub.faults = {}
    return ""


def forget(hub: Replica, tmp_path: Path) -> None:
    """A Hub on which nothing was ever merged."""
    for folder in ("models/me", "pulls", "lfs"):
        shutil.rmtree(hub.root / folder, ignore_errors=True)
    hub.writes.pulls.clear()
    hub.writes.uploaded.clear()
    wipe(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["403", "429", "500", "reset"])
def test_each_request_may_fail(here: Replica, tmp_path: Path, pair: tuple[Path, Path], kind: str) -> None:
    """One after the other: the merge goes on, or says one line, and the same command continues."""
    whole = expected(*pair)
    merge(*pair, OUT, 0.4, **SMALL)
    for number in range(len(here.asked)):
        forget(here, tmp_path)
        said = attempt(here, pair, number, kind)
        shown = on_the_hub(here) if (here.root / "models/me/merged").exists() else {}
        assert shown in ({}, whole), (number, said)
        if said:
            assert "me/merged" in said, said
            merge(*pair, OUT, 0.4, **SMALL)
        assert on_the_hub(here) == whole, number
        assert_nothing_is_left(here, tmp_path)


def test_what_passes_is_tried_again(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A broken line in the middle of one merge: it goes on."""
    here.faults = {number: ("500", "reset", "429")[number % 3] for number in range(12, 60, 9)}
    assert merge(*pair, OUT, 0.4, **SMALL).is_published
    assert on_the_hub(here) == expected(*pair)
    assert_nothing_is_left(here, tmp_path)


# ----------------------------------------------------------------------------------------------- the draft


def begun(hub: Replica, pair: tuple[Path, Path], shards: int = 2, **options: object) -> Path:
    """A merge that ended after so many shards were in the draft; the draft's folder."""
    hub.count, hub.faults = 0, {}
    stops = threading.Event()

    def look() -> None:
        while not stops.is_set():
            if len(list((hub.root / "pulls/me/merged/1").glob(".slerp-merge/*.safetensors.json"))) >= shards:
                hub.faults = dict.fromkeys(range(hub.count, hub.count + 500), "403")
                return
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with pytest.raises(OutputError, match="403"):
            merge(*pair, OUT, 0.4, **{**SMALL, **options})  # type: ignore[arg-type]
    finally:
        stops.set()
        thread.join()
        hub.faults = {}
    return hub.root / "pulls/me/merged/1"


def test_only_the_own_users_draft_is_continued(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Anybody may open a pull request under our title, with shards and receipts of their own."""
    begun(here, pair)
    here.writes.pulls["me/merged"][0].author = "mallory"
    wipe(tmp_path)
    said: list[str] = []
    report = merge(*pair, OUT, 0.4, **SMALL, on_warning=said.append)
    assert (report.num_resumed, report.pull_request) == (0, 2)
    assert any("pull request 1 of mallory is the draft of another merge, or of another user" in text for text in said)
    assert [pull.status for pull in here.writes.pulls["me/merged"]] == ["draft", "merged"]
    assert on_the_hub(here) == expected(*pair)


def test_what_is_not_right_in_the_draft_is_made_again(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A shard with other bytes, a receipt that is damaged, one that lacks a tensor. Only the fourth shard is kept."""
    draft = begun(here, pair, shards=4, max_shard_bytes=80_000)
    wipe(tmp_path)
    shards = sorted(draft.glob("*.safetensors"))[:3]
    receipts = [draft / f".slerp-merge/{shard.name}.json" for shard in shards]
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    receipts[1].write_text(receipts[1].read_text()[:-30])
    stored = json.loads(receipts[2].read_text())
    stored["findings"].popitem()
    receipts[2].write_text(json.dumps(stored))
    report = merge(*pair, OUT, 0.4, max_shard_bytes=80_000)
    assert 1 <= report.num_resumed <= 2  # perhaps one more was on its way
    assert on_the_hub(here) == expected(*pair, max_shard_bytes=80_000)
    assert_nothing_is_left(here, tmp_path)


@pytest.mark.slow
def test_a_draft_of_other_libraries_and_one_with_a_strange_file(
    here: Replica, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """The shards of the first are made again; the second is not published."""
    plan = begun(here, pair) / ".slerp-merge/plan.json"
    wipe(tmp_path)
    plan.write_text(plan.read_text().replace('"numpy": "', '"numpy": "0.'))
    said: list[str] = []
    assert merge(*pair, OUT, 0.4, publish=False, **SMALL, on_warning=said.append).num_resumed == 0
    assert any(re.search(r"are made again: numpy was 0\.\S+, is \d", text) for text in said)
    (here.root / "pulls/me/merged/1/evil.py").write_text("import os")
    with pytest.raises(OutputError, match=r"pull request 1 also changes evil.py"):
        merge(*pair, OUT, 0.4, **SMALL)
    assert on_the_hub(here) == {}


@pytest.mark.slow
def test_a_local_input_that_changed_is_merged_again(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Where samples do not show it, its time does: no shard of the old input is kept."""
    begun(here, pair)
    wipe(tmp_path)
    path = pair[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start, stop = max(
        (one["data_offsets"] for name, one in header.items() if name != "__metadata__"), key=lambda o: o[1] - o[0]
    )
    assert stop - start > 1_000
    data[8 + length + start] ^= 1  # samples see the middle
    path.write_bytes(data)
    said: list[str] = []
    report = merge(*pair, OUT, 0.4, **SMALL, on_warning=said.append)
    assert report.num_resumed == 0
    assert any("are made again: local inputs have other times than they had then" in text for text in said)
    assert on_the_hub(here) == expected(*pair)


def test_no_publish_leaves_the_draft_and_the_next_command_publishes_it(
    here: Replica, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """Nothing is merged or uploaded again, also from an empty disk; the repository is a private one."""
    report = merge(*pair, OUT, 0.4, publish=False, private=True, **SMALL)
    assert (report.is_published, report.pull_request) == (False, 1)
    assert "/discussions/1: not published. Merge pull request 1" in str(report)
    assert "me/merged" in here.private
    assert on_the_hub(here) == {}
    wipe(tmp_path)
    uploaded = sum(here.writes.uploaded.values())
    again = merge(*pair, OUT, 0.4, **SMALL)
    assert (again.already_complete, again.is_published) == (True, True)
    assert sum(here.writes.uploaded.values()) == uploaded
    assert on_the_hub(here) == expected(*pair)
    assert_nothing_is_left(here, tmp_path)


@pytest.mark.slow
def test_values_that_cannot_be_merged_leave_no_draft(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    path = pair[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(DataError):
        merge(*pair, OUT, 0.4, **SMALL)
    assert on_the_hub(here) == {}
    assert_nothing_is_left(here, tmp_path)


@pytest.mark.slow
def test_weights_of_others_are_replaced_only_if_asked(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Before a weight is read; in one step; what is no model's stays. Another merge there says what differs."""
    old = save_model(here.root / "models/me/merged", language_model(2), config=CONFIG)
    (old / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"hub:me/merged: has weights already \(model.safetensors\)"):
        merge("org/base", "org/ft", OUT, 0.4, **SMALL)
    assert not here.writes.uploaded
    assert sum(here.weights().values()) < 20_000  # headers
    said: list[str] = []
    merge(*pair, OUT, 0.4, overwrite=True, **SMALL, on_warning=said.append)
    assert said[-1].startswith("hub:me/merged also holds what was there before: notes.txt")
    assert on_the_hub(here) == {**expected(*pair), "notes.txt": b"mine"}
    assert merge(*pair, OUT, 0.4, overwrite=True, **SMALL).already_complete
    with pytest.raises(OutputError, match=r"hub:me/merged: holds another merge: t was 0.4, now 0.5"):
        merge(*pair, OUT, 0.5, **SMALL)


# ------------------------------------------------------------------------------------------------ the disk


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    real = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free))
        yield


def test_a_small_disk_makes_smaller_shards_and_another_disk_continues_with_them(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so the draft is found from a machine with more room."""
    models = [tmp_path / f"wide/m{seed}" for seed in range(2)]
    for seed, folder in enumerate(models):
        rng = np.random.default_rng(seed)
        save_model(folder, {f"layers.{k}.weight": rng.standard_normal((500, 500), np.float32) for k in range(8)})
    said: list[str] = []
    with disk(monkeypatch, 10_000_000):
        report = merge(*models, OUT, 0.4, publish=False, on_warning=said.append)
    assert report.num_shards == 8
    assert any(
        "its disk has 10 MB of room, so the shards have at most 1 MB, as with max_shard_bytes" in t for t in said
    )
    again = merge(*models, OUT, 0.4)
    assert (again.already_complete, again.is_published) == (True, True)
    assert on_the_hub(here) == expected(*models, max_shard_bytes=1_000_000)


@pytest.mark.slow
def test_a_disk_too_small_for_two_shards_is_refused(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [save_model(tmp_path / f"m{k}", {"w": np.full((500, 500), k + 1, np.float32)}) for k in range(2)]
    with (
        disk(monkeypatch, 1_000_000),
        pytest.raises(OutputError, match=r"at most two at a time, take .* work=FOLDER"),
    ):
        merge(*models, "hub:me/other", 0.4)
    assert "me/other" not in here.writes.pulls


@pytest.mark.slow
def test_a_draft_with_smaller_shards_is_continued_on_a_larger_disk(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tmp_path / f"wide/m{seed}" for seed in range(2)]
    for seed, folder in enumerate(models):
        rng = np.random.default_rng(seed)
        save_model(folder, {f"layers.{k}.weight": rng.standard_normal((500, 500), np.float32) for k in range(12)})
    with disk(monkeypatch, 10_000_000):
        begun(here, (models[0], models[1]), max_shard_bytes=5_000_000_000)
    wipe(tmp_path)
    report = merge(*models, OUT, 0.4)
    assert report.num_resumed >= 2
    assert report.num_shards == 12
    assert on_the_hub(here) == expected(*models, max_shard_bytes=1_000_000)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_token_that_may_only_read_is_found_before_a_weight_is_read(here: Replica) -> None:
    """Nothing of the inputs is even looked at, no repository is made; test_who_may_not_write has the other ways."""
    here.role = "read"
    with pytest.raises(OutputError, match=r"me/merged: your token may only read\. Give one with write permission"):
        merge("org/base", "org/ft", OUT, 0.4, stream=True)
    assert [path for _, path in here.asked] == ["/api/whoami-v2"]


@pytest.mark.slow
def test_who_may_not_write_is_told_before_a_weight_is_read(here: Replica, tmp_path: Path) -> None:
    """One line each."""
    words = ("merge", "org/base", "org/ft", OUT, "--stream")

    def said(*arguments: str, **more: str) -> str:
        return refusal(here, tmp_path, *(arguments or words), **{"HF_TOKEN": TOKEN, **more})

    assert "me/merged: writing needs a token. Give it by " in said(HF_TOKEN="")
    assert "me/merged: the Hub does not let you write there (it answers 401" in said(HF_TOKEN="hf_wrong")
    assert "me/merged: HF_HUB_OFFLINE forbids to write to the Hub" in said(HF_HUB_OFFLINE="1")
    assert "me/merged: http://127.0.0.1:9 cannot be reached" in said(HF_ENDPOINT="http://127.0.0.1:9")
    here.of_others, here.renamed = {"you/model"}, {"org/old": "org/new"}
    (here.root / "models/org/old").mkdir()
    assert "org/old: is called org/new on the Hub. Write hub:org/new." in said(*words[:3], "hub:org/old")
    assert "you/model: the Hub does not let you write there (it answers 403" in said(*words[:3], "hub:you/model")
    assert "acme/new: is not there, and you may not make it: acme is neither" in said(*words[:3], "hub:acme/new")
    here.orgs = {"acme": "read"}
    assert "acme/new: is not there, and you may not make it" in said(*words[:3], "hub:acme/new")
    assert not here.fetched()
    assert not here.writes.pulls
    assert not (here.root / "models/me").exists()


@pytest.mark.parametrize(
    ("words", "expected_words"),
    [
        (["merge", "base", "ft", "hub:merged"], "hub:merged: is no repository of the Hub. Write hub:org/name."),
        (["merge", "base", "ft", "hub:me/one.safetensors"], "a repository holds a folder, not one file"),
        (["merge", "base", "me/ft", "hub:me/ft"], "hub:me/ft: is an input of this merge. Choose another repository."),
        (["merge", "base", "ft", OUT, "--t", "0.3,0.5"], "is one repository, but there are 2 outputs. Give one value"),
        (["merge", "base", "ft", OUT, "--executor", "processes:2"], "workers share a folder, and cannot write to"),
        (
            ["merge", "base", "ft", OUT, "--try", "Once"],
            "--try loads OUT from this disk, and hub:me/merged is not here",
        ),
        (["merge", "base", "ft", "out", "--private"], "--private is for an output on the Hub: hub:org/name as OUT"),
        (["merge", "base", "ft", "out", "--no-publish"], "--no-publish is for an output on the Hub"),
        (["merge", "base", "ft", "out", "--work", "x"], "--work is for an output on the Hub"),
        (["merge", "base", "ft", OUT, "--report-html", "x.html"], "--report-html: hub:me/merged is not here"),
        (["verify", OUT, "--against", "base", "ft", "--full"], "hub:me/merged: is verified by ranges, a sample of it"),
        (["verify", OUT, "--dry-run"], "hub:me/merged: a dry run is of an output that is here"),
        (["plan", "base", "ft", OUT], "many hosts need a folder that all of them see. Then: merge-tool push."),
        (["sweep", "base", "ft", OUT, "--eval", "true"], "a sweep needs a folder as OUT"),
    ],
)
def test_what_the_hub_cannot_take_is_refused(
    pair: tuple[Path, Path], words: list[str], expected_words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair[0].parent)
    result = CliRunner().invoke(merge_tool, words)
    assert result.exit_code == 1, result.output
    assert expected_words in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["base", "ft"]


def test_a_file_of_several_recipes_needs_a_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"
    (tmp_path / "parts.yaml").write_text(f"name: first\n{one % pair[0]}---\n{one % 'first'}")
    result = CliRunner().invoke(merge_tool, ["run", str(tmp_path / "parts.yaml"), OUT])
    assert (result.exit_code, "a file of several recipes needs a folder as OUT" in result.stderr) == (1, True)


@pytest.mark.slow
def test_another_draft_is_left_alone_and_said(here: Replica, pair: tuple[Path, Path]) -> None:
    (here.root / "models/me/merged").mkdir(parents=True)
    here.writes.pulls["me/merged"] = [Pull("slerp-merge 0123456789abcdef"), Pull("Fix a typo")]
    said: list[str] = []
    assert merge(*pair, OUT, 0.4, on_warning=said.append).pull_request == 3
    assert len([text for text in said if "pull request 1 of me is the draft of another merge" in text]) == 1
    assert [pull.status for pull in here.writes.pulls["me/merged"]] == ["draft", "draft", "merged"]


def test_a_dry_run_looks_and_writes_nothing(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(merge_tool, ["merge", *map(str, pair), OUT, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"  write     .* to hub:me/merged\n  waiting   at most .* of it here, in ", done.stdout)
    assert not (here.root / "models/me").exists()
    assert not (tmp_path / "home/assets").exists()


@pytest.mark.slow
def test_a_recipe_goes_to_the_hub(here: Replica, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """With its report here, if that is asked for."""
    recipe = {"merge_method": "linear", "dtype": "bfloat16", "models": [
        {"model": str(path), "parameters": {"weight": 0.5}} for path in pair]}  # fmt: skip
    merge_models(recipe, OUT, report_path="report.json", **SMALL)
    merge_models(recipe, "local", **SMALL)
    assert on_the_hub(here) == contents(Path("local"))
    assert Path("report.json").read_bytes() == on_the_hub(here)["merge_report.json"]
    with pytest.raises(RecipeError, match="is one repository, but there are 2 outputs"):
        merge(*pair, OUT, [0.2, 0.4])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kills_of_a_merge_to_the_hub(here: Replica, tmp_path: Path) -> None:
    """At 50 random moments of a merge that is streamed both ways, half of them resumed from an empty disk."""
    whole, moments, kills = expected("org/base", "org/ft", stream=True), random.Random(0), 0
    here.latency = 0.01
    while kills < 50:
        process = subprocess.Popen(command("org/base", "org/ft", more=("--stream",)), stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(1, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert not (here.root / "models/me/merged").exists() or on_the_hub(here) in ({}, whole)
            if kills % 2:
                wipe(tmp_path)
            continue
        assert process.returncode == 0
        assert on_the_hub(here) == whole
        assert_nothing_is_left(here, tmp_path)
        forget(here, tmp_path)
    merge("org/base", "org/ft", OUT, 0.4, stream=True, **SMALL)
    assert on_the_hub(here) == whole
    assert_nothing_is_left(here, tmp_path)


@pytest.mark.slow
def test_a_merge_streamed_both_ways_keeps_its_memory(here: Replica) -> None:
    """--memory 64MB, with tensors that do not fit: the merging process; what it starts is beside that."""
    for seed in range(2):
        tensors = {f"layers.{k}.weight": np.full((4096, 4096), seed + k, np.float16) for k in range(4)}
        save_model(here.root / f"models/wide/m{seed}", tensors)
    words = command("wide/m0", "wide/m1", more=("--stream", "--memory", "64MB", "--json"))
    words[words.index("120000")] = "40MB"
    report = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    assert report["peak_bytes"] < 64_000_000
    assert (report["num_shards"], report["is_published"]) == (4, True)
