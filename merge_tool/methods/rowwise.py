"""Methods that work on rows (the last dimension) or on single elements, with at most one threshold of the whole
tensor."""

from __future__ import annotations

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.sparse import Mask, merge_masked
from merge_tool.methods.steps import MergeSpec, OrderStatistics, Steps, Tile
from merge_tool.methods.tiles import magnitudes, number, numbers, of_elements

# ---------------------------------------------------------------------------------------------- della


def mean_ranks(values: Array) -> Array:
    """Each value's 0-based rank within its row, ascending; equal values share the mean of their ranks."""
    order = np.argsort(values, axis=-1)
    in_order = np.take_along_axis(values, order, axis=-1)
    begins = np.ones(values.shape, bool)
    begins[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    del in_order
    places = np.arange(values.shape[-1])
    first = begins * places
    np.maximum.accumulate(first, axis=-1, out=first)
    ends = np.ones(values.shape, bool)
    ends[:, :-1] = begins[:, 1:]
    last = np.where(ends, places, len(places))[:, ::-1]
    np.minimum.accumulate(last, axis=-1, out=last)
    first += last[:, ::-1]
    del last
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, first, axis=-1)
    ranks /= 2
    return ranks


def _by_rank(spec: MergeSpec) -> Mask:
    """DELLA's mask: an element stays with a probability from density - epsilon (the smallest of its row) to density +
    epsilon (the largest), evenly by rank. If `rescale`, elements that stay are divided by that probability.

    P. T. Deep, R. Bhardwaj and S. Poria, "DELLA-Merging", 2024, whose epsilon is the whole width, twice this one.
    """
    densities, epsilons = numbers(spec, "density", 0.0, 1.0), numbers(spec, "epsilon", 0.0)
    for p, e in zip(densities, epsilons, strict=True):
        if 0 < p < 1 and not (p - e >= -1e-9 and p + e <= 1 + 1e-9):
            raise ValueError(
                f"epsilon is {e:g} at a density of {p:g}; density - epsilon must be at least 0, and density + "
                "epsilon at most 1."
            )
    rescale = bool(spec["rescale"])

    def mask(tile: Tile, i: int, d: Array) -> None:
        p, e = densities[i], epsilons[i]
        if p == 1:
            return
        if p == 0:
            d[:] = 0.0
            return
        keep = mean_ranks(np.abs(d))
        keep *= 2 * e / max(1, d.shape[-1] - 1)
        keep += p - e if d.shape[-1] > 1 else p
        np.multiply(d, tile.uniform(i) < keep, out=d)
        if rescale:
            np.maximum(keep, np.finfo(float).tiny, out=keep)  # elements of probability 0 are 0 already
            np.divide(d, keep, out=d)

    return mask


@of_elements
def della(spec: MergeSpec) -> Steps:
    yield from ()
    return merge_masked(spec, _by_rank(spec), consensus=True)


@of_elements
def della_linear(spec: MergeSpec) -> Steps:
    yield from ()
    return merge_masked(spec, _by_rank(spec), consensus=False)


# ------------------------------------------------------------------------------------------- nearswap


def nearswap(spec: MergeSpec) -> Steps:
    """w x + (1 - w) base with w = min(1, t / |x - base|): the base moved towards x by t, or to x if that is nearer."""
    t = number(spec, "t", 0.0)
    yield from ()

    def combine(tile: Tile) -> Array:
        x = tile.inputs[0]
        d = x - tile.base
        moved: Array = tile.base + np.clip(d, -t, t)
        np.copyto(moved, x, where=np.abs(d) <= t)
        return moved

    return combine


# --------------------------------------------------------------------------------------- arcee fusion


def _log_softmax(rows: Array) -> Array:
    shifted: Array = rows - rows.max(axis=-1, keepdims=True)
    shifted -= np.log(np.add.reduce(np.exp(shifted), axis=-1, keepdims=True))
    return shifted


def divergence(x: Array, base: Array) -> Array:
    """KL(softmax(x) || softmax(base)) of each row, [rows, 1].

    Computed as sum p (r + exp(-r) - 1) with r = log p - log q, which is equal because p and q sum to 1. All its terms
    have one sign: similar rows have a divergence of 1e-8 and less, of which sum p r has few digits.
    """
    r, q = _log_softmax(x), _log_softmax(base)
    p = np.exp(r)
    r -= q
    np.exp(q, out=q)
    far = r < -1  # there exp(-r) may overflow, and p (r - 1) + q is equal to it
    terms = np.expm1(-np.maximum(r, -1.0))
    terms += r
    terms *= p
    np.copyto(terms, p * (r - 1.0) + q, where=far)
    return np.asarray(np.add.reduce(terms, axis=-1, keepdims=True))


def importance(tile: Tile) -> Array:
    """|x - base| times its row's divergence."""
    x = tile.inputs[0]
    weight = divergence(x, tile.base)
    return np.asarray(np.abs(x - tile.base) * weight)


@of_elements
def arcee_fusion(spec: MergeSpec) -> Steps:
    """x where its importance is at least median + 1.5 (q3 - q1) of the tensor's importances, else the base.

    The quartiles are the values of ranks int(q (numel - 1)).
    """
    ranks = [int(q * (spec.numel - 1)) for q in (0.25, 0.5, 0.75)]
    ((q1, median, q3),) = yield OrderStatistics(lambda tile: [magnitudes(importance(tile))], [ranks])
    threshold = np.float32(median + 1.5 * (q3 - q1))

    def combine(tile: Tile) -> Array:
        matters = magnitudes(importance(tile)) >= threshold
        return np.where(matters, tile.inputs[0], tile.base)

    return combine
