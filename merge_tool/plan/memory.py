"""The memory budget of a merge, and its division. All sizes in bytes."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from merge_tool.arrays import STORED_DTYPES, TILE
from merge_tool.checkpoint.quantise import extra_bytes
from merge_tool.errors import RecipeError, counted
from merge_tool.methods.inner import Scratch
from merge_tool.plan.limits import LEAST_BYTES, MAX_JOBS
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.plan.system_memory import available_bytes, resident_bytes

DEFAULT_MOST_BYTES = 256_000_000
_COMMAND_BYTES = 48_000_000  # interpreter, imports and headers of a usual model: about 40 MB
_RESERVE_BYTES = 3_000_000  # threads' stacks, malloc's overhead, the journal: at most 2.0 MB measured
_PER_TENSOR_BYTES = 300  # findings until a shard is done, and the shard's header: 290 measured
_CARD_BYTES = 5_000_000  # huggingface_hub's card class and YAML, imported after the buffers are given back
_LARGEST_CHUNK_TILES = 2  # larger chunks were no faster, and fall out of the caches
SUM_BLOCK = 16_384  # elements that are added at a time, if inputs are read one by one
_STEPS_ROWS = 6  # float64 tiles that a method's expressions hold at a time, beside its inputs
_SLACK_BYTES = 2_000_000  # run-to-run variation of one command's resident memory


@dataclass(frozen=True, slots=True)
class Layout:
    """What the streaming loop allocates: `jobs` slots of one chunk each, and an arena for tensors read once.

    Each job has `scratch_bytes` for the sums and the combine of two weights, and `temporary_bytes` for short-lived
    arrays. A method's passes hold `state_bytes`; the scales of 8-bit output that are kept have `scales_bytes`.
    """

    jobs: int
    chunk_elements: int
    slot_bytes: int
    arena_bytes: int
    scratch_bytes: int = Scratch.NBYTES
    temporary_bytes: int = 0
    state_bytes: int = 0
    scales_bytes: int = 0

    @property
    def buffer_bytes(self) -> int:
        each = self.slot_bytes + self.scratch_bytes + self.temporary_bytes
        return self.jobs * each + self.arena_bytes + self.state_bytes + self.scales_bytes


@dataclass(frozen=True, slots=True)
class Machine:
    """A merge's limits: `budget` bytes of resident memory for the whole process, and the number of threads."""

    budget: int
    jobs: int

    @property
    def header_bytes(self) -> int:
        """The largest header that is read into memory."""
        return max(4_000_000, (self.budget - resident_bytes()) // 3)


def machine(memory_bytes: int | None = None, jobs: int | None = None) -> Machine:
    """The requested limits, or the defaults. Raises RecipeError for limits that no merge can keep."""
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected at least 1.")
    budget = default_budget(resident_bytes()) if memory_bytes is None else memory_bytes
    if budget < LEAST_BYTES:
        raise RecipeError(f"The memory budget is {budget:,} bytes, expected at least {LEAST_BYTES // 10**6}MB.")
    return Machine(budget, jobs or default_jobs())


def default_jobs() -> int:
    """The cores this process may use, at most MAX_JOBS."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may refuse it
            cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_JOBS, cores))


def default_budget(held: int) -> int:
    """A quarter of the memory that the machine or its cgroup has left, within LEAST_BYTES and DEFAULT_MOST_BYTES. The
    budget is for the whole process. A Python process that already holds more than the command line does at its start
    (after importing torch, for example) gets the difference on top.
    """
    available = available_bytes()
    budget = max(LEAST_BYTES, min(DEFAULT_MOST_BYTES, (available or 4 * DEFAULT_MOST_BYTES) // 4))
    return budget + max(0, held - _COMMAND_BYTES)


def plan_layout(plan: MergePlan, budget: int, jobs: int, *, held: int | None = None) -> Layout:
    """Divide `budget` bytes. The process `held` so many bytes before the merge (default: as many as it holds now).

    If memory is short: fewer jobs and smaller chunks, then RecipeError with the least budget that suffices.
    """
    held = resident_bytes() if held is None else held
    state = _state_bytes(plan)
    fixed = held + _RESERVE_BYTES + _PER_TENSOR_BYTES * plan.num_tensors + state
    room = budget - fixed
    unit = max((plan.tile(job) for job in plan.jobs()), default=TILE)
    unit = max(TILE, -(-unit // TILE) * TILE)
    tiles = min(_LARGEST_CHUNK_TILES, max((-(-job.numel // unit) for job in plan.jobs()), default=1) or 1)
    jobs = max(1, min(jobs, plan.num_tensors * tiles))
    scratch = Scratch.NBYTES if any(plan.is_weighted(job) for job in plan.jobs()) else 0
    slot_bytes, temporary = _job_bytes(plan, tiles * unit)
    while jobs * (slot_bytes + temporary + scratch) > room // 2 and (tiles > 1 or jobs > 1):
        if tiles > 1:
            tiles //= 2
            slot_bytes, temporary = _job_bytes(plan, tiles * unit)
        else:
            jobs -= 1
    needed = max(fixed + jobs * (slot_bytes + temporary + scratch), held + _CARD_BYTES)
    if needed > budget:
        enough = _megabytes(needed + _SLACK_BYTES)
        raise RecipeError(
            f"This merge of {counted(plan.num_tensors, 'tensor')} needs at least {enough} of memory, the budget is "
            f"{_megabytes(budget)}. Give --memory {enough} or more."
        )
    rest = room - jobs * (slot_bytes + temporary + scratch)
    scales = min(_stored_scales_bytes(plan), rest // 4)
    return Layout(
        jobs=jobs,
        chunk_elements=tiles * unit,
        slot_bytes=slot_bytes,
        arena_bytes=_arena_bytes(plan, rest - scales),
        scratch_bytes=scratch,
        temporary_bytes=temporary,
        state_bytes=state,
        scales_bytes=scales,
    )


def _job_bytes(plan: MergePlan, chunk: int) -> tuple[int, int]:
    """The largest slot for a chunk of so many elements, and the most memory that reading and merging a chunk takes
    beside it."""
    slot = temporary = finishing = 0
    for job in plan.jobs():
        slot = max(slot, _slot_bytes(plan, job, chunk))
        reading = max(source.extra_bytes(min(chunk, source.info.numel)) for source in job.sources)
        rows = len(job.sources) + _STEPS_ROWS
        merging = 8 * rows * min(plan.tile(job), job.numel) if plan.has_steps(job) else 0
        if plan.is_summed(job):
            merging = 3 * 8 * SUM_BLOCK
        temporary = max(temporary, reading, merging if job.scaling is None else extra_bytes(job.numel))
        finishing = max(finishing, _scales_bytes(plan, job))  # scales of the tensor before may still be written
    return slot, temporary + finishing


def _slot_bytes(plan: MergePlan, job: TensorJob, chunk: int) -> int:
    """A chunk of all inputs and of the output. If inputs are added one by one: of one input, the sums and the
    output."""
    if plan.is_summed(job):
        length, rows = min(chunk, job.numel), len(set(job.values))
        itemsize = STORED_DTYPES[job.out.dtype].itemsize
        return aligned(input_bytes(job, length)) + aligned(8 * rows * length) + aligned(length * itemsize)
    infos = (*(source.info for source in job.sources), job.out)
    return sum(aligned(min(chunk, i.numel) * STORED_DTYPES[i.dtype].itemsize) for i in infos)


def input_bytes(job: TensorJob, length: int) -> int:
    """The bytes of so many elements of the widest input."""
    return max(length * STORED_DTYPES[source.info.dtype].itemsize for source in job.sources)


def _state_bytes(plan: MergePlan) -> int:
    """The most memory that the passes over one tensor hold, for all outputs."""
    if not any(plan.may_take_passes(job) for job in plan.jobs()):
        return 0
    state = largest = 0
    for job in plan.jobs():
        largest = max(largest, _scales_bytes(plan, job))
        if plan.has_steps(job):
            outputs = range(len(plan.labels)) if len(set(job.values)) > 1 else (0,)
            state = max(state, sum(plan.method.state_bytes(job.spec(0, output)) for output in outputs))
    return max(state, largest)


def _scales_bytes(plan: MergePlan, job: TensorJob) -> int:
    """The largest magnitude of every group, in float64, and the scales made from them, in every output."""
    if job.scaling is None:
        return 0
    itemsize = STORED_DTYPES[job.scaling.like.scales.info.dtype].itemsize
    return len(plan.labels) * job.scaling.num_scales * (8 + itemsize)


def _stored_scales_bytes(plan: MergePlan) -> int:
    """The stored scales of a shard, at most. If they are kept, a weight's passes are not made again for its codes."""
    shards = (sum(job.out.nbytes for job in shard.jobs if job.is_scales) for shard in plan.shards)
    return len(plan.labels) * max(shards, default=0)


def _arena_bytes(plan: MergePlan, room: int) -> int:
    """The part of `room` that tensors read once can use: twice the largest tensor that fits, so that reading and
    writing overlap."""
    sizes = [region_bytes(plan, job) for job in plan.jobs()]
    fitting = [size for size in sizes if size <= room]
    largest = max(fitting, default=0)
    second = max((size for size in fitting if size <= room - largest), default=0)
    return max(0, min(sum(fitting), largest + second))


def region_bytes(plan: MergePlan, job: TensorJob) -> int:
    """The arena bytes of a tensor: all its inputs, whole. 0 if it is only copied, or its inputs are added one by
    one."""
    is_once = job.is_copied or plan.is_summed(job)
    return 0 if is_once else sum(aligned(source.info.nbytes) for source in job.sources)


def aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def estimate_peak(plan: MergePlan, layout: Layout, held: int) -> int:
    """The expected peak resident memory, in bytes, of a process that holds `held` now."""
    grown = held + 1_500_000 + _PER_TENSOR_BYTES * plan.num_tensors
    return max(grown + layout.buffer_bytes, grown + _CARD_BYTES)


def _megabytes(nbytes: int) -> str:
    return f"{-(-nbytes // 1_000_000)}MB"
