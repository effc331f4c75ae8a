"""The output folder: one run at a time writes in it, and a folder or file with a name is complete.

The operating system drops a lock with the process that holds it, so a killed run blocks nobody; the file `.lock` stays
and means nothing by itself. Folders and small files are written under a hidden name, synced, then renamed. Only the
first process touches the disk; its errors are raised in every process.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from train.errors import TrainError
from train.world import World

LOCK, PARTIAL, TRASH = ".lock", ".partial-", ".trash-"

# ---- one run at a time ---------------------------------------------------------------------------------


@contextmanager
def hold_output(output: Path, world: World) -> Iterator[None]:
    """Make `output` and lock it for this run; remove what a killed run left half-written.

    All processes call it; the first one takes the lock. Raises TrainError, in every process, when another run
    holds the folder or nothing can be written there.
    """
    held: list[Any] = []

    def take() -> None:
        from filelock import Timeout

        try:
            output.mkdir(parents=True, exist_ok=True)
            held.append(_lock(output))
            _sweep(output)
        except Timeout as e:
            raise TrainError(
                f"{output}: another mixce-train is writing here. Wait for it to end, or set another `output`."
            ) from e
        except OSError as e:
            raise TrainError(f"{output}: cannot be written to ({e.strerror}). Free it, or set another `output`.") from e

    try:
        world.first(take)
        yield
    finally:
        for lock in held:
            lock.release()


def _lock(output: Path) -> Any:
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(output / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # A network disk without locks: a file with the holder's process id, which the next process looks up.
        lock = SoftFileLock(output / (LOCK + ".pid"), blocking=False)
        lock.acquire()
    return lock


def _sweep(output: Path) -> None:
    for parent in (output, output / "checkpoints"):
        for pattern in (PARTIAL, TRASH):
            for left in parent.glob(pattern + "*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


# ---- whole or absent -----------------------------------------------------------------------------------


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


def first_writes(world: World, folder: Path, action: Callable[[], object]) -> None:
    """Do `action` in the first process; when the disk refuses, raise TrainError in every process."""
    error = _attempt(action) if world.is_first else None
    shown = folder.with_name(folder.name.removeprefix(PARTIAL))
    world.fail_together(
        error and f"{shown}: cannot be saved ({error}). Earlier checkpoints are untouched. Make room, then start again."
    )


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as e:
        return e.strerror or str(e)
    except SafetensorError as e:  # safetensors reports a full disk so
        return str(e)
    return None


def publish_text(path: Path, text: str) -> None:
    """Write a small file; under its name it is complete or absent. Raises OSError."""
    hidden = path.with_name(PARTIAL + path.name)
    hidden.write_text(text, encoding="utf-8")
    _sync(hidden)
    hidden.replace(path)


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
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
