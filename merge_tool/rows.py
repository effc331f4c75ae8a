"""A tensor whose rows are another's in another order, some of them from a third: vocabularies matched token by token.

A row that one side alone has is `alone`: both sides' sources give it the same values, sums leave it out, and the merge
hands it on as it is. So the rows that both have are merged as if there were no others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import NUMPY_DTYPES
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.methods import Array, decode, encode

MEAN, FIRST_OTHER = -1, -2  # instead of a row: the mean of the rows of `averaged`; row r of the other side is -2 - r
_MOST = 65_536  # elements that are converted at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Which row stands where: of the tensor itself (0 and above), of the other side's, or MEAN; and which are alone."""

    codes: Array
    alone: Array
    num_averaged: int = 0  # so many rows of `averaged` hold a token

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows [start, stop) as (first, number of rows, code of the first) of neighbours that follow each other."""
        codes = self.codes[start:stop].astype(np.int64)
        steps = np.where(codes[:-1] >= 0, 1, np.where(codes[:-1] < MEAN, -1, 0))
        breaks = np.flatnonzero(codes[1:] - codes[:-1] != steps) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(codes)], strict=True):
            yield start + begin, end - begin, int(codes[begin])


@dataclass(frozen=True, eq=False)
class RowTensor:
    """A TensorSource of the rows that `rows` names, in the dtype of `info`, which holds all of theirs exactly."""

    info: TensorInfo
    own: TensorSource
    other: TensorSource
    averaged: TensorSource
    rows: Rows
    _mean: list[Array] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stored_dtype(self) -> str:
        return self.own.stored_dtype

    @property
    def where(self) -> str:
        return f"{self.own.where} (rows by token)"

    @property
    def files(self) -> tuple[ByteSource, ...]:
        return tuple(dict.fromkeys([*self.own.files, *self.other.files, *self.averaged.files]))

    @property
    def columns(self) -> int:
        return self.info.numel // len(self.rows.codes)

    def acquire(self) -> None:
        with ExitStack() as opened:
            for source in (self.own, self.other, self.averaged):
                source.acquire()
                opened.callback(source.release)
            opened.pop_all()

    def release(self) -> None:
        for source in (self.own, self.other, self.averaged):
            source.release()

    def prefetch(self, start: int, stop: int) -> None:
        for source, begin, count, _ in self._pieces(start, stop):
            source.prefetch(begin, begin + count)

    def forget(self, start: int, stop: int) -> None:
        for source, begin, count, _ in self._pieces(start, stop):
            source.forget(begin, begin + count)

    def read_into(self, start: int, values: Array) -> None:
        for source, begin, count, place in self._pieces(start, start + len(values)):
            _read_as(source, begin, values[place : place + count])
        self._fill_means(start, values)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[TensorSource, int, int, int]]:
        """Elements [start, stop) as (source, its first element, how many, where they go); without means."""
        columns = self.columns
        for row, count, code in self.rows.runs(start // columns, -(-stop // columns)):
            if code == MEAN:
                continue
            source, first = (self.own, code) if code >= 0 else (self.other, FIRST_OTHER - code)
            begin, end = max(start, row * columns), min(stop, (row + count) * columns)
            yield source, first * columns + begin - row * columns, end - begin, begin - start

    def _fill_means(self, start: int, values: Array) -> None:
        columns, stop = self.columns, start + len(values)
        first = start // columns
        for row in np.flatnonzero(self.rows.codes[first : -(-stop // columns)] == MEAN) + first:
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            encode(self._mean_row()[begin - row * columns : end - row * columns], values[begin - start : end - start])

    def _mean_row(self) -> Array:
        """The mean of all rows that hold a token: what a head says of it is below what it says of the best of them."""
        with self._lock:
            if not self._mean:
                total, columns = np.zeros(self.columns), self.columns
                step = max(1, _MOST // columns)
                for row in range(0, self.rows.num_averaged, step):
                    some: Array = np.empty(min(step, self.rows.num_averaged - row) * columns)
                    _read_as(self.averaged, row * columns, some)
                    for values in some.reshape(-1, columns):  # one after the other: the same sum for any step
                        total += values
                self._mean.append(total / self.rows.num_averaged)
            return self._mean[0]

    def extra_bytes(self, count: int) -> int:
        reading = max(source.extra_bytes(count) for source in (self.own, self.other, self.averaged))
        averaging = 8 * (3 * self.columns + max(_MOST, self.columns))
        rows = 40 * (count // self.columns + 2)  # codes, and the runs of a permutation
        reading += 8 * min(count, _MOST) + (averaging if self.rows.num_averaged else 0) + rows
        return max(reading, 2 * NUMPY_DTYPES[self.info.dtype].itemsize * count)  # work's copies, without rows alone


def _read_as(source: TensorSource, start: int, values: Array) -> None:
    """Elements of `source` from `start` on in the dtype of `values`, which holds them exactly."""
    dtype = NUMPY_DTYPES[source.info.dtype]
    if dtype == values.dtype:
        source.read_into(start, values)
        return
    for begin in range(0, len(values), _MOST):
        part = values[begin : begin + _MOST]
        stored: Array = np.empty(len(part), dtype)
        source.read_into(start + begin, stored)
        decode(stored, part)


def rows_note(source: TensorSource) -> str:
    """What the report says of a tensor whose figures are of some rows only."""
    if not isinstance(source, RowTensor) or not source.rows.alone.any():
        return ""
    return f"{int(source.rows.alone.sum()):,} rows of one side only, as they are; figures are of the others"


def alone_ranges(source: TensorSource, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The elements within [start, stop) that belong to rows of one side alone, as ranges relative to `start`."""
    if not isinstance(source, RowTensor) or stop == start:
        return
    columns = source.columns
    first = start // columns
    alone = source.rows.alone[first : -(-stop // columns)]
    edges = np.flatnonzero(np.diff(alone, prepend=False, append=False))
    for begin, end in edges.reshape(-1, 2):
        yield (
            max(start, (first + int(begin)) * columns) - start,
            min(stop, (first + int(end)) * columns) - start,
        )
