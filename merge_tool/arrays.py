"""Every fact about dtypes, once: codes of safetensors <-> numpy, the grid of tiles, exact widening, one rounding.

Arrays and bytes only. Values are widened exactly (`decode`) and rounded once, to nearest even (`encode`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

TILE = 131_072  # elements; chunks start at multiples of TILE, and sums are made tile by tile. Smaller tiles stay in
# a cache, but threads then wait for the interpreter lock: at 32,768, two threads were slower than one.

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
POWERS_OF_TWO = np.dtype(ml_dtypes.float8_e8m0fnu)  # scales of 8-bit floats: 2^-127 to 2^127, and a NaN
FLOAT8_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    **FLOAT8_DTYPES,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),  # only compared and copied, as bytes
}
SCALE_DTYPES: Mapping[str, np.dtype[Any]] = {
    **{code: NUMPY_DTYPES[code] for code in ("F32", "BF16", "F16")},
    "F8_E8M0": POWERS_OF_TWO,
}
STORED_DTYPES: Mapping[str, np.dtype[Any]] = {**NUMPY_DTYPES, **SCALE_DTYPES}  # scales included: copied or made
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", *FLOAT8_DTYPES})
LARGEST_CODES = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in FLOAT8_DTYPES.values()}  # type: ignore[no-untyped-call]
FLOAT8_TABLES = {  # the value of every code, in float32
    dtype: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in FLOAT8_DTYPES.values()
}
_NONFINITE: Mapping[np.dtype[Any], tuple[Any, int]] = {  # a value with all these bits set is infinite or NaN
    BFLOAT16: (np.uint16, 0x7F80),
    np.dtype("<f2"): (np.uint16, 0x7C00),
    FLOAT8_DTYPES["F8_E4M3"]: (np.uint8, 0x7F),
    FLOAT8_DTYPES["F8_E5M2"]: (np.uint8, 0x7C),
}
_PIECE = 32_768
_LEAST_NORMAL, _ABOVE_NORMAL = np.array([2.0**-14, 65_520.0], np.float32).view(np.uint32)  # of float16


def decode(values: Array, out: Array) -> Array:
    """`values` of any float dtype as float32 or float64, exactly, into `out`."""
    if values.dtype in FLOAT8_TABLES or (values.dtype == np.float16 and out.dtype == np.float32):
        codes: Array = values.view(np.uint8 if values.dtype.itemsize == 1 else np.uint16)
        np.take(_decoding_table(values.dtype, out.dtype), codes, out=out, mode="clip")
    else:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            np.copyto(out, values)
    return out


@functools.cache
def _decoding_table(narrow: np.dtype[Any], wide: np.dtype[Any]) -> Array:
    """The value of every code."""
    codes = np.arange(1 << 8 * narrow.itemsize, dtype=np.uint8 if narrow.itemsize == 1 else np.uint16)
    with np.errstate(invalid="ignore"):
        return codes.view(narrow).astype(np.float32).astype(wide)


def encode(values: Array, out: Array) -> Array:
    """Float32 or float64 `values` rounded once, to nearest even, to `out`'s dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        if out.dtype in FLOAT8_TABLES:
            _encode_float8(values, out)
        elif out.dtype == np.float16 and values.dtype == np.float32:
            for start in range(0, len(values), _PIECE):  # its temporaries stay small
                _encode_float16(values[start : start + _PIECE], out[start : start + _PIECE])
        elif out.dtype == BFLOAT16 and values.dtype == np.float64:
            np.copyto(out, _to_float32(values, low_bits=0x8000), casting="unsafe")
        else:
            np.copyto(out, values, casting="unsafe")
    return out


def _to_float32(values: Array, *, low_bits: int) -> Array:
    """Float64 -> float32 such that rounding the result further equals rounding `values` once: to a dtype whose ties end
    in these 16 bits as float32. (ml_dtypes converts float64 through float32, which would round twice.)

    Rounding twice goes wrong only where the first rounding makes a tie; those few are rounded to odd instead.
    """
    nearest = values.astype(np.float32)
    ties = np.flatnonzero(nearest.view(np.uint32) & np.uint32(0xFFFF) == np.uint32(low_bits))
    if len(ties):
        nearest[ties] = _round_to_odd(values[ties])
    return nearest


def _round_to_odd(values: Array) -> Array:
    """Float64 -> float32 such that rounding the result further equals rounding `values` once.

    Truncate, then set the last bit if anything was lost (Boldo and Melquiond, "When double rounding is odd").
    """
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)
    bits |= (back != values) & ~np.isnan(values)
    return nearest


def _encode_float16(values: Array, out: Array) -> None:
    """In integers: the exponent moves by 112, 13 bits are rounded off. The few values that are no normal numbers of
    float16 are numpy's, which takes twice as long."""
    bits = values.view(np.uint32)
    size = bits & np.uint32(0x7FFF_FFFF)
    odd = size >> np.uint32(13)
    odd &= np.uint32(1)
    odd += size
    odd += np.uint32((0xFFF - (112 << 23)) & 0xFFFF_FFFF)
    odd >>= np.uint32(13)
    codes = out.view(np.uint16)
    np.copyto(codes, odd, casting="unsafe")
    np.right_shift(bits, np.uint32(16), out=odd)
    odd &= np.uint32(0x8000)
    codes |= odd.astype(np.uint16)
    size -= _LEAST_NORMAL
    others = np.flatnonzero(size >= _ABOVE_NORMAL - _LEAST_NORMAL)
    if len(others):
        out[others] = values[others].astype(np.float16)


def _encode_float8(values: Array, out: Array) -> None:
    """By a table over float32's upper 16 bits, the last of which is set if any lower one is: rounded to odd, they round
    further as the whole value does. (ml_dtypes' own conversion takes three times as long.)"""
    narrow = _to_float32(values, low_bits=0) if values.dtype == np.float64 else np.ascontiguousarray(values)
    bits = narrow.view(np.uint32)
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    upper |= bits & np.uint32(0xFFFF) != 0
    np.take(_float8_codes(out.dtype), upper, out=out.view(np.uint8), mode="clip")


@functools.cache
def _float8_codes(dtype: np.dtype[Any]) -> Array:
    """The 8-bit code of each bfloat16."""
    upper: Array = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
    return upper.astype(np.float32).astype(dtype).view(np.uint8)


def as_bytes(values: Array) -> memoryview:
    """The memory of a flat, contiguous array."""
    return memoryview(values.view(np.uint8))  # type: ignore[arg-type]  # numpy 2.4's stubs say no, numpy says yes


def convert(values: Array, out: Array) -> bool:
    """`values` in `out`'s dtype, each rounded once; False if a finite one became infinite or NaN."""
    fits = True
    for start in range(0, len(values), TILE):
        cut = slice(start, start + TILE)
        wide = _widened(values[cut])
        encode(wide, out[cut])
        if not _is_finite(out[cut]):
            fits &= bool((np.isfinite(_widened(out[cut])) | ~np.isfinite(wide)).all())
    return fits


def _widened(values: Array) -> Array:
    """As float64 if they are float64, else as float32."""
    if values.dtype in (np.float64, np.float32):
        return values
    return decode(values, np.empty(values.shape, np.float32))


def same_values(x: Array, y: Array) -> bool:
    """Whether two flat arrays hold the same bytes, or, where their dtypes differ, the same float64 bits."""
    if x.dtype != y.dtype:
        x, y = (decode(values, np.empty(values.shape)) for values in (x, y))
    if x.nbytes % 8 == 0:
        return bool((x.view(np.uint64) == y.view(np.uint64)).all())
    return bool((x.view(np.uint8) == y.view(np.uint8)).all())


def first_nonfinite(values: Array) -> int | None:
    """The first index whose value is NaN or infinite."""
    if _is_finite(values):
        return None
    return int(np.flatnonzero(~np.isfinite(_widened(values)))[0])


def _is_finite(values: Array) -> bool:
    if values.dtype in _NONFINITE:
        kind, bits = _NONFINITE[values.dtype]
        return bool((values.view(kind) & kind(bits)).max(initial=0) < bits)
    return bool(np.isfinite(_widened(values)).all())
