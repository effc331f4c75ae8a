"""Shared by the methods: sums over a tile, sums over all tiles that stay within float64, and checks of parameters.

As in `inner`, no BLAS and no reduction whose order depends on an array's address: the same tensors give the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.inner import PairSums, is_finite, refinement
from merge_tool.methods.steps import Combine, MergeSpec, Pass, Steps, Sums, Tile

Vectors: TypeAlias = Callable[[Tile], Sequence[Array]]  # the tile's vectors, float64; the caller may write to them

_LANES = 1_024  # partial sums of a tile, then added pairwise
_BALANCED = 1e-9  # a sum of weights below this share of their magnitudes' sum is 0 but for rounding


# ------------------------------------------------------------------------------------------- one tile


def dot(a: Array, b: Array) -> float:
    """The inner product of all elements of two arrays of one shape."""
    a, b = a.reshape(-1), b.reshape(-1)
    whole = len(a) // _LANES * _LANES
    with np.errstate(over="ignore", invalid="ignore"):
        lanes = np.einsum("ij,ij->j", a[:whole].reshape(-1, _LANES), b[:whole].reshape(-1, _LANES))
        lanes[: len(a) - whole] += a[whole:] * b[whole:]
        return float(np.add.reduce(lanes))


def row_dots(a: Array, b: Array) -> Array:
    """The inner products of the rows of [rows, columns], as [rows, 1]."""
    return np.asarray(np.add.reduce(a * b, axis=-1, keepdims=True))


def magnitudes(values: Array) -> Array:
    """|values| rounded to float32, as order statistics are, to compare with a threshold."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return np.abs(narrow, out=narrow)


def weigh(coefficients: Sequence[float | Array], arrays: Sequence[Array]) -> None:
    """x_i becomes c_i x_i."""
    for c, x in zip(coefficients, arrays, strict=True):
        if not (isinstance(c, float) and c == 1.0):
            np.multiply(x, c, out=x)


def mix(coefficients: Sequence[float], arrays: Sequence[Array]) -> Array:
    """sum_i c_i x_i, in the arrays' own memory."""
    weigh(coefficients, arrays)
    for x in arrays[1:]:
        np.add(arrays[0], x, out=arrays[0])
    return arrays[0]


# ------------------------------------------------------------------------------------------ all tiles


def in_range(
    of: Callable[[Tile, float], Sequence[float]], size: int
) -> Generator[Pass, list[float], tuple[list[float], float]]:
    """Sums of squares and products, `of(tile, scale)` of the values times `scale`, and the scale that was used. The
    scale is 1, or another power of two for float64 tensors whose squares leave float64's range.
    """
    sums = yield Sums(lambda tile: of(tile, 1.0), size)
    largest = max(map(abs, sums), default=0.0)
    if not all(map(math.isfinite, sums)):
        return (yield Sums(lambda tile: of(tile, 2.0**-600), size)), 2.0**-600
    if largest < 1e-200:
        return (yield Sums(lambda tile: of(tile, 2.0**500), size)), 2.0**500
    return sums, 1.0


def gram(vectors: Vectors, n: int) -> Generator[Pass, list[float], tuple[Array, float]]:
    """All inner products [n, n] of n vectors times a scale, and the scale."""
    pairs = [(i, j) for i in range(n) for j in range(i, n)]

    def of(tile: Tile, scale: float) -> list[float]:
        xs = _scaled(vectors(tile), scale)
        return [dot(xs[i], xs[j]) for i, j in pairs]

    products, scale = yield from in_range(of, len(pairs))
    table = np.zeros((n, n))
    for (i, j), value in zip(pairs, products, strict=True):
        table[i, j] = table[j, i] = value
    return table, scale


def pair_sums(vectors: Vectors) -> Generator[Pass, list[float], PairSums]:
    """The sums from which `inner` computes the angle of two vectors, refined by more passes if digits were lost."""

    def of(tile: Tile, scale: float) -> list[float]:
        x, d = _scaled(vectors(tile), scale)
        np.subtract(d, x, out=d)
        return [dot(x, x), dot(x, d), dot(d, d)]

    (xx, xd, dd), scale = yield from in_range(of, 3)
    sums = PairSums(xx, xd, dd, scale)
    while is_finite(sums) and (refined := refinement(sums)) is not None:
        sign, factor = refined
        yy, ee = yield Sums(functools.partial(_refined, vectors, scale, sign * factor), 2)
        sums = PairSums(xx=xx, xd=xd, dd=dd, scale=scale, refined=(sign, factor, yy, ee))
    return sums


def _refined(vectors: Vectors, scale: float, factor: float, tile: Tile) -> list[float]:
    x, e = _scaled(vectors(tile), scale)
    yy = dot(e, e)
    np.multiply(x, factor, out=x)
    np.subtract(e, x, out=e)
    return [yy, dot(e, e)]


def _scaled(vectors: Sequence[Array], scale: float) -> Sequence[Array]:
    if scale != 1.0:
        for x in vectors:
            np.multiply(x, scale, out=x)
    return vectors


def quadratic(c: Sequence[float], table: Array) -> float:
    """|sum_i c_i x_i|^2 from the inner products of the x_i."""
    terms = (a * b * float(table[i, j]) for i, a in enumerate(c) for j, b in enumerate(c))
    return max(0.0, math.fsum(terms))


def vectors(tile: Tile) -> list[Array]:
    """The inputs, or their differences from the base if there is one."""
    return tile.inputs if tile.base is None else tile.deltas()


def mixed(coefficients: Sequence[float]) -> Combine:
    """base + sum_i c_i (x_i - base), or sum_i c_i x_i without a base."""

    def combine(tile: Tile) -> Array:
        merged = mix(coefficients, vectors(tile))
        return merged if tile.base is None else np.add(merged, tile.base, out=merged)

    return combine


def of_elements(steps: Callable[[MergeSpec], Steps]) -> Callable[[MergeSpec], Steps]:
    """A method that gets only tensors with at least one element."""

    @functools.wraps(steps)
    def begin(spec: MergeSpec) -> Steps:
        if spec.numel == 0:
            return lambda tile: tile.inputs[0]
        return (yield from steps(spec))

    return begin


# ----------------------------------------------------------------------------------------- parameters


def numbers(spec: MergeSpec, name: str, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """A parameter's value for each input. Raises ValueError, before any pass, for values that are no numbers in the
    range."""
    return [_number(name, value, low, high) for value in spec.each[name]]


def number(spec: MergeSpec, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A parameter's value for the tensor. Raises ValueError as `numbers` does."""
    return _number(name, spec.shared[name], low, high)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
    real = float(value)
    if not low <= real <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:.15g} and {high:.15g}"
        raise ValueError(f"{name} is {real}; it must be {bounds}.")
    return real


def check_size(weights: Sequence[float]) -> None:
    """Raise ValueError for weights whose magnitudes add up to more than float64 holds."""
    if not math.isfinite(sum(map(abs, weights))):
        listed = ", ".join(f"{w:g}" for w in weights)
        raise ValueError(f"the values of weight ({listed}) are too large to be added; change weight.")


def weight_sum(weights: Sequence[float], remedy: str) -> float:
    """The weights' sum, to divide by. Raises ValueError if it is 0, or beyond float64."""
    check_size(weights)
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    listed = ", ".join(f"{w:g}" for w in weights)
    if abs(total) <= _BALANCED * size:
        raise ValueError(f"the values of weight ({listed}) add up to 0 and cannot be normalized; {remedy}.")
    return total
