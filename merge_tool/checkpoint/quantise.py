"""8-bit codes with fresh scales, from merged values: arrays and grids only, no names, no files.

The values that share a scale are a group. A group's scale is its largest magnitude / the largest code, rounded up, so
that no code overflows; a group of zeros has the scale 1. A code is value / scale in float64, rounded once to nearest
even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from merge_tool.arrays import LARGEST_CODES, POWERS_OF_TWO, Array, decode, encode
from merge_tool.checkpoint.grid import Grid

_PIECE = 32_768  # elements encoded at a time
_POWERS_BIAS = 127
_LARGEST_READ = float(np.finfo(np.float32).max)  # a reader multiplies codes and scales in float32


def largest_of(grid: Grid, start: int, values: Array) -> Iterator[tuple[tuple[slice, slice], Array]]:
    """The largest magnitude of each group in `values` (the magnitudes of the elements from `start` on), as pairs: where
    the groups' scales are in the matrix of all scales, and the magnitudes."""
    for begin in range(0, len(values), _PIECE):
        part = values[begin : begin + _PIECE]
        for patch in grid.patches(start + begin, start + begin + len(part)):
            yield patch.scales_cut, patch.largest(part[patch.cut].reshape(patch.shape))


def fresh_scales(largest: Array, codes: np.dtype[Any], out: Array) -> bool:
    """Fill `out` with the scales of groups with these `largest` magnitudes (float64), for codes of dtype `codes`. False
    if a scale does not fit `out`'s dtype, or a code times its scale would be read as infinity."""
    largest_code = LARGEST_CODES[codes]
    fits = True
    for begin in range(0, len(out), _PIECE):
        cut = slice(begin, begin + _PIECE)
        exact = np.where(largest[cut] == 0, largest_code, largest[cut]) / largest_code
        _round_up(exact, out[cut])
        with np.errstate(over="ignore"):
            fits &= bool((out[cut].astype(np.float64) * largest_code <= _LARGEST_READ).all())
    return fits


def _round_up(values: Array, out: Array) -> None:
    """The positive `values` rounded up to `out`'s dtype; infinity or NaN for values beyond it."""
    if out.dtype == POWERS_OF_TWO:
        mantissa, exponent = np.frexp(values)
        exponent = np.clip(exponent - (mantissa == 0.5), -_POWERS_BIAS, _POWERS_BIAS + 1) + _POWERS_BIAS
        out[...] = exponent.astype(np.uint8).view(POWERS_OF_TWO)
        return
    encode(values, out)
    bits: Array = out.view(np.uint16 if out.dtype.itemsize == 2 else np.uint32)
    bits += decode(out, np.empty(values.shape)) < values


def encode_scaled(grid: Grid, start: int, values: Array, scales: Array, out: Array) -> None:
    """Codes of float64 `values`, the elements from `start` on, into `out`. `scales` are all of the tensor's, flat."""
    matrix = scales.reshape(-1, grid.scale_columns)
    for begin in range(0, len(values), _PIECE):
        part = values[begin : begin + _PIECE]
        quotients = np.empty(len(part))
        for patch in grid.patches(start + begin, start + begin + len(part)):
            own = patch.spread(matrix[patch.scales_cut].astype(np.float64))
            np.divide(part[patch.cut].reshape(patch.shape), own, out=quotients[patch.cut].reshape(patch.shape))
        encode(quotients, out[begin : begin + len(part)])


def extra_bytes(count: int) -> int:
    """The memory that `largest_of` and `encode_scaled` take for `count` elements: the rows' indices in the grid (for
    short rows), the scales spread to columns, then to elements, the quotients, and their rounding to 8 bits."""
    return (32 + 3 * 8 + 8 + 8 + 32) * min(count, _PIECE)
