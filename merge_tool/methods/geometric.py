"""The inner-product family: a few inner products per tensor (or row, or column), then a sum of c_i x_i.

After the sums, everything is arithmetic on the table of inner products: a direction is a combination of the inputs and
is given by its coefficients. With a base, the inputs are replaced by their differences from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.inner import ANTIPARALLEL, SMALL_SINE, PairSums, Weights, slerp_weights
from merge_tool.methods.steps import ColumnSums, Combine, MergeSpec, Steps, Sums, Tile
from merge_tool.methods.tiles import (
    dot,
    gram,
    mix,
    number,
    numbers,
    of_elements,
    pair_sums,
    row_dots,
    weight_sum,
)

_CANCELLED = 1e-3  # share of a squared length: below it the table has lost digits, so the vector itself is summed


# ------------------------------------------------------------------------------- two weights for two models


def slerp(sums: PairSums, spec: MergeSpec) -> Weights:
    """Slerp at t: 0 is the first model, 1 the second."""
    return slerp_weights(sums, number(spec, "t"))


def linear_of_two(sums: PairSums, spec: MergeSpec) -> Weights:
    """As `linear`."""
    w0, w1 = _shares(spec)
    return Weights(w0, w1, precise=min(w0, w1) < 0)


# ------------------------------------------------------------------------------- averages, passthrough


def _shares(spec: MergeSpec) -> list[float]:
    weights = numbers(spec, "weight")
    divisor = weight_sum(weights, "change weight, or set normalize to false") if spec["normalize"] else 1.0
    return [w / divisor for w in weights]


def linear(spec: MergeSpec) -> Steps:
    """sum_i w_i x_i, over sum_i w_i where `normalize`."""
    shares = _shares(spec)
    yield from ()
    return lambda tile: mix(shares, tile.inputs)


def passthrough(spec: MergeSpec) -> Steps:
    """x, or scale x."""
    scale = 1.0 if spec["scale"][0] is None else numbers(spec, "scale")[0]
    yield from ()
    return lambda tile: mix([scale], tile.inputs)


def _vectors(tile: Tile) -> list[Array]:
    return tile.inputs if tile.base is None else tile.deltas()


def _mixed(coefficients: Sequence[float]) -> Combine:
    """base + sum_i c_i (x_i - base), or sum_i c_i x_i without a base."""

    def combine(tile: Tile) -> Array:
        merged = mix(coefficients, _vectors(tile))
        return merged if tile.base is None else np.add(merged, tile.base, out=merged)

    return combine


# --------------------------------------------------------------------------------------------- nuslerp


@of_elements
def nuslerp(spec: MergeSpec) -> Steps:
    """Slerp at t = w1 / (w0 + w1): of whole tensors, of rows (the last dimension), or of columns (the first)."""
    weights = numbers(spec, "weight")
    t = weights[1] / weight_sum(weights, "nuslerp goes w1 / (w0 + w1) of the way; change weight")
    if spec["nuslerp_flatten"]:
        mixing = slerp_weights((yield from pair_sums(_vectors)), t)
        return _mixed((mixing.w0, mixing.w1))
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
    x, y = _vectors(tile)
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
        x, y = _vectors(tile)
        return totals(places(tile), np.square(x, out=x), np.square(y, out=y))

    rx, ry = (_reciprocal(total) for total in (yield ColumnSums(squares, 2, columns)))

    def chords(tile: Tile) -> Array:
        (x, y), where = _vectors(tile), places(tile)
        np.multiply(x, rx[where], out=x)
        np.multiply(y, ry[where], out=y)
        apart, together = x - y, np.add(x, y, out=x)
        return totals(where, np.square(apart, out=apart), np.square(together, out=together))

    apart, together = np.sqrt((yield ColumnSums(chords, 2, columns)))
    w0, w1 = arc_weights(np.where((rx > 0) & (ry > 0), apart, 0.0), together, t)

    def combine(tile: Tile) -> Array:
        (x, y), where = _vectors(tile), places(tile)
        np.multiply(x, w0[where], out=x)
        np.multiply(y, w1[where], out=y)
        np.add(x, y, out=x)
        return x if tile.base is None else np.add(x, tile.base, out=x)

    return combine


# ------------------------------------------------------------------------------- means on the sphere


def multislerp(spec: MergeSpec) -> Steps:
    """The direction of m = sum_i w_i x_i/|x_i|, at the length sum_i w_i |x_i|.

    The method is published as: take the tangents at m of all points, average them, go along the average. That average
    is sum_i w_i (u_i - <u_i, m> m / <m, m>) = m - m = 0, so it stays at m, and needs |m| only. If m vanishes, no
    direction is preferred: linear, as slerp for antiparallel tensors.
    """
    weights, eps = numbers(spec, "weight"), number(spec, "eps", 0.0)
    if spec["normalize_weights"]:
        divisor = weight_sum(weights, "change weight, or set normalize_weights to false")
        weights = [w / divisor for w in weights]
    table, scale = yield from gram(_vectors, spec.num_inputs)
    norms = np.sqrt(np.diag(table))
    towards = [w / n if n else 0.0 for w, n in zip(weights, norms, strict=True)]
    size = math.fsum(abs(w) for w, n in zip(weights, norms, strict=True) if n)
    squared = quadratic(towards, table)
    if size > 0 and squared < _CANCELLED * size * size:
        (squared,) = yield Sums(lambda tile: _squared(mix([c * scale for c in towards], _vectors(tile))), 1)
    if math.sqrt(squared) <= eps * size:
        return _mixed(weights)
    longer = math.fsum(w * float(n) for w, n in zip(weights, norms, strict=True)) / math.sqrt(squared)
    return _mixed([c * longer for c in towards])


def _squared(x: Array) -> list[float]:
    return [dot(x, x)]


def quadratic(c: Sequence[float], table: Array) -> float:
    """|sum_i c_i x_i|^2 from the inner products of the x_i."""
    terms = (a * b * float(table[i, j]) for i, a in enumerate(c) for j, b in enumerate(c))
    return max(0.0, math.fsum(terms))


_MOST_STEPS = 10_000  # of karcher: about 0.1 s a tensor; with a `tol` of 0 all steps are made


def karcher(spec: MergeSpec) -> Steps:
    """The point of the sphere with the least sum of squared arcs to the inputs' directions, at their mean length.

    Gradient descent from the normalised average, until a step is shorter than `tol` or `max_iter` were made.
    H. Karcher, "Riemannian center of mass and mollifier smoothing", 1977. Tensors of norm 0 have no direction.
    """
    max_iter, tol, n = int(number(spec, "max_iter", 0, _MOST_STEPS)), number(spec, "tol", 0.0), spec.num_inputs
    table, _ = yield from gram(lambda tile: tile.inputs, n)
    norms = [math.sqrt(table[i, i]) for i in range(n)]
    known = [i for i in range(n) if norms[i] > 0]
    cosines = np.array([[table[i, j] / (norms[i] * norms[j]) for j in known] for i in known])
    center = sphere_mean(cosines, max_iter, tol)
    if center is None:
        return _mixed([1.0 / n] * n)
    length = math.fsum(norms) / n
    coefficients = [0.0] * n
    for i, c in zip(known, center, strict=True):
        coefficients[i] = length * c / norms[i]
    return _mixed(coefficients)


def sphere_mean(cosines: Array, max_iter: int, tol: float) -> list[float] | None:
    """The mean's coefficients for unit vectors with these `cosines`; None if their average vanishes."""
    n = len(cosines)
    mean = [1.0 / max(1, n)] * n
    if quadratic(mean, cosines) < ANTIPARALLEL**2:
        return None
    mean = _unit(mean, cosines)
    for _ in range(max_iter):
        tangent = _tangent(mean, cosines)
        step = math.sqrt(quadratic(tangent, cosines))
        if step < tol or step == 0:
            break
        along = math.sin(step) / step
        mean = _unit([math.cos(step) * c + along * d for c, d in zip(mean, tangent, strict=True)], cosines)
    return mean


def _unit(c: Sequence[float], cosines: Array) -> list[float]:
    length = math.sqrt(quadratic(c, cosines))
    return [value / length for value in c]


def _tangent(mean: Sequence[float], cosines: Array) -> list[float]:
    """The average of the arcs from the mean to each point; a point exactly opposite does not count."""
    n = len(mean)
    tangent = [0.0] * n
    for i in range(n):
        cosine = min(1.0, max(-1.0, math.fsum(float(cosines[i, j]) * mean[j] for j in range(n))))
        angle = math.acos(cosine)
        if math.pi - angle < ANTIPARALLEL:
            continue
        pull = (angle / math.sin(angle) if angle > SMALL_SINE else 1.0) / n
        tangent[i] += pull
        for j in range(n):
            tangent[j] -= pull * cosine * mean[j]
    return tangent


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
    return _mixed([t / n] * n)


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
