"""A stored output against its parents, bit for bit: a sample of tiles, merged again from the pass results in the
report; or everything, by a whole merge whose writers compare instead of writing."""

from __future__ import annotations

import random
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from merge_tool.arrays import STORED_DTYPES, TILE, Array, as_bytes, same_values
from merge_tool.checkpoint.alike import to_hold
from merge_tool.checkpoint.quantise import largest_of
from merge_tool.checkpoint.source import ByteSource, acquired
from merge_tool.errors import MergeToolError, shown
from merge_tool.models.side_files import REPORT
from merge_tool.plan.plan import ShardPlan, TensorJob
from merge_tool.plan.prepare import Prepared
from merge_tool.run.buffers import WorkerMemory
from merge_tool.run.findings import Findings
from merge_tool.run.run import ShardDone
from merge_tool.run.summed import Summed
from merge_tool.run.weighted import Scaled, Weighted, scales_of
from merge_tool.run.work import Work, start_work
from merge_tool.verification.checks import Checks, check_bytes, first_difference

_PIECE = 1 << 20
# Errors that a method may raise for pass results that its passes never give.
_UNREADABLE = (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError)


class Sample:
    """Checks some tiles of every tensor, and of 8-bit outputs some rows of scales; `share` is how much of each."""

    def __init__(
        self, checks: Checks, files: Mapping[int, ByteSource], prepared: Prepared, findings: Findings, share: float
    ) -> None:
        self.checks, self.plan, self.findings, self.share = checks, prepared.plan, findings, share
        self.files = files
        self.worker, self.chance = WorkerMemory(prepared.layout), random.Random()
        self.room = bytearray(8 * TILE)
        self.places: dict[str, tuple[TensorJob, ByteSource]] = {
            job.out.name: (job, files[shard.number]) for shard in self.plan.shards for job in shard.jobs if job.scaling
        }

    def check(self) -> None:
        for shard in self.plan.shards:
            file = self.files[shard.number]
            check_bytes(self.checks, file, 0, memoryview(shard.header()), "its header")
            for job in shard.jobs:
                with acquired(to_hold(job.sources)):
                    self._check_tensor(file, job)

    def _check_tensor(self, file: ByteSource, job: TensorJob) -> None:
        if (work := self._begun(job)) is None:
            return
        with np.errstate(all="ignore"):  # the output's scales may be zero or NaN
            if isinstance(work, Scaled) and job.is_scales:
                self._check_scales(file, job, work)
                return
            if isinstance(work, Scaled) and work.copied(0) is None:
                work.scales[0] = self._scales_there(job)
            for number in self._chosen(-(-job.numel // work.tile)):
                if not self._check_tile(file, job, work, number * work.tile):
                    break

    def _chosen(self, count: int) -> list[int]:
        return sorted(self.chance.sample(range(count), min(count, max(1, round(self.share * count)))))

    def _begun(self, job: TensorJob) -> Work | None:
        """The tensor's work after its passes: from the report's results, or with the passes made again."""
        finding, work, what = self.findings[job.number], start_work(self.plan, job), shown(job.out.name)
        if isinstance(work, Scaled):
            codes = self.places[job.first.info.name][0]
            if finding.equal != self.findings[codes.number].equal:
                self.checks.add(f"{REPORT}: {what}: is wrong about whether the parents are equal.")
                return None
            finding = self.findings[codes.number]
        try:
            if work.resume(finding):
                return work
        except (*_UNREADABLE, MergeToolError) as e:
            self.checks.add(f"{REPORT}: {what}: its pass results are not possible ({shown(e)}).")
            return None
        if isinstance(work, Weighted | Scaled):
            self.checks.add(f"{REPORT}: {what}: has no sums.")
            return None
        work = start_work(self.plan, job)
        self._make_passes(job, work)
        self.findings.add(job.number, work.finding)
        return work

    def _make_passes(self, job: TensorJob, work: Work) -> None:
        def chunks() -> Iterator[tuple[int, list[Array]]]:
            for start in range(0, max(job.numel, 1), work.tile):
                yield start, self._inputs(job, start, min(start + work.tile, job.numel))[0]

        while work.needs_chunks:
            for start, inputs in chunks():
                work.add(start, inputs, self.worker.scratch)
            work.settle(chunks, self.worker.scratch)

    def _inputs(self, job: TensorJob, start: int, stop: int) -> tuple[list[Array], Array]:
        inputs, out = self.worker.arrays(job, stop - start)
        for source, values in zip(job.sources, inputs, strict=True):
            source.read_into(start, values)
        return inputs, out

    def _check_sum(self, file: ByteSource, job: TensorJob, work: Summed, start: int, stop: int) -> bool:
        try:
            merged = work.merged(0, start, *work.add_up(start, stop, self.worker))
        except (*_UNREADABLE, MergeToolError) as e:
            self.checks.add(f"{shown(file.name)}: {shown(e, 600)}")
            return False
        return self._compare(file, job, start, merged)

    def _check_tile(self, file: ByteSource, job: TensorJob, work: Work, start: int) -> bool:
        stop = min(start + work.tile, job.numel)
        if isinstance(work, Summed):
            return self._check_sum(file, job, work, start, stop)
        inputs, out = self._inputs(job, start, stop)
        if work.finding.equal and not all(same_values(inputs[0], other) for other in inputs[1:]):
            self.checks.add(f"{REPORT}: {shown(job.out.name)}: says that the parents are equal; they are not.")
            return False
        try:
            merged = work.merge(0, start, inputs, out, self.worker.scratch)
        except (*_UNREADABLE, MergeToolError) as e:
            self.checks.add(f"{shown(file.name)}: {shown(e, 600)}")
            return False
        is_same = self._compare(file, job, start, merged)
        for source in job.sources:
            source.forget(start, start + len(inputs[0]))
        return is_same

    def _compare(self, file: ByteSource, job: TensorJob, start: int, expected: Array) -> bool:
        self.checks.num_compared += len(expected)
        offset = job.out.offset + start * expected.itemsize
        return check_bytes(self.checks, file, offset, as_bytes(expected), job.out.name, self.room, job)

    # ------------------------------------------------------------------------------------------ 8 bits

    def _scales_there(self, codes: TensorJob) -> Array:
        """The scales that the output has."""
        assert codes.scaling is not None
        job, file = self.places[codes.scaling.like.scales.info.name]
        scales: Array = np.empty(job.out.numel, STORED_DTYPES[job.out.dtype])
        file.read_into(job.out.offset, as_bytes(scales))
        return scales

    def _check_scales(self, file: ByteSource, job: TensorJob, work: Scaled) -> None:
        """Compare rows of scales, each made from all values that share it. A single scale needs the whole tensor."""
        columns = work.scaling.like.grid.scale_columns
        rows = self._chosen(job.out.numel // columns)
        if (source := work.copied(0)) is not None:
            scales: Array = np.empty(job.out.numel, STORED_DTYPES[job.out.dtype])
            source.read_into(0, scales)
        else:
            scales = self._fresh_scales(job, work, rows)
        for row in rows:
            if not self._compare(file, job, row * columns, scales[row * columns : (row + 1) * columns]):
                return

    def _fresh_scales(self, job: TensorJob, work: Scaled, rows: list[int]) -> Array:
        """An array of all scales; only those in `rows` are computed."""
        grid, codes = work.scaling.like.grid, self.places[job.first.info.name][0]
        largest = np.zeros(job.out.numel)
        whole = largest.reshape(-1, grid.scale_columns)
        for row in rows:
            begin, end = grid.elements(row)
            for start in range(begin, end, TILE):
                inputs, _ = self._inputs(codes, start, min(start + TILE, end))
                merged = work.pair.merge_wide(0, start, inputs, self.worker.scratch)
                for cut, values in largest_of(grid, start, np.abs(merged, out=merged)):
                    np.maximum(whole[cut], values, out=whole[cut])
        return scales_of(job, largest)


# --------------------------------------------------------------------------------------- everything


class _Comparer:
    """A shard's Writer that writes nothing: it compares with the existing file and keeps the first difference."""

    def __init__(self, file: ByteSource) -> None:
        self.file, self.first, self.nbytes = file, -1, 0
        self.lock = threading.Lock()  # of `first`

    def write(self, offset: int, data: memoryview) -> None:
        position = first_difference(self.file, offset, data, bytearray(min(len(data), _PIECE) or 1))
        with self.lock:
            if position is not None and (self.first < 0 or position < self.first):
                self.first = position

    def hash_next(self, data: memoryview) -> None:
        self.nbytes += len(data)

    def sync(self) -> str:
        return ""

    def abandon(self) -> None:
        pass


class Comparison:
    """A Sink that keeps the findings and reports where the existing shards differ from the merge."""

    def __init__(self, checks: Checks, files: Mapping[int, ByteSource]) -> None:
        self.checks, self.files, self.findings = checks, files, Findings()
        self.lock = threading.Lock()  # of findings and checks

    def open_shard(self, shard: ShardPlan, header: bytearray) -> Sequence[_Comparer]:
        comparer = _Comparer(self.files[shard.number])
        comparer.write(0, memoryview(header))
        return [comparer]

    def finish_shard(self, done: ShardDone, writers: Sequence[_Comparer]) -> None:
        with self.lock:
            self._take(done, writers[0].first)

    def _take(self, done: ShardDone, position: int) -> None:
        for number in done.findings:
            self.findings.add(number, done.findings[number])
        self.checks.num_compared += sum(job.out.numel for job in done.shard.jobs)
        if position >= 0:
            jobs = done.shard.jobs
            number = bisect_right([job.out.offset for job in jobs], position) - 1
            what = f"tensor {jobs[number].out.name}" if number >= 0 else "its header"
            self.checks.add(
                f"{shown(done.shard.file_name)}: is not the merge of these parents: from byte {position:,} on "
                f"({shown(what)}) it differs."
            )
