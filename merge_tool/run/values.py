"""Values in a merge: converted, and refused by name if they cannot be merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from merge_tool.arrays import Array, convert, first_nonfinite
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import DataError, shown
from merge_tool.plan.plan import TensorJob

Chunks: TypeAlias = Callable[[], Iterable[tuple[int, Sequence[Array]]]]  # (first element, inputs), every chunk again


def converted(job: TensorJob, start: int, values: Array, out: Array) -> Array:
    """`values`, the elements from `start` on, in the output's dtype. Raises DataError if a value does not fit."""
    if values.dtype == out.dtype:
        return values
    if not convert(values, out):
        raise overflow(job, start + (first_nonfinite(out) or 0))
    return out


def overflow(job: TensorJob, element: int) -> DataError:
    wider = "float32" if job.out.dtype == "BF16" else "bfloat16 or float32"
    return DataError(
        f"{shown(job.out.name)}: element {element:,} is finite but too large for {job.out.dtype}. Choose {wider} as "
        "the output's dtype."
    )


def refuse_nonfinite(job: TensorJob, chunks: Chunks) -> None:
    """Raise DataError for the first value, in the order of chunks and inputs, that is not finite."""
    for start, inputs in chunks():
        check_finite(job, start, inputs)


def check_finite(job: TensorJob, start: int, inputs: Sequence[Array]) -> None:
    """Raise DataError for a value that is not finite; `inputs` are the elements from `start` on."""
    for source, values in zip(job.sources, inputs, strict=True):
        check_finite_one(source, start, values)


def check_finite_one(source: TensorSource, start: int, values: Array) -> None:
    """Raise DataError for a value that is not finite; `values` are one input's elements from `start` on."""
    if (index := first_nonfinite(values)) is not None:
        raise DataError(
            f"{shown(source.info.name)} in {shown(source.where)}: element {start + index:,} is "
            f"{float(values[index])}. A merge would spread it; repair or leave out that model."
        )


def stored(job: TensorJob, start: int, merged: Array, out: Array) -> Array:
    """`out` with the merged values, float64, from element `start` on. Raises DataError if one is not finite, or does
    not fit."""
    if (index := first_nonfinite(merged)) is not None:
        what = f"element {start + index:,} became {float(merged[index])}"
        raise DataError(f"{shown(job.out.name)}: {what} in the merge, from values that are finite.")
    if not convert(merged, out):
        raise overflow(job, start + (first_nonfinite(out) or 0))
    return out
