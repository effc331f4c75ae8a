"""Tensors of an output in 8 bits against its parents, by sample: codes by the output's own scales, bit for bit, and
rows of these scales, each from all the values that share them. One scale for a whole tensor takes all of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from merge_tool.arrays import STORED_DTYPES, TILE, Array, as_bytes, same_values
from merge_tool.checkpoint.quantise import encode_scaled, largest_of
from merge_tool.checkpoint.source import LocalFile, TensorSource
from merge_tool.errors import shown
from merge_tool.methods.inner import METHODS, Weights
from merge_tool.models.side_files import REPORT
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.run.buffers import WorkerMemory
from merge_tool.run.findings import Findings
from merge_tool.run.work import merge_wide, scales_of
from merge_tool.verify.checks import Checks, check_bytes


@dataclass(frozen=True, slots=True)
class _Merge:
    """How a weight's values come about at `t`, by the findings; `equal` parents need no weights."""

    t: float
    equal: bool
    weights: Weights | None


class ScaledSample:
    """Checks codes and scales of one output; `share` is how much of each."""

    def __init__(
        self,
        checks: Checks,
        files: Mapping[int, LocalFile],
        plan: MergePlan,
        findings: Findings,
        share: float,
        worker: WorkerMemory,
    ) -> None:
        self.checks, self.plan, self.findings, self.share, self.worker = checks, plan, findings, share, worker
        self.chance = random.Random()
        self.places: dict[str, tuple[TensorJob, LocalFile]] = {
            job.out.name: (job, files[shard.number]) for shard in plan.shards for job in shard.jobs if job.scaling
        }

    def check(self, job: TensorJob) -> None:
        assert job.scaling is not None
        codes = self.places[job.base.info.name][0]
        if self.findings[job.number].equal != self.findings[codes.number].equal:
            self.checks.add(f"{REPORT}: {shown(job.out.name)}: says otherwise whether the parents are equal.")
            return
        how = self._how(codes)
        if how is None:
            return
        with np.errstate(all="ignore"):  # scales of the output may be zero, or no numbers
            if job.is_scales:
                self._check_scales(job, how)
            else:
                self._check_codes(job, how)

    def _how(self, codes: TensorJob) -> _Merge | None:
        finding, t = self.findings[codes.number], codes.ts[0]
        if finding.equal or t in (0, 1):
            return _Merge(t, finding.equal, None)
        if finding.sums is None:
            self.checks.add(f"{REPORT}: {shown(codes.out.name)}: has no sums.")
            return None
        return _Merge(t, False, METHODS[self.plan.method].weights(finding.sums, t))

    def _chosen(self, count: int) -> list[int]:
        return sorted(self.chance.sample(range(count), min(count, max(1, round(self.share * count)))))

    def _inputs(self, job: TensorJob, start: int, stop: int) -> tuple[list[Array], Array]:
        inputs, out = self.worker.arrays(job, stop - start)
        for source, values in zip(job.sources, inputs, strict=True):
            source.read_into(start, values)
        return inputs, out

    # ------------------------------------------------------------------------------------ codes

    def _check_codes(self, job: TensorJob, how: _Merge) -> None:
        assert job.scaling is not None
        stored = job.handed_on(0, equal=how.equal)
        scales = None if stored else self._scales_there(job)
        for tile in self._chosen(-(-job.numel // TILE)):
            start, stop = tile * TILE, min((tile + 1) * TILE, job.numel)
            inputs, out = self._inputs(job, start, stop)
            if how.equal and not same_values(*inputs):
                self.checks.add(f"{REPORT}: {shown(job.out.name)}: says that the parents are equal; they are not.")
                return
            if stored is not None:
                stored.read_into(start, out)
            else:
                assert scales is not None
                merged = self._merged(job, how, start, inputs)
                encode_scaled(job.scaling.like.grid, start, merged, scales, out)
            if not self._compare(job, start, out):
                return

    def _merged(self, job: TensorJob, how: _Merge, start: int, inputs: list[Array]) -> Array:
        weights = how.weights or Weights(0.0, 1.0)  # of t = 1, which needs none
        return merge_wide(job, how.t, weights, start, inputs, self.worker.scratch)

    def _scales_there(self, codes: TensorJob) -> Array:
        """The output's own."""
        assert codes.scaling is not None
        job, file = self.places[codes.scaling.like.scales.info.name]
        found: Array = np.empty(job.out.numel, STORED_DTYPES[job.out.dtype])
        file.read_into(job.out.offset, as_bytes(found))
        return found

    def _compare(self, job: TensorJob, start: int, expected: Array) -> bool:
        self.checks.num_compared += len(expected)
        offset = job.out.offset + start * expected.itemsize
        file = self.places[job.out.name][1]
        return check_bytes(self.checks, file, offset, as_bytes(expected), job.out.name, None, job)

    # ----------------------------------------------------------------------------------- scales

    def _check_scales(self, job: TensorJob, how: _Merge) -> None:
        assert job.scaling is not None
        columns = job.scaling.like.grid.scale_columns
        rows = self._chosen(job.out.numel // columns)
        stored = job.handed_on(0, equal=how.equal)
        found = self._stored(job, stored) if stored is not None else self._fresh(job, how, rows)
        for row in rows:
            if not self._compare(job, row * columns, found[row * columns : (row + 1) * columns]):
                return

    def _stored(self, job: TensorJob, source: TensorSource) -> Array:
        found: Array = np.empty(job.out.numel, STORED_DTYPES[job.out.dtype])
        source.read_into(0, found)
        return found

    def _fresh(self, job: TensorJob, how: _Merge, rows: list[int]) -> Array:
        """All scales, of which those in `rows` are right."""
        assert job.scaling is not None
        grid, codes = job.scaling.like.grid, self.places[job.base.info.name][0]
        largest = np.zeros(job.out.numel)
        whole = largest.reshape(-1, grid.scale_columns)
        for row in rows:
            begin, end = grid.elements(row)
            for start in range(begin, end, TILE):
                inputs, _ = self._inputs(codes, start, min(start + TILE, end))
                merged = self._merged(job, how, start, inputs)
                for cut, values in largest_of(grid, start, np.abs(merged, out=merged)):
                    np.maximum(whole[cut], values, out=whole[cut])
        return scales_of(job, largest)


__all__ = ["ScaledSample"]
