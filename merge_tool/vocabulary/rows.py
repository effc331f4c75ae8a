"""A tensor whose rows are rows of other tensors in another order: vocabularies matched token by token.

A row that is the same for all models, because only one of them has it, is `alone`: sums of a pair leave it out, and the
merge copies it. So the rows that both models have are merged as if there were no others.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, Array, decode, encode
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import ByteSource, TensorSource

# Codes for rows that no source has: the mean of all rows with a token; zeros; or the mean of `averages[-3 - code]`.
MEAN, ZERO, FIRST_AVERAGE = -1, -2, -3
_SOURCE = 1 << 32
_MOST = 65_536  # elements converted at a time


def kept(values: Array) -> Array:
    """A copy outside the malloc heap: a small array left on top of the heap would keep the freed memory below it
    resident (7 MB measured for three vocabularies of 100,000 tokens)."""
    memory = mmap.mmap(-1, max(values.nbytes, 1))
    copy: Array = np.frombuffer(memory, values.dtype, values.size).reshape(values.shape)
    copy[...] = values
    return copy


def code(source: int, rows: Array) -> Array:
    """Encode (source number, row number) in one int64."""
    return source * _SOURCE + rows.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Rows:
    """The code of each row: a source's row (`code`), MEAN, ZERO or an average; and which rows are `alone`.

    `averages` is [sets, sources]: a row of each source, -1 if it has none. MEAN is the mean of the first `num_averaged`
    rows, which have a token, without those whose code is MEAN.
    """

    codes: Array
    alone: Array
    num_averaged: int = 0
    averages: Array = field(default_factory=lambda: np.empty((0, 0), np.int32))

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows [start, stop) as runs of consecutive source rows: (first row, number of rows, code of the first)."""
        codes = self.codes[start:stop]
        steps = np.where(codes[:-1] >= 0, 1, np.where(codes[:-1] > FIRST_AVERAGE, 0, -1))
        breaks = np.flatnonzero(codes[1:] - codes[:-1] != steps) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(codes)], strict=True):
            yield start + begin, end - begin, int(codes[begin])


@dataclass(frozen=True, eq=False)
class RowTensor:
    """A TensorSource of the rows in `rows`, in the dtype of `info`, which holds all sources' values exactly."""

    info: TensorInfo
    sources: tuple[TensorSource, ...]
    own: int  # the index of the model's own tensor among the sources
    rows: Rows
    _means: list[Array] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stored_dtype(self) -> str:
        return self.sources[self.own].stored_dtype

    @property
    def where(self) -> str:
        return f"{self.sources[self.own].where} (rows by token)"

    @property
    def files(self) -> tuple[ByteSource, ...]:
        return tuple(dict.fromkeys(file for source in self.sources for file in source.files))

    @property
    def columns(self) -> int:
        return self.info.numel // len(self.rows.codes)

    def acquire(self) -> None:
        with ExitStack() as opened:
            for source in self.sources:
                source.acquire()
                opened.callback(source.release)
            opened.pop_all()

    def release(self) -> None:
        for source in self.sources:
            source.release()

    def prefetch(self, start: int, stop: int) -> None:
        for source, begin, count, _ in self._pieces(start, stop):
            source.prefetch(begin, begin + count)

    def forget(self, start: int, stop: int) -> None:
        for source, begin, count, _ in self._pieces(start, stop):
            source.forget(begin, begin + count)

    def read_into(self, start: int, values: Array) -> None:
        self._read(start, values)
        for _, cut, columns in self.parts(start, len(values), lambda codes: codes == MEAN):
            encode(self._mean_rows()[0][columns], values[cut])

    def _read(self, start: int, values: Array) -> None:
        """Read all rows except those that are MEAN."""
        for source, begin, count, offset in self._pieces(start, start + len(values)):
            _read_as(source, begin, values[offset : offset + count])
        for row, cut, columns in self.parts(start, len(values), lambda codes: codes < MEAN):
            encode(self._made(int(self.rows.codes[row]), columns), values[cut])

    def parts(self, start: int, count: int, wanted: Callable[[Array], Array]) -> Iterator[tuple[int, slice, slice]]:
        """The rows with `wanted` codes among `count` elements from `start` on: (row, its slice of these elements, its
        columns)."""
        columns, stop = self.columns, start + count
        first = start // columns
        for row in (np.flatnonzero(wanted(self.rows.codes[first : -(-stop // columns)])) + first).tolist():
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            yield row, slice(begin - start, end - start), slice(begin - row * columns, end - row * columns)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[TensorSource, int, int, int]]:
        """Elements [start, stop) as (source, first element there, count, offset here); without rows that no source
        has."""
        columns = self.columns
        for row, count, code in self.rows.runs(start // columns, -(-stop // columns)):
            if code < 0:
                continue
            number, first = divmod(code, _SOURCE)
            begin, end = max(start, row * columns), min(stop, (row + count) * columns)
            yield self.sources[number], first * columns + begin - row * columns, end - begin, begin - start

    def _made(self, code: int, columns: slice) -> Array:
        """Columns of a row that no source has, as float64: zeros, or an average."""
        total, part = np.zeros(columns.stop - columns.start), np.empty(columns.stop - columns.start)
        if code == ZERO:
            return total
        rows = self.rows.averages[FIRST_AVERAGE - code].tolist()
        for source, row in zip(self.sources, rows, strict=True):
            if row >= 0:
                _read_as(source, row * self.columns + columns.start, part)
                total += part
        total /= sum(row >= 0 for row in rows)
        return total

    def _mean_rows(self) -> Array:
        """Two rows: the mean of all rows that have a token, and the share of that mean that rows of one side alone
        contribute. Rows with values that are not finite do not count."""
        with self._lock:
            if not self._means:
                totals, count, columns = np.zeros((2, self.columns)), 0, self.columns
                step = max(1, _MOST // columns)
                room: Array = np.empty((step, columns))
                for row in range(0, self.rows.num_averaged, step):
                    cut = slice(row, min(row + step, self.rows.num_averaged))
                    some = room[: cut.stop - row]
                    self._read(row * columns, some.reshape(-1))
                    is_own = (self.rows.codes[cut] != MEAN) & np.isfinite(some).all(axis=1)
                    count += int(is_own.sum())
                    for total, chosen in zip(totals, (is_own, is_own & self.rows.alone[cut]), strict=True):
                        for index in np.flatnonzero(chosen):  # one by one: the same sum for any step
                            total += some[index]
                totals /= max(count, 1)
                self._means.append(totals)
            return self._means[0]

    def merged_mean(
        self, start: int, parts: tuple[Array, Array], weights: tuple[float, float], alone_weight: float
    ) -> Array:
        """Elements from `start` on of a padding row that is the mean of the merged rows, computed from both sides'
        means in `parts`. Such a row never gets the highest logit. Rows of one side alone are copied times
        `alone_weight`, and so is their share of the mean."""
        begin = start % self.columns
        alone = self._mean_rows()[1][begin : begin + len(parts[0])]
        x, y = (decode(values, np.empty(len(values))) for values in parts)
        merged: Array = weights[0] * x + weights[1] * y + (alone_weight - sum(weights)) * alone
        return merged

    def chosen(self, rows: Array, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The elements within [start, stop) that belong to chosen rows, as ranges relative to `start`."""
        columns = self.columns
        first, last = start // columns, -(-stop // columns)
        edges = np.flatnonzero(np.diff(rows[first:last], prepend=False, append=False))
        for begin, end in edges.reshape(-1, 2):
            yield (
                max(start, (first + int(begin)) * columns) - start,
                min(stop, (first + int(end)) * columns) - start,
            )

    def extra_bytes(self, count: int) -> int:
        reading = max(source.extra_bytes(count) for source in self.sources)
        makes_rows = bool((self.rows.codes < 0).any())
        making = 8 * (5 * self.columns + max(_MOST, self.columns) + _MOST)
        rows = 40 * (count // self.columns + 2)  # codes, and the runs of a permutation
        reading += 8 * min(count, _MOST) + (making if makes_rows else 0) + rows
        copies = 2 * NUMPY_DTYPES[self.info.dtype].itemsize * count  # the work's, without rows that are alone
        return max(reading, copies)


def _read_as(source: TensorSource, start: int, values: Array) -> None:
    """Read elements of `source` from `start` on into `values`, whose dtype holds them exactly."""
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
    """The report's note on a tensor whose figures cover only some rows."""
    if not isinstance(source, RowTensor) or not source.rows.alone.any():
        return ""
    return f"{int(source.rows.alone.sum()):,} rows of one side only, as they are; figures are of the others"


def alone_ranges(source: TensorSource, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The elements within [start, stop) in rows of one side alone, as ranges relative to `start`."""
    if isinstance(source, RowTensor) and stop > start:
        yield from source.chosen(source.rows.alone, start, stop)


def mean_ranges(source: TensorSource, start: int, stop: int) -> Iterator[tuple[RowTensor, int, int]]:
    """The same for rows that are MEAN, one by one, with their tensor."""
    if isinstance(source, RowTensor) and source.rows.num_averaged:
        for _, cut, _ in source.parts(start, stop - start, lambda codes: codes == MEAN):
            yield source, cut.start, cut.stop
