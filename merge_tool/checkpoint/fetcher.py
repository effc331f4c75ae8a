"""The process that downloads ranges (downloading.py), as the merge sees it: ask for ranges, receive pieces of them.

Questions are lines of JSON on its standard input, its answers frames on its standard output: a number, a length, so
many bytes. A negative length stands for a message: the reason why a range cannot be had. It ends with its input, so
also if we are killed.
"""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from merge_tool.apart import command_of
from merge_tool.errors import FetchError, reason
from merge_tool.streams import has_descriptor

FRAME = struct.Struct("<Ii")  # the range's number, the length of what follows; negative: of a message
PIECE_BYTES = 262_144  # the most that one frame carries
DOWNLOADS = 4  # ranges in flight, if the user says nothing
SMALL_DOWNLOADS = 24  # small ranges in flight, besides


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download waits: `stall_seconds` without a byte end a request, `waits` are the seconds before each
    further try; a try that got bytes does not count."""

    stall_seconds: float = 30.0
    waits: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 30, 60)


PATIENCE = Patience()


class Fetcher:
    """The running process. `on_piece(number, data)` and `on_refusal(number, message)` are called by `receive`, which a
    thread of its own runs; `on_refusal(None, ...)` if the process ends before it is asked to."""

    def __init__(self, downloads: int) -> None:
        try:
            self.process = subprocess.Popen(
                command_of("merge_tool.checkpoint.downloading"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if has_descriptor(2) else subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError as e:
            raise FetchError(f"Python cannot be started to download weights ({reason(e)}).") from e
        self._closed = False
        self._send({"threads": downloads + SMALL_DOWNLOADS, **asdict(PATIENCE)})

    def add_files(self, files: Sequence[dict[str, Any]]) -> None:
        """Name the files: each has `place`, `size` and `etag`. Files are counted from 0."""
        for file in files:
            self._send({"file": file})

    def ask(self, number: int, file: int, start: int, stop: int) -> None:
        """Ask for the bytes [start, stop) of a file."""
        self._send({"range": [number, file, start, stop]})

    def _send(self, question: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `receive` says
            self.process.stdin.write(json.dumps(question).encode() + b"\n")

    def receive(
        self, on_piece: Callable[[int, memoryview], None], on_refusal: Callable[[int | None, str], None]
    ) -> None:
        """Hand on what arrives, until the process ends."""
        pipe, room = self.process.stdout, bytearray(PIECE_BYTES)
        assert pipe is not None
        head = memoryview(bytearray(FRAME.size))
        while _fill(pipe, head):
            number, length = FRAME.unpack(head)
            data = memoryview(room)[: abs(length)]
            if not _fill(pipe, data):
                break
            if length < 0:
                on_refusal(number, bytes(data).decode())
            else:
                on_piece(number, data)
        pipe.close()
        if not self._closed:
            code = self.process.wait()
            on_refusal(None, f"The process that downloads weights ended with code {code}. Its last words are above. ")

    def close(self) -> None:
        self._closed = True
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _fill(pipe: IO[bytes], room: memoryview) -> bool:
    """Fill `room` from a pipe. False if the pipe ends before."""
    done = 0
    while done < len(room):
        count = pipe.readinto(room[done:])  # type: ignore[attr-defined]  # a raw pipe
        if not count:
            return False
        done += count
    return True
