"""Two tensors by two weights, w0 x + w1 y: sums first, then the bounded combine of `methods.inner`; in 8 bits, too."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, STORED_DTYPES, TILE, Array, decode, first_nonfinite, same_values
from merge_tool.checkpoint.quantise import encode_scaled, fresh_scales, largest_of
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import DataError, shown
from merge_tool.methods.inner import PairSums, Scratch, Weights, combine, is_finite, sharpen, sum_tile, total
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.plan.scaled import Scaling
from merge_tool.run.findings import Finding
from merge_tool.run.values import Chunks, converted, overflow, refuse_nonfinite
from merge_tool.vocabulary.rows import alone_ranges, mean_ranges


class Weighted:
    """Base and finetune merged by the weights that their sums give; the base, if all bytes are equal."""

    tile, needs_chunks, in_order = TILE, True, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        self.job, self.method = job, plan.method
        self.specs = [job.spec(plan.seed, output) for output in range(len(job.values))]
        self.keeps_equal = [self.method.copies_equal(spec) for spec in self.specs]
        self.parts = np.zeros((-(-job.numel // TILE), 3))
        self.differs = threading.Event()  # set by any thread, and never taken back
        self.weights: tuple[Weights, ...] = ()
        self.finding = Finding()

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        x, y = inputs
        for begin in range(0, len(x), TILE):
            cut = slice(begin, begin + TILE)
            if not self.differs.is_set() and not same_values(x[cut], y[cut]):
                self.differs.set()
            parts = _shared_rows(self.job, start + begin, x[cut], y[cut])
            self.parts[(start + begin) // TILE] = sum_tile(*parts, 1.0, scratch)

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        xx, xd, dd = (total(column) for column in self.parts.T)
        sums = PairSums(xx, xd, dd)
        equal = not self.differs.is_set() and all(self.keeps_equal)
        if not equal:
            if not is_finite(sums):
                refuse_nonfinite(self.job, chunks)
            has_float64 = "F64" in {source.info.dtype for source in self.job.sources}
            sums = sharpen(sums, lambda: _pair_tiles(self.job, chunks), has_float64=has_float64, scratch=scratch)
        self.resume(Finding(sums=sums, equal=equal))

    def resume(self, finding: Finding) -> bool:
        """Continue from the sums; false if they are not known."""
        self.finding = finding
        if not finding.equal:
            if finding.sums is None:
                return False
            assert self.method.weights is not None
            self.weights = tuple(self.method.weights(finding.sums, spec) for spec in self.specs)
        self.needs_chunks = False
        return True

    def copied(self, output: int) -> int | None:
        """The input that an output equals byte for byte; None if it equals neither."""
        return 0 if self.finding.equal else self.weights[output].copied

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        x, y = inputs
        if (side := self.copied(output)) is not None:
            return converted(self.job, start, inputs[side], out)
        return self._combined(output, start, x, y, out, scratch)

    def merge_wide(self, output: int, start: int, inputs: Sequence[Array], scratch: Scratch) -> Array:
        """At most a tile's elements in float64, in the first row of the scratch: where they are summed."""
        x, y = inputs
        out = scratch.f64[0, : len(x)]
        if (side := self.copied(output)) is not None:
            return decode(inputs[side], out)
        return self._combined(output, start, x, y, out, scratch)

    def _combined(self, output: int, start: int, x: Array, y: Array, out: Array, scratch: Scratch) -> Array:
        """The output's elements from `start` on, which is a multiple of TILE: a tile is combined as one."""
        job, weights = self.job, self.weights[output]
        w0, w1 = weights.w0, weights.w1
        if not combine(*_shared_rows(job, start, x, y), weights, out, scratch):
            raise overflow(job, start + (first_nonfinite(out) or 0))
        alone = 1 if self.keeps_equal[output] else w0 + w1  # rows that one model has: slerp's weights add up to more
        for begin, end in alone_ranges(job.first, start, start + len(x)):
            rows = x[begin:end] if alone == 1 else alone * decode(x[begin:end], np.empty(end - begin))
            out[begin:end] = converted(job, start + begin, rows, out[begin:end])
        for source, begin, end in mean_ranges(job.first, start, start + len(x)):
            mean = source.merged_mean(start + begin, (x[begin:end], y[begin:end]), (w0, w1), alone)
            out[begin:end] = converted(job, start + begin, mean, out[begin:end])
        return out


def _pair_tiles(job: TensorJob, chunks: Chunks) -> Iterable[tuple[Array, Array]]:
    for start, (x, y) in chunks():
        for begin in range(0, len(x), TILE):
            yield _shared_rows(job, start + begin, x[begin : begin + TILE], y[begin : begin + TILE])


def _shared_rows(job: TensorJob, start: int, x: Array, y: Array) -> tuple[Array, Array]:
    """A tile as it is summed: rows that one side alone has are zero in both, and those that are a mean of others."""
    ranges = list(alone_ranges(job.first, start, start + len(x)))
    ranges += [(begin, end) for _, begin, end in mean_ranges(job.first, start, start + len(x))]
    if ranges:
        x, y = x.copy(), y.copy()
        for begin, end in ranges:
            x[begin:end], y[begin:end] = 0, 0
    return x, y


# ------------------------------------------------------------------------------------------------ 8 bits


class ScalesStore:
    """The scales that one of a weight's two jobs has made, until its other job takes them.

    A file has all scales before all codes and is hashed in its order, so codes and scales are two jobs. The passes that
    both need are made once. At most `nbytes` are kept; what has no room is made again. Used from several threads.
    """

    def __init__(self, nbytes: int) -> None:
        self._room, self._lock = nbytes, threading.Lock()
        self._entries: dict[int, tuple[Finding, dict[int, Array]]] = {}

    def keep(self, scaling: Scaling, finding: Finding, scales: dict[int, Array]) -> None:
        size = sum(values.nbytes for values in scales.values())
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._entries[id(scaling)] = finding, scales

    def take(self, scaling: Scaling) -> tuple[Finding, dict[int, Array]] | None:
        with self._lock:
            entry = self._entries.pop(id(scaling), None)
            if entry is not None:
                self._room += sum(values.nbytes for values in entry[1].values())
            return entry


class Scaled:
    """Two weighted tensors in BASE's 8 bits: the codes, or their scales. If neither parent's codes can be copied, a
    second pass merges every element to find each group's maximum: the same for codes and scales, in any order.

    The first of a weight's two jobs leaves in `store` what its passes found; the second begins with that.
    """

    tile, in_order = TILE, False

    def __init__(self, plan: MergePlan, job: TensorJob, store: ScalesStore | None = None) -> None:
        assert job.scaling is not None
        self.job, self.scaling, self.pair = job, job.scaling, Weighted(plan, job)
        self.fresh: list[int] = []  # the outputs with scales of their own
        self.largest: dict[int, Array] = {}
        self.scales: dict[int, Array] = {}
        self.lock, self.store = threading.Lock(), store
        if store is not None and (entry := store.take(job.scaling)) is not None:
            finding, self.scales = entry
            self.pair.resume(finding)
            self.fresh, self.store = list(self.scales), None

    @property
    def finding(self) -> Finding:
        finding = self.pair.finding
        return Finding(equal=finding.equal) if self.job.is_scales else finding

    @property
    def needs_chunks(self) -> bool:
        return self.pair.needs_chunks or len(self.scales) < len(self.fresh)

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        if self.pair.needs_chunks:
            self.pair.add(start, inputs, scratch)
            return
        for begin in range(0, len(inputs[0]), TILE):
            parts = [x[begin : begin + TILE] for x in inputs]
            for output in self.fresh:
                merged = self.pair.merge_wide(output, start + begin, parts, scratch)
                magnitudes = np.abs(merged, out=scratch.f64[1, : len(merged)])
                self._raise(output, largest_of(self.scaling.like.grid, start + begin, magnitudes))

    def _raise(self, output: int, magnitudes: Iterable[tuple[tuple[slice, slice], Array]]) -> None:
        for cut, values in magnitudes:
            with self.lock:
                if output not in self.largest:
                    self.largest[output] = np.zeros(self.scaling.num_scales)
                whole = self.largest[output].reshape(-1, self.scaling.like.grid.scale_columns)
                np.maximum(whole[cut], values, out=whole[cut])

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        if self.pair.needs_chunks:
            self.pair.settle(chunks, scratch)
            self.fresh = [k for k in range(len(self.job.values)) if self.copied(k) is None]
        else:
            for output in self.fresh:
                self.scales[output] = scales_of(self.job, self.largest.pop(output))
        if self.store is not None and not self.needs_chunks:
            self.store.keep(self.scaling, self.pair.finding, self.scales)

    def resume(self, finding: Finding) -> bool:
        """Continue from the sums. Where the scales are not copied, `add` wants the chunks for them, or the caller sets
        `scales`."""
        is_enough = self.pair.resume(finding)
        self.fresh = [k for k in range(len(self.job.values)) if self.copied(k) is None] if is_enough else []
        return is_enough

    def copied(self, output: int) -> TensorSource | None:
        """The codes or the scales to copy byte for byte; None if they are computed."""
        stored = self.scaling.copied(self.pair.copied(output))
        return None if stored is None else stored.scales if self.job.is_scales else stored.codes

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        if (source := self.copied(output)) is not None:
            source.read_into(start, out)
            return out
        scales = self.scales[output]
        if self.job.is_scales:
            return scales[start : start + len(out)]
        for begin in range(0, len(out), TILE):
            cut = slice(begin, begin + TILE)
            merged = self.pair.merge_wide(output, start + begin, [x[cut] for x in inputs], scratch)
            encode_scaled(self.scaling.like.grid, start + begin, merged, scales, out[cut])
        return out


def scales_of(job: TensorJob, largest: Array) -> Array:
    """The scales of groups whose largest magnitudes these are. Raises DataError for values beyond 8 bits."""
    assert job.scaling is not None
    codes, scales = (side.info.dtype for side in (job.scaling.like.codes, job.scaling.like.scales))
    out: Array = np.empty(len(largest), STORED_DTYPES[scales])
    if not fresh_scales(largest, NUMPY_DTYPES[codes], out):
        raise DataError(
            f"{shown(job.first.info.name)}: merged values reach {largest.max():.3g}, too much for {codes} with scales "
            f"in {scales}. Choose bfloat16 or float32 as the output's dtype."
        )
    return out
