"""What a merge method is made of: passes over the tensors, then one combine, tile by tile.

Most methods are one generator function. The function gets a tensor's `MergeSpec` (shape and parameters), yields passes,
receives their results, and returns the function that merges a tile:

    def difference_at(spec):                          # base + lambda (x - base), where |x - base| is large
        least = yield OrderStatistics(lambda tile: [abs(x - tile.base) for x in tile.inputs], [[spec.numel // 2]])
        ...
        return lambda tile: tile.base + spec["lambda"] * (tile.inputs[0] - tile.base)

`merge_tool.run.run` runs a method from disk, `run_steps` in memory. Both give the same bits for the same tensors, for
any memory, threads and order of the tiles: sums are made for each tile and added exactly, counts are integers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from merge_tool.arrays import TILE as PAIR_TILE
from merge_tool.arrays import Array
from merge_tool.methods.inner import PairSums, Weights

TILE = PAIR_TILE // 2  # elements; a method holds many tiles at a time, in float64
FLAT, ROWS = "flat", "rows"  # a tile is TILE elements of the flat tensor, or whole rows


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """What a method knows of a tensor before any element is read: the shape, the parameters, a key for random bits.

    `each[name]` has one value per input (`weight`, `density`...), `shared[name]` one value (`t`, `lambda`...).
    `spec[name]` is either. `key` depends on the seed and the tensor's name only.
    """

    shape: tuple[int, ...]
    num_inputs: int
    has_base: bool
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    key: int = 0

    def __getitem__(self, name: str) -> Any:
        return self.each[name] if name in self.each else self.shared[name]

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def columns(self) -> int:
        """The length of a row: the last dimension; the whole tensor where there are fewer than two."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel


@dataclass(slots=True)
class Tile:
    """Some elements of every input and of the base, as float64: flat, or [rows, columns] for a method of rows.

    `start` is the first element's index in the flat tensor. The arrays may be written to: each pass gets fresh ones.
    """

    start: int
    base: Any  # Array, or None where the method has no base
    inputs: list[Array]
    key: int = 0

    def deltas(self) -> list[Array]:
        """Input minus base, in the inputs' own memory: call it once."""
        for x in self.inputs:
            np.subtract(x, self.base, out=x)
        return self.inputs

    def uniform(self, stream: int) -> Array:
        """Numbers in [0, 1), one per element, in the tile's shape: from key, stream and element index only.

        Philox 4x64 (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose raw output
        numpy promises not to change: four elements to a counter.
        """
        raw = self._random_bits(stream)
        raw >>= np.uint64(11)
        values: Array = raw * 2.0**-53
        return values

    def is_below(self, stream: int, p: float) -> Array:
        """Where `uniform(stream)` is below p, a number from 0 to less than 1."""
        below: Array = self._random_bits(stream) < np.uint64(math.ceil(p * 2.0**53) << 11)
        return below

    def _random_bits(self, stream: int) -> Array:
        """64 bits for each element; `uniform` uses the upper 53."""
        first, extra = divmod(self.start, 4)
        bits = np.random.Philox(counter=first, key=(self.key ^ (stream * 0x9E3779B97F4A7C15)) & (2**128 - 1))
        raw: Array = bits.random_raw(self.inputs[0].size + extra)[extra:]
        return raw.reshape(self.inputs[0].shape)


@dataclass(frozen=True, slots=True)
class Sums:
    """A pass that adds up: `of(tile)` is a sequence of `size` floats. The result is the list of their sums over all
    tiles, correctly rounded."""

    of: Callable[[Tile], Sequence[float]]
    size: int


@dataclass(frozen=True, slots=True)
class OrderStatistics:
    """A pass that finds values by rank: `of(tile)` is a list of arrays of values >= 0. The result has a list for each
    array k: for every rank in `ranks[k]` (0-based, ascending) the value of that rank in the whole tensor.

    Values are rounded to float32 first, so compare with a result in float32, too. Two histogram passes over the bit
    patterns find the values: bit patterns of floats >= 0 are ordered as the floats are.
    """

    of: Callable[[Tile], Sequence[Array]]
    ranks: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """A pass for matrices, in a method of rows: `of(tile)` is [size, columns] float64. The result is the sum over all
    tiles, added in the tiles' order. `columns` is the row's length by default."""

    of: Callable[[Tile], Array]
    size: int
    columns: int | None = None


Pass: TypeAlias = Sums | OrderStatistics | ColumnSums
Combine: TypeAlias = Callable[[Tile], Array]
Steps: TypeAlias = Generator[Pass, Any, Combine]

REQUIRED: Any = object()  # a parameter without a default


@dataclass(frozen=True)
class Method:
    """One way to merge the tensors of some models, with the parameters that a recipe can set.

    `weights` makes two weights from the sums of two models, if the result without a base is a combination of the two.
    `coefficients` are the inputs' coefficients, if the result of `steps` is just their sum: any number of inputs is
    then added one by one. Everything else is `steps`: a generator function of passes, then a combine. All raise
    ValueError before the first pass for parameters that they cannot work with.

    `shared` and `each` map the parameters' names to defaults (REQUIRED if there is none): one value for all models, or
    one for each. `fractions` are the parameters that must be 0 to 1. `base` is "none" (ignored), "optional", "required"
    (what the inputs are compared with), or "first" (the first of the inputs); `inputs` are the fewest and the most
    models beside it, the first included. Where `copies_equal`, inputs (and base) that hold the same bytes give those
    bytes. A method of `ROWS` sees whole rows. `divides_weights` is a function of the
    shared parameters: whether each model's share is its weight divided by the sum of all weights. `passes_by` are the
    parameters on which the results of the passes depend; None: perhaps on all.
    """

    summary: str
    source: str
    steps: Callable[[MergeSpec], Steps] | None = None
    weights: Callable[[PairSums, MergeSpec], Weights] | None = None
    coefficients: Callable[[MergeSpec], Sequence[float]] | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    fractions: frozenset[str] = frozenset()
    inputs: tuple[int, int] = (1, 1_000)
    base: str = "required"
    granularity: Callable[[MergeSpec], str] = lambda spec: FLAT
    copies_equal: Callable[[MergeSpec], bool] = lambda spec: False
    state_bytes: Callable[[MergeSpec], int] = lambda spec: 0  # held by its passes besides tiles
    divides_weights: Callable[[Mapping[str, Any]], bool] = lambda shared: False
    passes_by: frozenset[str] | None = None

    def is_weighted(self, num_inputs: int, *, has_base: bool) -> bool:
        """Whether so many tensors are merged by two weights rather than by steps."""
        return self.weights is not None and num_inputs == 2 and not has_base


def seed_key(seed: int, name: str) -> int:
    """128 bits for a tensor's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "little")


def tile_elements(spec: MergeSpec, granularity: str) -> int:
    """The number of elements in a tile: TILE, or as many whole rows as fit into TILE, at least one row."""
    if granularity == FLAT:
        return TILE
    return max(1, TILE // max(1, spec.columns)) * max(1, spec.columns)
