"""Laws of the command: exit codes, one clear message, the same on one process and under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train_fixtures import (
    config_values,
    copy_rows,
    read_metrics,
    run_cli,
    save_model,
    write_config,
    write_jsonl,
)
from train.__main__ import UsageError, parse, run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    write_jsonl(folder / "d.jsonl", copy_rows())
    return folder


def config(base: Path, tmp_path: Path, **overrides: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    return write_config(
        tmp_path / "c.yaml", config_values(base / "model", base / "d.jsonl", tmp_path / "o", **overrides)
    )


def test_a_tiny_stablelm_learns_through_the_command(base: Path, tmp_path: Path) -> None:
    """A real subprocess; flags override the file; the loss falls; stdin is closed and never asked."""
    import subprocess

    done = run_cli(config(base, tmp_path), "--max_steps", 40, "--lr=1e-2", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    losses = [m["loss"] for m in read_metrics(tmp_path / "o")]
    assert len(losses) == 40
    assert losses[-1] < losses[0] / 2
    assert "41,280 trained" in done.stderr
    assert "Warning" not in done.stderr


def test_an_error_is_one_message_without_a_traceback(base: Path, tmp_path: Path) -> None:
    """Exit code 1 and the remedy, in a real subprocess."""
    done = run_cli(config(base, tmp_path), "--device", "cuda")
    assert done.returncode == 1
    assert done.stderr == "Error: device is cuda, but torch finds no CUDA device. Set device to auto or cpu.\n"


def test_under_torchrun_one_process_prints(base: Path, tmp_path: Path) -> None:
    """An error that all processes meet is printed once."""
    done = run_cli(config(base, tmp_path), "--global_batch", 3, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("Error: The global batch is 3 sequences") == 1
    assert "expected a multiple of micro_batch 2 x 2 processes = 4" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Found 0 configs, expected one."),
        (["a.yaml", "b.yaml"], 2, "Found 2 configs (a.yaml b.yaml), expected one."),
        (["a.yaml", "--lr"], 2, "--lr needs a value"),
        (["a.yaml", "--lrr", "1"], 2, "'lrr' is not a key. Did you mean 'lr'?"),
        (["a.yaml", "--lr", "[1"], 2, "--lr is [1, expected a YAML value."),
        (["absent.yaml"], 1, "absent.yaml: the config cannot be read"),
    ],
)
def test_wrong_command_lines(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """2 for the command line, 1 for what it names."""
    assert run(arguments) == code
    assert message in capsys.readouterr().err


def test_flags_are_yaml_and_resume_may_stand_alone() -> None:
    """Values have the types that the file would give them; dashes may replace underscores."""
    assert parse(["c.yaml", "--packing", "false", "--max-steps=3", "--resume"]) == (
        "c.yaml",
        {"packing": False, "max_steps": 3, "resume": True},
    )
    assert parse(["--resume", "false", "c.yaml"]) == ("c.yaml", {"resume": False})
    with pytest.raises(UsageError):
        parse(["c.yaml", "--sources_", "x"])


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """With its default, and without importing torch first."""
    from dataclasses import fields

    from train.config import TrainConfig

    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{item.name} " in shown for item in fields(TrainConfig))


def test_a_bad_config_is_exit_code_1(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr."""
    assert run([str(config(base, tmp_path, mixing_ratio=1.5))]) == 1
    assert capsys.readouterr().err == (
        "Error: mixing_ratio is 1.5, expected from 0 (self-reinforcement) to 1 (cross-entropy).\n"
    )


def test_importing_the_config_does_not_import_torch() -> None:
    """A typo is reported at once."""
    import subprocess
    import sys

    code = "import sys, train.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(base: Path, tmp_path: Path) -> None:
    """`compile: true` changes nothing but the time (needs a C++ compiler)."""
    values = {"max_steps": 3}
    assert run_cli(config(base, tmp_path / "a", **values)).returncode == 0
    done = run_cli(config(base, tmp_path / "b", **values), "--compile", "true")
    assert done.returncode == 0, done.stderr
    a, b = ([m["loss"] for m in read_metrics(tmp_path / run / "o")] for run in "ab")
    assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_on_both_processes(base: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher reaches the workers, which agree on the step and write one checkpoint."""
    import signal
    import subprocess
    import sys
    import time

    from tests.train_fixtures import REPO, environment
    from train.checkpoint import read_progress
    from train.retention import list_checkpoints

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = config(base, tmp_path, max_steps=100_000)
    process = subprocess.Popen(
        [*launcher, "-m", "train", str(path)], cwd=REPO, env=environment(), stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "o" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(read_metrics(tmp_path / "o")) > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    (folder,) = list_checkpoints(tmp_path / "o")
    assert f"Stopped by a signal; saved step {read_progress(folder).step}." in said
