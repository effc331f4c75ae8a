"""Models on an object store: read by range with obstore's real client, the bytes of a local merge, each sent once; what
cannot be had is said in one line, and no key is ever shown."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoints import contents, language_model, save_model, save_pickles
from merge_tool import CheckpointError, FetchError, MergeToolError, RecipeError, merge, merge_models
from merge_tool.checkpoint import fetcher
from merge_tool.checkpoint.fetcher import Patience
from merge_tool.checkpoint.reader import open_checkpoint
from merge_tool.cli import merge_tool
from s3_replica import KEY, SECRET, Replica, serve
from test_lora import normal, save_adapter

pytest.importorskip("obstore", reason="object stores are read by obstore: pip install -e '.[cloud]'")

CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "num_hidden_layers": 8}
SIDE = {"tokenizer.json": "{}", "README.md": "# card\n", "sub/a b+c.txt": "x"}
BASE, FT = "s3://bucket/models/base", "s3://bucket/models/ft"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """`models/base` in two shards, `models/ft` in one file, in a folder."""
    for seed, (name, shards) in enumerate({"base": 2, "ft": 1}.items()):
        tensors = language_model(seed, hidden=64, layers=8)
        save_model(tmp_path / "models" / name, tensors, shards=shards, side_files=SIDE, config=CONFIG)
    return tmp_path / "models"


@pytest.fixture
def store(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """The same in a bucket; this process is in an empty folder, and nobody waits long."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "temp").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(fetcher, "PATIENCE", Patience(stall_seconds=1.0, waits=(0.01, 0.02, 0.05, 0.1, 0.2)))
    with serve() as replica:
        for key, value in replica.environment().items():
            monkeypatch.setenv(key, value)
        replica.put_folder("bucket", "models", here)
        yield replica


def local(here: Path, **options: object) -> dict[str, bytes]:
    """The files of the same merge of local folders."""
    merge(here / "base", here / "ft", "local", 0.4, **options)  # type: ignore[arg-type]
    try:
        return contents(Path("local"))
    finally:
        shutil.rmtree("local")


def test_a_merge_from_a_bucket_is_the_local_one(store: Replica, here: Path, tmp_path: Path) -> None:
    """Every file the same, report and card included; each byte is served once, and nothing is kept. The second time the
    merge is complete. Objects that stand for folders, as consoles make them, are no files."""
    for name in ("", "base/", "base/sub/", "base/nothing/"):
        store.put("bucket", f"models/{name}", b"")
    report = merge(BASE, f"{FT}/", "merged", 0.4)
    assert contents(Path("merged")) == local(here)
    sizes = {f"models/{path.relative_to(here)}": path.stat().st_size for path in here.rglob("*.safetensors")}
    served = sum(count for key, count in store.served.items() if key.endswith(".safetensors"))
    assert served <= 1.03 * sum(sizes.values())
    assert not [*(tmp_path / "temp").iterdir()]
    assert merge(BASE, FT, "merged", 0.4).already_complete
    assert not report.already_complete


def test_one_file_in_a_bucket(store: Replica, here: Path) -> None:
    """As FT of a local model; and both ways of another bucket's listing, with names that must be quoted."""
    merge(here / "base", f"{FT}/model.safetensors", "merged", 0.4)
    assert contents(Path("merged"))["model.safetensors"] == local(here)["model.safetensors"]
    store.put_folder("bucket", "a b/c+d%20e", here / "ft")
    merge(here / "base", "s3://bucket/a b/c+d%20e", "again", 0.4)
    assert contents(Path("again"))["model.safetensors"] == local(here)["model.safetensors"]


@pytest.mark.slow
def test_two_of_one_name_are_told_apart(store: Replica, here: Path) -> None:
    """In the report and in the recipe by as many folders as are needed, as local ones are."""
    for name in ("base", "ft"):
        store.put_folder("bucket", f"{name}/final", here / name)
        shutil.copytree(here / name, Path(name, "final"))
    recipe = {"merge_method": "slerp", "base_model": "s3://bucket/base/final", "parameters": {"t": 0.4},
              "models": [{"model": "s3://bucket/base/final"}, {"model": "s3://bucket/ft/final"}]}  # fmt: skip
    merge_models(recipe, "merged")
    of_paths = {**recipe, "base_model": "base/final", "models": [{"model": "base/final"}, {"model": "ft/final"}]}
    merge_models(of_paths, "local")
    assert contents(Path("merged")) == contents(Path("local"))


@pytest.mark.slow
def test_an_adapter_is_fetched_whole_and_its_model_is_not(store: Replica, here: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": normal(4, 64), f"{name}.lora_B.weight": normal(64, 4)}
    adapter = save_adapter(here.parent / "adapter", factors)
    store.put_folder("bucket", "adapter", adapter)
    merge(BASE, f"{BASE}+s3://bucket/adapter", "merged", 0.4)
    merge(here / "base", f"{here / 'base'}+{adapter}", "local", 0.4)
    assert contents(Path("merged"))["model.safetensors"] == contents(Path("local"))["model.safetensors"]


def test_what_passes_is_tried_again(store: Replica, here: Path) -> None:
    """A busy server, a broken line, a body that ends too early, and a stall: the merge goes on."""
    merge(BASE, FT, "first", 0.4)
    number, store.count = store.count, 0
    kinds = ("500", "reset", "short", "429", "503", "short")
    store.faults = {k: kinds[k % 6] for k in range(5, number, 7)} | {number - 2: "stall"}
    merge(BASE, FT, "merged", 0.4)
    assert contents(Path("merged")) == local(here)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("404", r"models/\S+: is not there \(the server answers 404 Made\)", marks=pytest.mark.slow),
        ("etag", r"models/\S+\.safetensors: the object changed while it was being merged: it has another ETag, exp"),
        ("size", r"models/\S+\.safetensors: the object changed while it was being merged: it has [\d,]+ bytes"),
        pytest.param("range", r"models/\S+\.safetensors: cannot be used .*got", marks=pytest.mark.slow),
        ("403", r"models/\S+: the store does not let you do that \(the server answers 403 Made\)"),
    ],
)
def test_what_cannot_be_the_planned_object_is_refused(store: Replica, fault: str, said: str) -> None:
    """In the middle of a merge."""
    store.spoilt = {"models/ft/model.safetensors": fault}
    with pytest.raises(CheckpointError, match=said) as failed:
        merge(BASE, FT, "merged", 0.4)
    assert KEY not in str(failed.value)


@pytest.mark.slow
def test_after_a_refusal_the_same_command_continues(store: Replica, here: Path) -> None:
    """With the shards that are finished."""
    store.spoilt = {"models/ft/model.safetensors": "403"}
    small = {"max_shard_bytes": 500_000}
    with pytest.raises(FetchError):
        merge(BASE, FT, "merged", 0.4, jobs=1, downloads=1, **small)
    store.spoilt = {}
    merge(BASE, FT, "merged", 0.4, **small)
    assert contents(Path("merged")) == local(here, **small)


def attempt() -> str:
    """What a merge of two tiny models says that is refused."""
    try:
        merge("s3://bucket/tiny/base", "s3://bucket/tiny/ft", "merged", 0.4, jobs=1)
    except MergeToolError as e:
        return str(e)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["403", "500", "reset", "short"])
def test_each_request_may_fail(store: Replica, tmp_path: Path, kind: str) -> None:
    """One after the other: the merge goes on, or says one line and the same command continues."""
    models = [tmp_path / "tiny" / name for name in ("base", "ft")]
    for seed, folder in enumerate(models):
        save_model(folder, language_model(seed, hidden=32, layers=1), config=CONFIG)
        store.put_folder("bucket", f"tiny/{folder.name}", folder)
    merge(*models, "local", 0.4)
    whole, store.count = contents(Path("local")), 0
    assert not attempt()
    for number in range(store.count):
        shutil.rmtree("merged", ignore_errors=True)
        store.count, store.faults = 0, {number: kind}
        if said := attempt():
            assert (kind, "s3://bucket/tiny" in said) == ("403", True), said
            store.faults = {}
            assert not attempt()
        assert contents(Path("merged")) == whole, number


def refusal(*words: str, **variables: str) -> str:
    """The one line that says why the command did nothing."""
    done = CliRunner().invoke(merge_tool, ["merge", *words], env=variables)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert SECRET not in done.stderr
    assert KEY not in done.stderr
    return done.stderr


def test_no_key_is_shown(store: Replica) -> None:
    """Not one in an address, nor what a server says of it."""
    said = refusal(f"s3://{KEY}:{SECRET}@bucket/x", FT, "merged")
    assert "s3://...: is no address on an object store, expected s3://BUCKET/FOLDER" in said
    said = refusal(BASE, FT, "merged", AWS_SECRET_ACCESS_KEY=SECRET, AWS_ACCESS_KEY_ID="other")
    assert f"{BASE}: the store does not let you do that (the server answers 403 InvalidAccessKeyId)" in said
    assert "Keys are given by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


def test_what_is_not_there_is_one_line(store: Replica) -> None:
    """A bucket, a folder; others in test_what_cannot_be_read_is_one_line."""
    said = refusal("s3://nobody/x", FT, "merged")
    assert "s3://nobody/x: there is no bucket nobody. Check the name and the endpoint." in said
    said = refusal("s3://bucket/models/bse", FT, "merged")
    assert "s3://bucket/models/bse: nothing is there. Check the spelling" in said


@pytest.mark.slow
def test_what_cannot_be_read_is_one_line(store: Replica, here: Path) -> None:
    """Each names the address and what to do."""
    store.put_folder("bucket", "pickles", save_pickles(here.parent / "pickles", language_model(0)))
    store.put("bucket", "gguf/model.gguf", b"GGUF")
    store.put("bucket", "empty/config.json", b"{}")
    store.put("bucket", "short/model.safetensors", (here / "ft/model.safetensors").read_bytes()[:-5])
    store.put("bucket", "nothing/model.safetensors", b"")
    store.put("bucket", "begun/.slerp-merge/0123/model.safetensors.json", b"{}")
    del store.buckets["bucket"]["models/base/model-00002-of-00002.safetensors"]
    expected = {
        "s3://bucket/models/model.safetensors": r"models/model.safetensors: is not there .*NoSuchKey",
        "s3://bucket/pickles": r"its weights are pickles \(pytorch_model.bin\), which are read whole, by torch",
        "s3://bucket/pickles/pytorch_model.bin": r"its weights are pickles \(pytorch_model.bin\)",
        "s3://bucket/gguf": r"s3://bucket/gguf: GGUF weights \(model.gguf\) are not read",
        "s3://bucket/empty": r"s3://bucket/empty: no weights found, expected model\.safetensors",
        "s3://bucket/models": r"but models in base, ft\. Give one of these: s3://bucket/models/base\.",
        "s3://bucket/short": r"short/model\.safetensors: .*bytes",
        "s3://bucket/nothing": r"nothing/model\.safetensors: .*bytes",
        "s3://bucket/begun": r"holds an unfinished merge\. Run that merge's command again",
        BASE: r"base/model.safetensors.index.json: names 1 missing shard: model-00002",
        "s3://b/../x": r"has \. or \.\. in its path",
    }
    for address, said in expected.items():
        assert re.search(said, found := refusal(address, FT, "merged")), (address, found)
    assert not Path("merged").exists()


@pytest.mark.slow
def test_endpoints_that_do_not_do_are_one_line(store: Replica) -> None:
    words = (BASE, FT, "merged")
    said = refusal(*words, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert f"{BASE}: the store cannot be reached (" in said
    assert "set AWS_ALLOW_HTTP=true" in refusal(*words, AWS_ALLOW_HTTP="false")
    said = refusal("az://models/base", FT, "merged")
    assert "which account is meant? Set AZURE_STORAGE_ACCOUNT_NAME with" in said
    assert "always read by range" in refusal(*words, "--no-stream")


def test_without_obstore_it_says_how_to_install_it(store: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Path("block")
    block.mkdir()
    (block / "obstore.py").write_text("raise ImportError('hidden by a test')\n")
    monkeypatch.syspath_prepend(str(block.resolve()))
    said = refusal(BASE, FT, "merged")
    assert f"{BASE}: object stores are read and written by obstore: pip install '.[cloud]' in slerp-merge's" in said


@pytest.mark.slow
def test_what_reads_no_ranges_says_so(store: Replica, here: Path) -> None:
    """Before any work; a plan for many hosts, a verification and a comparison."""
    merge(here / "base", here / "ft", "merged", 0.4)
    for words in (["verify", "merged", "--against", BASE, FT], ["diff", BASE, FT], ["plan", BASE, FT, "out"]):
        done = CliRunner().invoke(merge_tool, words)
        assert done.exit_code == 1, words
        assert re.search(r"s3://\S+: models at an address are read by range, which only", done.stderr), done.stderr
    with pytest.raises(RecipeError, match="always read by range"):
        merge(BASE, FT, "out", 0.4, stream=False)
    with pytest.raises(FetchError, match="models at an address are read by range"):
        open_checkpoint(BASE)


def test_the_plan_says_what_would_be_downloaded(store: Replica, here: Path) -> None:
    done = CliRunner().invoke(merge_tool, ["merge", BASE, FT, "merged", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"download  .* from buckets, by range; a spool of at most", done.stdout), done.stdout
    assert sum(store.served[key] for key in store.served if key.endswith(".safetensors")) < 20_000
    done = CliRunner().invoke(merge_tool, ["inspect", BASE])
    assert done.exit_code == 0, done.output
