"""The maths of merging two tensors: arrays and floats only, no names, no files, no threads.

Sums over the pair of tensors are made on a fixed grid; then `merged = w0 * x + w1 * y`. A block is summed in float64 by
einsum (never BLAS, whose last bits depend on threads and kernels), and the blocks' sums are added with fsum. So the
same tensors give the same bits for any chunks, threads and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge_tool.arrays import BFLOAT16, TILE, Array, decode, encode, first_nonfinite

_LANES = 1_024  # partial sums of a tile, then added pairwise

SMALL_SINE = 1e-9  # below it slerp and lerp agree to the last bit of float64, and slerp would divide by noise
ANTIPARALLEL = 1e-6  # radians; closer to pi, no arc is preferred over another
PRECISE_ANGLE = 2.0  # radians; above it the weights cancel and the combine runs in float64

# ---------------------------------------------------------------------------------------------- sums


class Scratch:
    """One thread's working memory: two rows of TILE elements, as float64 or as float32."""

    NBYTES = 2 * 8 * TILE + 8 * _LANES

    def __init__(self, memory: Array) -> None:
        rows = memory[: 2 * 8 * TILE]
        self.f64 = rows.view(np.float64).reshape(2, TILE)
        self.f32 = rows.view(np.float32).reshape(4, TILE)
        self.lanes = memory[2 * 8 * TILE :].view(np.float64)


@dataclass(frozen=True, slots=True)
class PairSums:
    """Inner products of x (base), y (finetune) and d = y - x: <x,x>, <x,d>, <d,d>, of the values times `scale`.

    `refined` holds the result of a second pass, made if these three lose digits: the sign s and factor c that it used,
    <y,y>, and <e,e> with e = y - s c x. `scale` is a power of two, other than 1 only for float64 tensors whose squares
    would leave float64's range.
    """

    xx: float
    xd: float
    dd: float
    scale: float = 1.0
    refined: tuple[int, float, float, float] | None = None

    @property
    def norms(self) -> tuple[float, float]:
        """|x| and |y|, scaled."""
        yy = self.refined[2] if self.refined else max(0.0, self.xx + 2 * self.xd + self.dd)
        return math.sqrt(self.xx), math.sqrt(yy)


def sum_tile(x: Array, y: Array, scale: float, scratch: Scratch) -> tuple[float, float, float]:
    """<x,x>, <x,d> and <d,d> over one tile (at most TILE elements, flat) of the values times `scale`."""
    a, d = _widen(x, y, scale, scratch)
    np.subtract(d, a, out=d)
    return _dot(a, a, scratch), _dot(a, d, scratch), _dot(d, d, scratch)


def sum_refined_tile(
    x: Array, y: Array, scale: float, sign: int, factor: float, scratch: Scratch
) -> tuple[float, float]:
    """<y,y> and <e,e>, e = y - sign * factor * x, over one tile of the values times `scale`."""
    a, e = _widen(x, y, scale, scratch)
    yy = _dot(e, e, scratch)
    np.multiply(a, sign * factor, out=a)
    np.subtract(e, a, out=e)
    return yy, _dot(e, e, scratch)


def _widen(x: Array, y: Array, scale: float, scratch: Scratch) -> tuple[Array, Array]:
    """Both as float64 times `scale`, padded with zeros to whole lanes."""
    padded = -(-len(x) // _LANES) * _LANES
    for values, wide in zip((x, y), scratch.f64, strict=True):
        decode(values, wide[: len(x)])
        wide[len(x) : padded] = 0.0
        if scale != 1.0:
            np.multiply(wide[:padded], scale, out=wide[:padded])
    return scratch.f64[0, :padded], scratch.f64[1, :padded]


def _dot(a: Array, b: Array, scratch: Scratch) -> float:
    lanes = np.einsum("ij,ij->j", a.reshape(-1, _LANES), b.reshape(-1, _LANES), out=scratch.lanes)
    return float(np.add.reduce(lanes))


def total(parts: Any) -> float:
    """The sum of floats in any order, correctly rounded; NaN or infinity if a float is NaN or infinite; NaN if the sum
    overflows."""
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):
        return math.nan


def sharpen(
    sums: PairSums, tiles: Callable[[], Iterable[tuple[Array, Array]]], *, has_float64: bool, scratch: Scratch
) -> PairSums:
    """The sums. They are made again if they left float64's range or lost digits of the angle, which is rare.

    `tiles` gives the pair of tensors once more, tile by tile; their values must be finite.
    """
    if not is_finite(sums):
        sums = _sum_again(tiles, 2.0**-600, scratch)
    elif has_float64 and sums.xx + sums.dd < 1e-200:
        sums = _sum_again(tiles, 2.0**500, scratch)
    while (refined := refinement(sums)) is not None:
        sign, factor = refined
        parts = [sum_refined_tile(x, y, sums.scale, sign, factor, scratch) for x, y in tiles()]
        yy, ee = (total(column) for column in zip(*parts, strict=True))
        sums = PairSums(xx=sums.xx, xd=sums.xd, dd=sums.dd, scale=sums.scale, refined=(sign, factor, yy, ee))
    return sums


def is_finite(sums: PairSums) -> bool:
    return all(math.isfinite(value) for value in (sums.xx, sums.xd, sums.dd))


def _sum_again(tiles: Callable[[], Iterable[tuple[Array, Array]]], scale: float, scratch: Scratch) -> PairSums:
    parts = [sum_tile(x, y, scale, scratch) for x, y in tiles()]
    xx, xd, dd = (total(column) for column in zip(*parts, strict=True))
    return PairSums(xx, xd, dd, scale)


# -------------------------------------------------------------------------------------------- angles


@dataclass(frozen=True, slots=True)
class Angle:
    """The angle between two tensors in radians, and its distance from pi, each with its own small-end digits."""

    theta: float
    to_pi: float

    @property
    def sine(self) -> float:
        return math.sin(min(self.theta, self.to_pi))


def pair_angle(sums: PairSums) -> Angle | None:
    """The angle between x and y, or None where a norm is 0.

    From the chord between the tensors scaled to one length: theta = 2 asin(chord / 2) keeps its digits down to zero,
    while an arc cosine has none below 1.5e-8. Near pi, from the chord to -x. W. Kahan, "How Futile are Mindless
    Assessments of Roundoff in Floating-Point Computation?", section 12.
    """
    n0, n1 = sums.norms
    if n0 == 0 or n1 == 0:
        return None
    half = 2 * math.asin(math.sqrt(_half_chord_squared(sums)))
    if sums.refined and sums.refined[0] < 0:
        return Angle(math.pi - half, half)
    return Angle(half, math.pi - half)


def _half_chord_squared(sums: PairSums) -> float:
    n0, n1 = sums.norms
    if sums.refined:
        _, factor, _, ee = sums.refined
        squared = (ee - (n1 - factor * n0) ** 2) / (4 * factor * n0 * n1)
    else:
        difference = (2 * sums.xd + sums.dd) / (n1 + n0)  # n1 - n0, without cancellation
        squared = (sums.dd - difference**2) / (4 * n0 * n1)
    return min(1.0, max(0.0, squared))


def refinement(sums: PairSums) -> tuple[int, float] | None:
    """The sign and factor of another pass, if the sums so far leave fewer than 11 digits of the angle; else None.

    Digits are lost if the norms differ by much more than the angle, if y is much shorter than x, or if the angle is
    near pi. Call this again after each pass. There are at most three: for |y|, for the angle, and for the other sign.
    """
    n0, n1 = sums.norms
    if n0 == 0 or sums.dd == 0 or (n1 == 0 and sums.refined):
        return None
    if sums.refined:
        sign, factor, _, _ = sums.refined
        if abs(factor - n1 / n0) > 1e-2 * factor:
            return sign, n1 / n0
        return (-sign, n1 / n0) if _half_chord_squared(sums) > 0.75 else None
    if n1 * n1 < 1e-3 * max(sums.xx, sums.dd):
        return 1, 1.0  # <y,y> itself was lost
    half_squared = _half_chord_squared(sums)
    if half_squared > 0.75:
        return -1, n1 / n0
    return (1, n1 / n0) if sums.dd > 1000 * (4 * n0 * n1 * half_squared) else None


# ------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True)
class Weights:
    """`merged = w0 * x + w1 * y`. `precise`: combine in float64. `note` names a special case."""

    w0: float
    w1: float
    precise: bool = False
    note: str = ""

    @property
    def copied(self) -> int | None:
        """Which of the two tensors the result is, byte for byte: 0 or 1; None if neither."""
        pair = self.w0, self.w1
        return 0 if pair == (1, 0) else 1 if pair == (0, 1) else None


def slerp_weights(sums: PairSums, t: float) -> Weights:
    """Spherical linear interpolation of the unnormalised tensors, sin((1-t) theta) / sin(theta) and so on.

    K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, applied to vectors of any norm. Linear if
    there is no arc (a zero tensor), if the arc is too short (sin(theta) < 1e-9), and if every arc is as good as another
    (antiparallel, within 1e-6 of pi). At t = 0 and t = 1 the weights are exactly 1 and 0.
    """
    angle = pair_angle(sums)
    if angle is None:
        return Weights(1.0 - t, t, precise=not 0 <= t <= 1, note="zero norm: linear")
    if angle.to_pi < ANTIPARALLEL:
        return Weights(1.0 - t, t, precise=True, note="antiparallel: linear")
    if angle.sine < SMALL_SINE or t in (0, 1):
        return Weights(1.0 - t, t, precise=not 0 <= t <= 1)
    w0, w1 = (_arc_sine(share, angle) / angle.sine for share in (1.0 - t, t))
    return Weights(w0, w1, precise=angle.theta > PRECISE_ANGLE or not 0 <= t <= 1)


def _arc_sine(share: float, angle: Angle) -> float:
    """sin(share * theta), with theta's digits near pi."""
    if angle.theta < math.pi / 2:
        return math.sin(share * angle.theta)
    return math.sin(share * math.pi - share * angle.to_pi)


# ------------------------------------------------------------------------------------------- combine

_SURELY_FITS = 400.0  # finite in every dtype we write; makes the exact check unnecessary for nearly every block
_TINY = np.float32(2.0**-124)  # float32 products below lose digits that a subnormal bfloat16 still shows
_TINY_CODE = 0x0180  # _TINY as a bfloat16; smaller values are rounded to it or to less
_INFINITE_CODE = 0x7F80  # infinity as a bfloat16; NaNs are above


def combine(x: Array, y: Array, weights: Weights, out: Array, scratch: Scratch) -> bool:
    """`out = w0 * x + w1 * y`, flat arrays of one length; False if a finite result does not fit `out`'s dtype.

    For 16-bit outputs |out - exact| <= ulp(exact)/2 + 2^-22 (|w0 x| + |w1 y|); they are computed in float32, or in
    float64 if float32 does not suffice. float32 and float64 outputs are always computed in float64.
    """
    narrow = out.dtype.itemsize <= 2 and np.float64 not in (x.dtype, y.dtype) and not weights.precise
    fits = True
    for start in range(0, len(x), TILE):
        cut = slice(start, start + TILE)
        done = narrow and _combine_narrow(x[cut], y[cut], weights, out[cut], scratch)
        if not done:  # also if a product left float32's range: the sum may be within it
            fits &= _combine_wide(x[cut], y[cut], weights, out[cut], scratch)
    return bool(fits)


def _combine_narrow(x: Array, y: Array, weights: Weights, out: Array, scratch: Scratch) -> bool:
    a, b = (row[: len(x)] for row in scratch.f32[:2])
    np.multiply(decode(x, a), np.float32(weights.w0), out=a)
    np.multiply(decode(y, b), np.float32(weights.w1), out=b)
    np.add(a, b, out=a)
    encode(a, out)
    if out.dtype == BFLOAT16:
        sizes = np.bitwise_and(out.view(np.uint16), np.uint16(0x7FFF), out=scratch.f32[2].view(np.uint16)[: len(x)])
        if sizes.min(initial=0x7FFF) <= _TINY_CODE:
            magnitude = np.abs(a, out=b)
            _combine_tiny(np.flatnonzero((magnitude < _TINY) & (magnitude > 0)), x, y, weights, out)
        return bool(sizes.max(initial=0) < _INFINITE_CODE)
    return first_nonfinite(out) is None


def _combine_tiny(places: Array, x: Array, y: Array, weights: Weights, out: Array) -> None:
    if len(places):
        wide = weights.w0 * decode(x[places], np.empty(len(places)))
        wide += weights.w1 * decode(y[places], np.empty(len(places)))
        out[places] = encode(wide, np.empty(len(places), out.dtype))


def _combine_wide(x: Array, y: Array, weights: Weights, out: Array, scratch: Scratch) -> bool:
    a, b = (row[: len(x)] for row in scratch.f64[:2])
    np.multiply(decode(x, a), weights.w0, out=a)
    np.multiply(decode(y, b), weights.w1, out=b)
    np.add(a, b, out=a)
    encode(a, out)
    return _fits(np.abs(a, out=b).max(initial=0.0), out.dtype)


def _fits(largest: Any, dtype: np.dtype[Any]) -> bool:
    """Whether a value of this magnitude is finite in `dtype`; rounding is monotonic, so the largest decides."""
    return bool(largest <= _SURELY_FITS) or bool(
        np.isfinite(encode(np.array([largest]), np.empty(1, dtype)).astype(np.float64))[0]
    )


# ------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """For finite values: the largest magnitude, and (scale, s) with the sum of squares scale^2 s."""

    largest: float
    squares: tuple[float, float]
    num_nonfinite: int
    first_nonfinite: int | None


def measure(values: Array) -> Measured:
    """Magnitudes of at most TILE flat values of any float dtype, in float64."""
    wide = decode(values, np.empty(values.shape))
    finite = np.isfinite(wide)
    bad = np.flatnonzero(~finite)
    np.abs(wide, out=wide)
    wide[~finite] = 0.0
    largest = float(wide.max(initial=0.0))
    if largest == 0:
        return Measured(0.0, (0.0, 0.0), len(bad), int(bad[0]) if len(bad) else None)
    scale = math.ldexp(
        1.0, math.frexp(largest)[1] - 1
    )  # a power of two: dividing by it is exact, or too small to count
    wide /= scale
    squares = float(np.add.reduce(np.multiply(wide, wide, out=wide)))
    return Measured(largest, (scale, squares), len(bad), int(bad[0]) if len(bad) else None)
