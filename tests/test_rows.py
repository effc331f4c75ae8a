"""Rows of another order, and the memory that reading them takes. Which rows those are: test_vocab.py."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import BF16, Array, save_file
from merge_tool import open_checkpoint
from merge_tool.arrays import NUMPY_DTYPES
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.vocabulary.rows import FIRST_AVERAGE, MEAN, ZERO, Rows, RowTensor, code

PYTHON_BYTES = 10_000  # of objects, beside arrays
KINDS = {"own": 0, "of another model": 5, "zero": 6, "average": 6, "mean": 6}  # and which row is of that kind


def row_tensor(folder: Path, kind: str, columns: int, dtypes: tuple[Any, Any]) -> tuple[RowTensor, Array]:
    """Four rows of one model, two of another, and one of that kind: zeros, the average of both models' first rows, the
    mean of all others; and all of it as float64."""
    sources, wide = [], []
    for number, dtype in enumerate(dtypes):
        stored = np.random.default_rng(number).standard_normal((6, columns), np.float32).astype(dtype)
        save_file({"w": stored}, folder / f"{number}.safetensors")
        sources.append(open_checkpoint(folder / f"{number}.safetensors").source("w"))
        wide.append(stored.astype(np.float64))
    expected = np.concatenate([wide[0][:4], wide[1][4:]])
    own = {"zero": ZERO, "average": FIRST_AVERAGE, "mean": MEAN}.get(kind, 0)
    last = {"zero": 0 * expected[0], "average": (wide[0][0] + wide[1][0]) / 2, "mean": expected.mean(axis=0)}
    codes = np.array([*code(0, np.arange(4)), *code(1, np.array([4, 5])), own])
    averages = np.zeros((1 if kind == "average" else 0, 2), np.int32)
    rows = Rows(codes, np.zeros(7, bool), 6 if kind == "mean" else 0, averages)
    dtype = "F32" if np.float32 in dtypes else "BF16"
    tensor = RowTensor(TensorInfo("w", dtype, (7, columns), 0), tuple(sources), 0, rows)
    return tensor, np.concatenate([expected, last.get(kind, expected[0])[None]])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, np.float32), (np.float32, BF16)])
@pytest.mark.parametrize("columns", [1_000, 20_000, 300_000])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_rows_takes_no_more_memory_than_is_told(
    tmp_path: Path, kind: str, columns: int, dtypes: tuple[Any, Any]
) -> None:
    """A few elements of a row or all of it, of every kind; and the values are right."""
    for count in (100, columns):
        tensor, expected = row_tensor(tmp_path, kind, columns, dtypes)
        values: Array = np.empty(count, NUMPY_DTYPES[tensor.info.dtype])
        tensor.acquire()
        tracemalloc.start()
        try:
            tensor.read_into(KINDS[kind] * columns, values)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            tensor.release()
        assert peak <= tensor.extra_bytes(count) + PYTHON_BYTES
        np.testing.assert_array_equal(values, expected[KINDS[kind], :count].astype(values.dtype))
