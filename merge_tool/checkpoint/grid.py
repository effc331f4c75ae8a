"""Which scale belongs to which element: matrices cut into blocks, read by ranges of elements. No bytes, no dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_tool.checkpoint.strided import boxes


@dataclass(frozen=True, slots=True)
class Grid:
    """Which scale belongs to which element: matrices of `rows` and `columns` (one for each expert), cut into blocks."""

    rows: int
    columns: int
    block: tuple[int, int]

    @property
    def scale_rows(self) -> int:
        return -(-self.rows // self.block[0])

    @property
    def scale_columns(self) -> int:
        return -(-self.columns // self.block[1])

    def patches(self, start: int, stop: int) -> Iterator[Patch]:
        """The elements [start, stop) as rectangles, in their order."""
        begin = 0
        for (top, bottom), (left, right) in boxes((-(-stop // self.columns), self.columns), start, stop):
            of_row = self._scale_row(np.arange(top, bottom))
            first, last = int(of_row[0]), int(of_row[-1]) + 1
            end = begin + (bottom - top) * (right - left)
            yield Patch(
                cut=slice(begin, end),
                shape=(bottom - top, right - left),
                left=left,
                scale_rows=(first, last),
                of_row=of_row - first,
                grid=self,
            )
            begin = end

    def _scale_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        matrix, inside = np.divmod(row, self.rows)
        return matrix * self.scale_rows + inside // self.block[0]  # type: ignore[no-any-return]

    def elements(self, scale_row: int) -> tuple[int, int]:
        """[start, stop) of the elements that one row of scales belongs to."""
        matrix, inside = divmod(scale_row, self.scale_rows)
        top = matrix * self.rows + inside * self.block[0]
        bottom = matrix * self.rows + min(self.rows, (inside + 1) * self.block[0])
        return top * self.columns, bottom * self.columns


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of elements: `cut` of a range, of that `shape`, from column `left` on.

    The rectangle's scales are in `scale_rows` [first, last). `of_row` is the scale row of each element row, counted
    from first.
    """

    cut: slice
    shape: tuple[int, int]
    left: int
    scale_rows: tuple[int, int]
    of_row: npt.NDArray[Any]
    grid: Grid

    @property
    def scales_cut(self) -> tuple[slice, slice]:
        """Where the rectangle's scales are in the matrix of all scales."""
        width = self.grid.block[1]
        return slice(*self.scale_rows), slice(self.left // width, -(-(self.left + self.shape[1]) // width))

    def spread(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The scales of `scales_cut`, spread to one for each element, or one for each row."""
        if self.grid.scale_columns > 1:
            of_column = np.arange(self.left, self.left + self.shape[1]) // self.grid.block[1]
            scales = scales[:, of_column - of_column[0]]
        return scales[self.of_row]  # type: ignore[no-any-return]

    def largest(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The largest of the rectangle's `values` (in its shape) for each scale of `scales_cut`."""
        width, columns = self.grid.block[1], self.scales_cut[1]
        edges = np.maximum(np.arange(columns.start, columns.stop) * width - self.left, 0)
        of_rows = np.maximum.reduceat(values, edges, axis=1)
        return np.maximum.reduceat(of_rows, np.flatnonzero(np.diff(self.of_row, prepend=-1)), axis=0)


__all__ = ["Grid", "Patch"]
