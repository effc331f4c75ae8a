"""Laws of train/checkpoint.py: a folder is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.train_fixtures import (
    REPO,
    config_values,
    copy_rows,
    environment,
    read_metrics,
    run_cli,
    save_model,
    write_config,
    write_jsonl,
)
from train.checkpoint import read_progress
from train.config import build_config, load_config
from train.errors import TrainError
from train.loop import finetune
from train.output import LOCK, hold_output
from train.retention import list_checkpoints, prune
from train.world import World

resource = pytest.importorskip("resource", reason="needs POSIX limits")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    write_jsonl(folder / "d.jsonl", copy_rows())
    return folder


def values(base: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    return config_values(base / "model", base / "d.jsonl", output, **overrides)


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment())


def wait_until(condition: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.0005)


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Writing a file beyond `most` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- one run at a time ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_touches_nothing(base: Path, tmp_path: Path) -> None:
    """While one run lives, a start in its folder is one error, and what the first is writing stays."""
    half = tmp_path / "o" / "checkpoints" / ".partial-step-00000003"
    with hold_output(tmp_path / "o", ALONE):
        half.mkdir(parents=True)
        done = run_cli(write_config(tmp_path / "c.yaml", values(base, tmp_path / "o")))
        assert half.exists()
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: {tmp_path / 'o'}: another mixce-train is writing here. Wait for it to end, or set another `output`.\n"
    )


@pytest.mark.slow
def test_two_ranks_hold_one_lock(base: Path, tmp_path: Path) -> None:
    """The ranks of one run do not shut each other out; another run's ranks all get the error, which is printed once."""
    config = write_config(tmp_path / "c.yaml", values(base, tmp_path / "o", max_steps=1))
    with hold_output(tmp_path / "o", ALONE):
        done = run_cli(config, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("another mixce-train is writing here") == 1
    assert "exitcode  : 1" in done.stderr


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """kill -9 leaves the lock's file and no lock."""
    code = (
        "import sys, time, torch; from pathlib import Path; from train.output import hold_output; "
        "from train.world import World\n"
        "with hold_output(Path(sys.argv[1]), World(0, 1, torch.device('cpu'))): print(flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, env=environment(), stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"\n"
    with pytest.raises(TrainError, match="another mixce-train"), hold_output(tmp_path, ALONE):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).exists()
    with hold_output(tmp_path, ALONE):
        pass


def test_a_disk_without_locks_gets_one_by_process_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock fails as on a network disk without a lock server: still one run at a time."""
    import errno
    import fcntl

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with (
        hold_output(tmp_path, ALONE),
        pytest.raises(TrainError, match="another mixce-train"),
        hold_output(tmp_path, ALONE),
    ):
        pass
    with hold_output(tmp_path, ALONE):
        pass


# ---- whole or absent -------------------------------------------------------------------------------------


def test_killed_during_a_save_the_previous_checkpoint_loads(base: Path, tmp_path: Path) -> None:
    """SIGKILL while the hidden folder is being written: what has a name is whole, and the run goes on."""
    output = tmp_path / "o"
    config = write_config(tmp_path / "c.yaml", values(base, output, save_every=1, max_steps=100_000, keep_last=2))
    process = start(config)
    wait_until(lambda: len(list_checkpoints(output)) == 2, process)
    wait_until(lambda: any((output / "checkpoints").glob(".partial-*")), process)
    process.kill()
    process.communicate()
    left = [p.name for p in (output / "checkpoints").iterdir()]
    folders = list_checkpoints(output)
    assert len(folders) >= 2, left
    for folder in folders:
        AutoModelForCausalLM.from_pretrained(folder)
    last = read_progress(folders[-1]).step
    changed = {**values(base, output, save_every=1, keep_last=2), "max_steps": 100_000}
    process = start(write_config(tmp_path / "c.yaml", changed))
    wait_until(lambda: len(read_metrics(output)) > last + 1, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 0
    assert f"Resuming from step-{last:08d}" in said
    assert [m["step"] for m in read_metrics(output)] == list(range(1, len(read_metrics(output)) + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 0, a checkpoint of the last finished step, one line that says how to go on."""
    output = tmp_path / "o"
    process = start(write_config(tmp_path / "c.yaml", values(base, output, max_steps=100_000)))
    wait_until(lambda: (output / "metrics.jsonl").exists() and len(read_metrics(output)) > 3, process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 0, said
    (folder,) = list_checkpoints(output)
    step = read_progress(folder).step
    assert f"Stopped by a signal; saved step {step}." in said
    assert read_metrics(output)[-1]["step"] == step
    assert "Traceback" not in said
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_full_disk_leaves_the_previous_checkpoint(base: Path, tmp_path: Path) -> None:
    """The failed save is one error that says so; no half folder is left; with room again the run goes on."""
    output = tmp_path / "o"
    whole = build_config(values(base, output, save_every=2, max_steps=6))
    from train import loop

    real = loop.publish_folder
    reached: list[int] = []

    def stops_at_the_end(*arguments: Any) -> None:
        reached.append(1)
        with file_size_limit(100_000):
            real(*arguments)

    loop.publish_folder = stops_at_the_end  # the final save alone meets a full disk
    try:
        with pytest.raises(TrainError, match=r"final: cannot be saved .*Earlier checkpoints are untouched"):
            finetune(whole)
    finally:
        loop.publish_folder = real
    assert reached
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert not list(output.glob(".partial*"))
    for folder in list_checkpoints(output):
        AutoModelForCausalLM.from_pretrained(folder)
    finetune(whole)
    assert (output / "final" / "model.safetensors").exists()


def test_a_full_disk_at_the_first_checkpoint(base: Path, tmp_path: Path) -> None:
    """A step's checkpoint that does not fit is the same error, and leaves nothing behind."""
    config = build_config(values(base, tmp_path / "o", save_every=2, max_steps=6))
    with (
        file_size_limit(100_000),
        pytest.raises(TrainError, match=r"step-00000002: cannot be saved .*Make room"),
    ):
        finetune(config)
    assert list((tmp_path / "o" / "checkpoints").iterdir()) == []


def test_no_write_access_is_one_error(base: Path, tmp_path: Path) -> None:
    """An output that cannot be made is refused before anything is loaded."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainError, match=r"file/o: cannot be written to"):
        finetune(build_config(values(base, tmp_path / "file" / "o")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_one_error(base: Path, tmp_path: Path) -> None:
    """The same for a folder without the permission."""
    (tmp_path / "o").mkdir(mode=0o500)
    with pytest.raises(TrainError, match="o: cannot be written to"):
        finetune(build_config(values(base, tmp_path / "o")))


def test_leftovers_are_swept_and_unfinished_folders_ignored(tmp_path: Path) -> None:
    """A folder without state.json is no checkpoint; hidden ones of a killed process go."""
    parent = tmp_path / "checkpoints"
    for name in (".partial-step-00000003", ".trash-step-00000001", "step-00000009"):
        (parent / name).mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    (tmp_path / ".partial-run.json").write_text("{")
    with hold_output(tmp_path, ALONE):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "checkpoints"]
    assert [p.name for p in parent.iterdir()] == ["step-00000009"]
    prune(tmp_path, 1)


def test_a_saved_checkpoint_is_ordinary(base: Path, tmp_path: Path) -> None:
    """Loaded by transformers it has the run's weights; names and dtype are the base's."""
    config = load_config(write_config(tmp_path / "c.yaml", values(base, tmp_path / "o", save_every=2, max_steps=4)))
    finetune(config)
    folder = tmp_path / "o" / "checkpoints" / "step-00000002"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(base / "model")
    assert model.state_dict().keys() == before.state_dict().keys()
    assert model.dtype == before.dtype == torch.float32
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


# ---- damaged checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4 that has not ended."""
    output = tmp_path_factory.mktemp("stopped") / "o"
    finetune(build_config(values(base, output, save_every=2, max_steps=6, keep_last=3)))
    for folder in ("final", "checkpoints/step-00000006"):
        shutil.rmtree(output / folder)
    return output


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no optimizer": (lambda f: (f / "optimizer.safetensors").unlink(), r"optimizer state missing: .* and \d+ more"),
    "cut optimizer": (lambda f: cut(f / "optimizer.safetensors"), "(?i)incomplete|header|offset"),
    "one state less": (
        lambda f: retensor(f / "optimizer.safetensors", lambda t: t.pop("lm_head.weight|v")),
        r"optimizer state missing: lm_head.weight\|v\.",
    ),
    "one state more": (
        lambda f: retensor(f / "optimizer.safetensors", lambda t: t.update({"lm_head.weight|c": torch.ones(320, 1)})),
        r"optimizer state not expected: lm_head.weight\|c\.",
    ),
    "cut state.json": (lambda f: cut(f / "state.json"), "state.json cannot be read"),
    "empty state.json": (lambda f: (f / "state.json").write_text("null"), "state.json lacks score"),
    "no update counts": (
        lambda f: rewrite(f / "state.json", lambda s: s.pop("updates")), "state.json lacks updates"
    ),
    "no generators": (lambda f: (f / "generators.safetensors").unlink(), r"generators.safetensors lacks torch\|0"),
    "one generator less": (
        lambda f: retensor(f / "generators.safetensors", lambda t: t.pop("rounding|0")),
        r"generators.safetensors lacks rounding\|0",
    ),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "the model cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(base: Path, tmp_path: Path, stopped: Path, damage: str) -> None:
    """One error that names the folder, what it lacks and what to do; done so, the run goes on from the one before."""
    shutil.copytree(stopped, tmp_path / "o")
    config = build_config(values(base, tmp_path / "o", save_every=2, max_steps=6))
    folder = tmp_path / "o" / "checkpoints" / "step-00000004"
    apply, message = DAMAGE[damage]
    apply(folder)
    with pytest.raises(TrainError, match=message) as error:
        finetune(config)
    assert str(folder) in str(error.value)
    assert "Delete this folder to go on from the checkpoint before it" in str(error.value)


def test_without_the_damaged_checkpoint_the_run_goes_on(base: Path, tmp_path: Path, stopped: Path) -> None:
    """What the error advises works, and gives the bytes of the run that met no damage."""
    shutil.copytree(stopped, tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "checkpoints" / "step-00000004")
    finetune(build_config(values(base, tmp_path / "o", save_every=2, max_steps=6)))
    again = tmp_path / "o" / "checkpoints" / "step-00000004" / "model.safetensors"
    assert again.read_bytes() == (stopped / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()


def test_a_damaged_record_is_one_error(base: Path, tmp_path: Path, stopped: Path) -> None:
    """run.json cut by hand or by an older version: named, with what to do."""
    shutil.copytree(stopped, tmp_path / "o")
    cut(tmp_path / "o" / "run.json")
    with pytest.raises(TrainError, match=r"run.json: cannot be read .*Delete it"):
        finetune(build_config(values(base, tmp_path / "o", save_every=2, max_steps=6)))
