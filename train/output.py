"""Folders of the output appear whole: written under a hidden name, synced to disk, then renamed.

Only the first process touches the disk; an error that it meets is raised in every process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from train.errors import TrainError
from train.world import World

PARTIAL, TRASH = ".partial-", ".trash-"


def publish_folder(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Let `write` fill a hidden folder beside `folder`, sync it to disk, and give it its name.

    All processes call it; only the first touches the disk. Raises TrainError, in every process, when the
    disk is full or not writable; the hidden folder is then removed.
    """
    hidden = folder.with_name(PARTIAL + folder.name)
    try:
        first_writes(world, hidden, lambda: _fresh(hidden))
        write(hidden)
        first_writes(world, hidden, lambda: _publish(hidden, folder))
    except TrainError:
        if world.is_first:
            shutil.rmtree(hidden, ignore_errors=True)
        raise


def first_writes(world: World, folder: Path, action: Callable[[], None]) -> None:
    """Do `action` in the first process; when the disk refuses, raise TrainError in every process."""
    error = _attempt(action) if world.is_first else None
    shown = folder.with_name(folder.name.removeprefix(PARTIAL))
    world.fail_together(
        error and f"cannot save {shown}: {error}. Earlier checkpoints are untouched; make room and run it again"
    )


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as e:
        return e.strerror or str(e)
    except SafetensorError as e:  # how that library reports a full disk
        return str(e)
    return None


def _fresh(hidden: Path) -> None:
    if hidden.exists():
        shutil.rmtree(hidden)
    hidden.mkdir(parents=True)


def _publish(hidden: Path, folder: Path) -> None:
    for file in hidden.iterdir():
        _sync(file)
    _sync(hidden)
    hidden.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(output: Path) -> None:
    """Remove what a killed process left behind."""
    for parent in (output, output / "checkpoints"):
        for pattern in (PARTIAL, TRASH):
            for left in parent.glob(pattern + "*"):
                shutil.rmtree(left)
