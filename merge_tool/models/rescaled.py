"""A weight whose rows have given lengths, m * V / ||V|| with V = W + scale * B A (DoRA), read by range.

The lengths of V take a pass over the whole tensor, always in the same pieces: an element has the same bits in whatever
range it is read. They are kept while the tensor is acquired.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, Array, decode, encode
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.models.low_rank import MOST, LowRankTensor, rectangles


class Factors:
    """magnitude / ||V||: one number for each row of the matrix V, or for each column."""

    def __init__(self, direction: LowRankTensor, magnitude: TensorSource, *, of_rows: bool) -> None:
        self.direction = replace(direction, info=replace(direction.info, dtype="F64"))
        self.magnitude, self.of_rows = magnitude, of_rows
        self._lock = threading.Lock()
        self._users = 0
        self._values: Array | None = None

    @property
    def count(self) -> int:
        return (self.direction.left if self.of_rows else self.direction.right).length

    def acquire(self) -> None:
        self.direction.acquire()
        try:
            self.magnitude.acquire()
        except BaseException:
            self.direction.release()
            raise
        with self._lock:
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._values = None
        self.magnitude.release()
        self.direction.release()

    def values(self, first: int, last: int) -> Array:
        """The numbers from `first` to `last`. Between `acquire` and `release` the first reader computes all, while
        others wait; else, of rows, only those that are asked for take a pass (a plan looks at a few elements)."""
        with self._lock:
            if self._values is None and self._users:
                self._values = self._compute(0, self.count)
            if self._values is not None:
                return self._values[first:last]
        return self._compute(first, last) if self.of_rows else self._compute(0, self.count)[first:last]

    def _compute(self, first: int, last: int) -> Array:
        squares: Array = np.zeros(last - first)
        width, height = self.direction.right.length, self.direction.left.length
        start, stop = (first * width, last * width) if self.of_rows else (0, height * width)
        piece = np.empty(min(MOST, stop - start))
        for rows, columns in rectangles(start, stop, width):
            part = piece[: (rows[1] - rows[0]) * (columns[1] - columns[0])]
            self.direction.read_into(rows[0] * width + columns[0], part)
            np.multiply(part, part, out=part)
            kept = slice(rows[0] - first, rows[1] - first) if self.of_rows else slice(*columns)
            squares[kept] += part.reshape(rows[1] - rows[0], -1).sum(axis=1 if self.of_rows else 0)
        stored: Array = np.empty(last - first, NUMPY_DTYPES[self.magnitude.info.dtype])
        self.magnitude.read_into(first, stored)
        factors: Array = decode(stored, np.empty(last - first))
        with np.errstate(all="ignore"):  # the reader looks for values that are not finite
            return np.divide(factors, np.sqrt(squares, out=squares), out=factors)

    def multiply(self, start: int, values: Array) -> None:
        """Multiply the elements from `start` on with the numbers of their rows or columns."""
        width, done = self.direction.right.length, 0
        first, last = (start // width, -(-(start + len(values)) // width)) if self.of_rows else (0, width)
        factors = self.values(first, last)
        for rows, columns in rectangles(start, start + len(values), width):
            shape = rows[1] - rows[0], columns[1] - columns[0]
            part = values[done : done + shape[0] * shape[1]].reshape(shape)
            part *= factors[rows[0] - first : rows[1] - first, None] if self.of_rows else factors[slice(*columns)]
            done += part.size

    @property
    def extra_bytes(self) -> int:
        """The numbers, the sums of squares, and the magnitudes as stored."""
        return 3 * 8 * self.count


@dataclass(frozen=True, slots=True)
class RescaledTensor:
    """A TensorSource: a LowRankTensor, each row or column of it multiplied with a number of `factors`."""

    info: TensorInfo
    factors: Factors

    @property
    def stored_dtype(self) -> str:
        return self.factors.direction.stored_dtype

    @property
    def where(self) -> str:
        return self.factors.direction.where

    @property
    def files(self) -> tuple[ByteSource, ...]:
        return tuple(dict.fromkeys((*self.factors.direction.files, *self.factors.magnitude.files)))

    def acquire(self) -> None:
        self.factors.acquire()

    def release(self) -> None:
        self.factors.release()

    def prefetch(self, start: int, stop: int) -> None:
        self.factors.direction.prefetch(start, stop)

    def forget(self, start: int, stop: int) -> None:
        self.factors.direction.forget(start, stop)

    def read_into(self, start: int, values: Array) -> None:
        wide = np.empty(min(MOST, len(values)))
        for done in range(0, len(values), MOST):
            part = wide[: min(MOST, len(values) - done)]
            self.factors.direction.read_into(start + done, part)
            with np.errstate(all="ignore"):  # the reader looks for values that are not finite
                self.factors.multiply(start + done, part)
            encode(part, values[done : done + MOST])

    def extra_bytes(self, count: int) -> int:
        reading = self.factors.direction.extra_bytes(MOST)
        return 8 * MOST + reading + self.factors.extra_bytes
