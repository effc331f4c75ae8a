"""The memory of the streaming loop, allocated once and given back to the system at the end; and its threads."""

from __future__ import annotations

import _thread
import contextlib
import mmap
import threading
from collections.abc import Callable

import numpy as np

from merge_tool.arrays import STORED_DTYPES, Array
from merge_tool.errors import WorkerError, reason
from merge_tool.methods.inner import Scratch
from merge_tool.plan.memory import Layout, aligned, input_bytes
from merge_tool.plan.plan import TensorJob

_START_SECONDS = 30.0
_FREED_ONCE = 8 << 20  # bytes; as many as the tiles of a method of many models take, and below glibc's 32 MB


def anonymous(nbytes: int) -> Array:
    """Zeroed memory that returns to the system with the last array that uses it."""
    try:
        return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=np.uint8)
    except OSError as e:
        raise MemoryError(f"{nbytes:,} bytes") from e


def keep_freed_tiles() -> None:
    """Let the C library keep the memory of a tile for the next one.

    glibc gives a freed block back to the system if it is larger than the largest one freed before, up to 32 MB; then
    each tile begins with page faults, a third of a method's CPU time. So one larger block is freed first. No page of it
    is used. Other C libraries are not affected.
    """
    with contextlib.suppress(MemoryError):
        np.empty(_FREED_ONCE, np.uint8)


class Arena:
    """One block of memory, cut into regions first fit. Used under the run's lock."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = anonymous(nbytes)
        self._taken: dict[int, int] = {}  # start -> stop

    def take(self, nbytes: int) -> int | None:
        start = 0
        for begin, end in sorted(self._taken.items()):
            if begin - start >= nbytes:
                break
            start = end
        if start + nbytes > self.nbytes:
            return None
        self._taken[start] = start + nbytes
        return start

    def give_back(self, start: int) -> None:
        del self._taken[start]


class WorkerMemory:
    """One thread's own memory: a slot for a chunk of all inputs and of the output, and scratch for blocks."""

    def __init__(self, layout: Layout) -> None:
        self.slot = anonymous(layout.slot_bytes)
        self.scratch = Scratch(anonymous(Scratch.NBYTES))

    def arrays(self, job: TensorJob, length: int) -> tuple[list[Array], Array]:
        """Flat arrays of `length` elements for every input, and for the output."""
        arrays, start = [], 0
        for info in (*(source.info for source in job.sources), job.out):
            dtype = STORED_DTYPES[info.dtype]
            arrays.append(self.slot[start : start + length * dtype.itemsize].view(dtype))
            start += aligned(length * dtype.itemsize)
        return arrays[:-1], arrays[-1]

    def sums(self, job: TensorJob, length: int, rows: int) -> tuple[Array, Array, Array]:
        """Bytes for `length` elements of the widest input, float64 [rows, length], and a flat array for the output."""
        out = STORED_DTYPES[job.out.dtype]
        sizes = [input_bytes(job, length), 8 * rows * length, length * out.itemsize]
        starts = [0, aligned(sizes[0]), aligned(sizes[0]) + aligned(sizes[1])]
        room, sums, last = (self.slot[start : start + size] for start, size in zip(starts, sizes, strict=True))
        return room, sums.view(np.float64).reshape(rows, length), last.view(out)


class Worker:
    """Runs `target` in a daemon thread. `target` handles its errors; an error that escapes it is kept as `error`.
    Raises WorkerError if no thread can be started.

    threading.Thread.start waits for its thread to say that it runs, forever if the system has no memory for that thread
    to get so far. A merge under a limit on memory must not hang, so this waits with a limit of its own.
    """

    def __init__(self, target: Callable[[], None]) -> None:
        self._begun, self._ended = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        try:
            _thread.start_new_thread(self._run, (target,))
        except RuntimeError as e:
            raise cannot_start(e) from e
        if not self._begun.wait(_START_SECONDS):
            raise WorkerError(
                f"A worker thread did not begin within {_START_SECONDS:g} s: the system is short of memory, or very "
                "busy. Give fewer --jobs, then run the same command: it continues."
            )

    def _run(self, target: Callable[[], None]) -> None:
        try:
            self._begun.set()
            target()
        except BaseException as e:  # noqa: BLE001 - nobody is above this
            self.error = e
        finally:
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()


def cannot_start(e: RuntimeError) -> WorkerError:
    """The error if Python can start no thread: there is no memory for its stack, or a limit is reached."""
    return WorkerError(
        f"The system starts no other thread ({reason(e)}): memory, or the number of threads, is limited. Give fewer "
        "--jobs, then run the same command: it continues."
    )


def ended(error: BaseException | None) -> WorkerError:
    """The error for a thread that ended unexpectedly."""
    cause = f"{type(error).__name__}: {reason(error)}" if error is not None else "it left no message"
    return WorkerError(
        f"A worker thread ended unexpectedly ({cause}). Run the same command: it continues. If that happens again, "
        "please report it."
    )
