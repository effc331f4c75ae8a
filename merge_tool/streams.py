"""Standard output and error that never fail: closed, full, of a foreign encoding, or not there at all.

What is printed must not decide a merge. Streams that are no files (a test's, a notebook's) are left as they are.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Forgiving(io.RawIOBase):
    """Writes to a descriptor, or nowhere once that fails; `error` is that failure. Without a descriptor: nowhere."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._fd is None or self.error is not None:
            return len(data)
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return self._write_blocking(data)
        except OSError as e:
            self.error = e
            return len(data)

    def _write_blocking(self, data: Any) -> int:
        """The reader is slow, and another program has set its pipe so that writing does not wait."""
        try:
            os.set_blocking(self._fd or 0, True)
            return os.write(self._fd or 0, data)
        except OSError as e:
            self.error = e
            return len(data)

    def fileno(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "there is no such stream")
        return self._fd

    def isatty(self) -> bool:
        return self._fd is not None and os.isatty(self._fd)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """sys.stdout and sys.stderr that never raise: what cannot be written is dropped, signs that the encoding lacks are
    escaped."""
    fill_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _forgiving(before[0]), _forgiving(before[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        sys.stdout, sys.stderr = before


def _forgiving(stream: Any) -> Any:
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Forgiving(None)), encoding="utf-8", errors="backslashreplace")
    held = getattr(stream, "buffer", None)
    raw = getattr(held, "raw", held)  # with PYTHONUNBUFFERED there is no buffer between
    if not isinstance(raw, io.FileIO):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    buffer = io.BufferedWriter(_Forgiving(raw.fileno()))
    at_once = raw is held or stream.line_buffering or raw.fileno() == 2
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=at_once)


def write_error() -> OSError | None:
    """Why standard output could not be written, if so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Forgiving) else None


def fill_descriptors() -> None:
    """Open the null device in place of closed standard descriptors (`2>&-`): otherwise the next file that is opened,
    a shard perhaps, gets the number of standard error, and whatever prints prints into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != fd:
                    os.dup2(opened, fd)
                    os.close(opened)


def has_descriptor(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
