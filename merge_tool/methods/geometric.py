"""The inner-product family: a few inner products per tensor (or row, or column), then a sum of c_i x_i.

After the sums, everything is arithmetic on the table of inner products: a direction is a combination of the inputs,
given by its coefficients. With a base, the inputs' differences from the base take the place of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.inner import ANTIPARALLEL, SMALL_SINE, PairSums, Weights, slerp_weights
from merge_tool.methods.steps import ColumnSums, MergeSpec, Steps, Tile
from merge_tool.methods.tiles import (
    gram,
    mix,
    mixed,
    number,
    numbers,
    of_elements,
    pair_sums,
    quadratic,
    row_dots,
    vectors,
    weight_sum,
)

# ------------------------------------------------------------------------------- two weights for two models


def slerp(sums: PairSums, spec: MergeSpec) -> Weights:
    """Slerp at t: 0 is the first model, 1 the second."""
    return slerp_weights(sums, number(spec, "t"))


def linear_of_two(sums: PairSums, spec: MergeSpec) -> Weights:
    """As `linear`."""
    w0, w1 = shares(spec)
    return Weights(w0, w1, precise=min(w0, w1) < 0)


# ------------------------------------------------------------------------------- averages, passthrough


def shares(spec: MergeSpec) -> list[float]:
    """Each model's coefficient in `linear`."""
    weights = numbers(spec, "weight")
    divisor = weight_sum(weights, "change weight, or set normalize to false") if spec["normalize"] else 1.0
    return [w / divisor for w in weights]


def linear(spec: MergeSpec) -> Steps:
    """sum_i w_i x_i, divided by sum_i w_i if `normalize`."""
    coefficients = shares(spec)
    yield from ()
    return lambda tile: mix(coefficients, tile.inputs)


def passthrough(spec: MergeSpec) -> Steps:
    """x, or scale x."""
    scale = 1.0 if spec["scale"][0] is None else numbers(spec, "scale")[0]
    yield from ()
    return lambda tile: mix([scale], tile.inputs)


# --------------------------------------------------------------------------------------------- nuslerp


@of_elements
def nuslerp(spec: MergeSpec) -> Steps:
    """Slerp at t = w1 / (w0 + w1): of whole tensors, of rows (the last dimension), or of columns (the first)."""
    weights = numbers(spec, "weight")
    t = weights[1] / weight_sum(weights, "nuslerp goes w1 / (w0 + w1) of the way; change weight")
    if spec["nuslerp_flatten"]:
        mixing = slerp_weights((yield from pair_sums(vectors)), t)
        return mixed((mixing.w0, mixing.w1))
    if spec["nuslerp_row_wise"]:
        return (yield from _nuslerp_columns(spec, t))
    return lambda tile: _slerp_rows(tile, t)


def arc_weights(apart: Array, together: Array, t: float) -> tuple[Array, Array]:
    """Slerp's two weights for many pairs of unit vectors u, v at once, from |u - v| and |u + v|.

    As `inner.slerp_weights`: linear if there is no arc, if the arc is too short, or if no arc is preferred. A zero
    vector has `apart` = 0.
    """
    theta, to_pi = 2 * np.arctan2(apart, together), 2 * np.arctan2(together, apart)
    sine = np.sin(np.minimum(theta, to_pi))
    arc = (sine >= SMALL_SINE) & (to_pi >= ANTIPARALLEL)
    safe = np.where(arc, sine, 1.0)

    def weight(share: float) -> Array:
        near, far = np.sin(share * theta), np.sin(share * math.pi - share * to_pi)
        return np.where(arc, np.where(theta < math.pi / 2, near, far) / safe, share)

    return weight(1.0 - t), weight(t)


def _reciprocal(squares: Array) -> Array:
    """1 / norm, and 0 for a norm of 0."""
    norms = np.sqrt(squares)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _slerp_rows(tile: Tile, t: float) -> Array:
    x, y = vectors(tile)
    rx, ry = _reciprocal(row_dots(x, x)), _reciprocal(row_dots(y, y))
    u, v = x * rx, y * ry
    arc = (rx > 0) & (ry > 0)
    apart, together = u - v, np.add(u, v, out=u)
    w0, w1 = arc_weights(np.where(arc, np.sqrt(row_dots(apart, apart)), 0.0), np.sqrt(row_dots(together, together)), t)
    merged = np.add(np.multiply(x, w0, out=x), np.multiply(y, w1, out=y), out=x)
    return merged if tile.base is None else np.add(merged, tile.base, out=merged)


def num_columns(spec: MergeSpec) -> int:
    """The number of columns: vectors along the first dimension. A tensor of one dimension is one column."""
    return spec.numel // max(1, spec.shape[0] if spec.shape else 1)


def _nuslerp_columns(spec: MergeSpec, t: float) -> Steps:
    columns = num_columns(spec)

    def places(tile: Tile) -> Array:
        return np.arange(tile.start, tile.start + tile.inputs[0].size) % columns

    def totals(where: Array, *values: Array) -> Array:
        return np.array([np.bincount(where, weights=v, minlength=columns) for v in values])

    def squares(tile: Tile) -> Array:
        x, y = vectors(tile)
        return totals(places(tile), np.square(x, out=x), np.square(y, out=y))

    rx, ry = (_reciprocal(total) for total in (yield ColumnSums(squares, 2, columns)))

    def chords(tile: Tile) -> Array:
        (x, y), where = vectors(tile), places(tile)
        np.multiply(x, rx[where], out=x)
        np.multiply(y, ry[where], out=y)
        apart, together = x - y, np.add(x, y, out=x)
        return totals(where, np.square(apart, out=apart), np.square(together, out=together))

    apart, together = np.sqrt((yield ColumnSums(chords, 2, columns)))
    w0, w1 = arc_weights(np.where((rx > 0) & (ry > 0), apart, 0.0), together, t)

    def combine(tile: Tile) -> Array:
        (x, y), where = vectors(tile), places(tile)
        np.multiply(x, w0[where], out=x)
        np.multiply(y, w1[where], out=y)
        np.add(x, y, out=x)
        return x if tile.base is None else np.add(x, tile.base, out=x)

    return combine


# ----------------------------------------------------------------------------------------------- warp


@of_elements
def warp(spec: MergeSpec) -> Steps:
    """base + eta times the slerp of the differences from it; of one model, base + eta (x - base).

    A. Rame et al., "WARP: on the benefits of weight averaged rewarded policies", 2024. More than two models follow one
    another: model m is slerped into the mean of those before it, at t = w_m / (w_1 + ... + w_m).
    """
    weights, eta = numbers(spec, "weight", 0.0), number(spec, "eta")
    weight_sum(weights, "one of them must be above 0; change weight")
    if spec.num_inputs == 2:
        t = weights[1] / math.fsum(weights)
        mixing = slerp_weights((yield from pair_sums(Tile.deltas)), t)
        return mixed((eta * mixing.w0, eta * mixing.w1))
    table, scale = yield from gram(Tile.deltas, spec.num_inputs)
    return mixed([eta * c for c in slerp_chain(weights, table, scale)])


def slerp_chain(weights: Sequence[float], table: Array, scale: float) -> list[float]:
    """The coefficients of vectors that are slerped one after another, from their inner products times scale^2."""
    chain, weight = [0.0] * len(weights), 0.0
    for m, w in enumerate(weights):
        if w == 0:
            continue
        weight += w
        along = math.fsum(c * float(table[j, m]) for j, c in enumerate(chain))
        squared = quadratic(chain, table)
        apart = quadratic([c - (j == m) for j, c in enumerate(chain)], table)
        mixing = slerp_weights(PairSums(xx=squared, xd=along - squared, dd=apart, scale=scale), w / weight)
        chain = [mixing.w0 * c for c in chain]
        chain[m] = mixing.w1
    return chain


# ----------------------------------------------------------------------------------------- model stock


@of_elements
def model_stock(spec: MergeSpec) -> Steps:
    """(1 - t) base + t average, with t = n c / (1 + (n - 1) c) and c the mean cosine between the models' differences.

    D.-H. Jang et al., "Model Stock: all we need is just a few fine-tuned models", 2024. Where c <= 0 the differences
    have nothing in common and t is 0, the base. `filter_wise`: row by row.
    """
    n = spec.num_inputs
    if spec["filter_wise"]:
        return lambda tile: _stock_rows(tile, n)
    table, _ = yield from gram(Tile.deltas, n)
    r = _reciprocal(np.diag(table))
    cosines = [float(table[i, j] * r[i] * r[j]) for i in range(n) for j in range(i)]
    t = float(stock_share(np.array(math.fsum(cosines) / len(cosines)), n))
    return mixed([t / n] * n)


def stock_share(cosine: Array, n: int) -> Array:
    c = np.clip(cosine, 0.0, 1.0)
    return np.asarray(n * c / (1 + (n - 1) * c))


def _stock_rows(tile: Tile, n: int) -> Array:
    deltas = tile.deltas()
    r = [_reciprocal(row_dots(d, d)) for d in deltas]
    cosine = np.zeros_like(r[0])
    for i in range(n):
        for j in range(i):
            cosine += row_dots(deltas[i], deltas[j]) * (r[i] * r[j])
    merged = mix([1.0] * n, deltas)
    np.multiply(merged, stock_share(cosine / (n * (n - 1) / 2), n) / n, out=merged)
    np.add(merged, tile.base, out=merged)
    return merged
