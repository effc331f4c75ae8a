"""A file appears whole or not at all: written beside its name, synced, renamed, and the folder synced.

Errors of write and fsync are errors; the message names the file and the next step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from merge_tool.errors import OutputError, reason, shown

_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2) if os.name == "nt" else ()  # seconds
_TRIES = 100  # to empty a folder in which others work
# What file systems say whose folders cannot be synced
_NO_FOLDER_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EACCES, errno.ENOSYS}
)
_PART_OF_RUN = re.compile(r"\.[0-9a-f]{16}\.part$")


def leads_out(name: str, *, is_windows: bool = os.name == "nt") -> bool:
    """Whether a relative name that a file gives leads out of the folder, as a path of this system or of Windows.

    >>> leads_out("sub/x.json"), leads_out("../x"), leads_out("..\\\\x"), leads_out("C:\\\\x"), leads_out("/x")
    (False, True, True, True, True)
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    has_drive = bool(windows.drive) and (is_windows or "\\" in name)  # elsewhere `a:b` is a name like any other
    rooted = posix.is_absolute() or bool(windows.root) or has_drive
    return rooted or ".." in {*posix.parts, *windows.parts} or "\0" in name or not posix.parts


def mounted_kinds(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """The names of the file systems that Linux has mounted from a device: `ext4`, `fuse.sshfs`. Empty elsewhere."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        number = f"{os.major(device)}:{os.minor(device)}"
    except (OSError, AttributeError):
        return []
    return [line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [number]]


def free_bytes(folder: Path) -> int | None:
    """The free space of a folder's disk; None if the file system does not say (ramfs, FUSE without sizes)."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def write_whole(path: Path, pieces: Iterable[bytes], part: Path | None = None) -> None:
    """Write a file by way of `part` (default: its name and .part): a kill leaves the old file, or the new one.

    Raises OSError.
    """
    part = part_path(path) if part is None else part
    with part.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        sync_file(file.fileno())
    patiently(lambda: part.replace(path))


def patiently(action: Callable[[], Any]) -> None:
    """Rename or remove a file. On Windows a virus scanner, an indexer or a preview may hold a new file for a moment,
    which refuses both: then the action is tried again for about ten seconds."""
    for seconds in _WAITS:
        try:
            action()
            return
        except PermissionError:
            time.sleep(seconds)
    action()


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, though workers on other hosts still make and remove files there."""
    for _ in range(_TRIES):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:  # of a file that its worker has removed
            if not folder.exists():
                return
        except OSError as e:
            if e.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        else:
            return
    shutil.rmtree(folder)


def part_path(path: Path, run: str = "") -> Path:
    """The unfinished file; of a `run`, if several may write the same one."""
    return path.with_name(f"{path.name}.{run}.part" if run else f"{path.name}.part")


def is_part_of_run(name: str) -> bool:
    return _PART_OF_RUN.search(name) is not None


def rename_synced(source: Path, target: Path) -> None:
    """Rename within one file system and make the new name durable."""
    try:
        patiently(lambda: source.replace(target))
        sync_folder(target.parent)
    except OSError as e:
        raise write_failed(target, e) from e


def sync_file(fd: int) -> None:
    """Make a file's bytes durable. On macOS fsync leaves them in the drive's cache, which F_FULLFSYNC empties."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


def sync_folder(folder: Path) -> bool:
    """fsync a folder, so that the names in it survive a power cut. False if the file system cannot (some FUSE drivers,
    some shares). Windows has no such call. Raises OSError if the disk fails."""
    if os.name == "nt":
        return True
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:  # a folder that may be written, not read
        return False
    try:
        sync_file(fd)
    except OSError as e:
        if e.errno not in _NO_FOLDER_SYNC:
            raise
        return False
    finally:
        os.close(fd)
    return True


def write_failed(path: Path, e: OSError) -> OutputError:
    next_step = "The same command continues from the last finished shard."
    if e.errno in {errno.ENOSPC, errno.EDQUOT}:
        next_step = "Free some space, then run the same command: it continues from the last finished shard."
    if e.errno == errno.EFBIG:
        next_step = (
            "The disk, or a limit (ulimit -f), takes no file so large. Give a smaller --max-shard-size (4GB for FAT32; "
            "OUT is then a folder) or another disk."
        )
    return OutputError(f"{shown(path)}: writing failed ({reason(e)}). {next_step}")
