"""A file appears whole or not at all: written beside its name, synced, renamed, and the folder synced.

Errors of write and fsync are errors; the message names the file and the next step.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from merge_tool.errors import OutputError, shown

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


def write_whole(path: Path, pieces: Iterable[bytes], part: Path | None = None) -> None:
    """Write a file by way of `part` (default: its name and .part): a kill leaves the old file, or the new one.

    Raises OSError.
    """
    part = part_path(path) if part is None else part
    with part.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def part_path(path: Path, run: str = "") -> Path:
    """The unfinished file; of a `run`, if several may write the same one."""
    return path.with_name(f"{path.name}.{run}.part" if run else f"{path.name}.part")


def is_part_of_run(name: str) -> bool:
    return _PART_OF_RUN.search(name) is not None


def rename_synced(source: Path, target: Path) -> None:
    """Rename within one file system and make the new name durable."""
    try:
        source.replace(target)
        sync_folder(target.parent)
    except OSError as e:
        raise write_failed(target, e) from e


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_failed(path: Path, e: OSError) -> OutputError:
    next_step = "The same command continues from the last finished shard."
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        next_step = "Free some space, then run the same command: it continues from the last finished shard."
    return OutputError(f"{shown(path)}: writing failed ({e.strerror}). {next_step}")
