"""SLERP written another way: whole tensors, 50 digits for the angle, rounding by search. Slow and plain."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def exact_dot(a: Array, b: Array) -> Any:
    """The inner product of float64 vectors to 60 digits."""
    with mpmath.workdps(60):
        return mpmath.fdot(map(float, a.ravel()), map(float, b.ravel()))


def exact_angle(x: Array, y: Array) -> Any:
    """The angle in radians by the two-argument arc tangent of |x|y| - y|x|| and |x|y| + y|x||, in 60 digits."""
    with mpmath.workdps(60):
        xx, yy, xy = exact_dot(x, x), exact_dot(y, y), exact_dot(x, y)
        cross = xx * yy - xy * xy  # Lagrange
        return mpmath.atan2(mpmath.sqrt(max(cross, 0)), xy)


def exact_weights(theta: Any, t: float) -> tuple[Any, Any]:
    with mpmath.workdps(60):
        t = mpmath.mpf(t)
        if mpmath.sin(theta) < mpmath.mpf("1e-9") or mpmath.pi - theta < mpmath.mpf("1e-6"):
            return 1 - t, t
        return mpmath.sin((1 - t) * theta) / mpmath.sin(theta), mpmath.sin(t * theta) / mpmath.sin(theta)


def exact_merge(x: Array, y: Array, t: float) -> tuple[list[Any], tuple[Any, Any]]:
    """Every element of slerp(x, y, t) to 60 digits, and the weights."""
    x64, y64 = (a.astype(np.float64).ravel() for a in (x, y))
    with mpmath.workdps(60):
        if not x64.any() or not y64.any():
            w0, w1 = 1 - mpmath.mpf(t), mpmath.mpf(t)
        else:
            w0, w1 = exact_weights(exact_angle(x64, y64), t)
        return [w0 * float(a) + w1 * float(b) for a, b in zip(x64, y64, strict=True)], (w0, w1)


def ulp(value: float, dtype: np.dtype[Any]) -> float:
    """The distance between neighbours of `dtype` (bfloat16 or float16) around |value|, subnormals included."""
    digits, smallest = {"bfloat16": (8, -126), "float16": (11, -14)}[dtype.name]
    exponent = max(int(np.floor(np.log2(abs(value)))) if value else smallest, smallest)
    return float(2.0 ** (exponent - digits + 1))


def float64_merge(x: Array, y: Array, t: float) -> Array:
    """slerp of whole tensors in plain float64, by the textbook formula with the stable angle."""
    a, b = (v.astype(np.float64).ravel() for v in (x, y))
    n0, n1 = np.linalg.norm(a), np.linalg.norm(b)
    if n0 == 0 or n1 == 0:
        return ((1 - t) * a + t * b).reshape(x.shape)
    u, v = a / n0, b / n1
    theta = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    if np.sin(theta) < 1e-9 or np.pi - theta < 1e-6:
        return ((1 - t) * a + t * b).reshape(x.shape)
    w0, w1 = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return (w0 * a + w1 * b).reshape(x.shape)
