"""The maths against an oracle in 60 digits."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merge_tool.arrays import TILE, convert, decode, encode, same_values
from merge_tool.methods.geometric import linear_of_two
from merge_tool.methods.inner import (
    PairSums,
    Scratch,
    Weights,
    combine,
    pair_angle,
    refinement,
    slerp_weights,
    sum_refined_tile,
    sum_tile,
    total,
)
from merge_tool.methods.steps import MergeSpec
from oracle import exact_angle, exact_merge, ulp

BF16, E4M3, E5M2 = (np.dtype(d) for d in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
SCRATCH = Scratch(np.zeros(Scratch.NBYTES, np.uint8))


def sums_of(x: Any, y: Any, scale: float = 1.0) -> PairSums:
    """As run.py makes them: tile by tile, refined where that is asked for."""
    x, y = x.ravel(), y.ravel()
    cuts = [slice(n, n + TILE) for n in range(0, len(x), TILE)]
    columns = zip(*(sum_tile(x[c], y[c], scale, SCRATCH) for c in cuts), strict=True)
    sums = PairSums(*(total(column) for column in columns), scale)
    for _ in range(4):
        if (found := refinement(sums)) is None:
            return sums
        sign, factor = found
        parts = zip(*(sum_refined_tile(x[c], y[c], scale, sign, factor, SCRATCH) for c in cuts), strict=True)
        yy, ee = (total(part) for part in parts)
        sums = PairSums(sums.xx, sums.xd, sums.dd, scale, (sign, factor, yy, ee))
    raise AssertionError("refining does not end")


def linear_weights(w0: float, w1: float, *, normalize: bool = True) -> Weights:
    """Those of `linear` for two tensors, whatever their values."""
    given = MergeSpec((1,), 2, False, {"normalize": normalize}, {"weight": (w0, w1)})
    return linear_of_two(PairSums(1.0, 0.0, 1.0), given)


def pair_at_angle(theta: float, ratio: float = 1.0, size: int = 3000, seed: int = 0) -> tuple[Any, Any]:
    """Two float64 vectors about `theta` apart, the second `ratio` times as long."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size)
    across = rng.standard_normal(size)
    across -= across @ x / (x @ x) * x
    across *= np.linalg.norm(x) / np.linalg.norm(across)
    return x, ratio * (math.cos(theta) * x + math.sin(theta) * across)


ANGLES = [1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 0.03, 0.5, 1.0, math.pi / 2, 2.0, 2.5, 3.0, 3.1, math.pi - 1e-3, math.pi - 1e-5]


@pytest.mark.parametrize("ratio", [1.0, 1.0001, 1.01, 0.5, 10.0, 0.1])
@pytest.mark.parametrize("theta", ANGLES)
def test_angles_have_ten_digits_where_the_norms_are_within_a_factor_of_ten(theta: float, ratio: float) -> None:
    x, y = pair_at_angle(theta, ratio)
    angle = pair_angle(sums_of(x, y))
    expected = exact_angle(x, y)
    assert angle is not None
    assert abs(angle.theta - expected) <= 1e-10 * expected
    assert abs(angle.to_pi - (mpmath.pi - expected)) <= 1e-10 * (mpmath.pi - expected)


@pytest.mark.parametrize("ratio", [1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("theta", [1e-5, 1e-2, 1.0, math.pi / 2, 2.5, math.pi - 1e-2])
def test_angles_of_very_unequal_norms_keep_eight_digits(theta: float, ratio: float) -> None:
    x, y = pair_at_angle(theta, ratio)
    angle = pair_angle(sums_of(x, y))
    assert angle is not None
    assert float(angle.theta) == pytest.approx(float(exact_angle(x, y)), rel=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3, E5M2])
@pytest.mark.parametrize("theta", [1e-3, 0.1, 1.0, 3.0])
def test_angles_are_of_the_stored_values(dtype: Any, theta: float) -> None:
    x, y = (v.astype(np.float32).astype(dtype) for v in pair_at_angle(theta))
    angle = pair_angle(sums_of(x, y))
    expected = exact_angle(x.astype(np.float64), y.astype(np.float64))
    assert angle is not None
    assert abs(angle.theta - expected) <= 1e-10 * expected


def test_ten_million_elements_sum_as_exactly_as_few() -> None:
    x, y = pair_at_angle(1e-4, 1.001, size=10_000_000)
    angle = pair_angle(sums_of(x, y))
    long_double = [np.sum(a.astype(np.longdouble) * b) for a, b in ((x, x), (y, y), (x, y))]
    xx, yy, xy = (mpmath.mpf(str(v)) for v in long_double)
    d = x - y * float(mpmath.sqrt(xx / yy))
    chord = math.sqrt(math.fsum((d * d).tolist())) / math.sqrt(float(xx))
    assert angle is not None
    assert xy > 0
    assert angle.theta == pytest.approx(2 * math.asin(chord / 2), rel=1e-10)


def test_float64_values_whose_squares_overflow_or_vanish_are_summed_with_a_scale() -> None:
    for size, scale in ((1e200, 2.0**-600), (1e-200, 2.0**500)):
        x, y = (size * v for v in pair_at_angle(0.5))
        angle = pair_angle(sums_of(x, y, scale))
        assert angle is not None
        assert angle.theta == pytest.approx(0.5, rel=1e-12)


def exact(value: Any) -> float:
    return float(np.float64(value))


@pytest.mark.parametrize("t", [0.1, 0.4, 0.5, 0.9])
@pytest.mark.parametrize("theta", [1e-7, 1e-3, 0.1, 1.0, 1.99, 2.01, 3.0, math.pi - 1e-4, math.pi - 1e-7])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)])
def test_sixteen_bit_results_stay_within_the_stated_bound(dtype: Any, theta: float, t: float) -> None:
    """|out - exact| <= ulp(exact)/2 + 2^-22 (|w0 x| + |w1 y|)."""
    x, y = (v.astype(np.float32).astype(dtype) for v in pair_at_angle(theta, 1.3, size=600))
    out = np.empty(600, dtype)
    assert combine(x, y, slerp_weights(sums_of(x, y), t), out, SCRATCH)
    merged, (w0, w1) = exact_merge(x, y, t)
    for a, b, found, expected in zip(x, y, out, merged, strict=True):
        slack = 2.0**-22 * (abs(w0 * exact(a)) + abs(w1 * exact(b)))
        assert abs(exact(found) - expected) <= ulp(float(expected), dtype) / 2 + slack


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-128, 2.0**-120, 1e-20])
def test_bfloat16_subnormals_stay_within_the_bound_too(scale: float) -> None:
    x, y = ((v * scale).astype(BF16) for v in pair_at_angle(0.7, 1.1, size=400))
    out = np.empty(400, BF16)
    assert combine(x, y, slerp_weights(sums_of(x, y), 0.3), out, SCRATCH)
    merged, (w0, w1) = exact_merge(x, y, 0.3)
    for a, b, found, expected in zip(x, y, out, merged, strict=True):
        slack = 2.0**-22 * (abs(w0 * exact(a)) + abs(w1 * exact(b)))
        assert abs(exact(found) - expected) <= ulp(float(expected), BF16) / 2 + slack


@pytest.mark.parametrize("more", [-(2.0**-20), 2.0**-20])
def test_a_bfloat16_subnormal_is_rounded_once(more: float) -> None:
    """A hair above half of the smallest value it is that value, a hair below 0; float32 cannot tell the two."""
    x, out = np.full(3, 2.0**-133).astype(BF16), np.empty(3, BF16)
    assert combine(x, np.zeros(3, BF16), Weights(0.5 + more, 0.0), out, SCRATCH)
    assert (out.astype(np.float64) == (2.0**-133 if more > 0 else 0.0)).all()


@pytest.mark.parametrize("theta", [1e-7, 0.1, 1.5, 1.99, 2.5, 3.0])
def test_float32_results_have_a_relative_error_below_1e_7(theta: float) -> None:
    x, y = (v.astype(np.float32) for v in pair_at_angle(theta, 1.3, size=800))
    out = np.empty(800, np.float32)
    assert combine(x, y, slerp_weights(sums_of(x, y), 0.37), out, SCRATCH)
    merged, _ = exact_merge(x, y, 0.37)
    error = mpmath.norm([exact(a) - b for a, b in zip(out, merged, strict=True)])
    assert error < 1e-7 * mpmath.norm(merged)


def test_weights_of_zero_antiparallel_and_equal_tensors() -> None:
    x, _ = pair_at_angle(1.0)
    zero = slerp_weights(sums_of(np.zeros(5), np.ones(5)), 0.25)
    assert (zero.w0, zero.w1, zero.note) == (0.75, 0.25, "zero norm: linear")
    opposite = slerp_weights(sums_of(x, -2 * x), 0.25)
    assert (opposite.w0, opposite.w1, opposite.note) == (0.75, 0.25, "antiparallel: linear")
    same = slerp_weights(sums_of(x, x.copy()), 0.25)
    assert (same.w0, same.w1) == (0.75, 0.25)


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_the_ends_are_copies_and_t_outside_is_computed_in_float64(method: str) -> None:
    """At t = 0 and 1 the weights are exactly 1 and 0: the bytes of one side are handed on."""
    sums = sums_of(*pair_at_angle(1.0))
    for t, copied, precise in ((0.0, 0, False), (1.0, 1, False), (0.25, None, False), (-0.5, None, True)):
        found = slerp_weights(sums, t) if method == "slerp" else linear_weights(1 - t, t)
        assert (found.copied, found.precise) == (copied, precise)


def test_linear_weights_are_shares_unless_they_are_taken_as_they_are() -> None:
    assert linear_weights(3, 1) == Weights(0.75, 0.25)
    assert linear_weights(3, 1, normalize=False) == Weights(3, 1)
    with pytest.raises(ValueError, match="set normalize to false"):
        linear_weights(1, -1)


@pytest.mark.parametrize("theta", [1e-3, 1.0, 2.5])
def test_t_outside_zero_to_one_continues_the_arc(theta: float) -> None:
    x, y = pair_at_angle(theta)
    for t in (-0.5, 1.5, 3.0):
        weights = slerp_weights(sums_of(x, y), t)
        assert weights.precise
        assert weights.w0 == pytest.approx(math.sin((1 - t) * theta) / math.sin(theta), rel=1e-9)
        assert weights.w1 == pytest.approx(math.sin(t * theta) / math.sin(theta), rel=1e-9)


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False, width=64)))
@settings(max_examples=300)
def test_float64_rounds_once_to_bfloat16(values: Any) -> None:
    """Against rounding in exact arithmetic; through float32 it would be rounded twice."""
    found = encode(values, np.empty(values.shape, BF16)).astype(np.float64)
    for value, rounded in zip(values, found, strict=True):
        limit = (2 - 2.0**-8) * 2.0**127
        if abs(value) >= limit:
            assert math.isinf(rounded)
            continue
        unit = mpmath.mpf(ulp(value, BF16))
        with mpmath.workdps(60):
            expected = mpmath.nint(mpmath.mpf(value) / unit) * unit  # nint rounds ties to even
        assert rounded == float(expected)


def test_double_rounding_would_show_here() -> None:
    value = np.array([1 + 2.0**-8 + 2.0**-40])  # just above a tie of bfloat16, on a tie after float32
    assert float(encode(value, np.empty(1, BF16))[0]) == 1 + 2.0**-7
    assert float(value.astype(np.float32).astype(BF16)[0]) == 1.0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_8_bit_code_decodes_to_its_value(dtype: Any) -> None:
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    np.testing.assert_array_equal(decode(codes, np.empty(256)), codes.astype(np.float64))


def test_overflow_is_told_apart_from_infinity() -> None:
    big = np.array([1.0, 7e4], np.float32)
    assert not convert(big, np.empty(2, np.float16))
    assert convert(np.array([1.0, np.inf], np.float32), np.empty(2, np.float16))
    half = slerp_weights(sums_of(big, big * 1.01), 0.5)
    assert not combine(big, big * np.float32(1.01), half, np.empty(2, np.float16), SCRATCH)
    assert combine(big, big * np.float32(1.01), half, np.empty(2, np.float32), SCRATCH)


def test_a_result_that_just_fits_is_kept() -> None:
    top = np.array([65504.0, 65504.0], np.float16)
    out = np.empty(2, np.float16)
    assert combine(top, top, linear_weights(0.5, 0.5), out, SCRATCH)
    assert out.tolist() == [65504.0, 65504.0]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sums_do_not_depend_on_where_the_tensor_lies_in_memory(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 7, 1023, 1024, 1025, TILE - 1]))
    shift = data.draw(st.integers(0, 9))
    rng = np.random.default_rng(size)
    x, y = rng.standard_normal(size), rng.standard_normal(size)
    there = np.zeros(size + shift)
    there[shift:] = x
    assert sum_tile(x, y, 1.0, SCRATCH) == sum_tile(there[shift:], y, 1.0, SCRATCH)


def test_same_values_compares_bits_not_numbers() -> None:
    nan = np.array([np.nan, 0.0], np.float32)
    assert same_values(nan, nan.copy())
    assert not same_values(np.array([0.0, 1.0]), np.array([-0.0, 1.0]))
    assert same_values(np.array([1.5, -np.inf], BF16), np.array([1.5, -np.inf], np.float32))
    assert not same_values(np.arange(5, dtype=np.uint8), np.arange(1, 6, dtype=np.uint8))


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_of_unit_vectors_by_hand(t: float) -> None:
    """Golden vectors: a quarter turn in the plane, and one with unequal lengths."""
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    out = np.empty(2)
    combine(x, y, slerp_weights(sums_of(x, y), t), out, SCRATCH)
    np.testing.assert_allclose(out, [math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)], rtol=1e-15)
    combine(x, 3 * y, slerp_weights(sums_of(x, 3 * y), t), out, SCRATCH)
    np.testing.assert_allclose(out, [math.cos(t * math.pi / 2), 3 * math.sin(t * math.pi / 2)], rtol=1e-15)
