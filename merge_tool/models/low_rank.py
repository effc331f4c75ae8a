"""A tensor plus a product of two thin matrices, W + scale * (L^T R), read by range; the sum is never stored whole.

Sums run over the rank in its order, sixteen at a time, in float64 and without BLAS: an element has the same bits in
whatever range it is read. Products of float32 and narrower factors are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, Array, decode, encode
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import ByteSource, TensorSource

MOST = 65_536  # elements computed at a time
_WIDEST = 32_768  # rows or columns at a time
_RANKS = 16  # ranks that are summed before the sum is added to the total
_BLOCK = 32_768  # elements to which the tensor itself is added at a time


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix [rank, length], stored as such (`by_rank`) or transposed. Without a `source`, all ones.

    It begins at element `offset`. If several are stored side by side (`side_by_side`), transposed, the ranks of this
    one are every so many columns, from column `column` on.
    """

    source: TensorSource | None
    rank: int
    length: int
    by_rank: bool
    offset: int = 0
    side_by_side: int = 1
    column: int = 0

    def load(self, ranks: tuple[int, int], places: tuple[int, int]) -> Array:
        """A block of rows and columns, as float64."""
        (k0, k1), (p0, p1) = ranks, places
        out = np.empty((k1 - k0, p1 - p0))
        if self.source is None:
            out[...] = 1.0
        elif self.by_rank and p1 - p0 == self.length:
            decode(self._read(k0 * self.length, out.size), out.reshape(-1))
        elif self.by_rank:
            for k in range(k0, k1):
                decode(self._read(k * self.length + p0, p1 - p0), out[k - k0])
        else:
            width = self.rank * self.side_by_side
            step = max(1, MOST // width)
            for p in range(p0, p1, step):
                q = min(p + step, p1)
                rows = self._read(p * width, (q - p) * width).reshape(-1, width)[:, self.column :: self.side_by_side]
                decode(np.ascontiguousarray(rows[:, k0:k1].T), out[:, p - p0 : q - p0])
        return out

    def _read(self, start: int, count: int) -> Array:
        assert self.source is not None
        values: Array = np.empty(count, NUMPY_DTYPES[self.source.info.dtype])
        self.source.read_into(self.offset + start, values)
        return values

    @property
    def extra_bytes(self) -> int:
        """The memory that `load` takes beside its result: a block as it is stored, twice if it is transposed."""
        if self.source is None:
            return 0
        itemsize = NUMPY_DTYPES[self.source.info.dtype].itemsize
        width = self.rank * self.side_by_side
        most = min(width * self.length, max(MOST, width))
        return itemsize * most * (1 if self.by_rank else 2)


@dataclass(frozen=True, slots=True)
class LowRankTensor:
    """A TensorSource: `base`, seen as a matrix of `left.length` rows, plus `scale` times left^T right."""

    info: TensorInfo
    base: TensorSource
    left: Factor
    right: Factor
    scale: float
    also_read: tuple[ByteSource, ...] = ()  # files that the scale comes from

    @property
    def stored_dtype(self) -> str:
        return self.base.stored_dtype

    @property
    def where(self) -> str:
        return f"{self.base.where} + {self._factors[0].where}"

    @property
    def files(self) -> tuple[ByteSource, ...]:
        files = [*self.base.files, *(file for factor in self._factors for file in factor.files), *self.also_read]
        return tuple(dict.fromkeys(files))

    @property
    def _factors(self) -> list[TensorSource]:
        return [factor.source for factor in (self.left, self.right) if factor.source is not None]

    def acquire(self) -> None:
        with ExitStack() as opened:
            for source in (self.base, *self._factors):
                source.acquire()
                opened.callback(source.release)
            opened.pop_all()

    def release(self) -> None:
        for source in (self.base, *self._factors):
            source.release()

    def prefetch(self, start: int, stop: int) -> None:
        self.base.prefetch(start, stop)

    def forget(self, start: int, stop: int) -> None:
        self.base.forget(start, stop)

    def read_into(self, start: int, values: Array) -> None:
        with np.errstate(all="ignore"):  # the reader looks for values that are not finite
            self._fill(start, values)

    def _fill(self, start: int, values: Array) -> None:
        done = 0
        for rows, columns in rectangles(start, start + len(values), self.right.length):
            product = self._product(rows, columns)
            part = values[done : done + product.size]
            self._add_base(start + done, product.reshape(-1), part)
            done += product.size

    def _product(self, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
        """left^T right of these rows and columns, in float64."""
        n, m = rows[1] - rows[0], columns[1] - columns[0]
        total: Array = np.zeros((n, m))
        step = _RANKS * max(1, MOST // (_RANKS * max(n, m)))
        for k in range(0, self.left.rank, step):
            ranks = k, min(k + step, self.left.rank)
            left, right = self.left.load(ranks, rows), self.right.load(ranks, columns)
            for group in range(0, len(left), _RANKS):
                total += sum_products(left[group : group + _RANKS], right[group : group + _RANKS], exact=self._is_exact)
        return total

    @property
    def _is_exact(self) -> bool:
        return all(source.info.dtype != "F64" for source in self._factors)

    def _add_base(self, start: int, product: Array, values: Array) -> None:
        """`values` become base + scale * product, rounded once."""
        np.multiply(product, self.scale, out=product)
        for begin in range(0, len(product), _BLOCK):
            part = product[begin : begin + _BLOCK]
            stored: Array = np.empty(len(part), NUMPY_DTYPES[self.base.info.dtype])
            self.base.read_into(start + begin, stored)
            np.add(part, decode(stored, np.empty(len(part))), out=part)
            encode(part, values[begin : begin + _BLOCK])

    def extra_bytes(self, count: int) -> int:
        elements = min(count, MOST)
        n = min(self.left.length, elements // self.right.length + 1, _WIDEST)
        m = min(self.right.length, elements, _WIDEST)
        factors = 8 * min(self.left.rank * (n + m), 2 * max(MOST, _RANKS * max(n, m)))
        loading = max(self.left.extra_bytes, self.right.extra_bytes)
        adding = (8 + 8) * _BLOCK + self.base.extra_bytes(_BLOCK)
        return 8 * elements + max(factors + loading + 8 * elements, adding)


def rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Elements [start, stop) of a matrix as (rows, columns): whole rows, or part of one; at most MOST elements."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns or columns > _WIDEST:
            count = min(columns - column, stop - start, _WIDEST)
            yield (row, row + 1), (column, column + count)
        else:
            rows = min(min(stop - start, MOST) // columns, _WIDEST)
            count = rows * columns
            yield (row, row + rows), (0, columns)
        start += count


def sum_products(left: Array, right: Array, *, exact: bool) -> Array:
    """left^T right of few ranks, [n, rows] and [n, columns], summed rank by rank for every element.

    For several rows and columns, einsum has the rank in its outermost loop and sums in this order; for one row or
    column it would sum along the rank, in another order. If products are not `exact`, fused operations may differ from
    separate ones.
    """
    if exact and left.shape[1] > 1 and right.shape[1] > 1:
        summed: Array = np.einsum("ki,kj->ij", left, right)
        return summed
    total = np.zeros((left.shape[1], right.shape[1]))
    for column, row in zip(left[:, :, None], right, strict=True):
        total += column * row
    return total
