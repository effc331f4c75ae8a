"""Passes under way: what each tile adds, and what is found at the end. Safe to feed from several threads.

Whoever drives a method calls `add` for every tile of the tensor, in any order, then `settle`; if that says so, every
tile once more; then `found` is what the method asked for. `run_steps` is the whole of it for tensors in memory.
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
    Given,
    Method,
    OrderStatistics,
    Pass,
    Steps,
    Sums,
    Tile,
    tile_elements,
)

_HALF = 1 << 16  # values of half a float32's bits


class Running(Protocol):
    """One pass under way."""

    found: Any
    in_order: bool  # whether tiles must be added in the order of their numbers

    def add(self, number: int, tile: Tile) -> None: ...

    def settle(self) -> bool:
        """All tiles were added: true if they are needed once more."""


class _RunningSums:
    in_order = False

    def __init__(self, asked: Sums, num_tiles: int) -> None:
        self.asked, self.parts = asked, np.zeros((num_tiles, asked.size))
        self.found: list[float] = []

    def add(self, number: int, tile: Tile) -> None:
        found = self.asked.of(tile)
        if len(found) != self.asked.size:
            raise ValueError(f"the method gave {len(found)} sums of a tile, {self.asked.size} were announced")
        self.parts[number] = found

    def settle(self) -> bool:
        self.found = [total(column) for column in self.parts.T]
        return False


class _RunningColumnSums:
    in_order = True

    def __init__(self, asked: ColumnSums, columns: int) -> None:
        self.asked, self.found = asked, np.zeros((asked.size, columns))

    def add(self, number: int, tile: Tile) -> None:
        self.found += self.asked.of(tile)

    def settle(self) -> bool:
        return False


class _RunningOrder:
    """Radix selection: count the upper halves of all bit patterns, then the lower halves within the buckets that hold
    the ranks asked for."""

    in_order = False

    def __init__(self, asked: OrderStatistics) -> None:
        self.asked = asked
        self.lock = threading.Lock()
        self.upper = np.zeros((len(asked.ranks), _HALF), np.int64)
        self.lower: dict[tuple[int, int], Array] = {}  # (array, bucket) -> counts
        self.places: list[list[tuple[int, int]]] = []  # of each rank: its bucket, and its rank in there
        self.found: list[list[float]] = []

    def add(self, number: int, tile: Tile) -> None:
        for k, values in enumerate(self.asked.of(tile)):
            bits = _bits(values)
            high = (bits >> np.uint32(16)).astype(np.int64)
            if not self.places:
                counts = np.bincount(high, minlength=_HALF)
                with self.lock:
                    self.upper[k] += counts
                continue
            for bucket in {bucket for bucket, _ in self.places[k]}:
                low = (bits[high == bucket] & np.uint32(0xFFFF)).astype(np.int64)
                counts = np.bincount(low, minlength=_HALF)
                with self.lock:
                    self.lower[k, bucket] += counts

    def settle(self) -> bool:
        if not self.places:
            self.places = [[_locate(c, rank) for rank in r] for c, r in zip(self.upper, self.asked.ranks, strict=True)]
            self.lower = {(k, b): np.zeros(_HALF, np.int64) for k, p in enumerate(self.places) for b, _ in p}
            if self.lower:
                return True
        self.found = [[self._value(k, *place) for place in places] for k, places in enumerate(self.places)]
        return False

    def _value(self, k: int, bucket: int, rank: int) -> float:
        low, _ = _locate(self.lower[k, bucket], rank)
        return float(np.array([bucket << 16 | low], np.uint32).view(np.float32)[0])


class _SortedOrder:
    """The same for a tensor of one tile, which is sorted: a histogram has more places than it has values."""

    in_order = False

    def __init__(self, asked: OrderStatistics) -> None:
        self.asked = asked
        self.found: list[list[float]] = []

    def add(self, number: int, tile: Tile) -> None:
        for values, ranks in zip(self.asked.of(tile), self.asked.ranks, strict=True):
            bits = np.sort(_bits(values))
            if wrong := [rank for rank in ranks if not 0 <= rank < len(bits)]:
                raise ValueError(f"rank {wrong[0]} of {len(bits)} values")
            self.found.append(bits[list(ranks)].view(np.float32).tolist())

    def settle(self) -> bool:
        return False


def _bits(values: Array) -> Array:
    """Values >= 0 as float32's bit patterns, whose order is the values' own."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    return np.where(bits == 0x80000000, np.uint32(0), bits)  # -0.0 is 0.0


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


def start_pass(asked: Pass, given: Given, num_tiles: int) -> Running:
    """Begin a pass over a tensor of so many tiles."""
    if isinstance(asked, Sums):
        return _RunningSums(asked, num_tiles)
    if isinstance(asked, OrderStatistics):
        return _SortedOrder(asked) if num_tiles == 1 else _RunningOrder(asked)
    if isinstance(asked, ColumnSums):
        return _RunningColumnSums(asked, given.columns if asked.columns is None else asked.columns)
    raise TypeError(f"a method yields Sums, OrderStatistics or ColumnSums, not {type(asked).__name__}")


def begin_steps(method: Method, given: Given) -> Steps:
    """A method's passes under way; of one that needs none and gives its combine at once, an empty run of them."""
    assert method.steps is not None
    found: Any = method.steps(given)
    return found if isinstance(found, Generator) else _without_passes(found)


def _without_passes(combine: Combine) -> Steps:
    yield from ()
    return combine


def check_combine(combine: Any) -> Combine:
    """Raise ValueError for what is no function of a tile."""
    if not callable(combine):
        raise ValueError(f"the method gave {type(combine).__name__} instead of a function that merges a tile")
    return combine  # type: ignore[no-any-return]


def check_merged(merged: Any, tile: Tile) -> Array:
    """Raise ValueError for a merged tile of another size than its inputs."""
    if np.size(merged) != tile.inputs[0].size:
        raise ValueError(f"the method gave {np.size(merged):,} elements for a tile of {tile.inputs[0].size:,}")
    return np.asarray(merged)


def check_given(method: Method, given: Given) -> None:
    """Raise the ValueError by which a method refuses its parameters; no tensor is needed."""
    if method.is_weighted(given.num_inputs, has_base=given.has_base):
        assert method.weights is not None
        method.weights(PairSums(1.0, 0.0, 1.0), given)
        return
    if method.steps is None:
        raise ValueError("it merges exactly two tensors")
    steps = begin_steps(method, given)
    next(steps, None)
    steps.close()


def run_steps(method: Method, given: Given, base: Array | None, inputs: Sequence[Array]) -> Array:
    """Merge arrays in memory, float64: what the streaming loop does from disk."""
    granularity = method.granularity(given)
    size = tile_elements(given, granularity)
    starts = range(0, max(given.numel, 1), size)

    def tile(begin: int) -> Tile:
        return cut_tile(begin, size, given, granularity, base, inputs)

    def visit(add: Callable[[int, Tile], None]) -> None:
        for number, begin in enumerate(starts):
            add(number, tile(begin))

    combine = drive(method, given, len(starts), visit)

    def merged(begin: int) -> Array:
        part = tile(begin)
        return check_merged(combine(part), part).reshape(-1)

    return np.concatenate([merged(begin) for begin in starts]).reshape(given.shape)


def drive(
    method: Method,
    given: Given,
    num_tiles: int,
    visit: Callable[[Callable[[int, Tile], None]], object],
) -> Combine:
    """Take a method through its passes: `visit(add)` calls `add` with every tile and its number, in order."""
    steps = begin_steps(method, given)
    try:
        asked = next(steps)
        while True:
            running = start_pass(asked, given, num_tiles)
            visit(running.add)
            while running.settle():
                visit(running.add)
            asked = steps.send(running.found)
    except StopIteration as e:
        return check_combine(e.value)


def cut_tile(
    begin: int, size: int, given: Given, granularity: str, base: Array | None, inputs: Sequence[Array]
) -> Tile:
    """The tile from element `begin` on, as new float64 arrays."""

    def part(values: Array) -> Array:
        flat = values.reshape(-1)[begin : begin + size].astype(np.float64)
        return flat if granularity == FLAT else flat.reshape(len(flat) // max(1, given.columns), given.columns)

    return Tile(begin, None if base is None else part(base), [part(x) for x in inputs], given.key)
