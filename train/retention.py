"""The checkpoints of an output: list them, find the best, delete those that need not be kept.

A folder is a checkpoint when it is named `step-N` and has a state.json; nothing else of it is read here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from train.checkpoint import read_progress
from train.output import TRASH


def checkpoint_path(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = (output / "checkpoints").glob("step-*") if output.is_dir() else ()
    return sorted(folder for folder in folders if (folder / "state.json").is_file())


def prune(output: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints and the best one."""
    folders = list_checkpoints(output)
    keep = set(folders[-keep_last:])
    keep.update([min(scored)[1]] if (scored := _scored(folders)) else [])
    for folder in folders:
        if folder not in keep:
            trash = folder.rename(folder.with_name(TRASH + folder.name))  # never half a folder under its name
            shutil.rmtree(trash)


def best_checkpoint(output: Path) -> tuple[float, Path]:
    """The lowest score of all checkpoints, and its folder; infinite when none was evaluated."""
    return min(_scored(list_checkpoints(output)), default=(math.inf, output))


def _scored(folders: Iterable[Path]) -> list[tuple[float, Path]]:
    """(score, folder) of those that have a finite one."""
    scores = ((read_progress(folder).score, folder) for folder in folders)
    return [(score, folder) for score, folder in scores if score is not None and math.isfinite(score)]
