"""Models of the Hub by their ids: fetched by the real library from a replica on this machine."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoints import contents, language_model, load_folder, save_model, save_pickles
from hub_replica import TOKEN, Replica, refusal, run, serve
from merge_tool.checkpoint.hub import hub_id, local_path
from merge_tool.errors import FetchError

SIDE = {"tokenizer.json": "{}", "README.md": "# card\n", "sub/chat.jinja": "{{ x }}"}
UNWANTED = {"pytorch_model.bin": b"x", "model.gguf": b"x", "onnx/model.onnx": b"x", "original/params.json": "{}"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    """Two models: `org/base` in two shards with much beside them, `org/ft` in one file."""
    models = tmp_path / "hub" / "models" / "org"
    save_model(models / "base", language_model(0), shards=2, side_files={**SIDE, **UNWANTED})
    save_model(models / "ft", language_model(1), side_files=SIDE)
    with serve(tmp_path / "hub") as replica:
        yield replica


def test_what_is_a_hub_id_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """org/name and org/name@revision are, until something local is called so."""
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name") == ("org/name", None)
    assert hub_id(Path("org/name@refs/pr/1")) == ("org/name", "refs/pr/1")
    for other in ("name", "./org/name", "/org/name", "a/b/c", "org/name.safetensors", "../name", "org/", "org/a b"):
        assert hub_id(other) is None
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert local_path("org/name") == Path("org/name")


def test_a_merge_of_hub_ids_is_that_of_the_folders(hub: Replica, tmp_path: Path) -> None:
    """The same weights, side files and names of parents; nothing is fetched that is not needed, nor twice; the
    same command recognises its result, also offline."""
    command = ("merge", "org/base", "org/ft", "merged", "--t", "0.4")
    done = run(hub, tmp_path, *command)
    assert (done.returncode, done.stderr) == (0, "")
    local = hub.root / "models/org"
    by_hand = run(hub, tmp_path, "merge", str(local / "base"), str(local / "ft"), "by-hand", "--t", "0.4")
    assert by_hand.returncode == 0
    ours, expected = (contents(tmp_path / "cwd" / name) for name in ("merged", "by-hand"))
    differ = {"README.md", "merge_report.json", "SHA256SUMS"}
    assert {k: v for k, v in ours.items() if k not in differ} == {k: v for k, v in expected.items() if k not in differ}
    assert "base_model:\n- org/base\n- org/ft\n" in ours["README.md"].decode()
    assert b"slerp-merge org/base org/ft OUT" in ours["README.md"]
    wanted = {"config.json", *SIDE}
    shards = {"model.safetensors.index.json", *(f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))}
    assert hub.fetched() == {
        *(f"org/base/{name}" for name in wanted | shards),
        *(f"org/ft/{name}" for name in wanted | {"model.safetensors"}),
    }
    hub.asked.clear()
    for more in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = run(hub, tmp_path, *command, **more)
        assert again.returncode == 0, again.stderr
        assert "already complete" in again.stdout
    assert hub.fetched() == set()


def test_a_revision_is_the_one_that_was_asked_for(hub: Replica, tmp_path: Path) -> None:
    """A tag and a commit open; the name in reports has no revision."""
    hub.tags["org/ft"] = {"v1"}
    commit = hub.commit(hub.root / "models/org/ft")
    for revision in ("v1", commit):
        done = run(hub, tmp_path, "inspect", f"org/ft@{revision}", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "org/ft"


def test_what_cannot_be_had_says_what_to_do(hub: Replica, tmp_path: Path) -> None:
    """Missing, gated, private, no such revision, offline, unreachable: one line each."""
    assert "no such model" in refusal(hub, tmp_path, "inspect", "org/nothing")
    missing = refusal(hub, tmp_path, "inspect", "org/ft@v9")
    assert "no revision v9" in missing
    assert f"{hub.url}/org/ft/tree/main" in missing
    hub.gated, hub.private = {"org/base"}, {"org/ft"}
    gated = refusal(hub, tmp_path, "inspect", "org/base")
    assert "gated" in gated
    assert f"{hub.url}/org/base" in gated
    assert "HF_TOKEN" in gated
    assert "if it is private" in refusal(hub, tmp_path, "inspect", "org/ft")
    assert "HF_HUB_OFFLINE" in refusal(hub, tmp_path, "inspect", "org/ft", HF_HUB_OFFLINE="1")
    assert "cannot be reached" in refusal(hub, tmp_path, "inspect", "org/ft", HF_ENDPOINT="http://127.0.0.1:9")
    assert run(hub, tmp_path, "inspect", "org/base", HF_TOKEN=TOKEN).returncode == 0
    assert run(hub, tmp_path, "inspect", "org/ft", HF_TOKEN=TOKEN).returncode == 0


def test_a_repository_of_other_formats_is_refused_unfetched(hub: Replica, tmp_path: Path) -> None:
    (hub.root / "models/org/ft/model.safetensors").rename(hub.root / "models/org/ft/tf_model.h5")
    assert "formats that are not read (tf_model.h5)" in refusal(hub, tmp_path, "inspect", "org/ft")
    assert not any(name.endswith(".h5") for name in hub.fetched())


def bare(hub: Replica, *names: str) -> None:
    """Leave org/ft with its weights alone, under these names."""
    folder = hub.root / "models/org/ft"
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(weights)


@pytest.mark.parametrize("name", ["model.safetensors", "style.safetensors"])
def test_a_repository_of_nothing_but_weights_is_a_model(hub: Replica, tmp_path: Path, name: str) -> None:
    """Looked at, merged, recognised again, without a word of the library's; offline it is no empty model before."""
    bare(hub, name)
    look = run(hub, tmp_path, "inspect", "org/ft")
    assert (look.returncode, look.stderr) == (0, "")
    assert "not fully in the Hub's cache" in refusal(hub, tmp_path, "inspect", "org/ft", HF_HUB_OFFLINE="1")
    command = ("merge", "org/base", "org/ft", "merged", "--t", "1")
    done = run(hub, tmp_path, *command)
    assert (done.returncode, done.stderr) == (0, "")
    merged = load_folder(tmp_path / "cwd/merged")
    assert all(merged[key].tobytes() == values.tobytes() for key, values in language_model(1).items())
    assert "already complete" in run(hub, tmp_path, *command, HF_HUB_OFFLINE="1").stdout


@pytest.mark.parametrize(
    ("names", "message"), [(["q4.gguf"], "GGUF weights"), (["notes.md"], "no weights found"), ([], "no weights found")]
)
def test_a_repository_without_weights_that_are_read_gets_one_line(
    hub: Replica, tmp_path: Path, names: list[str], message: str
) -> None:
    bare(hub, *names)
    assert message in refusal(hub, tmp_path, "inspect", "org/ft")


def test_a_pipeline_of_the_hub_says_how_to_get_one_component(hub: Replica, tmp_path: Path) -> None:
    bare(hub, "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "model_index.json")
    (hub.root / "models/org/ft/model_index.json").write_text("{}")
    said = refusal(hub, tmp_path, "inspect", "org/ft")
    assert "hf download org/ft --local-dir FOLDER, then FOLDER/unet, FOLDER/vae." in said
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_fetched_where_there_are_no_others(hub: Replica, tmp_path: Path, shards: int) -> None:
    """The weights and their index, and nothing of the training's state."""
    folder = hub.root / "models/org/ft"
    (folder / "model.safetensors").unlink()
    save_pickles(folder, language_model(1), shards=shards)
    (folder / "optimizer.bin").write_bytes(b"x")
    done = run(hub, tmp_path, "merge", "org/base", "org/ft", "out", "--t", "1")
    assert done.returncode == 0, done.stderr
    merged = load_folder(tmp_path / "cwd/out")
    assert all(merged[name].tobytes() == values.tobytes() for name, values in language_model(1).items())
    names = {name.rsplit("/", 1)[-1] for name in hub.fetched()}
    assert {p.name for p in folder.glob("pytorch_model*")} <= names
    assert "optimizer.bin" not in names


def test_a_broken_download_continues(hub: Replica, tmp_path: Path) -> None:
    """A line that breaks in the middle of a file: in the end the file is right, whoever tries again."""
    hub.fails_after = {"model.safetensors": 20_000}
    done = run(hub, tmp_path, "inspect", "org/ft", "--health")
    if done.returncode:
        done = run(hub, tmp_path, "inspect", "org/ft", "--health")
    assert done.returncode == 0, done.stderr
    (cached,) = (tmp_path / "home").glob("hub/models--org--ft/snapshots/*")
    expected = load_folder(hub.root / "models/org/ft")
    assert load_folder(cached).keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in load_folder(cached).items())


def test_the_output_may_not_be_called_like_the_input(hub: Replica, tmp_path: Path) -> None:
    """Once it exists it would be the input of the next run."""
    done = run(hub, tmp_path, "merge", "org/base", "org/ft", "org/base")
    assert done.returncode == 1
    assert "the output is" in done.stderr
    assert hub.asked == []


def test_python_users_get_a_fetch_error(hub: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_tool import open_checkpoint

    monkeypatch.chdir(tmp_path)
    for key, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(FetchError, match="no such model"):
        open_checkpoint("org/nothing")
    assert open_checkpoint("org/ft").name == "org/ft"


def test_a_cache_without_links_does(hub: Replica, tmp_path: Path) -> None:
    """Where links cannot be made (Windows), the snapshot holds the files themselves."""
    done = run(hub, tmp_path, "merge", "org/base", "org/ft", "merged", HF_HUB_DISABLE_SYMLINKS="1")
    assert done.returncode == 0, done.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "home/hub").rglob("*"))
    assert load_folder(tmp_path / "cwd/merged").keys() == load_folder(hub.root / "models/org/base").keys()


def test_a_dry_run_fetches_and_writes_nothing_here(hub: Replica, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "merge", "org/base", "org/ft", "merged", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "25 (28,160 parameters, 3 layers)" in done.stdout
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_sweep_takes_hub_ids(hub: Replica, tmp_path: Path) -> None:
    score = f"{sys.executable} -c \"print('loss 1')\""
    done = run(hub, tmp_path, "sweep", "org/base", "org/ft", "out", "--t", "0.2,0.4", "--eval", score)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "cwd/out/sweep.csv").read_text().splitlines()) == 3


def test_a_search_pins_hub_ids(hub: Replica, tmp_path: Path) -> None:
    """Its recipes name the commits that were merged."""
    pytest.importorskip("optuna", reason="needs Optuna: pip install '.[search]'")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd/judge.py").write_text("def judge(tensors):\n    return {'n': len(tensors)}\n")
    words = ["--in-process", "judge.py:judge", "--maximize", "n", "--trials", "2", "--uniform", "0,1"]
    done = run(hub, tmp_path, "search", "org/base", "org/ft", "out", *words)
    assert done.returncode == 0, done.stderr
    chosen = (tmp_path / "cwd/out/chosen.yaml").read_text()
    assert len(re.findall(r"org/(?:base|ft)@[0-9a-f]{40}", chosen)) == 3
    again = run(hub, tmp_path, "run", "out/chosen.yaml", "made")
    assert again.returncode == 0, again.stderr


def test_an_incomplete_cache_offline_is_not_half_a_model(hub: Replica, tmp_path: Path) -> None:
    """A shard missing from the cache: refused offline, fetched again online."""
    assert run(hub, tmp_path, "inspect", "org/base", "--health").returncode == 0
    (shard,) = (tmp_path / "home").rglob("snapshots/*/model-00001-of-00002.safetensors")
    shard.unlink()
    assert "not fully in the Hub's cache" in refusal(
        hub, tmp_path, "inspect", "org/base", "--health", HF_HUB_OFFLINE="1"
    )
    assert run(hub, tmp_path, "inspect", "org/base", "--health").returncode == 0


def test_a_diff_takes_hub_ids(hub: Replica, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "diff", "org/base", "org/ft", "--json")
    assert done.returncode == 0, done.stderr
    assert "org/base" in done.stdout
