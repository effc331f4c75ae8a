"""Every fact about dtypes, once: codes of safetensors <-> numpy, the grid of tiles, exact widening, one rounding.

Arrays and bytes only. Values are widened exactly (`decode`) and rounded once, to nearest even (`encode`).
"""

from __future__ import annotations

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


def decode(values: Array, out: Array) -> Array:
    """`values` of any float dtype as float32 or float64, exactly, into `out`."""
    if values.dtype in FLOAT8_TABLES:
        out[...] = FLOAT8_TABLES[values.dtype][values.view(np.uint8)]
    else:
        np.copyto(out, values)
    return out


def encode(values: Array, out: Array) -> Array:
    """Float32 or float64 `values` rounded once, to nearest even, to `out`'s dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float64 and (out.dtype == BFLOAT16 or out.dtype in FLOAT8_TABLES):
            values = _round_to_odd(values)  # ml_dtypes converts float64 through float32, which would round twice
        np.copyto(out, values, casting="unsafe")
    return out


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
        fits &= bool((np.isfinite(_widened(out[cut])) | ~np.isfinite(wide)).all())
    return fits


def _widened(values: Array) -> Array:
    return decode(values, np.empty(values.shape, np.float64 if values.dtype == np.float64 else np.float32))


def same_values(x: Array, y: Array) -> bool:
    """Whether two flat arrays hold the same bytes, or, where their dtypes differ, the same float64 bits."""
    if x.dtype != y.dtype:
        x, y = (decode(values, np.empty(values.shape)) for values in (x, y))
    if x.nbytes % 8 == 0:
        return bool((x.view(np.uint64) == y.view(np.uint64)).all())
    return bool((x.view(np.uint8) == y.view(np.uint8)).all())


def first_nonfinite(values: Array) -> int | None:
    """The first index whose value is NaN or infinite."""
    places = np.flatnonzero(~np.isfinite(_widened(values)))
    return int(places[0]) if len(places) else None
