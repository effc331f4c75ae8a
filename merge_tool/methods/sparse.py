"""The task-vector family: differences from the base, some of them dropped, then summed or averaged by consensus.

base + lambda sum_i w_i d_i, d_i = x_i - base after a mask. A mask works on one difference of one tile; thresholds are
exact order statistics of the whole tensor, and what equals a threshold is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.steps import Combine, Given, OrderStatistics, Pass, Steps, Sums, Tile
from merge_tool.methods.tiles import (
    check_size,
    dot,
    in_range,
    magnitudes,
    mix,
    number,
    numbers,
    of_elements,
    weigh,
    weight_sum,
)

Mask: TypeAlias = Callable[[Tile, int, Array], object]  # (tile, i, d): drops elements of input i's difference, in d


# --------------------------------------------------------------------------------- sums and consensus
_BALANCE = 2.0**-43  # of the magnitudes added up: the sum of a thousand float64 numbers may be off by so much


def keep_all(tile: Tile, i: int, d: Array) -> None:
    """No mask."""


def merge_masked(given: Given, mask: Mask, *, consensus: bool) -> Combine:
    """The combine of the whole family. Raises ValueError for weights that cannot be normalized."""
    weights, scale, normalize = numbers(given, "weight"), number(given, "lambda"), bool(given["normalize"])
    divisor = 1.0
    check_size(weights)
    if normalize and not consensus and any(weights):
        divisor = weight_sum(weights, "change weight, or set normalize to false")

    def combine(tile: Tile) -> Array:
        deltas = masked(tile, mask)
        if consensus:
            weigh(weights, deltas)
            found = agreed(deltas, weights, elected(deltas), normalize=normalize)
        else:
            found = mix(weights, deltas)
            np.divide(found, divisor, out=found)
        np.multiply(found, scale, out=found)
        np.add(found, tile.base, out=found)
        return found

    return combine


def masked(tile: Tile, mask: Mask) -> list[Array]:
    deltas = tile.deltas()
    for i, d in enumerate(deltas):
        mask(tile, i, d)
    return deltas


def elected(deltas: Sequence[Array]) -> tuple[Array, Array]:
    """Where the models' sum is positive, and where it is negative; neither, where they balance: to what rounding leaves
    of a sum of 0 (weights such as 0.1 + 0.2 - 0.3, a base that is the others' mean), in any order of the models."""
    found, size = deltas[0].copy(), np.abs(deltas[0])
    for d in deltas[1:]:
        np.add(found, d, out=found)
        size += np.abs(d)
    size *= _BALANCE
    return found > size, found < np.negative(size, out=size)


def agreed(deltas: Sequence[Array], weights: Sequence[float], signs: tuple[Array, Array], *, normalize: bool) -> Array:
    """The sum of the weighted `deltas` that have the elected sign; where `normalize`, over the sum of their weights.

    In the deltas' memory. Weights of both signs may cancel: a sum of 0 divides nothing.
    """
    positive, negative = signs
    divisor = np.zeros_like(deltas[0]) if normalize else None
    for d, w in zip(deltas, weights, strict=True):
        agrees = ((d > 0) & positive) | ((d < 0) & negative)
        np.multiply(d, agrees, out=d)  # several times as fast as numpy's own `where`
        if divisor is not None:
            divisor += agrees * w
    found = mix([1.0] * len(deltas), deltas)
    if divisor is not None:
        divisor += divisor == 0
        np.divide(found, divisor, out=found)
    return found


# ----------------------------------------------------------------------------------- masks by magnitude


Bounds: TypeAlias = Callable[[int, int], tuple[int, int] | None]  # (i, numel): first and last rank kept; None: all
_NOTHING = (0, -1)


def between_ranks(given: Given, bounds: Bounds) -> Generator[Pass, Any, Mask]:
    """The mask that keeps, of input i, the magnitudes of ranks `bounds(i, numel)` (ascending from 0, inclusive)."""
    asked = {i: found for i in range(given.num_inputs) if (found := bounds(i, given.numel)) is not None}
    inner = {i: sorted({first} - {0} | {last} - {given.numel - 1}) for i, (first, last) in asked.items()}
    ranked = [i for i in asked if asked[i] != _NOTHING and inner[i]]
    values: dict[tuple[int, int], float] = {}
    if ranked and given.numel:

        def of(tile: Tile) -> list[Array]:
            return [magnitudes(np.subtract(tile.inputs[i], tile.base, out=tile.inputs[i])) for i in ranked]

        found = yield OrderStatistics(of, [inner[i] for i in ranked])
        values = {
            (i, rank): v for i, vs in zip(ranked, found, strict=True) for rank, v in zip(inner[i], vs, strict=True)
        }

    def mask(tile: Tile, i: int, d: Array) -> None:
        if i not in asked:
            return
        first, last = asked[i]
        if asked[i] == _NOTHING:
            d[...] = 0.0
            return
        low, high = (np.float32(values.get((i, rank), end)) for rank, end in ((first, 0.0), (last, math.inf)))
        sizes = magnitudes(d)
        np.multiply(d, (sizes >= low) & (sizes <= high), out=d)

    return mask


def rescaled(given: Given, mask: Mask) -> Generator[Pass, Any, Mask]:
    """Where `rescale` is asked for: what is kept of a difference is scaled to the sum of magnitudes it had before."""
    if not given["rescale"]:
        return mask
    n = given.num_inputs

    def of(tile: Tile) -> list[float]:
        before = [float(np.add.reduce(np.abs(d), axis=None)) for d in tile.deltas()]
        for i, d in enumerate(tile.inputs):
            mask(tile, i, d)
        return before + [float(np.add.reduce(np.abs(d), axis=None)) for d in tile.inputs]

    found = yield Sums(of, 2 * n)
    factors = [a / b if b > 0 and math.isfinite(a) else 1.0 for a, b in zip(found[:n], found[n:], strict=True)]

    def mask_and_scale(tile: Tile, i: int, d: Array) -> None:
        mask(tile, i, d)
        np.multiply(d, factors[i], out=d)

    return mask_and_scale


# -------------------------------------------------------------------------------------------- methods


def task_arithmetic(given: Given) -> Steps:
    """base + lambda sum_i w_i d_i. G. Ilharco et al., "Editing models with task arithmetic", 2022."""
    yield from ()
    return merge_masked(given, keep_all, consensus=False)


def ties(given: Given) -> Steps:
    """Keep the `density` largest of each difference, elect signs, average what agrees.

    P. Yadav et al., "TIES-Merging: resolving interference when merging models", 2023.
    """
    densities = numbers(given, "density", 0.0, 1.0)

    def bounds(i: int, numel: int) -> tuple[int, int] | None:
        if densities[i] == 1:
            return None
        return (numel - max(1, int(densities[i] * numel)), numel - 1) if densities[i] > 0 else _NOTHING

    merge_masked(given, keep_all, consensus=True)  # raises before any pass
    mask = yield from between_ranks(given, bounds)
    mask = yield from rescaled(given, mask)
    return merge_masked(given, mask, consensus=True)


def _breadcrumbs(given: Given, consensus: bool) -> Steps:
    """Keep `density` of each difference: without the `gamma` largest (fewer, if too few were left), then the largest.

    M. Davari and E. Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", 2023.
    """
    densities, gammas = numbers(given, "density", 0.0, 1.0), numbers(given, "gamma", 0.0, 1.0)

    def bounds(i: int, numel: int) -> tuple[int, int] | None:
        if densities[i] == 1:
            return None
        kept = int(densities[i] * numel)
        first = max(0, numel - kept - int(gammas[i] * numel))
        return (first, first + kept - 1) if kept else _NOTHING

    merge_masked(given, keep_all, consensus=consensus)  # raises before any pass
    mask = yield from between_ranks(given, bounds)
    mask = yield from rescaled(given, mask)
    return merge_masked(given, mask, consensus=consensus)


def breadcrumbs(given: Given) -> Steps:
    return _breadcrumbs(given, consensus=False)


def breadcrumbs_ties(given: Given) -> Steps:
    return _breadcrumbs(given, consensus=True)


def dropped(given: Given) -> Mask:
    """DARE's mask: each element stays with probability `density`, and is then divided by it where `rescale`.

    L. Yu et al., "Language models are super Mario", 2023. The expectation of what is left is the difference itself.
    """
    densities, rescale = numbers(given, "density", 0.0, 1.0), bool(given["rescale"])

    def mask(tile: Tile, i: int, d: Array) -> None:
        p = densities[i]
        if p < 1:
            np.multiply(d, tile.uniform(i) < p, out=d)
            np.divide(d, p if rescale and p else 1.0, out=d)

    return mask


def dare_linear(given: Given) -> Steps:
    yield from ()
    return merge_masked(given, dropped(given), consensus=False)


def dare_ties(given: Given) -> Steps:
    yield from ()
    return merge_masked(given, dropped(given), consensus=True)


# ------------------------------------------------------------------------------------------------ sce


def spread(inputs: Sequence[Array]) -> Array:
    """The standard deviation of each element across the models, in float32: exactly 0 where they are equal.

    The base cancels. Its order is the variance's, without leaving float32's range.
    """
    n = len(inputs)
    mean = np.zeros_like(inputs[0])
    for x in inputs[1:]:
        mean += x - inputs[0]
    mean /= n
    squares = mean * mean
    for x in inputs[1:]:
        squares += np.square(x - inputs[0] - mean)
    return magnitudes(np.sqrt(np.divide(squares, n, out=squares), out=squares))


@of_elements
def sce(given: Given) -> Steps:
    """Select the `select_topk` of the varying elements that vary most, weight each difference by its energy, elect.

    F. Wan et al., "FuseChat: knowledge fusion of chat models", 2024, section on SCE.
    """
    topk, n = number(given, "select_topk", 0.0, 1.0), given.num_inputs
    least = 0.0
    if topk < 1:
        (varying,) = yield Sums(lambda tile: [float(np.count_nonzero(spread(tile.inputs)))], 1)
        kept = int(varying * topk)
        least = math.inf
        if kept:
            ((least,),) = yield OrderStatistics(lambda tile: [spread(tile.inputs)], [[given.numel - kept]])

    def selected(tile: Tile) -> list[Array]:
        varies = None if least == 0 else spread(tile.inputs) >= np.float32(least)
        deltas = tile.deltas()
        if varies is not None:
            weigh([varies] * n, deltas)
        return deltas

    def energies(tile: Tile, scale: float) -> list[float]:
        return [dot(d, d) for d in (np.multiply(d, scale, out=d) for d in selected(tile))]

    found, _ = yield from in_range(energies, n)
    shares = [value / math.fsum(found) for value in found] if any(found) else [1.0 / n] * n

    def combine(tile: Tile) -> Array:
        deltas = selected(tile)
        signs = elected(deltas)
        weigh(shares, deltas)
        merged = agreed(deltas, shares, signs, normalize=True)
        np.add(merged, tile.base, out=merged)
        return merged

    return combine
