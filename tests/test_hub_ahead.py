"""Models of the Hub are checked by their headers: no byte of a weight is fetched for a merge that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from checkpoints import contents, language_model, load_folder, save_file, save_model, save_pickles
from hub_replica import TOKEN, Replica, refusal, run, serve
from merge_tool import FetchError, OutputError, merge
from merge_tool.checkpoint.header import MAX_HEADER_BYTES
from merge_tool.checkpoint.hub import look
from merge_tool.errors import sized
from test_lora import normal, save_adapter

SIDE = {"tokenizer.json": "{}", "README.md": "# card\n"}
SHARDS = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
FILES = {f"org/base/{shard}" for shard in SHARDS} | {"org/ft/model.safetensors"}
COMMAND = ("merge", "org/base", "org/ft", "merged", "--t", "0.4")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    """`org/base` in two shards, `org/ft` in one file; nothing of them is in the cache."""
    models = tmp_path / "hub/models/org"
    config = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "num_hidden_layers": 3}
    save_model(models / "base", language_model(0), shards=2, side_files=SIDE, config=config)
    save_model(models / "ft", language_model(1), side_files=SIDE, config=config)
    with serve(tmp_path / "hub") as replica:
        yield replica


@pytest.fixture
def here(hub: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    """The same for this very process, in an empty folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for key, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    return hub


def header_of(hub: Replica, name: str) -> int:
    """The bytes of a file of the replica up to the end of its header."""
    raw = (hub.root / "models" / name).read_bytes()
    return 8 + int.from_bytes(raw[:8], "little")


def size_of(hub: Replica, *names: str) -> int:
    return sum((hub.root / "models" / name).stat().st_size for name in names)


def assert_only_headers(hub: Replica, tmp_path: Path, times: int = 1, files: set[str] = FILES) -> None:
    """Of every file its length and its header were served, and not a byte of a weight; the cache has no weights."""
    assert hub.weights() == {name: times * (8 + header_of(hub, name)) for name in files}
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def other_shape(hub: Replica) -> None:
    """Make a tensor of org/ft fit org/base no longer."""
    tensors = {**language_model(1), "model.layers.1.mlp.up_proj.weight": np.zeros((3, 3), np.float32)}
    save_file(tensors, hub.root / "models/org/ft/model.safetensors", {"format": "pt"})


def recipe(tmp_path: Path, **content: Any) -> str:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


# ------------------------------------------------------------------------- nothing is fetched in vain


def test_a_mismatch_is_refused_before_a_weight_is_fetched(hub: Replica, tmp_path: Path) -> None:
    other_shape(hub)
    said = run(hub, tmp_path, *COMMAND)
    assert said.returncode == 1
    assert "org/base" in said.stderr
    assert "model.layers.1.mlp.up_proj.weight" in said.stderr
    assert_only_headers(hub, tmp_path)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_message_is_that_of_models_in_the_cache(hub: Replica, tmp_path: Path) -> None:
    """Word for word, names included, whether headers or weights are here."""
    other_shape(hub)
    ahead = run(hub, tmp_path, *COMMAND).stderr
    for model in ("org/base", "org/ft"):
        assert run(hub, tmp_path, "inspect", model, "--health").returncode == 0
    assert run(hub, tmp_path, *COMMAND).stderr == ahead
    assert ahead.startswith("Error: ")


def test_a_dry_run_fetches_no_weights_and_tells_the_download(hub: Replica, tmp_path: Path) -> None:
    """The plan is that of the same models in local folders; the merge that follows is, too, and fetches once."""
    planned = run(hub, tmp_path, *COMMAND, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert_only_headers(hub, tmp_path)
    shown = run(hub, tmp_path, *COMMAND, "--dry-run").stdout
    assert re.search(r"^  download  [\d.]+ kB from the Hub$", shown, re.MULTILINE)
    local = [str(hub.root / "models/org" / name) for name in ("base", "ft")]
    expected = json.loads(run(hub, tmp_path, "merge", *local, "merged", "--t", "0.4", "--dry-run", "--json").stdout)
    plan = json.loads(planned.stdout)
    assert plan["download_bytes"] == size_of(hub, *FILES)
    assert plan["cached_bytes"] == 0
    for found in (plan, expected):  # what the models are called is not the same
        found["settings"] = [{**row, "models": [Path(m).name for m in row["models"]]} for row in found["settings"]]
    vary = {"models", "free_disk_bytes", "memory_budget_bytes", "expected_peak_bytes", "download_bytes"}
    assert {k: v for k, v in plan.items() if k not in vary} == {k: v for k, v in expected.items() if k not in vary}
    assert list((tmp_path / "cwd").iterdir()) == []

    hub.served.clear()
    hub.asked.clear()
    assert run(hub, tmp_path, *COMMAND).returncode == 0
    assert run(hub, tmp_path, "merge", *local, "by-hand", "--t", "0.4").returncode == 0
    ours, by_hand = (contents(tmp_path / "cwd" / name) for name in ("merged", "by-hand"))
    assert ours["model.safetensors"] == by_hand["model.safetensors"]
    assert ours.keys() == by_hand.keys()
    assert hub.weights() == {name: 8 + header_of(hub, name) + size_of(hub, name) for name in FILES}
    commits = {path.split("/resolve/")[1].split("/")[0] for _, path in hub.asked if "/resolve/" in path}
    assert commits == {hub.commit(hub.root / "models/org" / name) for name in ("base", "ft")}


def test_what_is_in_the_cache_is_used_from_there(hub: Replica, tmp_path: Path) -> None:
    """A dry run with a shard of two missing: the header of that one, and the rest is told."""
    assert run(hub, tmp_path, "inspect", "org/base", "--health").returncode == 0
    (cached,) = (tmp_path / "home").rglob(f"snapshots/*/{SHARDS[0]}")
    cached.unlink()
    hub.served.clear()
    plan = json.loads(run(hub, tmp_path, *COMMAND, "--dry-run", "--json").stdout)
    first, second, ft = (f"org/base/{SHARDS[0]}", f"org/base/{SHARDS[1]}", "org/ft/model.safetensors")
    assert hub.weights() == {name: 8 + header_of(hub, name) for name in (first, ft)}
    assert plan["download_bytes"] == size_of(hub, first, ft)
    assert plan["cached_bytes"] == size_of(hub, second)
    shown = run(hub, tmp_path, *COMMAND, "--dry-run").stdout
    assert re.search(r"^  download  [\d.]+ kB from the Hub \([\d.]+ kB more are in its cache\)$", shown, re.MULTILINE)
    assert run(hub, tmp_path, *COMMAND).returncode == 0
    assert "  download  nothing from the Hub (" in run(hub, tmp_path, *COMMAND[:3], "x", "--dry-run").stdout


def test_a_recipe_beyond_the_layers_is_refused_before_a_weight_is_fetched(hub: Replica, tmp_path: Path) -> None:
    """A layer_range that leaves the model; a recipe that fits, with a model named twice, is merged."""
    slices = [{"sources": [{"model": "org/base", "layer_range": [0, 2]}, {"model": "org/ft", "layer_range": [2, 4]}]}]
    bad = recipe(tmp_path, merge_method="linear", slices=slices, parameters={"weight": 0.5}, dtype="bfloat16")
    done = run(hub, tmp_path, "run", bad, "merged")
    assert done.returncode == 1
    assert "layer" in done.stderr
    assert_only_headers(hub, tmp_path)
    hub.served.clear()
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("org/ft", "org/base", "org/ft")]
    good = recipe(tmp_path, merge_method="linear", models=models, dtype="bfloat16")
    plan = json.loads(run(hub, tmp_path, "run", good, "merged", "--dry-run", "--json").stdout)
    assert plan["download_bytes"] == size_of(hub, *FILES)
    assert_only_headers(hub, tmp_path)
    done = run(hub, tmp_path, "run", good, "merged")
    assert done.returncode == 0, done.stderr


def test_an_out_that_is_taken_is_said_before_a_weight_is_fetched(hub: Replica, tmp_path: Path) -> None:
    """OUT with something else in it, a folder in place of a file, and memory that does not do."""
    (tmp_path / "cwd/merged").mkdir(parents=True)
    (tmp_path / "cwd/merged/x").write_text("x")
    assert "is not empty" in refusal(hub, tmp_path, *COMMAND)
    (tmp_path / "cwd/merged/config.json").mkdir()
    assert "config.json: is a folder" in refusal(hub, tmp_path, *COMMAND, "--overwrite")
    assert_only_headers(hub, tmp_path, times=2)


def test_inspect_fetches_headers_alone(hub: Replica, tmp_path: Path) -> None:
    found, local = (
        json.loads(run(hub, tmp_path, "inspect", ref, "--json").stdout)
        for ref in ("org/base", str(hub.root / "models/org/base"))
    )
    assert {**found, "name": "base"} == local
    assert found["name"] == "org/base"
    assert_only_headers(hub, tmp_path, files={name for name in FILES if "base" in name})


def test_a_sweep_is_checked_before_a_weight_is_fetched(hub: Replica, tmp_path: Path) -> None:
    score = f"{sys.executable} -c \"print('loss 1')\""
    ask = ("sweep", "org/base", "org/ft", "out", "--t", "0.2,0.4", "--eval", score)
    assert run(hub, tmp_path, *ask, "--only", "nothing.has.this.name").returncode == 1
    assert_only_headers(hub, tmp_path)
    hub.served.clear()
    assert run(hub, tmp_path, *ask).returncode == 0
    assert hub.weights() == {name: 8 + header_of(hub, name) + size_of(hub, name) for name in FILES}


def test_adapters_are_fetched_whole_and_their_model_is_not(hub: Replica, tmp_path: Path) -> None:
    """`MODEL+ADAPTER`, and an adapter alone as FT: planned with the model's headers; then merged."""
    factors = {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32)}
    factors["model.layers.0.self_attn.q_proj.lora_B.weight"] = (32, 4)
    folder = save_adapter(hub.root / "models/org/lora", {name: normal(*shape) for name, shape in factors.items()})
    base = {name for name in FILES if "base" in name}
    told = [run(hub, tmp_path, "merge", "org/base", "org/lora", "merged", "--dry-run").stdout for _ in range(2)]
    assert all("from the Hub (1.28 kB more are in its cache)" in text for text in told)
    fetched = (
        "Fetched into the Hub's cache: 1.28 kB of pickles, adapters or weights in sub-folders. Nothing else was read"
    )
    assert [fetched in text for text in told] == [True, False]
    assert told[1].endswith("Nothing was read but headers; nothing was written.\n")
    for ft in ("org/base+org/lora", "org/lora"):
        hub.served.clear()
        done = run(hub, tmp_path, "merge", "org/base", ft, "merged", "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["download_bytes"] == size_of(hub, *base)
        served = {name: count for name, count in hub.weights().items() if "lora" not in name}
        assert served == {name: 8 + header_of(hub, name) for name in base}
    assert run(hub, tmp_path, "merge", "org/base", "org/lora", "merged").returncode == 0
    assert run(hub, tmp_path, "merge", str(hub.root / "models/org/base"), str(folder), "by-hand").returncode == 0
    ours, by_hand = (load_folder(tmp_path / "cwd" / name) for name in ("merged", "by-hand"))
    assert all(ours[name].tobytes() == by_hand[name].tobytes() for name in by_hand)


def test_a_model_with_an_adapters_configuration_left_in_it_waits_as_any(hub: Replica, tmp_path: Path) -> None:
    (hub.root / "models/org/ft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert run(hub, tmp_path, *COMMAND, "--dry-run").returncode == 0
    assert_only_headers(hub, tmp_path)


def test_pickles_are_fetched_whole_even_for_a_dry_run(hub: Replica, tmp_path: Path) -> None:
    """What they hold cannot be known from a header; the other model waits."""
    folder = hub.root / "models/org/ft"
    (folder / "model.safetensors").unlink()
    save_pickles(folder, language_model(1))
    shown = run(hub, tmp_path, *COMMAND, "--dry-run").stdout
    assert re.search(r"^Fetched into the Hub's cache: [\d.]+ kB of pickles", shown, re.MULTILINE)
    plan = json.loads(run(hub, tmp_path, *COMMAND, "--dry-run", "--json").stdout)
    assert hub.served["org/ft/pytorch_model.bin"] == size_of(hub, "org/ft/pytorch_model.bin") == plan["cached_bytes"]
    assert_only_headers(hub, tmp_path, times=2, files={name for name in FILES if "base" in name})


def test_offline_and_unreachable_say_what_they_said(hub: Replica, tmp_path: Path) -> None:
    """After a dry run the small files are in the cache, and the weights are not."""
    assert run(hub, tmp_path, *COMMAND, "--dry-run").returncode == 0
    assert "not fully in the Hub's cache" in refusal(hub, tmp_path, *COMMAND, HF_HUB_OFFLINE="1")
    assert "cannot be reached to fetch it" in refusal(hub, tmp_path, *COMMAND, HF_ENDPOINT="http://127.0.0.1:9")
    assert run(hub, tmp_path, *COMMAND).returncode == 0
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert "already complete" in run(hub, tmp_path, *COMMAND, **more).stdout


# ------------------------------------------------------------------------------------------------ room


def free_space(monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    """Give the disks of paths that hold these words so many free bytes."""
    real = shutil.disk_usage

    def told(path: Path) -> Any:
        found = [nbytes for word, nbytes in free.items() if word in str(path)]
        return real(path)._replace(free=found[0]) if found else real(path)

    monkeypatch.setattr(shutil, "disk_usage", told)


def test_no_room_in_the_cache_is_said_before_the_download(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_space(monkeypatch, home=1000)
    with pytest.raises(FetchError, match=rf"take {sized(size_of(here, *FILES))}, .* has 1 kB free.* HF_HUB_CACHE"):
        merge("org/base", "org/ft", "merged", 0.4, stream=False)
    assert_only_headers(here, tmp_path)
    assert not Path("merged").exists()


def test_output_and_cache_on_one_disk_must_fit_together(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for either alone is not enough; what is in the cache takes no more."""
    free_space(monkeypatch, cwd=300_000)
    with pytest.raises(OutputError, match="what is fetched into the Hub's cache"):
        merge("org/base", "org/ft", "merged", 0.4, stream=False)
    assert_only_headers(here, tmp_path)
    done = run(here, tmp_path, "diff", "org/base", "org/ft")
    assert done.returncode == 0, done.stderr
    assert merge("org/base", "org/ft", "merged", 0.4).output_bytes > 0


def test_what_a_broken_download_left_takes_no_room_again(here: Replica, tmp_path: Path) -> None:
    """Of the library's versions that continue it; what others leave behind is not counted."""
    with closing(look("org/ft")) as found:
        blobs = found.folder.parents[1] / "blobs"
    (blobs / f"{'a' * 64}.incomplete").write_bytes(bytes(100))
    (blobs / f"{'a' * 64}.12345678.incomplete").write_bytes(bytes(1000))
    with closing(look("org/ft")) as found:
        assert found.begun_bytes == 100


# --------------------------------------------------------------------------------- ends, odd and sudden


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (9, -9)])
def test_whatever_ends_it_leaves_nothing_in_the_temporary_folder(
    hub: Replica, tmp_path: Path, number: int, code: int
) -> None:
    """Stopped while one header has come and another is waited for: no file, no folder, no weight."""
    hub.stalls = {"model.safetensors"}
    (tmp_path / "cwd").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    program = subprocess.Popen(
        [sys.executable, "-m", "merge_tool", *COMMAND],
        cwd=tmp_path / "cwd", env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert hub.stalled.wait(60)
    os.killpg(program.pid, number)
    _, said = program.communicate(timeout=60)
    assert program.returncode == code, said
    assert contents(tmp_path / "tmp") == {}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_server_that_ignores_ranges_is_not_listened_to_for_long(hub: Replica, tmp_path: Path) -> None:
    """It sends the whole file: what is read ends with the header, and the plan is the same."""
    tensors = {**language_model(1), "large": np.zeros((5000, 5000), np.float16)}
    save_file(tensors, hub.root / "models/org/ft/model.safetensors", {"format": "pt"})
    hub.ignores_ranges = True
    found, local = (
        json.loads(run(hub, tmp_path, "inspect", ref, "--json").stdout)
        for ref in ("org/ft", str(hub.root / "models/org/ft"))
    )
    assert found["shards"] == local["shards"]
    assert hub.weights()["org/ft/model.safetensors"] < 40_000_000  # twice what fits the sockets, of twice 50 MB
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_line_that_breaks_in_a_header_is_tried_again(hub: Replica, tmp_path: Path) -> None:
    """Once, and it is as if nothing had been; always, and it is said."""
    hub.fails_after = {"model.safetensors": 100}
    assert run(hub, tmp_path, *COMMAND, "--dry-run").returncode == 0
    assert hub.fails_after == {}
    hub.fails_after, hub.fails_again = {"model.safetensors": 100}, True
    assert "org/ft: cannot be fetched (" in refusal(hub, tmp_path, *COMMAND)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


HOSTILE = {
    "an absurd length": (lambda raw: (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + raw[8:], "its header would have"),
    "cut short": (lambda raw: raw[:-100], "the file is truncated"),
    "cut in the header": (lambda raw: raw[:500], "truncated: its header needs"),
    "nearly nothing": (lambda raw: raw[:5], "has 5 bytes, too few for a safetensors file"),
    "a pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "no JSON": (lambda raw: raw[:8] + b"x" * (len(raw) - 8), "does not start with"),
    "a zip file": (lambda raw: b"PK\x03\x04" + raw[4:], "its header would have|is a zip or pickle file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_file_is_refused_by_its_header(hub: Replica, tmp_path: Path, kind: str) -> None:
    """In the words in which the same file in a local folder is, under the model's name."""
    damage, words = HOSTILE[kind]
    file = hub.root / "models/org/ft/model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    said = refusal(hub, tmp_path, *COMMAND)
    local = refusal(hub, tmp_path, "merge", str(hub.root / "models/org/base"), str(file.parent), "merged")
    assert said.replace("org/ft/", "ft/") == local
    assert any(word in said for word in words.split("|"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_size_that_an_answer_does_not_tell_is_asked_for(hub: Replica, tmp_path: Path) -> None:
    """Of a part of a file, and of a whole file that comes without its length."""
    hub.claims = {"model.safetensors": "bytes 0-7/*"}
    assert run(hub, tmp_path, *COMMAND, "--dry-run").returncode == 0
    hub.ignores_ranges = hub.hides_sizes = True
    assert run(hub, tmp_path, *COMMAND, "--dry-run").returncode == 0


@pytest.mark.parametrize("claim", ["bytes 8-15/100", "", "bytes 0-7/" + "9" * 40])
def test_an_answer_that_is_not_what_was_asked_for_is_refused(hub: Replica, tmp_path: Path, claim: str) -> None:
    hub.claims = {"model.safetensors": claim}
    assert "org/ft/model.safetensors: its header cannot be fetched alone" in refusal(hub, tmp_path, *COMMAND)


def test_the_host_of_large_files_is_given_no_token(hub: Replica, tmp_path: Path) -> None:
    """The Hub redirects there; a private model's headers come all the same."""
    hub.private = {"org/ft"}
    assert run(hub, tmp_path, "inspect", "org/ft", HF_TOKEN=TOKEN).returncode == 0
    assert any(path.startswith("/cdn/org/ft/") for _, path in hub.asked)
    assert not hub.has_leaked


def test_an_index_that_names_what_the_repository_lacks_is_refused(hub: Replica, tmp_path: Path) -> None:
    """As in a local folder, and no path in it is followed."""
    path = hub.root / "models/org/base/model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, what in (
        ("secret.safetensors", "names 1 missing shard"), ("../../../secret.safetensors", "is not a path inside"),
    ):  # fmt: skip
        index["weight_map"]["model.norm.bias"] = name
        path.write_text(json.dumps(index))
        assert what in refusal(hub, tmp_path, *COMMAND)


def test_a_library_without_the_names_fetches_the_whole(hub: Replica, tmp_path: Path) -> None:
    code = (
        "import json; from merge_tool.checkpoint import fetching, ranges; "
        "assert ranges.can_ask(); ranges._NEEDED = ('no_such_name',); "
        "assert not ranges.can_ask(); print(json.dumps(fetching.look_ahead('org/ft')[0]))"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["coming"] == []
    assert json.loads(done.stdout)["cached_bytes"] == size_of(hub, "org/ft/model.safetensors")
