"""A merge whose output stays in memory, for a judge in this process. Nothing is written to a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from merge_tool.arrays import STORED_DTYPES, Array
from merge_tool.plan.plan import MergePlan, ShardPlan
from merge_tool.plan.prepare import Prepared
from merge_tool.run.findings import Finding, Findings
from merge_tool.run.run import ShardDone, run_plan
from merge_tool.run.work import check_exact_tensors


class _Buffer:
    """The bytes of one shard, in place of a file."""

    def __init__(self, nbytes: int) -> None:
        self.content: Array = np.empty(nbytes, np.uint8)

    def write(self, offset: int, data: memoryview) -> None:
        self.content[offset : offset + data.nbytes] = np.frombuffer(data, np.uint8)

    def hash_next(self, data: memoryview) -> None:
        """Nothing is hashed."""

    def sync(self) -> str:
        return ""

    def abandon(self) -> None:
        """Nothing is open."""


class _Memory:
    """The sink of the run: shards in memory."""

    def __init__(self) -> None:
        self.buffers: dict[int, _Buffer] = {}

    def open_shard(self, shard: ShardPlan, header: bytearray) -> tuple[_Buffer]:
        buffer = self.buffers[shard.number] = _Buffer(shard.size)
        return (buffer,)

    def finish_shard(self, done: ShardDone, writers: Any) -> None:
        """Its bytes are all there."""


def merge_in_memory(
    prepared: Prepared,
    *,
    known: Callable[[Any], Finding | None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> tuple[Mapping[str, Array], Findings]:
    """The merged tensors by name, in the output's order, shapes and types (bfloat16 from ml_dtypes), and the findings.
    Holds the whole output in memory. Raises the errors of a merge."""
    plan, memory, findings = prepared.plan, _Memory(), Findings()
    if known is None:
        check_exact_tensors(plan)
    for done in run_plan(plan, memory, prepared.layout, on_progress=on_progress, known=known):
        for number in done.findings:
            findings.add(number, done.findings[number])
    return _tensors(plan, memory), findings


def _tensors(plan: MergePlan, memory: _Memory) -> dict[str, Array]:
    tensors = {}
    for shard in plan.shards:
        content = memory.buffers[shard.number].content
        for job in shard.jobs:
            raw = content[job.out.offset : job.out.offset + job.out.nbytes]
            tensors[job.out.name] = raw.view(STORED_DTYPES[job.out.dtype]).reshape(job.out.shape)
    return tensors
