"""Weights read by range: nothing of a model is kept, the bytes are those of a local merge, each is downloaded once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

import corpus
from checkpoints import contents, language_model, save_model, save_pickles
from corpus_cases import CASES
from hub_replica import TOKEN, Replica, refusal, run, serve
from merge_tool import CheckpointError, OutputError, merge
from merge_tool.checkpoint import blocks, fetcher
from merge_tool.checkpoint.fetcher import Patience
from test_corpus import recorded_here
from test_lora import normal, save_adapter

COMMAND = ("merge", "org/base", "org/ft", "merged", "--t", "0.4")
CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "num_hidden_layers": 8}
SIDE = {"tokenizer.json": "{}", "README.md": "# card\n"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    """`org/base` in two shards, `org/ft` in one file."""
    models = tmp_path / "hub/models/org"
    for seed, (name, shards) in enumerate({"base": 2, "ft": 1}.items()):
        tensors = language_model(seed, hidden=128, layers=8)
        save_model(models / name, tensors, shards=shards, side_files=SIDE, config=CONFIG)
    with serve(tmp_path / "hub") as replica:
        yield replica


@pytest.fixture
def here(hub: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    """The same for this very process, in an empty folder; nobody waits long."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for key, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(fetcher, "PATIENCE", Patience(stall_seconds=1.0, waits=(0.01, 0.02, 0.05, 0.1, 0.2)))
    return hub


def weights_of(hub: Replica, *names: str) -> int:
    folders = [hub.root / "models/org" / name for name in names or ("base", "ft")]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def by_hand(hub: Replica, tmp_path: Path) -> dict[str, bytes]:
    """The same merge of the same files in the Hub's cache."""
    run(hub, tmp_path, *COMMAND[:3], "by-hand", *COMMAND[4:], "--no-stream", check="1")
    return contents(tmp_path / "cwd/by-hand")


def assert_nothing_was_kept(tmp_path: Path) -> None:
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_streamed_merge_is_the_local_one_and_keeps_nothing(hub: Replica, tmp_path: Path) -> None:
    """Every file the same, report and card included; each byte is served once; a second run is complete. The host of
    large files is given no token."""
    hub.private = {"org/ft"}
    done = run(hub, tmp_path, *COMMAND, "--stream", HF_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert not hub.has_leaked
    hub.private = set()
    assert_nothing_was_kept(tmp_path)
    assert sum(hub.weights().values()) <= 1.02 * weights_of(hub)
    assert "already complete" in run(hub, tmp_path, *COMMAND, "--stream").stdout
    expected = by_hand(hub, tmp_path)
    assert contents(tmp_path / "cwd/merged") == expected
    assert len(expected) >= 6


@pytest.mark.parametrize("spool_bytes", [0, 10**9])
def test_tensors_that_are_read_twice_are_downloaded_once_where_the_spool_has_room(
    here: Replica, spool_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks so small that a tensor is many of them, and no room in memory for a tensor; at most twice without
    room."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 550_000)  # as always, a block is larger than the chunks at hand
    monkeypatch.setattr("merge_tool.plan.memory._arena_bytes", lambda plan, room: 0)
    models = here.root / "models/wide"
    for seed in range(2):
        rng = np.random.default_rng(seed)
        tensors = {f"layers.{k}.weight": rng.standard_normal((2000, 1500), np.float32) for k in range(2)}
        save_model(models / f"m{seed}", {name: values.astype(bfloat16) for name, values in tensors.items()})
    merge("wide/m0", "wide/m1", "merged", 0.4, stream=True, downloads=3, spool_bytes=spool_bytes, jobs=1)
    nbytes, served = sum(path.stat().st_size for path in models.rglob("*.safetensors")), sum(here.weights().values())
    assert served / nbytes <= 1.02 if spool_bytes else 1.02 < served / nbytes <= 2.02
    merge(models / "m0", models / "m1", "local", 0.4)
    assert contents(Path("merged"))["model.safetensors"] == contents(Path("local"))["model.safetensors"]


def test_the_plan_says_what_would_be_downloaded(hub: Replica, tmp_path: Path) -> None:
    plan = json.loads(run(hub, tmp_path, *COMMAND, "--stream", "--dry-run", "--json").stdout)
    assert plan["is_streamed"]
    assert plan["download_bytes"] == weights_of(hub)
    assert 0 < plan["spool_bytes"] <= weights_of(hub)
    said = run(hub, tmp_path, *COMMAND, "--stream", "--dry-run").stdout
    assert " from the Hub, by range; a spool of at most " in said
    assert not json.loads(run(hub, tmp_path, *COMMAND, "--dry-run", "--json").stdout)["is_streamed"]
    assert sum(hub.weights().values()) < 0.3 * weights_of(hub)  # headers


def test_a_disk_without_room_for_the_download_is_enough(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming is then chosen by itself, and said; --no-stream insists."""
    real = shutil.disk_usage
    free = int(1.4 * weights_of(here))  # the output takes a half, the download all of it
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100_000)
    with pytest.raises(OutputError, match=r"has .* free"):
        merge("org/base", "org/ft", "merged", 0.4, stream=False)
    said: list[str] = []
    merge("org/base", "org/ft", "merged", 0.4, on_warning=said.append)
    assert any("are read by range, and not kept" in text for text in said)
    assert_nothing_was_kept(tmp_path)


def test_what_the_cache_has_is_not_downloaded(hub: Replica, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "diff", "org/base", "org/base").returncode == 0
    hub.served.clear()
    assert run(hub, tmp_path, *COMMAND, "--stream").returncode == 0
    assert set(hub.weights()) == {"org/ft/model.safetensors"}


def test_a_streamed_model_may_have_an_adapter(hub: Replica, tmp_path: Path) -> None:
    """The adapter, which is small, is fetched; the model is not."""
    save_adapter(
        hub.root / "models/org/adapter",
        {
            "model.layers.0.mlp.up_proj.lora_A.weight": normal(4, 128),
            "model.layers.0.mlp.up_proj.lora_B.weight": normal(384, 4),
        },
    )
    command = ("merge", "org/base+org/adapter", "org/ft", "merged", "--stream")
    done = run(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "home").rglob("*.safetensors")] == ["adapter_model.safetensors"]


def test_pickles_are_refused_for_streaming(hub: Replica, tmp_path: Path) -> None:
    folder = hub.root / "models/org/ft"
    (folder / "model.safetensors").unlink()
    save_pickles(folder, language_model(1))
    assert "are pickles (pytorch_model.bin), which are read whole" in refusal(hub, tmp_path, *COMMAND, "--stream")
    assert hub.served["org/ft/pytorch_model.bin"] == 0


def test_a_file_at_an_address_is_a_model(hub: Replica, tmp_path: Path) -> None:
    """Any server with ranges will do. Its query, which may be a signature, is in no file; the server gets no token."""
    hub.gated = set()
    address = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/org/ft/resolve/x/model.safetensors?signature=secret"
    done = run(hub, tmp_path, "merge", "org/base", address, "merged", "--t", "0.4", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert not hub.has_leaked
    merged, expected = contents(tmp_path / "cwd/merged"), by_hand(hub, tmp_path)
    assert {k: v for k, v in merged.items() if "safetensors" in k} == {
        k: v for k, v in expected.items() if "safetensors" in k
    }
    assert not any(b"secret" in content for content in merged.values())
    wrong = refusal(hub, tmp_path, "merge", "org/base", address.replace("model.s", "no.s"), "other")
    assert "/no.safetensors: cannot be read (" in wrong
    assert "secret" not in wrong
    assert "is always read by range" in refusal(hub, tmp_path, "merge", "org/base", address, "other", "--no-stream")


def streamed(name: str, hub: Replica, folder: Path) -> dict[str, str]:
    """The files of a case of the corpus, its folders of models being on the Hub."""
    case, models = CASES[name], hub.root / "models/c"
    models.mkdir(exist_ok=True)
    folder.mkdir()
    with contextlib.chdir(folder):
        case.make()
        for path in [path.parent for path in Path().glob("*/*.safetensors")]:
            if path.exists():
                shutil.move(path, models / path)
        if case.recipe:
            there = "|".join(sorted((path.name for path in models.iterdir()), key=len, reverse=True))
            Path("recipe.yaml").write_text(re.sub(rf"((?:model|source): )({there})\b", r"\1c/\2", case.recipe))
        inputs = set(Path().rglob("*"))
        program, *words = case.command.split()
        for k in range(2) if program == "slerp-merge" else ():
            words[k] = "+".join(f"c/{part}" if (models / part).is_dir() else part for part in words[k].split("+"))
        exit_code, output = corpus._run_here(program, [*words, "--stream"])
        assert exit_code == 0, output
        written = sorted(path for path in Path().rglob("*") if path not in inputs and path.is_file())
        return {path.as_posix(): corpus._digest(path) for path in written}


SOME = ("fp8-out", "vocab-union-unigram", "adapter-both", "renamed-copies", "method-dare-ties", "shards")
LATER = [
    name
    for name, case in CASES.items()
    if not re.search("pickle|one-file$|adapters|^adapter-yaml|^vocab-ft-yaml", name) and not case.apart
]


@recorded_here
@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER if name not in SOME)]
)
def test_every_kind_of_merge_can_be_streamed(
    name: str, here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those that corpus.json records for the local merge."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 60_000)
    assert streamed(name, here, tmp_path / "case") == corpus.recorded()[name]
    assert not list((tmp_path / "home").rglob("snapshots/*/model*.safetensors"))  # only adapters, and sub-folders


# --------------------------------------------------------------------------------------------- faults

PASSING = ("403", "429", "500", "reset", "short", "stall")


def downloads_of(hub: Replica) -> list[int]:
    """The numbers of the requests of a merge after its plan."""
    hub.asked.clear()
    hub.count = 0
    merge("org/base", "org/ft", "merged", 0.4, stream=True)
    shutil.rmtree("merged")
    first = next(n for n, (verb, path) in enumerate(hub.asked) if verb == "HEAD" and path.endswith(".safetensors"))
    hub.count = 0
    return list(range(first, len(hub.asked)))


def test_what_passes_is_tried_again(here: Replica, tmp_path: Path) -> None:
    """Many requests of one merge fail, each in another way: the bytes are the same, and hardly more are served."""
    numbers = downloads_of(here)
    here.served.clear()
    here.faults = {number: PASSING[k % len(PASSING)] for k, number in enumerate(numbers[1::7])}
    merge("org/base", "org/ft", "merged", 0.4, stream=True)
    here.faults = {}
    assert sum(here.weights().values()) <= 1.1 * weights_of(here)  # headers, and small tensors
    assert contents(Path("merged")) == by_hand(here, tmp_path)


def test_what_shows_another_file_is_refused(here: Replica) -> None:
    """An answer with other bytes than were asked for. The file is named; the same command continues."""
    numbers = downloads_of(here)
    here.faults = dict.fromkeys(numbers[20:60], "range")
    with pytest.raises(CheckpointError, match=r"org/\w+/model.*safetensors: cannot be read by range"):
        merge("org/base", "org/ft", "merged", 0.4, stream=True)
    here.faults = {}
    assert merge("org/base", "org/ft", "merged", 0.4, stream=True).output_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*PASSING, "range", "etag"])
def test_each_request_of_a_merge_may_fail(here: Replica, tmp_path: Path, kind: str) -> None:
    """One after the other, those of the plan included: the same bytes, or one message and the same bytes by the same
    command."""
    expected = by_hand(here, tmp_path)
    numbers = downloads_of(here)
    for number in range(len(numbers) + numbers[0]):
        shutil.rmtree(tmp_path / "home")
        here.count, here.faults = 0, {number: kind}
        try:
            merge("org/base", "org/ft", "merged", 0.4, stream=True)
            said = ""
        except CheckpointError as e:
            said = str(e)
        assert not said or kind in ("range", "etag") or number < numbers[0], said
        if said:
            assert "org/" in said
            here.faults = {}
            merge("org/base", "org/ft", "merged", 0.4, stream=True)
        assert contents(Path("merged")) == expected
        shutil.rmtree("merged")


def test_addresses_that_expire_are_found_again(here: Replica, tmp_path: Path) -> None:
    here.uses = 40
    merge("org/base", "org/ft", "merged", 0.4, stream=True)
    assert max(here.address_uses.values()) > 40
    here.uses = None
    assert contents(Path("merged")) == by_hand(here, tmp_path)


def test_a_server_that_never_recovers_is_given_up(here: Replica) -> None:
    """After as many tries as are allowed, in one line that names the file."""
    here.faults = dict.fromkeys(range(downloads_of(here)[20], 10_000), "500")
    with pytest.raises(CheckpointError, match=r"org/\w+/model.*safetensors: .*failed 6 times in a row"):
        merge("org/base", "org/ft", "merged", 0.4, stream=True)
    here.faults = {}
    merge("org/base", "org/ft", "merged", 0.4, stream=True)


def test_a_server_that_ignores_ranges_is_refused(here: Replica) -> None:
    here.ignores_ranges = True
    with pytest.raises(CheckpointError, match=r"cannot be read by range.*the server answers 200"):
        merge("org/base", "org/ft", "merged", 0.4, stream=True)


def test_a_file_that_changes_at_its_address_stops_the_merge(here: Replica) -> None:
    """Its ETag is another one, in the middle of the merge."""
    address = f"{here.url}/cdn/org/ft/resolve/x/model.safetensors"
    merge("org/base", address, "merged", 0.4)
    numbers = [n for n, (_, path) in enumerate(here.asked) if path.startswith("/cdn/org/ft/")]
    shutil.rmtree("merged")
    here.count, here.faults = 0, dict.fromkeys(numbers[len(numbers) // 2 :], "etag")
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file on the server changed.*expected"):
        merge("org/base", address, "merged", 0.4)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_kill_leaves_nothing_but_the_work_folder_and_the_same_command_continues(
    hub: Replica, tmp_path: Path, number: int
) -> None:
    """No spool, no process that still downloads."""
    expected = by_hand(hub, tmp_path)
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "tmp").mkdir()
    hub.rate, hub.count = 3_000_000.0, 0
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    words = [sys.executable, "-m", "merge_tool", *COMMAND, "--stream", "--max-shard-size", "1MB"]
    program = subprocess.Popen(words, cwd=tmp_path / "cwd", env=environment, stderr=subprocess.DEVNULL)
    work = tmp_path / "cwd/merged/.slerp-merge/files"
    while not list(work.glob("*.safetensors")) and program.poll() is None:
        time.sleep(0.01)
    program.send_signal(number)
    program.wait(30)
    hub.rate = None
    assert list((tmp_path / "tmp").iterdir()) == []
    time.sleep(0.3)
    quiet = sum(hub.served.values())
    time.sleep(0.3)
    assert sum(hub.served.values()) == quiet
    done = run(hub, tmp_path, *COMMAND, "--stream", "--max-shard-size", "1MB")
    assert done.returncode == 0, done.stderr
    assert expected["config.json"] == contents(tmp_path / "cwd/merged")["config.json"]
    assert run(hub, tmp_path, "verify", "merged", "--against", "org/base", "org/ft", "--full").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kills_of_a_streamed_merge(hub: Replica, tmp_path: Path) -> None:
    """At 50 random moments, each followed by the same command until it is through: the bytes of the local merge."""
    words = [*COMMAND, "--max-shard-size", "1MB"]
    run(hub, tmp_path, *words[:3], "by-hand", *words[4:], "--no-stream")
    expected = contents(tmp_path / "cwd/by-hand")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    shutil.rmtree(tmp_path / "home")
    moments, hub.rate, kills = random.Random(0), 4_000_000.0, 0
    while kills < 50:
        command = [sys.executable, "-m", "merge_tool", *words, "--stream"]
        program = subprocess.Popen(command, cwd=tmp_path / "cwd", env=environment, stderr=subprocess.DEVNULL)
        try:
            program.wait(moments.uniform(0.2, 6))
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            kills += 1
            continue
        assert program.returncode == 0
        assert contents(tmp_path / "cwd/merged") == expected
        shutil.rmtree(tmp_path / "cwd/merged")
    assert run(hub, tmp_path, *words, "--stream").returncode == 0
    assert contents(tmp_path / "cwd/merged") == expected
    assert_nothing_was_kept(tmp_path)


@pytest.mark.slow
def test_a_streamed_merge_keeps_its_memory(hub: Replica, tmp_path: Path) -> None:
    """--memory 64MB, with tensors that do not fit: the merging process; what it starts is beside that."""
    for seed in range(2):
        tensors = {f"layers.{k}.weight": np.full((4096, 4096), seed + k, bfloat16) for k in range(4)}
        save_model(hub.root / f"models/wide/m{seed}", tensors)
    command = ("merge", "wide/m0", "wide/m1", "merged", "--stream", "--memory", "64MB", "--json")
    done = run(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_bytes"] < 64_000_000
