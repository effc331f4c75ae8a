"""Passes under way: each tile is added, then the result is ready. Several threads may add tiles.

The caller calls `add` for every tile of the tensor, in any order, then `settle`. If `settle` returns true, the caller
adds every tile once more. Then `result` is what the method gets. `run_steps` does all of that for tensors in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.inner import PairSums, total
from merge_tool.methods.steps import (
    FLAT,
    ColumnSums,
    Combine,
    MergeSpec,
    Method,
    OrderStatistics,
    Pass,
    Steps,
    Sums,
    Tile,
    tile_elements,
)

_HALF = 1 << 16  # values of half a float32's bits
_FEW = 4_096  # values that are counted one by one


class Running(Protocol):
    """One pass under way."""

    result: Any
    in_order: bool  # whether tiles must be added in the order of their numbers

    def add(self, number: int, tile: Tile) -> None: ...

    def settle(self) -> bool:
        """Call when all tiles were added. True if all tiles are needed once more."""


class _RunningSums:
    in_order = False

    def __init__(self, request: Sums, num_tiles: int) -> None:
        self.request, self.parts = request, np.zeros((num_tiles, request.size))
        self.result: list[float] = []

    def add(self, number: int, tile: Tile) -> None:
        sums = self.request.of(tile)
        if len(sums) != self.request.size:
            raise ValueError(f"the method gave {len(sums)} sums of a tile, {self.request.size} were announced")
        self.parts[number] = sums

    def settle(self) -> bool:
        self.result = [total(column) for column in self.parts.T]
        return False


class _RunningColumnSums:
    in_order = True

    def __init__(self, request: ColumnSums, columns: int) -> None:
        self.request, self.result = request, np.zeros((request.size, columns))

    def add(self, number: int, tile: Tile) -> None:
        self.result += self.request.of(tile)

    def settle(self) -> bool:
        return False


class _RunningOrder:
    """Radix selection: count the upper halves of all bit patterns, then the lower halves within the buckets that hold
    the ranks asked for."""

    in_order = False

    def __init__(self, request: OrderStatistics) -> None:
        self.request = request
        self.lock = threading.Lock()
        self.upper = np.zeros((len(request.ranks), _HALF), np.int64)
        self.lower: dict[tuple[int, int], Array] = {}  # (array, bucket) -> counts
        self.bucket_ranks: list[list[tuple[int, int]]] = []  # for each rank: its bucket, and its rank within the bucket
        self.result: list[list[float]] = []

    def add(self, number: int, tile: Tile) -> None:
        for k, values in enumerate(self.request.of(tile)):
            bits = _bits(values)
            high = bits >> np.uint32(16)
            if not self.bucket_ranks:
                self._count(self.upper, k, high)
                continue
            for bucket in {bucket for bucket, _ in self.bucket_ranks[k]}:
                self._count(self.lower, (k, bucket), bits[high == np.uint32(bucket)] & np.uint32(0xFFFF))

    def _count(self, histograms: Any, key: Any, values: Array) -> None:
        """Add some values below 65,536 to one of the histograms."""
        if len(values) < _FEW:
            with self.lock:
                np.add.at(histograms[key], values, 1)
            return
        counts = np.bincount(values.astype(np.int64), minlength=_HALF)
        with self.lock:
            histograms[key] += counts

    def settle(self) -> bool:
        if not self.bucket_ranks:
            pairs = zip(self.upper, self.request.ranks, strict=True)
            self.bucket_ranks = [[_locate(counts, rank) for rank in ranks] for counts, ranks in pairs]
            self.lower = {(k, b): np.zeros(_HALF, np.int64) for k, p in enumerate(self.bucket_ranks) for b, _ in p}
            if self.lower:
                return True
        self.result = [[self._value(k, *pair) for pair in pairs] for k, pairs in enumerate(self.bucket_ranks)]
        return False

    def _value(self, k: int, bucket: int, rank: int) -> float:
        low, _ = _locate(self.lower[k, bucket], rank)
        return float(np.array([bucket << 16 | low], np.uint32).view(np.float32)[0])


class _SortedOrder:
    """The same for a tensor of one tile: sorting takes less memory than a histogram with more buckets than values."""

    in_order = False

    def __init__(self, request: OrderStatistics) -> None:
        self.request = request
        self.result: list[list[float]] = []

    def add(self, number: int, tile: Tile) -> None:
        for values, ranks in zip(self.request.of(tile), self.request.ranks, strict=True):
            bits = np.sort(_bits(values))
            if wrong := [rank for rank in ranks if not 0 <= rank < len(bits)]:
                raise ValueError(f"rank {wrong[0]} of {len(bits)} values")
            self.result.append(bits[list(ranks)].view(np.float32).tolist())

    def settle(self) -> bool:
        return False


def _bits(values: Array) -> Array:
    """Values >= 0 as float32 bit patterns, which are ordered as the values are."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    return bits & np.uint32(0x7FFF_FFFF)  # -0.0 is 0.0


def _locate(counts: Array, rank: int) -> tuple[int, int]:
    """The bucket that holds a rank, and the rank within it."""
    ends = np.cumsum(counts)
    if not 0 <= rank < ends[-1]:
        raise ValueError(
            f"the method asked OrderStatistics for rank {rank:,} of {ends[-1]:,} values; ranks are counted from 0, so "
            f"the last one is {ends[-1] - 1:,}"
        )
    bucket = int(np.searchsorted(ends, rank, side="right"))
    return bucket, rank - int(ends[bucket] - counts[bucket])


def start_pass(request: Pass, spec: MergeSpec, num_tiles: int) -> Running:
    """Begin a pass over a tensor of so many tiles."""
    if isinstance(request, Sums):
        return _RunningSums(request, num_tiles)
    if isinstance(request, OrderStatistics):
        return _SortedOrder(request) if num_tiles == 1 else _RunningOrder(request)
    if isinstance(request, ColumnSums):
        return _RunningColumnSums(request, spec.columns if request.columns is None else request.columns)
    raise TypeError(f"a method yields Sums, OrderStatistics or ColumnSums, not {type(request).__name__}")


def begin_steps(method: Method, spec: MergeSpec) -> Steps:
    """A method's passes under way. A method without passes returns its combine at once; then there are no passes."""
    assert method.steps is not None
    steps: Any = method.steps(spec)
    return steps if isinstance(steps, Generator) else _without_passes(steps)


def _without_passes(combine: Combine) -> Steps:
    yield from ()
    return combine


def check_combine(combine: Any) -> Combine:
    """Raise ValueError unless the method returned a callable."""
    if not callable(combine):
        raise ValueError(f"the method gave {type(combine).__name__} instead of a function that merges a tile")
    return combine  # type: ignore[no-any-return]


def check_merged(merged: Any, tile: Tile) -> Array:
    """Raise ValueError if a merged tile and its inputs differ in size."""
    if np.size(merged) != tile.inputs[0].size:
        raise ValueError(f"the method gave {np.size(merged):,} elements for a tile of {tile.inputs[0].size:,}")
    return np.asarray(merged)


def check_spec(method: Method, spec: MergeSpec) -> None:
    """Raise ValueError if the method refuses its parameters; no tensor is needed."""
    if method.is_weighted(spec.num_inputs, has_base=spec.has_base):
        assert method.weights is not None
        method.weights(PairSums(1.0, 0.0, 1.0), spec)
        return
    if method.steps is None:
        raise ValueError("it merges exactly two tensors")
    steps = begin_steps(method, spec)
    next(steps, None)
    steps.close()


def run_steps(method: Method, spec: MergeSpec, base: Array | None, inputs: Sequence[Array]) -> Array:
    """Merge arrays in memory, float64: what the streaming loop does from disk."""
    granularity = method.granularity(spec)
    size = tile_elements(spec, granularity)
    starts = range(0, max(spec.numel, 1), size)

    def tile(begin: int) -> Tile:
        return cut_tile(begin, size, spec, granularity, base, inputs)

    def visit(add: Callable[[int, Tile], None]) -> None:
        for number, begin in enumerate(starts):
            add(number, tile(begin))

    combine = drive(method, spec, len(starts), visit)

    def merged(begin: int) -> Array:
        part = tile(begin)
        return check_merged(combine(part), part).reshape(-1)

    return np.concatenate([merged(begin) for begin in starts]).reshape(spec.shape)


def drive(
    method: Method,
    spec: MergeSpec,
    num_tiles: int,
    visit: Callable[[Callable[[int, Tile], None]], object],
) -> Combine:
    """Take a method through its passes: `visit(add)` calls `add` with every tile and its number, in order."""
    steps = begin_steps(method, spec)
    try:
        request = next(steps)
        while True:
            running = start_pass(request, spec, num_tiles)
            visit(running.add)
            while running.settle():
                visit(running.add)
            request = steps.send(running.result)
    except StopIteration as e:
        return check_combine(e.value)


def cut_tile(
    begin: int, size: int, spec: MergeSpec, granularity: str, base: Array | None, inputs: Sequence[Array]
) -> Tile:
    """The tile from element `begin` on, as new float64 arrays."""

    def part(values: Array) -> Array:
        flat = values.reshape(-1)[begin : begin + size].astype(np.float64)
        return flat if granularity == FLAT else flat.reshape(len(flat) // max(1, spec.columns), spec.columns)

    return Tile(begin, None if base is None else part(base), [part(x) for x in inputs], spec.key)
