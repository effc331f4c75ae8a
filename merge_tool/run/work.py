"""How one tensor's output is computed from its chunks, independent of who reads, schedules and writes them.

A work takes every chunk of its inputs as often as it needs (`add`, then `settle`), then merges chunk by chunk.
Chunks are whole tiles, and their number and order change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, TILE, Array, same_values
from merge_tool.errors import DataError, counted, listed, shown
from merge_tool.methods.inner import Scratch
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.run.findings import Finding
from merge_tool.run.stepped import Stepped
from merge_tool.run.summed import Summed
from merge_tool.run.values import Chunks, converted
from merge_tool.run.weighted import Scaled, ScalesStore, Weighted


class Work(Protocol):
    """One tensor's work. `tile` elements belong together. `needs_chunks` says whether `add` wants them (again)."""

    tile: int

    @property
    def finding(self) -> Finding:
        """The finding, once no more chunks are needed."""

    @property
    def needs_chunks(self) -> bool: ...

    @property
    def in_order(self) -> bool:
        """Whether chunks must be added in file order."""

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        """Take the elements from `start` on of every input, flat. From several threads."""

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        """All chunks were added: decide what comes next. Raises DataError for values that cannot be merged."""

    def resume(self, finding: Finding) -> bool:
        """Begin from an earlier finding instead of all chunks; false if that is not enough."""

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        """Elements of an output: `out`, filled, or an input as it is. Of scales, which are not where the inputs are,
        without inputs."""


def start_work(plan: MergePlan, job: TensorJob, store: ScalesStore | None = None) -> Work:
    """The work of one job. `store` has what a weight's first job in 8 bits leaves for the second."""
    if job.is_copied:
        return Copied(job)
    if job.exact:
        return Exact(plan, job)
    if job.scaling is not None:
        return Scaled(plan, job, store)
    if plan.is_weighted(job):
        return Weighted(plan, job)
    return Summed(plan, job) if plan.is_summed(job) else Stepped(plan, job)


class Copied:
    """One source as it is, or in the output's dtype.

    The bytes pass through this process anyway, because they are hashed; so copy_file_range saves nothing
    (bench/copy_files.py).
    """

    tile, needs_chunks, in_order = TILE, False, False
    finding = Finding()

    def __init__(self, job: TensorJob) -> None:
        self.job = job

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        raise AssertionError("nothing is added up")

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        raise AssertionError("nothing is added up")

    def resume(self, finding: Finding) -> bool:
        return True

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        return converted(self.job, start, inputs[0], out)


class Exact:
    """Integers and booleans: the base's, if all are equal or the plan keeps the base's."""

    tile, needs_chunks, in_order = TILE, True, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        self.plan, self.job, self.finding = plan, job, Finding()
        self.differs = threading.Event()  # set by any thread, and never taken back

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        if not self.differs.is_set() and not all(same_values(inputs[0], other) for other in inputs[1:]):
            self.differs.set()

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        differs = self.differs.is_set()
        if differs and not self.plan.keeps_base_on_mismatch:
            raise DataError(
                f"{shown(self.job.out.name)}: the values differ between {_models(self.plan)}, and integers have "
                "nothing between them. Give --on-mismatch base to keep the base's."
            )
        self.resume(Finding(equal=not differs, kept_base=differs))

    def resume(self, finding: Finding) -> bool:
        self.needs_chunks, self.finding = False, finding
        return True

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        return inputs[0]


def check_exact_tensors(plan: MergePlan) -> None:
    """Raise DataError naming all integer and boolean tensors that differ, unless the base's are to be kept."""
    if plan.keeps_base_on_mismatch:
        return
    differing = [job.out.name for job in plan.jobs() if job.exact and not _same_values(job)]
    if differing:
        raise DataError(
            f"{counted(len(differing), 'integer tensor differs', 'integer tensors differ')} between {_models(plan)}, "
            f"and integers have nothing between them: {listed(differing)}. Give --on-mismatch base to keep the base's."
        )


def _models(plan: MergePlan) -> str:
    names = sorted(plan.recipe.sources)
    return " and ".join(plan.names[k] for k in names) if len(names) == 2 else "the models"


def _same_values(job: TensorJob, chunk: int = TILE) -> bool:
    dtype = NUMPY_DTYPES[job.first.info.dtype]
    first, other = (np.empty(min(chunk, job.out.numel), dtype) for _ in range(2))
    for start in range(0, job.out.numel, chunk):
        one, two = first[: job.out.numel - start], other[: job.out.numel - start]
        job.first.read_into(start, one)
        for source in job.sources[1:]:
            source.read_into(start, two)
            if not same_values(one, two):
                return False
    return True
