"""Where bytes come from: a ByteSource is a name, a size and `read_into`. Knows no format.

Local files are read by position into the caller's buffer (no mmap: a mapped file stays resident, and a truncated one
kills the process). A file that changes while it is read is an error. A file that is still to be fetched has only its
header.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.errors import CheckpointError, next_step, reason, shown
from merge_tool.files import mounted_kinds

_RENUMBERING = ("fuse", "cifs", "smb", "9p", "virtiofs", "vboxsf", "msdos", "vfat", "exfat")  # without numbers on disk


class ByteSource(Protocol):
    """Bytes that can be read by position. `name` is for messages and has none of the user's folders."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path:
        """Where the file is, or will be once it is fetched."""

    @property
    def size(self) -> int: ...

    @property
    def mtime_ns(self) -> int:
        """The time of the last change, in nanoseconds."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on; raises CheckpointError if it cannot be filled."""

    def acquire(self) -> None:
        """Announce reads: the source may keep files open until `release`."""

    def release(self) -> None: ...

    def prefetch(self, offset: int, length: int) -> None:
        """Hint: these bytes are read soon."""

    def forget(self, offset: int, length: int) -> None:
        """Hint: these bytes are not read again."""


class TensorSource(Protocol):
    """One tensor's elements by range, flat: bytes of a file, or values computed from several tensors.

    `info` has the tensor's name in its checkpoint, and the dtype and shape as read. `stored_dtype` is the dtype in
    which a merge writes it by default. `where` names the file for messages; `files` are all files that are read.
    """

    @property
    def info(self) -> TensorInfo: ...

    @property
    def stored_dtype(self) -> str: ...

    @property
    def where(self) -> str: ...

    @property
    def files(self) -> Sequence[ByteSource]: ...

    def read_into(self, start: int, values: Any) -> None:
        """Fill a flat array of dtype `info.dtype` with the elements from `start` on. Safe from several threads."""

    def acquire(self) -> None:
        """Announce reads: open what is needed until `release`."""

    def release(self) -> None: ...

    def prefetch(self, start: int, stop: int) -> None:
        """Hint: these elements are read soon."""

    def forget(self, start: int, stop: int) -> None:
        """Hint: these elements are not read again."""

    def extra_bytes(self, count: int) -> int:
        """The memory that reading `count` elements takes in addition to the array that gets them."""


class _Hints(threading.local):
    """What gets this thread's hints while they are only collected."""

    collect: Callable[[Any, int, int], None] | None = None


_HINTS = _Hints()


def collect_hints(source: TensorSource, collect: Callable[[Any, int, int], None]) -> None:
    """Call `collect(file, offset, length)` for what a source prefetches for all its elements; nothing is read."""
    _HINTS.collect = collect
    try:
        source.prefetch(0, source.info.numel)
    finally:
        _HINTS.collect = None


def is_collected(file: Any, offset: int, length: int) -> bool:
    """Whether this thread's hints are only collected, as this one now is."""
    if _HINTS.collect is None:
        return False
    if length > 0:
        _HINTS.collect(file, offset, length)
    return True


@contextlib.contextmanager
def acquired(sources: Iterable[TensorSource]) -> Iterator[None]:
    """Hold the sources between `acquire` and `release`: some keep what takes a pass over the tensor to compute."""
    with contextlib.ExitStack() as opened:
        for source in sources:
            source.acquire()
            opened.callback(source.release)
        yield


class LocalFile:
    """One regular file, open while a reader has acquired it. Several threads may share it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        try:
            status = path.stat()
        except OSError as e:
            raise CheckpointError(f"{shown(name)}: cannot be read ({reason(e)}).{next_step(e)}") from e
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{shown(name)}: is not a regular file.")
        self.size = status.st_size
        self.identity = _identity(status)
        self._keeps_inode = True
        self._lock = threading.Lock()
        self._users = 0
        self._fd = -1

    @property
    def mtime_ns(self) -> int:
        return self.identity[2]

    def acquire(self) -> None:
        with self._lock:
            if self._users == 0:
                self._fd = self._open()
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                with contextlib.suppress(OSError):  # every byte has been read by now
                    os.close(self._fd)
                self._fd = -1

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
            status = os.fstat(fd)
        except OSError as e:
            raise CheckpointError(f"{shown(self.name)}: cannot be opened ({reason(e)}).{next_step(e)}") from e
        if self._is_another(status):
            os.close(fd)
            raise self._changed()
        return fd

    def _is_another(self, status: os.stat_result) -> bool:
        """Whether a file is not the one that was planned, by size and time; by inode only where that is a file's own:
        some drivers number a file anew whenever they are asked (sshfs, mergerfs, exfat-fuse)."""
        now = _identity(status)
        if now[1:] != self.identity[1:]:
            return True
        if now[0] != self.identity[0] and self._keeps_inode:
            self._keeps_inode = has_stable_inodes(mounted_kinds(status.st_dev))
            return self._keeps_inode
        return False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.acquire()
        try:
            self._fill(offset, buffer.cast("B"))
        finally:
            self.release()

    def _fill(self, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(offset + done, buffer[done:])
                if count == 0 and os.fstat(self._fd).st_size != self.size:
                    raise self._changed()
                if count == 0:
                    raise CheckpointError(
                        f"{shown(self.name)}: the file ends at byte {offset + done:,}, expected {self.size:,}; "
                        "it was cut short while we read it."
                    )
                done += count
            status = os.fstat(self._fd)
        except OSError as e:
            raise CheckpointError(
                f"{shown(self.name)}: reading failed at byte {offset + done:,} ({reason(e)}).{next_step(e)}"
            ) from e
        if self._is_another(status):  # another program wrote into the file
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{shown(self.name)}: the file changed while it was being merged. "
            "Wait until it is complete, then run the same command: it continues, or says what differs."
        )

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:  # Windows: one shared position
            os.lseek(self._fd, offset, os.SEEK_SET)
            chunk = os.read(self._fd, min(len(buffer), 1 << 20))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def prefetch(self, offset: int, length: int) -> None:
        if not is_collected(self, offset, length):
            self._advise(offset, length, "POSIX_FADV_WILLNEED")

    def forget(self, offset: int, length: int) -> None:
        self._advise(offset, length, "POSIX_FADV_DONTNEED")

    def _advise(self, offset: int, length: int, advice: str) -> None:
        if hasattr(os, "posix_fadvise") and self._fd >= 0 and length > 0:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, length, getattr(os, advice))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is on a server. `where` is its name in messages; a file of the Hub has a repository and a commit, an
    object the SHA-256 with which it was stored."""

    where: str
    url: str
    repo: str | None = None
    commit: str | None = None
    sha256: str = ""


class ComingFile:
    """A file that is still to be fetched: its size is known, and its first `length` bytes are in `held`, at
    `held_offset`. `etag` is what the server calls its content, `place` where it is.

    A ByteSource for planning: reading behind these bytes is an error. For one thread only.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        size: int,
        held: IO[bytes],
        held_offset: int,
        length: int,
        *,
        etag: str = "",
        place: Place | None = None,
    ) -> None:
        self.path, self.name, self.size = path, name, size
        self.length, self.etag, self.place = length, etag, place
        self.mtime_ns = time.time_ns()  # newer than any output: none was made of the file that is to be fetched
        self._held, self._held_offset = held, held_offset

    @property
    def digest(self) -> str:
        """The SHA-256 that the server has of the file, if it has one: of a large file of the Hub it is the ETag."""
        return self.etag if self.place is None or self.place.repo else self.place.sha256

    def identify(self) -> None:
        """Let `mtime_ns` stand for the content: a negative number, made of what the server calls it, because the time
        of its last change is not known. An output may have been made of it, by range."""
        digest = hashlib.sha256(f"{self.etag} {self.size}".encode()).digest()
        self.mtime_ns = -int.from_bytes(digest[:7], "little")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        count = len(buffer.cast("B"))
        if offset + count > self.length or self._held.closed:
            raise CheckpointError(f"{shown(self.name)}: is not fetched yet, only its header is.")
        self._held.seek(self._held_offset + offset)
        buffer.cast("B")[:] = self._held.read(count)

    def acquire(self) -> None:
        """Nothing is opened."""

    def release(self) -> None:
        """Nothing was opened."""

    def prefetch(self, offset: int, length: int) -> None:
        """Nothing can be."""

    def forget(self, offset: int, length: int) -> None:
        """Nothing is kept."""


def sha256_of(path: Path, on_read: Callable[[int], None] = lambda nbytes: None) -> str:
    """The digest of a whole file in hex, read a megabyte at a time; `on_read` is told how many bytes were read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            on_read(len(piece))
    return digest.hexdigest()


def has_stable_inodes(kinds: Sequence[str]) -> bool:
    """Whether a file keeps its inode number on file systems of these names. True of Linux's own, not known of others.

    >>> has_stable_inodes(["ext4"]), has_stable_inodes(["fuse.sshfs"]), has_stable_inodes([])
    (True, False, False)
    """
    return bool(kinds) and not any(kind.startswith(_RENUMBERING) for kind in kinds)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
