"""The order in which the loop reads the tensors' inputs, for who must fetch them first."""

from __future__ import annotations

from collections.abc import Iterator

from merge_tool.checkpoint.blocks import Use
from merge_tool.plan.memory import Layout, region_bytes
from merge_tool.plan.plan import MergePlan, TensorJob


def read_order(plan: MergePlan, layout: Layout, skip: frozenset[int] = frozenset()) -> Iterator[Use]:
    """Every time that a tensor's inputs are read: once if they fit the arena or are copied. A larger tensor is read
    again, after the first pass over the next one (run.py)."""
    waiting: TensorJob | None = None
    for job in (job for shard in plan.shards if shard.number not in skip for job in shard.jobs):
        fits = 0 < region_bytes(plan, job) <= layout.arena_bytes
        is_once = job.is_copied or job.is_scales or plan.is_summed(job) or fits
        yield Use(job.number, job.sources, is_again_later=not is_once)
        if waiting is not None:
            yield Use(waiting.number, waiting.sources)
        waiting = None if is_once else job
    if waiting is not None:
        yield Use(waiting.number, waiting.sources)
