"""The largest file that the disk of OUT can hold, asked before a byte is written; None if it is unknown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from merge_tool.files import mounted_kinds

_FAT_BYTES = 2**32 - 1
_FAT = frozenset({"vfat", "msdos", "fat", "fat32"})


def largest_file(folder: Path) -> int | None:
    """The largest file, in bytes, that the disk of an existing folder can hold; None if unknown, or larger than any
    model."""
    if sys.platform == "win32":
        return largest_of(_windows_kind(folder))
    if sys.platform == "linux":
        return largest_of(_linux_kind(folder))
    try:  # on macOS; Linux's C library answers 32 bits for every file system that it does not know
        bits = os.pathconf(folder, "PC_FILESIZEBITS")
    except (OSError, ValueError, AttributeError):
        return None
    return largest_of_bits(bits)


def largest_of_process() -> int | None:
    """The largest file that this process may write, by its limit (`ulimit -f`); None without a limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def largest_of(kind: str) -> int | None:
    """The largest file by the name of a file system.

    >>> largest_of("vfat"), largest_of("FAT32"), largest_of("ext4")
    (4294967295, 4294967295, None)
    """
    return _FAT_BYTES if kind.lower() in _FAT else None


def largest_of_bits(bits: int) -> int | None:
    """The largest file by the number of bits of a file's size, one of them the sign: 33 for 4 GiB.

    >>> largest_of_bits(33), largest_of_bits(64), largest_of_bits(-1)
    (4294967295, None, None)
    """
    return 2 ** (bits - 1) - 1 if 16 <= bits < 48 else None


def shard_limit(largest: int) -> int:
    """The most data of a shard on a disk whose largest file is `largest`: room is left for the header.

    >>> shard_limit(2**32 - 1), shard_limit(30_000)
    (4000000000, 28125)
    """
    return largest // 10**9 * 10**9 if largest > 2 * 10**9 else max(1, largest * 15 // 16)


def waiting_limit(room: int) -> int:
    """The most data of a shard that waits for its upload, if the disk has little room for two such shards. It is an
    eighth of the room (weights read by range need the most), rounded down to 1, 2 or 5 times a power of ten, so that
    another disk of about that size gives the same shards. At least a megabyte.

    >>> waiting_limit(10_000_000_000), waiting_limit(9_000_000_000), waiting_limit(5_000)
    (1000000000, 1000000000, 1000000)
    """
    share = max(room // 8, 1_000_000)
    power: int = 10 ** (len(str(share)) - 1)
    return max(step * power for step in (1, 2, 5) if step * power <= share)


def _linux_kind(folder: Path) -> str:
    try:
        return next(reversed(mounted_kinds(folder.stat().st_dev)), "")
    except OSError:
        return ""


def _windows_kind(folder: Path) -> str:
    if sys.platform != "win32":
        return ""
    import ctypes

    name = ctypes.create_unicode_buffer(64)
    root = f"{folder.resolve().anchor}"
    is_known = ctypes.windll.kernel32.GetVolumeInformationW(root, None, 0, None, None, None, name, len(name))
    return name.value if is_known else ""
