"""Means of many models other than the average: on the sphere, and the point with the least sum of distances.

One pass makes a table of numbers over pairs of models. The mean's coefficients are then computed from the table alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from merge_tool.arrays import Array
from merge_tool.methods.inner import ANTIPARALLEL, SMALL_SINE
from merge_tool.methods.steps import MergeSpec, Steps, Sums, Tile
from merge_tool.methods.tiles import (
    dot,
    gram,
    in_range,
    mix,
    mixed,
    number,
    numbers,
    of_elements,
    quadratic,
    vectors,
    weight_sum,
)

_CANCELLED = 1e-3  # share of a squared length: below it the table has lost digits, so the vector itself is summed
_TOGETHER = 1e-12  # share of the largest distance: nearer points count as one point
_MOST_STEPS = 10_000  # about 0.1 s a tensor; with a `tol` of 0 all steps are made

# ------------------------------------------------------------------------------- means on the sphere


def multislerp(spec: MergeSpec) -> Steps:
    """The direction of m = sum_i w_i x_i/|x_i|, at the length sum_i w_i |x_i|.

    The published method takes the tangents at m of all points, averages them, and goes along the average. That average
    is sum_i w_i (u_i - <u_i, m> m / <m, m>) = m - m = 0, so the method stays at m, and needs |m| only. If m vanishes,
    no direction is preferred: the result is linear, as for slerp of antiparallel tensors.
    """
    weights, eps = numbers(spec, "weight"), number(spec, "eps", 0.0)
    if spec["normalize_weights"]:
        divisor = weight_sum(weights, "change weight, or set normalize_weights to false")
        weights = [w / divisor for w in weights]
    table, scale = yield from gram(vectors, spec.num_inputs)
    norms = np.sqrt(np.diag(table))
    towards = [w / n if n else 0.0 for w, n in zip(weights, norms, strict=True)]
    size = math.fsum(abs(w) for w, n in zip(weights, norms, strict=True) if n)
    squared = quadratic(towards, table)
    if size > 0 and squared < _CANCELLED * size * size:
        (squared,) = yield Sums(lambda tile: _squared(mix([c * scale for c in towards], vectors(tile))), 1)
    if math.sqrt(squared) <= eps * size:
        return mixed(weights)
    longer = math.fsum(w * float(n) for w, n in zip(weights, norms, strict=True)) / math.sqrt(squared)
    return mixed([c * longer for c in towards])


def _squared(x: Array) -> list[float]:
    return [dot(x, x)]


def karcher(spec: MergeSpec) -> Steps:
    """The point of the sphere with the least sum of squared arcs to the inputs' directions, at their mean length.

    Gradient descent from the normalised average, until a step is shorter than `tol` or `max_iter` steps were made.
    H. Karcher, "Riemannian center of mass and mollifier smoothing", 1977. Tensors of norm 0 have no direction.
    """
    max_iter, tol, n = int(number(spec, "max_iter", 0, _MOST_STEPS)), number(spec, "tol", 0.0), spec.num_inputs
    table, _ = yield from gram(lambda tile: tile.inputs, n)
    norms = [math.sqrt(table[i, i]) for i in range(n)]
    known = [i for i in range(n) if norms[i] > 0]
    cosines = np.array([[table[i, j] / (norms[i] * norms[j]) for j in known] for i in known])
    center = sphere_mean(cosines, max_iter, tol)
    if center is None:
        return mixed([1.0 / n] * n)
    length = math.fsum(norms) / n
    coefficients = [0.0] * n
    for i, c in zip(known, center, strict=True):
        coefficients[i] = length * c / norms[i]
    return mixed(coefficients)


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
    """The average of the arcs from the mean to each point; a point exactly opposite to the mean does not count."""
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


# ------------------------------------------------------------------------------------ geometric median


@of_elements
def geometric_median(spec: MergeSpec) -> Steps:
    """The point with the least weighted sum of distances to the models, by Weiszfeld's iteration.

    Until no coefficient moves by more than `tol`, or `max_iter` steps were made. E. Weiszfeld, "Sur le point pour
    lequel la somme des distances de n points donnes est minimum", 1937; from a model on as Y. Vardi and C.-H. Zhang,
    "The multivariate L1-median and associated data depth", 2000.
    """
    weights = numbers(spec, "weight", 0.0)
    weight_sum(weights, "one of them must be above 0; change weight")
    max_iter, tol, n = int(number(spec, "max_iter", 0, _MOST_STEPS)), number(spec, "tol", 0.0), spec.num_inputs
    pairs = [(i, j) for i in range(n) for j in range(i)]

    def of(tile: Tile, scale: float) -> list[float]:
        apart, sums = np.empty_like(tile.inputs[0]), []
        for i, j in pairs:
            np.subtract(tile.inputs[i], tile.inputs[j], out=apart)
            sums.append(dot(apart, apart) if scale == 1.0 else dot(apart * scale, apart * scale))
        return sums

    squares, _ = yield from in_range(of, len(pairs))
    table = np.zeros((n, n))
    for (i, j), value in zip(pairs, squares, strict=True):
        table[i, j] = table[j, i] = value
    return mixed(median_of(table, np.array(weights), max_iter, tol))


def median_of(squares: Array, weights: Array, max_iter: int, tol: float) -> list[float]:
    """The median's coefficients, from the squared distances between the points.

    The iteration begins at the point with the least sum of distances. If the median is one of the points, it is this
    point. From there every step lessens the sum, so the iteration never comes to another point.
    """
    squares = squares / (squares.max() or 1.0)
    center = np.zeros(len(weights))
    center[int(np.argmin(np.add.reduce(np.sqrt(squares) * weights, axis=1)))] = 1.0
    for _ in range(max_iter):
        after = _weiszfeld(center, squares, weights)
        moved = float(np.abs(after - center).max())
        center = after
        if moved <= tol:
            break
    return [float(c) for c in center]


def _weiszfeld(center: Array, squares: Array, weights: Array) -> Array:
    """One step: the average of the points, each weighted by its weight over its distance. The weight of a point at the
    center itself holds the step back. For coefficients c that add up to 1, |x_i - x|^2 = (S c)_i - c S c / 2.
    """
    along = np.add.reduce(squares * center, axis=1)
    distances = np.sqrt(np.maximum(along - float(np.add.reduce(along * center)) / 2, 0.0))
    is_here = distances < _TOGETHER
    pull = np.divide(weights, distances, out=np.zeros_like(weights), where=~is_here)
    total = float(np.add.reduce(pull))
    if total == 0:
        return center
    towards: Array = pull / total
    held = float(np.add.reduce(weights * is_here))
    if held == 0:
        return towards
    step = towards - center
    size = total * math.sqrt(max(0.0, -float(np.add.reduce(step * np.add.reduce(squares * step, axis=1))) / 2))
    return center if size <= held else np.asarray(center + (1 - held / size) * step)
