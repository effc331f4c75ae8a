"""One safetensors file, written at known offsets in any order, hashed in file order, whole or not at all.

The file is `<name>.part` until `publish`: header first, then tensors' bytes at their offsets, then fsync,
then rename, then fsync of the folder. Errors of write and fsync are errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from merge_tool.files import part_path, rename_synced, sync_file, write_failed


class ShardWriter:
    """Writes `path` through `path.part`, with the `run` in that name. Several threads may call `write`; the caller
    orders the calls of `hash_next`."""

    def __init__(self, path: Path, header: bytes | bytearray, *, run: str = "", flush_bytes: int | None = None) -> None:
        self.path = path
        self.part = part_path(path, run)
        self._flush_bytes = flush_bytes
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._unflushed = 0
        self.size = 0
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self.part.unlink(missing_ok=True)
            self._fd = os.open(self.part, flags, 0o666)
        except OSError as e:
            raise write_failed(self.part, e) from e
        try:
            self.write(0, memoryview(header))
            self.hash_next(memoryview(header))
        except BaseException:
            self.abandon()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset`."""
        done = 0
        try:
            while done < len(data):
                done += self._write_some(offset + done, data[done:])
            if self._flush_bytes:
                self._flush(offset, done)
        except OSError as e:
            raise write_failed(self.part, e) from e

    def _write_some(self, offset: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, data, offset)
        with self._lock:  # Windows: one shared position
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, data)

    def _flush(self, offset: int, length: int) -> None:
        """Under memory pressure: bound the dirty pages, and drop the clean ones from the cache."""
        with self._lock:
            self._unflushed += length
            if self._unflushed < (self._flush_bytes or 0):
                return
            self._unflushed = 0
        getattr(os, "fdatasync", os.fsync)(self._fd)
        self._drop_cache()

    def _drop_cache(self) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only a hint
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def hash_next(self, data: memoryview) -> None:
        """Hash the next bytes in file order."""
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> str:
        """Make the bytes durable and close the file; returns its SHA-256 in hex."""
        try:
            sync_file(self._fd)
            self._drop_cache()
            fd, self._fd = self._fd, -1
            os.close(fd)
        except OSError as e:
            raise write_failed(self.part, e) from e
        return self._hash.hexdigest()

    def publish(self) -> None:
        """Give the file its name; call after `sync`."""
        rename_synced(self.part, self.path)

    def abandon(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # the file is given up
                os.close(self._fd)
            self._fd = -1


class RegionWriter(ShardWriter):
    """Writes a region of a file that others write at the same time: the bytes of consecutive tensors, or with `header`
    also the file's beginning. The file has all of its `size` from the start, and no name of its own. The digest is that
    of the region."""

    def __init__(
        self, path: Path, size: int, header: bytes | bytearray = b"", *, flush_bytes: int | None = None
    ) -> None:
        self.path = self.part = path
        self._flush_bytes = flush_bytes
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._unflushed = self.size = 0
        flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as e:
            raise write_failed(path, e) from e
        try:
            if os.fstat(self._fd).st_size < size:
                os.ftruncate(self._fd, size)
            self.write(0, memoryview(header))
            self.hash_next(memoryview(header))
        except OSError as e:
            self.abandon()
            raise write_failed(path, e) from e
        except BaseException:
            self.abandon()
            raise

    def publish(self) -> None:
        """The region is where it belongs."""
