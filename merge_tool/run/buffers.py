"""The memory of the streaming loop, allocated once and given back to the system at the end; and its threads."""

from __future__ import annotations

import _thread
import mmap
import threading
from collections.abc import Callable

import numpy as np

from merge_tool.arrays import STORED_DTYPES, Array
from merge_tool.methods.inner import Scratch
from merge_tool.plan.memory import Layout, aligned
from merge_tool.plan.plan import TensorJob

_START_SECONDS = 30.0


def anonymous(nbytes: int) -> Array:
    """Zeroed memory that goes back to the system with the last array on it."""
    try:
        return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=np.uint8)
    except OSError as e:
        raise MemoryError(f"{nbytes:,} bytes") from e


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
        found, start = [], 0
        for info in (*(source.info for source in job.sources), job.out):
            dtype = STORED_DTYPES[info.dtype]
            found.append(self.slot[start : start + length * dtype.itemsize].view(dtype))
            start += aligned(length * dtype.itemsize)
        return found[:-1], found[-1]


class Worker:
    """Runs `target` in a thread of its own, which does not keep the process alive. `target` deals with its errors.

    threading.Thread.start waits for its thread to say that it runs, forever if the system has no memory for that thread
    to get so far. A merge under a limit on memory must not hang, so this waits with a limit of its own.
    """

    def __init__(self, target: Callable[[], None]) -> None:
        self._begun, self._ended = threading.Event(), threading.Event()
        try:
            _thread.start_new_thread(self._run, (target,))
        except RuntimeError as e:  # how Python says that the system has no memory for its stack
            raise MemoryError("no thread can be started") from e
        if not self._begun.wait(_START_SECONDS):
            raise MemoryError("a thread was started and did not begin")

    def _run(self, target: Callable[[], None]) -> None:
        try:
            self._begun.set()
            target()
        finally:
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()
