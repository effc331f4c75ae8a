"""An embedding or head with some rows replaced (trainable tokens), read by range."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, Array, decode
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import ByteSource, TensorSource

_BLOCK = 65_536  # elements decoded at a time


@dataclass(frozen=True)
class TokenRows:
    """A TensorSource: `base`, with the rows that `places` names taken from `rows` at their places there."""

    info: TensorInfo
    base: TensorSource
    rows: TensorSource
    places: Mapping[int, int]  # the row of the embedding -> its row in `rows`
    also_read: tuple[ByteSource, ...] = ()  # files that the places come from

    @property
    def stored_dtype(self) -> str:
        return self.base.stored_dtype

    @property
    def where(self) -> str:
        return f"{self.base.where} + {self.rows.where}"

    @property
    def files(self) -> tuple[ByteSource, ...]:
        return tuple(dict.fromkeys((*self.base.files, *self.rows.files, *self.also_read)))

    @cached_property
    def _sorted(self) -> list[int]:
        return sorted(self.places)

    def acquire(self) -> None:
        self.base.acquire()
        try:
            self.rows.acquire()
        except BaseException:
            self.base.release()
            raise

    def release(self) -> None:
        self.rows.release()
        self.base.release()

    def prefetch(self, start: int, stop: int) -> None:
        self.base.prefetch(start, stop)

    def forget(self, start: int, stop: int) -> None:
        self.base.forget(start, stop)

    def read_into(self, start: int, values: Array) -> None:
        _read(self.base, start, values)
        width, stop = self.info.shape[-1], start + len(values)
        for row in self._sorted[bisect_left(self._sorted, start // width) :]:
            begin, end = max(start, row * width), min(stop, (row + 1) * width)
            if begin >= end:
                break
            offset = self.places[row] * width + begin - row * width
            _read(self.rows, offset, values[begin - start : end - start])

    def extra_bytes(self, count: int) -> int:
        return 8 * _BLOCK + self.base.extra_bytes(count)


def _read(source: TensorSource, start: int, values: Array) -> None:
    """Elements of a source from `start` on, in the dtype of `values`, which holds them exactly."""
    dtype = NUMPY_DTYPES[source.info.dtype]
    if dtype == values.dtype:
        source.read_into(start, values)
        return
    for done in range(0, len(values), _BLOCK):
        part = values[done : done + _BLOCK]
        stored: Array = np.empty(len(part), dtype)
        source.read_into(start + done, stored)
        decode(stored, part)
