"""How one tensor's output comes about: what is done with its chunks, whoever reads, schedules and writes them.

A work takes every chunk of its inputs as often as it needs (`add`, then `settle`), then merges chunk by chunk.
Chunks are whole tiles, and their number and order change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from merge_tool.checkpoint.reader import NUMPY_DTYPES, STORED_DTYPES
from merge_tool.errors import DataError, shown
from merge_tool.methods import (
    METHODS,
    TILE,
    Array,
    PairSums,
    Scratch,
    Weights,
    combine,
    convert,
    decode,
    first_nonfinite,
    is_finite,
    same_values,
    sharpen,
    sum_tile,
    total,
)
from merge_tool.methods.passes import Running, begin_steps, check_combine, check_merged, start_pass
from merge_tool.methods.steps import FLAT, Combine, Given, Pass, Steps, StepsMethod, Tile, tile_elements
from merge_tool.plan import MergePlan, TensorJob
from merge_tool.quantise import encode_scaled, fresh_scales, largest_of
from merge_tool.rows import alone_ranges, mean_ranges

Chunks = Callable[[], Iterable[tuple[int, Sequence[Array]]]]  # (first element, inputs) of every chunk once more


@dataclass(frozen=True, slots=True)
class TensorDone:
    """What was found out about one tensor: its sums (None if it was only compared) and whether bytes were equal."""

    number: int
    sums: PairSums | None
    equal: bool
    kept_base: bool = False


class Work(Protocol):
    """One tensor's work. `tile` elements belong together. `needs_chunks` says whether `add` wants them (again)."""

    tile: int
    done: TensorDone

    @property
    def needs_chunks(self) -> bool: ...

    @property
    def in_order(self) -> bool:
        """Whether chunks must be added in file order."""

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        """Take the elements from `start` on of every input, flat. From several threads."""

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        """All chunks were added: decide what comes next. Raises DataError for values that cannot be merged."""

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        """Elements of an output: `out`, filled, or an input as it is. Of scales, which are not where the inputs are,
        without inputs."""


def start_work(plan: MergePlan, job: TensorJob) -> Work:
    if job.is_copied:
        return _Copy(job)
    if job.exact:
        return _Exact(plan, job)
    if job.scaling is not None:
        return _Scaled(plan, job)
    if job.given is None:
        return _Pair(plan, job)
    assert plan.steps is not None
    return _Steps(plan.steps, job.given, job)


def work_tile(plan: MergePlan, job: TensorJob) -> int:
    """How many elements of this tensor belong together."""
    if plan.steps is None or job.given is None or job.exact:
        return TILE
    return tile_elements(job.given, plan.steps.granularity(job.given))


class _Copy:
    """One source as it is, or in the output's dtype.

    Its bytes go through our hands even so: they are hashed, and what is hashed is what is written. Then
    copy_file_range spares nothing (bench/copy.py).
    """

    tile, needs_chunks, in_order = TILE, False, False

    def __init__(self, job: TensorJob) -> None:
        self.job = job
        self.done = TensorDone(job.number, None, equal=False)

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        raise AssertionError("nothing is added up")

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        raise AssertionError("nothing is added up")

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        return _converted(self.job, start, inputs[0], out)


class _Exact:
    """Integers and booleans: the base's, if all are equal or the plan keeps the base's."""

    tile, needs_chunks, in_order = TILE, True, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        self.plan, self.job, self.equal = plan, job, True
        self.done = TensorDone(job.number, None, equal=True)

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        if self.equal and not all(same_values(inputs[0], other) for other in inputs[1:]):
            self.equal = False  # only ever set so: what another thread has found stays

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        self.needs_chunks = False
        if not self.equal and not self.plan.keeps_base_on_mismatch:
            raise DataError(_unequal_message(self.plan, self.job))
        self.done = TensorDone(self.job.number, None, self.equal, kept_base=not self.equal)

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        return inputs[0]


class _Pair:
    """Base and finetune by the weights that follow from their sums; the base, where all bytes are equal."""

    tile, needs_chunks, in_order = TILE, True, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        self.job, self.method, self.equal = job, METHODS[plan.method], True
        self.parts = np.zeros((-(-job.numel // TILE), 3))
        self.weights: tuple[Weights, ...] = ()
        self.done = TensorDone(job.number, None, equal=False)

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        x, y = inputs
        for begin in range(0, len(x), TILE):
            cut = slice(begin, begin + TILE)
            if self.equal and not same_values(x[cut], y[cut]):
                self.equal = False
            parts = _shared_rows(self.job, start + begin, x[cut], y[cut])
            self.parts[(start + begin) // TILE] = sum_tile(*parts, 1.0, scratch)

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        self.needs_chunks = False
        xx, xd, dd = (total(column) for column in self.parts.T)
        sums = PairSums(xx, xd, dd)
        if not self.equal:
            if not is_finite(sums):
                _refuse_nonfinite(self.job, chunks)
            has_float64 = "F64" in {source.info.dtype for source in self.job.sources}
            sums = sharpen(sums, lambda: _pair_tiles(self.job, chunks), has_float64=has_float64, scratch=scratch)
            self.weights = tuple(self.method.weights(sums, t) for t in self.job.ts)
        self.done = TensorDone(self.job.number, sums, self.equal)

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        weights = None if self.equal else self.weights[output]
        return merge_chunk(self.job, self.job.ts[output], weights, start, (inputs[0], inputs[1], out), scratch)


def _pair_tiles(job: TensorJob, chunks: Chunks) -> Iterable[tuple[Array, Array]]:
    for start, (x, y) in chunks():
        for begin in range(0, len(x), TILE):
            yield _shared_rows(job, start + begin, x[begin : begin + TILE], y[begin : begin + TILE])


def _shared_rows(job: TensorJob, start: int, x: Array, y: Array) -> tuple[Array, Array]:
    """A tile as it is summed: rows that one side alone has are zero in both, and those that are a mean of others."""
    ranges = list(alone_ranges(job.base, start, start + len(x)))
    ranges += [(begin, end) for _, begin, end in mean_ranges(job.base, start, start + len(x))]
    if ranges:
        x, y = x.copy(), y.copy()
        for begin, end in ranges:
            x[begin:end], y[begin:end] = 0, 0
    return x, y


class _Scaled:
    """A pair in BASE's 8 bits: the codes, or their scales. Where neither side's are handed on, a second pass merges
    every element to find the largest of those that share a scale: the same for codes and scales, in any order."""

    tile, in_order = TILE, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        assert job.scaling is not None
        self.job, self.scaling, self.pair = job, job.scaling, _Pair(plan, job)
        self.fresh: list[int] = []  # the outputs with scales of their own
        self.largest: dict[int, Array] = {}
        self.scales: dict[int, Array] = {}
        self.lock = threading.Lock()
        self.done = self.pair.done

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
                merged = self._merged(output, start + begin, parts, scratch)
                magnitudes = np.abs(merged, out=scratch.f64[1, : len(merged)])
                self._raise(output, largest_of(self.scaling.like.grid, start + begin, magnitudes))

    def _raise(self, output: int, found: Iterable[tuple[tuple[slice, slice], Array]]) -> None:
        for cut, values in found:
            with self.lock:
                if output not in self.largest:
                    self.largest[output] = np.zeros(self.scaling.num_scales)
                whole = self.largest[output].reshape(-1, self.scaling.like.grid.scale_columns)
                np.maximum(whole[cut], values, out=whole[cut])

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        if self.pair.needs_chunks:
            self.pair.settle(chunks, scratch)
            found = self.pair.done
            self.done = TensorDone(found.number, None, found.equal) if self.job.is_scales else found
            self.fresh = [k for k in range(len(self.job.ts)) if self.job.handed_on(k, equal=found.equal) is None]
            return
        for output in self.fresh:
            self.scales[output] = scales_of(self.job, self.largest.pop(output))

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        if (source := self.job.handed_on(output, equal=self.done.equal)) is not None:
            source.read_into(start, out)
            return out
        scales = self.scales[output]
        if self.job.is_scales:
            return scales[start : start + len(out)]
        for begin in range(0, len(out), TILE):
            cut = slice(begin, begin + TILE)
            merged = self._merged(output, start + begin, [x[cut] for x in inputs], scratch)
            encode_scaled(self.scaling.like.grid, start + begin, merged, scales, out[cut])
        return out

    def _merged(self, output: int, start: int, inputs: Sequence[Array], scratch: Scratch) -> Array:
        return merge_wide(self.job, self.job.ts[output], self.pair.weights[output], start, inputs, scratch)


def merge_wide(
    job: TensorJob, t: float, weights: Weights, start: int, inputs: Sequence[Array], scratch: Scratch
) -> Array:
    """At most a tile's elements in float64, in the first row of the scratch: where they are summed."""
    x, y = inputs
    out = scratch.f64[0, : len(x)]
    return decode(y, out) if t == 1 else merge_chunk(job, t, weights, start, (x, y, out), scratch)


def scales_of(job: TensorJob, largest: Array) -> Array:
    """The scales of groups whose largest magnitudes these are. Raises DataError for values beyond 8 bits."""
    assert job.scaling is not None
    codes, scales = (side.info.dtype for side in (job.scaling.like.codes, job.scaling.like.scales))
    found: Array = np.empty(len(largest), STORED_DTYPES[scales])
    if not fresh_scales(largest, NUMPY_DTYPES[codes], found):
        raise DataError(
            f"{shown(job.base.info.name)}: merged values reach {largest.max():.3g}, too much for {codes} with scales "
            f"in {scales}. Choose bfloat16 or float32 as the output's dtype."
        )
    return found


class _Steps:
    """Any number of models by a method's passes and its combine, tile by tile in float64."""

    def __init__(self, method: StepsMethod, given: Given, job: TensorJob) -> None:
        self.job, self.given = job, given
        self.granularity = method.granularity(given)
        self.tile = tile_elements(given, self.granularity)
        self.num_tiles = -(-given.numel // self.tile) or 1
        self.copies_equal, self.equal, self.is_checked = method.copies_equal(given), True, False
        self.done = TensorDone(job.number, None, equal=False)
        self.steps: Steps = begin_steps(method, given)
        self.running: Running | None = None
        self.combine: Combine | None = None
        self._advance(lambda: next(self.steps))

    @property
    def needs_chunks(self) -> bool:
        return self.running is not None

    @property
    def in_order(self) -> bool:
        return self.running is not None and self.running.in_order

    def _advance(self, step: Callable[[], Pass]) -> None:
        """The method's next pass, or its combine. What it finds impossible is the user's to mend."""
        try:
            self.running = start_pass(step(), self.given, self.num_tiles)
        except StopIteration as e:
            self.running, self.combine = None, self._told(partial(check_combine, e.value))
        except ValueError as e:
            raise DataError(f"{shown(self.job.out.name)}: {e}") from e

    def _told(self, ask: Callable[[], Any]) -> Any:
        """What a method gives; what is wrong with it names the tensor."""
        try:
            return ask()
        except ValueError as e:
            raise DataError(f"{shown(self.job.out.name)}: {e}") from e

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        assert self.running is not None
        for begin in range(0, max(len(inputs[0]), 1), self.tile):
            parts = [x[begin : begin + self.tile] for x in inputs]
            if self.copies_equal and self.equal and not all(same_values(parts[0], other) for other in parts[1:]):
                self.equal = False
            tile, running = self._decoded(start + begin, parts), self.running
            self._told(partial(running.add, (start + begin) // self.tile, tile))

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        self.is_checked = True
        assert self.running is not None
        running = self.running
        if self.copies_equal and self.equal:
            self.steps.close()
            self.running, self.done = None, TensorDone(self.job.number, None, equal=True)
        elif not self._told(running.settle):
            self._advance(lambda: self.steps.send(running.found))

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        if self.done.equal:
            return _converted(self.job, start, inputs[0], out)
        for begin in range(0, len(out), self.tile):
            cut = slice(begin, begin + self.tile)
            merged = self._merged(start + begin, [x[cut] for x in inputs])
            if (place := first_nonfinite(merged)) is not None:
                what = f"element {start + begin + place:,} became {float(merged[place])}"
                raise DataError(f"{shown(self.job.out.name)}: {what} in the merge, from values that are finite.")
            if not convert(merged, out[cut]):
                raise DataError(_overflow_message(self.job, start + begin + (first_nonfinite(out[cut]) or 0)))
        return out

    def _merged(self, start: int, parts: Sequence[Array]) -> Array:
        combine = self.combine
        assert combine is not None
        tile = self._decoded(start, parts)
        merged: Array = self._told(lambda: check_merged(combine(tile), tile)).reshape(-1)
        return merged

    def _decoded(self, start: int, parts: Sequence[Array]) -> Tile:
        """A tile as the method sees it. Values are looked at once, in the first pass over them."""
        shape = (-1,) if self.granularity == FLAT else (-1, self.given.columns)
        wide = [decode(values, np.empty(len(values))) for values in parts]
        if not self.is_checked:
            for source, values in zip(self.job.sources, wide, strict=True):
                if (place := first_nonfinite(values)) is not None:
                    raise _nonfinite(source.info.name, source.where, start + place, float(values[place]))
        shaped = [values.reshape(shape) if values.size else values for values in wide]
        base = shaped.pop(0) if self.given.has_base else None
        return Tile(start, base, shaped, self.given.key)


def merge_chunk(
    job: TensorJob, t: float, weights: Weights | None, start: int, arrays: tuple[Array, Array, Array], scratch: Scratch
) -> Array:
    """The output's elements from `start` on: an input as it is, an input converted, or both combined.

    `arrays` are those elements of base and finetune, and room for the output's; `start` is a multiple of TILE, for
    a tile is combined as one. Without `weights` (equal tensors, integers) the base is kept.
    """
    x, y, out = arrays
    if weights is None or t in (0, 1):
        return _converted(job, start, y if t == 1 and weights is not None else x, out)
    if not combine(*_shared_rows(job, start, x, y), weights, out, scratch):
        raise DataError(_overflow_message(job, start + (first_nonfinite(out) or 0)))
    for begin, end in alone_ranges(job.base, start, start + len(x)):  # weights of a slerp do not add up to 1
        out[begin:end] = _converted(job, start + begin, x[begin:end], out[begin:end])
    for rows, begin, end in mean_ranges(job.base, start, start + len(x)):
        mean = rows.merged_mean(start + begin, (x[begin:end], y[begin:end]), (weights.w0, weights.w1))
        out[begin:end] = _converted(job, start + begin, mean, out[begin:end])
    return out


def _converted(job: TensorJob, start: int, values: Array, out: Array) -> Array:
    if values.dtype == out.dtype:
        return values
    if not convert(values, out):
        raise DataError(_overflow_message(job, start + (first_nonfinite(out) or 0)))
    return out


def _refuse_nonfinite(job: TensorJob, chunks: Chunks) -> None:
    for start, sides in chunks():
        for source, values in zip(job.sources, sides, strict=True):
            if (place := first_nonfinite(values)) is not None:
                raise _nonfinite(source.info.name, source.where, start + place, float(values[place]))


def _nonfinite(name: str, where: str, place: int, value: float) -> DataError:
    return DataError(
        f"{shown(name)} in {shown(where)}: element {place:,} is {value}. A merge would spread it; repair or leave out "
        "that model."
    )


def _unequal_message(plan: MergePlan, job: TensorJob) -> str:
    between = f"between {plan.names[0]} and {plan.names[1]}" if len(plan.names) == 2 else "between the models"
    return (
        f"{shown(job.out.name)}: the {job.out.dtype} values differ {between}, and integers have nothing between them. "
        "Give --on-mismatch base to keep the base's."
    )


def _overflow_message(job: TensorJob, place: int) -> str:
    wider = "float32" if job.out.dtype == "BF16" else "bfloat16 or float32"
    return (
        f"{shown(job.out.name)}: element {place:,} is finite but too large for {job.out.dtype}. Choose {wider} as the "
        "output's dtype."
    )
