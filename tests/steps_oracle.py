"""Every method of many models written another way: whole tensors in float64, plainly from its formula. Slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from merge_tool.methods.steps import MergeSpec
from oracle import Array, float64_merge

Oracle = Callable[[MergeSpec, Any, list[Array]], Array]


def linear(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    if spec["normalize"]:
        return np.average(np.stack(inputs), axis=0, weights=spec["weight"])
    return np.tensordot(np.array(spec["weight"], float), np.stack(inputs), axes=1)


def passthrough(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    scale = spec["scale"][0]
    return inputs[0] if scale is None else inputs[0] * scale


def nuslerp(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    origin = np.zeros(spec.shape) if base is None else base
    x, y = (v - origin for v in inputs)
    w0, w1 = spec["weight"]
    t = w1 / (w0 + w1)
    if spec["nuslerp_flatten"] or x.ndim < 2:
        return origin + float64_merge(x, y, t)
    axis = 0 if spec["nuslerp_row_wise"] else -1
    x, y = (np.moveaxis(v, axis, -1) for v in (x, y))
    merged = np.empty(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        merged[place] = float64_merge(x[place], y[place], t)
    return origin + np.moveaxis(merged, -1, axis)


def multislerp(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    """By tangents, exponential map and all, as it is told."""
    origin = np.zeros(spec.shape) if base is None else base
    xs = [(x - origin).ravel() for x in inputs]
    w = np.array(spec["weight"], float)
    if spec["normalize_weights"]:
        w = w / w.sum()
    norms = [np.linalg.norm(x) for x in xs]
    units = [x / n if n else x for x, n in zip(xs, norms, strict=True)]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(a * (u - np.dot(u, mean) * mean) for a, u in zip(w, units, strict=True))
    length = np.linalg.norm(tangent)
    point = np.cos(length) * mean + (np.sin(length) / length * tangent if length else 0)
    return origin + (np.dot(w, norms) * point).reshape(spec.shape)


def karcher(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    """By logarithm and exponential maps of whole tensors, with two-argument arc tangents."""
    xs = [x.ravel() for x in inputs]
    norms = [float(np.linalg.norm(x)) for x in xs]
    units = [x / n for x, n in zip(xs, norms, strict=True) if n]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(spec["max_iter"]):
        tangent = np.zeros_like(mean)
        for u in units:
            theta = 2 * np.arctan2(np.linalg.norm(u - mean), np.linalg.norm(u + mean))
            across = u - np.dot(u, mean) * mean
            if np.linalg.norm(across) > 1e-12:
                tangent += theta * across / np.linalg.norm(across) / len(units)
        step = np.linalg.norm(tangent)
        if step < spec["tol"] or step == 0:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
        mean /= np.linalg.norm(mean)
    return (sum(norms) / len(norms) * mean).reshape(spec.shape)


def model_stock(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    rows = base.reshape(-1, spec.columns if spec["filter_wise"] else spec.numel)
    average = np.mean(np.stack(inputs), axis=0).reshape(rows.shape)
    merged = np.empty(rows.shape)
    for i, w0 in enumerate(rows):
        deltas = [x.reshape(rows.shape)[i] - w0 for x in inputs]
        found = []
        for j, a in enumerate(deltas):
            for b in deltas[j + 1 :]:
                size = np.linalg.norm(a) * np.linalg.norm(b)
                found.append(np.dot(a, b) / size if size else 0.0)
        c, n = max(0.0, float(np.mean(found))), len(inputs)
        t = n * c / (1 + (n - 1) * c)
        merged[i] = t * average[i] + (1 - t) * w0
    return merged.reshape(spec.shape)


def warp(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    """Vector by vector: the mean so far and the next difference, by the textbook's slerp."""
    mean, weight = None, 0.0
    for x, w in zip(inputs, spec["weight"], strict=True):
        if w:
            weight += w
            mean = x - base if mean is None else float64_merge(mean, x - base, w / weight)
    return base + spec["eta"] * mean


def geometric_median(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    """The model that the others do not pull away, if there is one; else the fixed point of Weiszfeld's plain step from
    the average on."""
    xs, w = np.stack([x.ravel() for x in inputs]), np.array(spec["weight"], float)
    for x in xs:
        apart = np.linalg.norm(xs - x, axis=1)
        others = apart > 0
        pull = ((xs - x)[others] * (w[others] / apart[others])[:, None]).sum(axis=0)
        if np.linalg.norm(pull) <= w[~others].sum():
            return x.reshape(spec.shape)
    point = np.average(xs, axis=0, weights=w)
    for _ in range(20_000):
        before, pull = point, w / np.linalg.norm(xs - point, axis=1)
        point = (pull[:, None] * xs).sum(axis=0) / pull.sum()
        if np.abs(point - before).max() < 1e-15:
            break
    return point.reshape(spec.shape)


def sparse(choose: Callable[[MergeSpec, int, Array], Array], *, consensus: bool) -> Oracle:
    """Task vectors through `choose`, then base + lambda times their sum or their average by elected signs."""

    def merge(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
        deltas = np.stack([choose(spec, i, x - base) for i, x in enumerate(inputs)])
        w = np.array(spec["weight"], float).reshape(-1, *(1,) * base.ndim)
        if not consensus:
            total = (deltas * w).sum(axis=0) / (w.sum() if spec["normalize"] else 1)
            return base + spec["lambda"] * total
        return base + spec["lambda"] * _elect(deltas, w, spec["normalize"])

    return merge


def _elect(deltas: Array, w: Array, normalize: bool, signs: Any = None) -> Array:
    signs = np.sign((deltas * w).sum(axis=0)) if signs is None else signs
    agree = ((deltas * w) * signs > 0).astype(float)
    total, weight = (deltas * w * agree).sum(axis=0), (w * agree).sum(axis=0)
    return total / np.where(weight == 0, 1, weight) if normalize else total


def _everything(spec: MergeSpec, i: int, d: Array) -> Array:
    return d


def _l1(spec: MergeSpec, before: Array, after: Array) -> Array:
    return after * (np.abs(before).sum() / np.abs(after).sum()) if spec["rescale"] and after.any() else after


def _largest(spec: MergeSpec, i: int, d: Array) -> Array:
    density = spec["density"][i]
    if density in (0, 1):
        return d * density
    sizes = np.abs(d).astype(np.float32)
    least = np.sort(sizes, axis=None)[::-1][max(1, int(density * d.size)) - 1]
    return _l1(spec, d, np.where(sizes >= least, d, 0.0))


def _middle(spec: MergeSpec, i: int, d: Array) -> Array:
    density = spec["density"][i]
    if density == 1:
        return d
    sizes = np.abs(d).astype(np.float32)
    kept, top = int(density * d.size), int(spec["gamma"][i] * d.size)
    top = min(top, d.size - kept)  # fewer of the largest go where too little would be left
    chosen = np.sort(sizes, axis=None)[::-1][top : top + kept]
    if not len(chosen):
        return np.zeros_like(d)
    return _l1(spec, d, np.where((sizes >= chosen.min()) & (sizes <= chosen.max()), d, 0.0))


def uniform(spec: MergeSpec, i: int) -> Array:
    """All of a stream at once, by numpy's own generator of floats."""
    bits = np.random.Philox(counter=0, key=(spec.key ^ (i * 0x9E3779B97F4A7C15)) & (2**128 - 1))
    return np.random.Generator(bits).random(spec.numel).reshape(spec.shape)


def _coin(spec: MergeSpec, i: int, d: Array) -> Array:
    density = spec["density"][i]
    kept = np.where(uniform(spec, i) < density, d, 0.0)
    return kept / density if spec["rescale"] and density else kept


def _ranked_coin(spec: MergeSpec, i: int, d: Array) -> Array:
    density, epsilon = spec["density"][i], spec["epsilon"][i]
    if density in (0, 1):
        return d * density
    rows = np.abs(d).reshape(-1, spec.columns)
    ranks = np.empty(rows.shape)
    for k, row in enumerate(rows):
        ordered = np.sort(row)
        ranks[k] = (np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") - 1) / 2
    n = spec.columns
    chance = np.full(rows.shape, density) if n == 1 else density - epsilon + 2 * epsilon * ranks / (n - 1)
    chance = chance.reshape(d.shape)
    kept = np.where(uniform(spec, i) < chance, d, 0.0)
    return kept / chance if spec["rescale"] else kept


def sce(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    deltas = np.stack([x - base for x in inputs])
    spread = np.std(np.stack(inputs), axis=0).astype(np.float32)
    if spec["select_topk"] < 1:
        kept = int(np.count_nonzero(spread) * spec["select_topk"])
        least = np.sort(spread, axis=None)[::-1][kept - 1] if kept else np.inf
        deltas = np.where(spread >= least, deltas, 0.0)
    energy = np.array([np.sum(d * d) for d in deltas])
    w = energy / energy.sum() if energy.any() else np.full(len(deltas), 1 / len(deltas))
    return base + _elect(deltas, w.reshape(-1, *(1,) * base.ndim), True, np.sign(deltas.sum(axis=0)))


def nearswap(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    apart = np.abs(inputs[0] - base)
    w = np.clip(np.divide(spec["t"], apart, out=np.ones_like(apart), where=apart > 0), 0, 1)
    return w * inputs[0] + (1 - w) * base


def arcee_fusion(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    x = inputs[0].reshape(-1, spec.columns)
    b = base.reshape(x.shape)
    p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (x, b))
    score = (np.abs(x - b) * (p * np.log(p / q)).sum(axis=1, keepdims=True)).astype(np.float32)
    ordered = np.sort(score, axis=None).astype(float)
    q1, median, q3 = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(score >= np.float32(median + 1.5 * (q3 - q1)), x, b).reshape(spec.shape)


def ram(spec: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    """Element by element."""
    plus = "r" in spec.shared
    deltas = np.stack([(x - base).ravel() for x in inputs])
    has = np.abs(deltas) > spec["epsilon"]
    merged = np.zeros(deltas.shape[1])
    for i, mine in enumerate(has):
        shared = sum(1 for k in np.flatnonzero(mine) if has[:, k].sum() >= 2)
        unique = int(mine.sum()) - shared
        scale = 1 + spec["r"] * min(spec["alpha"], shared / unique) if plus and unique else 1.0
        for k in np.flatnonzero(mine):
            number = int(has[:, k].sum())
            merged[k] += deltas[i, k] / number if number > 1 else scale * deltas[i, k]
    return base + merged.reshape(base.shape)


ORACLES: dict[str, Oracle] = {
    "linear": linear,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "geometric_median": geometric_median,
    "warp": warp,
    "model_stock": model_stock,
    "passthrough": passthrough,
    "task_arithmetic": sparse(_everything, consensus=False),
    "ties": sparse(_largest, consensus=True),
    "dare_linear": sparse(_coin, consensus=False),
    "dare_ties": sparse(_coin, consensus=True),
    "breadcrumbs": sparse(_middle, consensus=False),
    "breadcrumbs_ties": sparse(_middle, consensus=True),
    "della": sparse(_ranked_coin, consensus=True),
    "della_linear": sparse(_ranked_coin, consensus=False),
    "sce": sce,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "ram": ram,
    "ramplus_tl": ram,
}
