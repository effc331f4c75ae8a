"""Widening and rounding: every narrow code, every tie and its neighbours, against tables of exact values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_tool.arrays import NUMPY_DTYPES, Array, convert, decode, encode, first_nonfinite

NARROW = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]


def codes_of(dtype: str) -> Array:
    size = NUMPY_DTYPES[dtype].itemsize
    return np.arange(1 << 8 * size, dtype=f"u{size}").view(NUMPY_DTYPES[dtype])


def grid_of(dtype: str) -> tuple[Array, Array]:
    """All finite values >= 0 of a dtype, ascending, in float64; and the code of each."""
    codes = codes_of(dtype)[: 1 << 8 * NUMPY_DTYPES[dtype].itemsize - 1]
    with np.errstate(invalid="ignore"):
        values = codes.astype(np.float32).astype(np.float64)
    finite = np.isfinite(values)
    assert (np.diff(values[finite]) > 0).all()
    return values[finite], codes.view(f"u{codes.dtype.itemsize}")[finite]


def rounded(values: Array, dtype: str) -> Array:
    """Each finite float64 rounded once to the nearest code, ties to the even one; beyond the largest: infinity or NaN,
    as numpy and ml_dtypes write it."""
    grid, codes = grid_of(dtype)
    size = np.abs(values)
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    up = (size - low > high - size) | ((size - low == high - size) & (codes[above] % 2 == 0))
    nearest = np.where(up | (size >= high), codes[above], codes[above - 1])
    limit = grid[-1] + (grid[-1] - grid[-2]) / 2
    beyond = size >= limit if codes[-1] % 2 else size > limit
    with np.errstate(invalid="ignore"):
        largest = np.array([np.inf], np.float32).astype(NUMPY_DTYPES[dtype]).view(codes.dtype)[0]
    nearest = np.where(beyond, largest, nearest).astype(codes.dtype)
    sign = np.signbit(values).astype(codes.dtype) << (8 * codes.dtype.itemsize - 1)
    return np.bitwise_or(nearest, sign)


def interesting(dtype: str) -> Array:
    """All values, all midpoints, and what is next to them in float64 and in float32; also beyond the largest."""
    grid, _ = grid_of(dtype)
    middle = (grid[1:] + grid[:-1]) / 2
    marks = np.concatenate([grid, middle, grid[-1:] * [1.001, 1.01, 1.1, 2.0], [2 * grid[-1] - grid[-2]]])
    with np.errstate(over="ignore"):
        short = marks.astype(np.float32)
        narrow = np.nextafter(short, np.float32(np.inf)).astype(np.float64)
        below = np.nextafter(short, np.float32(0)).astype(np.float64)
    near = [marks, np.nextafter(marks, np.inf), np.nextafter(marks, 0), marks * (1 + 2.0**-30), marks * (1 - 2.0**-30)]
    values = np.concatenate([*near, narrow, below])
    values = values[np.isfinite(values)]
    return np.concatenate([values, -values])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("wide", [np.float64, np.float32])
def test_a_value_is_rounded_once_to_the_nearest_and_ties_to_even(dtype: str, wide: type) -> None:
    values = interesting(dtype)
    with np.errstate(over="ignore"):
        values = values.astype(wide)
    values = values[np.isfinite(values)]
    out = np.empty(len(values), NUMPY_DTYPES[dtype])
    encode(values, out)
    want = rounded(values.astype(np.float64), dtype)
    wrong = np.flatnonzero(out.view(want.dtype) != want)
    assert not len(wrong), (values[wrong[:3]], out[wrong[:3]], want[wrong[:3]])


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-300, 1e-42, 1e-38, 1e-7, 1e-4, 0.02, 1.0, 1e3, 1e38]))
@settings(max_examples=25, deadline=None)
def test_random_values_are_rounded_once(dtype: str, seed: int, scale: float) -> None:
    values = np.random.default_rng(seed).standard_normal(2_000) * scale
    out = np.empty(len(values), NUMPY_DTYPES[dtype])
    encode(values, out)
    assert (out.view(f"u{out.dtype.itemsize}") == rounded(values, dtype)).all()
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    short = short[np.isfinite(short)]
    out = out[: len(short)]
    encode(short, out)
    assert (out.view(f"u{out.dtype.itemsize}") == rounded(short.astype(np.float64), dtype)).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("wide", [np.float64, np.float32])
def test_every_code_is_widened_exactly_and_comes_back(dtype: str, wide: type) -> None:
    codes = codes_of(dtype)
    values = decode(codes, np.empty(len(codes), wide))
    grid, of_grid = grid_of(dtype)
    assert (values[of_grid] == grid).all()
    assert (values[len(codes) // 2 :][of_grid] == -grid).all()
    finite = np.isfinite(values)
    assert finite.sum() == 2 * len(grid)
    back = np.empty(len(codes), codes.dtype)
    encode(values, back)
    kind = f"u{codes.dtype.itemsize}"
    assert (back.view(kind)[finite] == codes.view(kind)[finite]).all()
    assert (np.isnan(decode(back, np.empty(len(codes)))) == np.isnan(decode(codes, np.empty(len(codes))))).all()


@pytest.mark.parametrize("dtype", [*NARROW, "F32", "F64"])
def test_the_first_value_that_is_not_finite_is_found(dtype: str) -> None:
    values = np.ones(1_000, np.float32).astype(NUMPY_DTYPES[dtype])
    assert first_nonfinite(values) is None
    assert first_nonfinite(values[:0]) is None
    values[700] = np.float32(np.nan)
    assert first_nonfinite(values) == 700
    if dtype != "F8_E4M3":  # has no infinity
        values[300] = np.float32(-np.inf)
        assert first_nonfinite(values) == 300
    values[900] = np.float32(1.0)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_finite_value_beyond_the_largest_does_not_fit(dtype: str) -> None:
    grid, _ = grid_of(dtype)
    out = np.empty(3, NUMPY_DTYPES[dtype])
    assert convert(np.array([0.0, grid[-1], -grid[-1]]), out)
    assert not convert(np.array([0.0, 2 * grid[-1], 1.0]), out)
    assert convert(np.array([0.0, np.nan, 1.0]), out)  # it was no number before
