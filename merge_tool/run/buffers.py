"""The memory of the streaming loop: anonymous, allocated once, given back to the system at the end."""

from __future__ import annotations

import mmap

import numpy as np

from merge_tool.arrays import STORED_DTYPES, Array
from merge_tool.methods.inner import Scratch
from merge_tool.plan.memory import Layout, aligned
from merge_tool.plan.plan import TensorJob


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
