"""The task-vector family: differences from the base, some of them dropped, then summed or averaged by consensus.

base + lambda sum_i w_i d_i, d_i = x_i - base after a mask. A mask works on one difference of one tile. Thresholds are
exact order statistics of the whole tensor; a value equal to its threshold is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.steps import Combine, MergeSpec, OrderStatistics, Pass, Steps, Sums, Tile
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

Mask: TypeAlias = Callable[
    [Tile, int, Array], object
]  # (tile, i, d): sets dropped elements of d, input i's difference, to 0


# --------------------------------------------------------------------------------- sums and consensus
_IN_A_SET = 8  # models whose sums of weights are looked up
_BALANCE = 2.0**-43  # share of the summed magnitudes: rounding may change a sum of 1,000 numbers by it


def keep_all(tile: Tile, i: int, d: Array) -> None:
    """No mask."""


def merge_masked(spec: MergeSpec, mask: Mask, *, consensus: bool) -> Combine:
    """The combine of the whole family. Raises ValueError for weights that cannot be normalized."""
    weights, scale, normalize = numbers(spec, "weight"), number(spec, "lambda"), bool(spec["normalize"])
    divisor = 1.0
    check_size(weights)
    if normalize and not consensus and any(weights):
        divisor = weight_sum(weights, "change weight, or set normalize to false")

    def combine(tile: Tile) -> Array:
        deltas = masked(tile, mask)
        if consensus:
            weigh(weights, deltas)
            merged = agreed(deltas, weights, elected(deltas), normalize=normalize)
        else:
            merged = mix(weights, deltas)
            if divisor != 1:
                np.divide(merged, divisor, out=merged)
        weigh([scale], [merged])
        np.add(merged, tile.base, out=merged)
        return merged

    return combine


def masked(tile: Tile, mask: Mask) -> list[Array]:
    deltas = tile.deltas()
    for i, d in enumerate(deltas):
        mask(tile, i, d)
    return deltas


def elected(deltas: Sequence[Array]) -> tuple[Array, Array]:
    """Where the models' sum is positive, and where it is negative. A sum that is 0 but for rounding is neither (weights
    such as 0.1 + 0.2 - 0.3, a base that is the others' mean), in any order of the models."""
    total, size, magnitude = deltas[0].copy(), np.abs(deltas[0]), np.empty_like(deltas[0])
    for d in deltas[1:]:
        np.add(total, d, out=total)
        size += np.abs(d, out=magnitude)
    size *= _BALANCE
    return total > size, total < np.negative(size, out=size)


def agreed(deltas: Sequence[Array], weights: Sequence[float], signs: tuple[Array, Array], *, normalize: bool) -> Array:
    """The sum of the weighted `deltas` that have the elected sign; if `normalize`, divided by the sum of their weights.

    The result uses the deltas' memory. Weights of both signs may cancel; nothing is divided by a sum of 0.
    """
    positive, negative = signs
    agreeing: list[Array] = []
    for d in deltas:
        agrees = d > 0
        agrees &= positive
        agrees |= (d < 0) & negative
        np.multiply(d, agrees, out=d)  # several times as fast as numpy's own `where`
        agreeing.append(agrees)
    total = mix([1.0] * len(deltas), deltas)
    if normalize:
        np.divide(total, _sum_of_agreeing(agreeing, weights), out=total)
    return total


def _sum_of_agreeing(agreeing: Sequence[Array], weights: Sequence[float]) -> Array:
    """The sum of the weights of the models that agree, element by element; 1 where it is 0."""
    sets = agreeing[0].astype(np.uint8)
    for bit, agrees in enumerate(agreeing[1:_IN_A_SET], start=1):
        sets |= agrees.view(np.uint8) << np.uint8(bit)
    sums = np.take(_sums_of_sets(tuple(weights[:_IN_A_SET])), sets, mode="clip")
    for agrees, w in zip(agreeing[_IN_A_SET:], weights[_IN_A_SET:], strict=True):
        sums += agrees * w
    sums += sums == 0
    return sums


@functools.lru_cache(maxsize=64)
def _sums_of_sets(weights: tuple[float, ...]) -> Array:
    """The sum of the weights of each set of models, in their order; a set is a number's bits."""
    sets, sums = np.arange(1 << len(weights)), np.zeros(1 << len(weights))
    for bit, w in enumerate(weights):
        sums += (sets >> bit & 1) * w
    return sums


# ----------------------------------------------------------------------------------- masks by magnitude


Bounds: TypeAlias = Callable[[int, int], tuple[int, int] | None]  # (i, numel): first and last rank kept; None: all
_NOTHING = (0, -1)


def between_ranks(spec: MergeSpec, bounds: Bounds) -> Generator[Pass, Any, Mask]:
    """The mask that keeps, of input i, the magnitudes of ranks `bounds(i, numel)` (ascending from 0, inclusive)."""
    kept = {i: ranks for i in range(spec.num_inputs) if (ranks := bounds(i, spec.numel)) is not None}
    inner = {i: sorted({first} - {0} | {last} - {spec.numel - 1}) for i, (first, last) in kept.items()}
    ranked = [i for i in kept if kept[i] != _NOTHING and inner[i]]
    values: dict[tuple[int, int], float] = {}
    if ranked and spec.numel:

        def of(tile: Tile) -> list[Array]:
            return [magnitudes(np.subtract(tile.inputs[i], tile.base, out=tile.inputs[i])) for i in ranked]

        statistics = yield OrderStatistics(of, [inner[i] for i in ranked])
        values = {
            (i, rank): v for i, vs in zip(ranked, statistics, strict=True) for rank, v in zip(inner[i], vs, strict=True)
        }

    def mask(tile: Tile, i: int, d: Array) -> None:
        if i not in kept:
            return
        first, last = kept[i]
        if kept[i] == _NOTHING:
            d[...] = 0.0
            return
        low, high = (np.float32(values.get((i, rank), end)) for rank, end in ((first, 0.0), (last, math.inf)))
        sizes = magnitudes(d)
        keep = sizes >= low
        if high < math.inf:
            keep &= sizes <= high
        np.multiply(d, keep, out=d)

    return mask


def rescaled(spec: MergeSpec, mask: Mask) -> Generator[Pass, Any, Mask]:
    """If `rescale`: the kept elements of a difference are scaled to the sum of magnitudes that the difference had
    before."""
    if not spec["rescale"]:
        return mask
    n = spec.num_inputs

    def of(tile: Tile) -> list[float]:
        before = [float(np.add.reduce(np.abs(d), axis=None)) for d in tile.deltas()]
        for i, d in enumerate(tile.inputs):
            mask(tile, i, d)
        return before + [float(np.add.reduce(np.abs(d), axis=None)) for d in tile.inputs]

    totals = yield Sums(of, 2 * n)
    factors = [a / b if b > 0 and math.isfinite(a) else 1.0 for a, b in zip(totals[:n], totals[n:], strict=True)]

    def mask_and_scale(tile: Tile, i: int, d: Array) -> None:
        mask(tile, i, d)
        np.multiply(d, factors[i], out=d)

    return mask_and_scale


# -------------------------------------------------------------------------------------------- methods


def task_arithmetic(spec: MergeSpec) -> Steps:
    """base + lambda sum_i w_i d_i. G. Ilharco et al., "Editing models with task arithmetic", 2022."""
    yield from ()
    return merge_masked(spec, keep_all, consensus=False)


def ties(spec: MergeSpec) -> Steps:
    """Keep the `density` largest of each difference, elect signs, average what agrees.

    P. Yadav et al., "TIES-Merging: resolving interference when merging models", 2023.
    """
    densities = numbers(spec, "density", 0.0, 1.0)

    def bounds(i: int, numel: int) -> tuple[int, int] | None:
        if densities[i] == 1:
            return None
        return (numel - max(1, int(densities[i] * numel)), numel - 1) if densities[i] > 0 else _NOTHING

    merge_masked(spec, keep_all, consensus=True)  # raises before any pass
    mask = yield from between_ranks(spec, bounds)
    mask = yield from rescaled(spec, mask)
    return merge_masked(spec, mask, consensus=True)


def _breadcrumbs(spec: MergeSpec, consensus: bool) -> Steps:
    """Keep `density` of each difference: drop the `gamma` largest (fewer, if too few were left), then keep the largest.

    M. Davari and E. Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", 2023.
    """
    densities, gammas = numbers(spec, "density", 0.0, 1.0), numbers(spec, "gamma", 0.0, 1.0)

    def bounds(i: int, numel: int) -> tuple[int, int] | None:
        if densities[i] == 1:
            return None
        kept = int(densities[i] * numel)
        first = max(0, numel - kept - int(gammas[i] * numel))
        return (first, first + kept - 1) if kept else _NOTHING

    merge_masked(spec, keep_all, consensus=consensus)  # raises before any pass
    mask = yield from between_ranks(spec, bounds)
    mask = yield from rescaled(spec, mask)
    return merge_masked(spec, mask, consensus=consensus)


def breadcrumbs(spec: MergeSpec) -> Steps:
    return _breadcrumbs(spec, consensus=False)


def breadcrumbs_ties(spec: MergeSpec) -> Steps:
    return _breadcrumbs(spec, consensus=True)


def dropped(spec: MergeSpec) -> Mask:
    """DARE's mask: each element stays with probability `density`; if `rescale`, it is then divided by `density`.

    L. Yu et al., "Language models are super Mario", 2023. The expectation of the rescaled result is the difference
    itself.
    """
    densities, rescale = numbers(spec, "density", 0.0, 1.0), bool(spec["rescale"])

    def mask(tile: Tile, i: int, d: Array) -> None:
        p = densities[i]
        if p < 1:
            np.multiply(d, tile.is_below(i, p), out=d)
            if rescale and p:
                np.divide(d, p, out=d)

    return mask


def dare_linear(spec: MergeSpec) -> Steps:
    yield from ()
    return merge_masked(spec, dropped(spec), consensus=False)


def dare_ties(spec: MergeSpec) -> Steps:
    yield from ()
    return merge_masked(spec, dropped(spec), consensus=True)


# ------------------------------------------------------------------------------------------------ sce


def spread(inputs: Sequence[Array]) -> Array:
    """The standard deviation of each element across the models, in float32: exactly 0 where they are equal.

    The base cancels. Standard deviations are ordered as variances are, and stay within float32's range.
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
def sce(spec: MergeSpec) -> Steps:
    """Select the `select_topk` of the varying elements that vary most, weight each difference by its energy, elect.

    F. Wan et al., "FuseChat: knowledge fusion of chat models", 2024, section on SCE.
    """
    topk, n = number(spec, "select_topk", 0.0, 1.0), spec.num_inputs
    least = 0.0
    if topk < 1:
        (varying,) = yield Sums(lambda tile: [float(np.count_nonzero(spread(tile.inputs)))], 1)
        kept = int(varying * topk)
        least = math.inf
        if kept:
            ((least,),) = yield OrderStatistics(lambda tile: [spread(tile.inputs)], [[spec.numel - kept]])

    def selected(tile: Tile) -> list[Array]:
        varies = None if least == 0 else spread(tile.inputs) >= np.float32(least)
        deltas = tile.deltas()
        if varies is not None:
            weigh([varies] * n, deltas)
        return deltas

    def energies(tile: Tile, scale: float) -> list[float]:
        return [dot(d, d) for d in (np.multiply(d, scale, out=d) for d in selected(tile))]

    sums, _ = yield from in_range(energies, n)
    shares = [value / math.fsum(sums) for value in sums] if any(sums) else [1.0 / n] * n

    def combine(tile: Tile) -> Array:
        deltas = selected(tile)
        signs = elected(deltas)
        weigh(shares, deltas)
        merged = agreed(deltas, shares, signs, normalize=True)
        np.add(merged, tile.base, out=merged)
        return merged

    return combine


# ------------------------------------------------------------------------------------------------ ram


def changed(deltas: Sequence[Array], epsilon: float) -> tuple[list[Array], Array]:
    """Where each difference is larger than epsilon, and how many of the models it is so for."""
    masks = [np.abs(d) > epsilon for d in deltas]
    count = np.zeros(deltas[0].shape, np.int64)
    for mask in masks:
        count += mask
    return masks, count


def ram(spec: MergeSpec) -> Steps:
    """base + the average of the differences larger than epsilon, over the models that have one at the element.

    X. Yuan et al., "Behavior knowledge merge in reinforced agentic models", 2026.
    """
    epsilon = number(spec, "epsilon", 0.0)
    yield from ()
    return _of_the_changed([1.0] * spec.num_inputs, epsilon)


@of_elements
def ramplus_tl(spec: MergeSpec) -> Steps:
    """As `ram`; a difference that one model alone has is scaled by that model's 1 + r min(alpha, shared / unique): the
    numbers of its elements in this tensor (Tensor-Local) that others changed, too, and that it alone changed.
    """
    epsilon, r, alpha, n = (*(number(spec, key, 0.0) for key in ("epsilon", "r", "alpha")), spec.num_inputs)

    def counts(tile: Tile) -> list[float]:
        masks, count = changed(tile.deltas(), epsilon)
        shared, unique = count > 1, count == 1
        return [float(np.count_nonzero(mask & which)) for which in (shared, unique) for mask in masks]

    sums = yield Sums(counts, 2 * n)
    pairs = zip(sums[:n], sums[n:], strict=True)
    return _of_the_changed([1 + r * min(alpha, shared / max(unique, 1.0)) for shared, unique in pairs], epsilon)


def _of_the_changed(scales: Sequence[float], epsilon: float) -> Combine:
    def combine(tile: Tile) -> Array:
        deltas = tile.deltas()
        masks, count = changed(deltas, epsilon)
        for d, mask, scale in zip(deltas, masks, scales, strict=True):
            np.multiply(d, mask, out=d)
            if scale != 1:
                np.multiply(d, scale, out=d, where=count == 1)
        merged = mix([1.0] * len(deltas), deltas)
        np.divide(merged, np.maximum(count, 1, out=count), out=merged)
        np.add(merged, tile.base, out=merged)
        return merged

    return combine
