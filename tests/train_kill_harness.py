"""kill -9 at random moments of a training run, again and again: `python tests/train_kill_harness.py --kills 50`.

Half of the moments lie inside a save. After each kill every checkpoint that has a name loads, the next session takes
up the last of them, and the run's end has the bytes of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM

from tests.train_fixtures import (
    REPO,
    config_values,
    copy_rows,
    environment,
    read_metrics,
    save_model,
    write_config,
    write_jsonl,
)
from train.checkpoint import read_progress
from train.retention import list_checkpoints


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment())


def last_step(output: Path) -> int:
    folders = list_checkpoints(output)
    return read_progress(folders[-1]).step if folders else 0


def kill_once(config: Path, output: Path, chance: random.Random, *, saving: bool) -> str:
    """One session: it must get beyond the last checkpoint, then it is killed; says where that was."""
    before = last_step(output)
    process = start(config)
    while process.poll() is None:
        if last_step(output) > before and (not saving or any((output / "checkpoints").glob(".partial-*"))):
            break
        time.sleep(0.0002)
    time.sleep(chance.random() * (0.01 if saving else 0.3))
    process.kill()
    said = process.communicate()[1]
    assert process.returncode == -9, said
    assert before == 0 or f"Resuming from step-{before:08d}" in said, said
    return "inside a save" if any((output / "checkpoints").glob(".partial-*")) else "between saves"


def run(kills: int, seed: int, root: Path, max_steps: int) -> Counter[str]:
    """Kill one run so often, then let it end; AssertionError if anything is lost."""
    chance, found = random.Random(seed), Counter[str]()
    save_model(root / "model")
    write_jsonl(root / "d.jsonl", copy_rows())

    def config(name: str) -> tuple[Path, Path]:
        options: dict[str, Any] = {"save_every": 3, "keep_last": 2, "max_steps": max_steps}
        values = config_values(root / "model", root / "d.jsonl", root / name, **options)
        return write_config(root / f"{name}.yaml", values), root / name

    path, output = config("killed")
    for number in range(kills):
        found[kill_once(path, output, chance, saving=number % 2 == 0)] += 1
        for folder in list_checkpoints(output):
            AutoModelForCausalLM.from_pretrained(folder)
    for one in (path, config("whole")[0]):
        process = start(one)
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert [m["step"] for m in read_metrics(output)] == list(range(1, max_steps + 1))
    final, whole = (root / name / "final/model.safetensors" for name in ("killed", "whole"))
    assert final.read_bytes() == whole.read_bytes(), "the weights differ from those of a run that nobody killed"
    assert not list(output.rglob(".partial-*"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.kills, options.seed, Path(folder), options.steps)
    print(
        f"{options.kills} kills of one run of {options.steps} steps, then its end as if there were none: {dict(found)}"
    )


if __name__ == "__main__":
    main()
