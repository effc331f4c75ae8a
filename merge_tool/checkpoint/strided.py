"""A tensor whose elements are stored in another order (transposed, sliced, expanded), gathered block by block. Only the
bytes that a block needs are read, a run of neighbours at a time, through at most a megabyte of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import LocalFile

_RUN_BYTES = 1 << 20
_Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A TensorSource; `strides` are in elements, none negative; `info.offset` is the byte offset of the first element;
    `written_as` as in FileTensor."""

    info: TensorInfo
    file: LocalFile
    strides: tuple[int, ...]
    written_as: str | None = None

    @property
    def stored_dtype(self) -> str:
        return self.written_as or self.info.dtype

    @property
    def where(self) -> str:
        return self.file.name

    @property
    def files(self) -> tuple[LocalFile]:
        return (self.file,)

    def read_into(self, start: int, values: npt.NDArray[Any]) -> None:
        done = 0
        for box in boxes(self.info.shape, start, start + len(values)):
            sizes = [stop - begin for begin, stop in box]
            part = values[done : done + prod(sizes)]
            self._gather(box, part.reshape(sizes))
            done += len(part)

    def _gather(self, box: _Box, out: npt.NDArray[Any]) -> None:
        """Fill `out` run by run, along the axis whose elements are closest in the file."""
        axis = min(range(out.ndim), key=lambda k: (out.shape[k] == 1 or self.strides[k] == 0, self.strides[k]))
        steps = [stride for k, stride in enumerate(self.strides) if k != axis]
        first = sum(begin * stride for (begin, _), stride in zip(box, self.strides, strict=True))
        runs = np.moveaxis(out, axis, -1)
        for index in np.ndindex(runs.shape[:-1]):
            position = first + sum(i * step for i, step in zip(index, steps, strict=True))
            self._read_run(position, self.strides[axis], runs[index])

    def _read_run(self, position: int, stride: int, out: npt.NDArray[Any]) -> None:
        """Read elements `position`, `position + stride` and so on of the storage into `out`."""
        most = max(1, _RUN_BYTES // (out.itemsize * max(stride, 1)))
        for done in range(0, len(out), most):
            part = out[done : done + most]
            run = np.empty((len(part) - 1) * stride + 1, out.dtype)
            raw = memoryview(run.view(np.uint8))  # type: ignore[arg-type]  # numpy 2.4's stubs say no, numpy says yes
            self.file.read_into(self.info.offset + (position + done * stride) * out.itemsize, raw)
            part[:] = run[::stride] if stride else run[0]

    def acquire(self) -> None:
        self.file.acquire()

    def release(self) -> None:
        self.file.release()

    def prefetch(self, start: int, stop: int) -> None:
        """No hint: the elements are spread over the whole tensor."""

    def forget(self, start: int, stop: int) -> None:
        """No hint: the next block is on the same pages."""

    def extra_bytes(self, count: int) -> int:
        return 2 * _RUN_BYTES


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[_Box]:
    """The elements [start, stop) of an array, flat in C order, as boxes of indices in that order.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 1), (2, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 1))]
    """
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    row, column = divmod(start, inner)
    if column and start < stop:
        end = min(stop - row * inner, inner)
        yield from (((row, row + 1), *box) for box in boxes(shape[1:], column, end))
        row, start = row + 1, row * inner + end
    last, rest = divmod(stop, inner)
    if row < last:
        yield ((row, last), *((0, n) for n in shape[1:]))
    if rest and start < stop:
        yield from (((last, last + 1), *box) for box in boxes(shape[1:], 0, rest))
