"""A checkpoint's content: shards, tensors, parameters and dtypes from its headers; norms and NaNs from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_tool.arrays import FLOAT_DTYPES, TILE
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import acquired
from merge_tool.errors import counted, shown, sized
from merge_tool.methods.inner import measure
from merge_tool.models.inputs import Inputs
from merge_tool.models.lora import open_model


@dataclass(frozen=True)
class ShardInspection:
    """One file: its name, how many tensors it holds, and its size in bytes."""

    name: str
    num_tensors: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers. `dtypes` maps a dtype code to (tensors, parameters)."""

    name: str
    num_tensors: int
    num_parameters: int
    nbytes: int
    shards: tuple[ShardInspection, ...]
    dtypes: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    notices: tuple[str, ...]

    def __repr__(self) -> str:
        counts = f"{counted(self.num_tensors, 'tensor')}, {counted(self.num_parameters, 'parameter')}"
        dtypes = ", ".join(f"{dtype}: {counted(tensors, 'tensor')}" for dtype, (tensors, _) in self.dtypes.items())
        return f"{shown(self.name)}: {counts}, {sized(self.nbytes)} in {counted(len(self.shards), 'file')} ({dtypes})"

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["dtypes"] = {
            dtype: {"num_tensors": tensors, "num_parameters": parameters}
            for dtype, (tensors, parameters) in self.dtypes.items()
        }
        return content


def inspect(path: str | Path) -> Inspection:
    """Read the headers of a model folder or file of weights; quantised checkpoints and odd dtypes are allowed. For a
    model of the Hub only headers are fetched.

    Raises CheckpointError if there is no checkpoint.
    """
    with (
        Inputs([path]) as inputs,
        open_model(inputs.refs[0], coming=inputs.coming, mergeable=False, as_stored=True) as checkpoint,
    ):
        counts: dict[str, int] = {}
        dtypes: dict[str, tuple[int, int]] = {}
        for info in checkpoint.tensors.values():
            for file in checkpoint.source(info.name).files:
                counts[file.name] = counts.get(file.name, 0) + 1
            tensors, parameters = dtypes.get(info.dtype, (0, 0))
            dtypes[info.dtype] = tensors + 1, parameters + info.numel
        shards = tuple(
            ShardInspection(file.file_name, counts.get(file.source.name, 0), file.source.size)
            for file in checkpoint.files
            if not file.file_name.endswith(".json")  # an adapter's configuration
        )
        return Inspection(
            name=checkpoint.name,
            num_tensors=len(checkpoint.tensors),
            num_parameters=sum(parameters for _, parameters in dtypes.values()),
            nbytes=sum(info.nbytes for info in checkpoint.tensors.values()),
            shards=shards,
            dtypes=dict(sorted(dtypes.items())),
            metadata=checkpoint.metadata,
            notices=checkpoint.notices,
        )


# --------------------------------------------------------------------------------------------- health


@dataclass(frozen=True, slots=True)
class TensorHealth:
    """One tensor of floats: Euclidean norm, root mean square and largest absolute value of its finite values.

    `num_nonfinite` values are NaN or infinite, the first of them at `first_nonfinite`. An empty tensor has None or 0 in
    all fields.
    """

    name: str
    dtype: str
    numel: int
    norm: float | None
    rms: float | None
    largest: float | None
    num_nonfinite: int
    first_nonfinite: int | None


def check_health(path: str | Path) -> list[TensorHealth]:
    """Read every floating-point tensor of a checkpoint, in order of their names, a megabyte at a time.

    Tensors of integers and of types below a byte are skipped. Raises CheckpointError.
    """
    with open_model(path, mergeable=False) as checkpoint:
        names = sorted(n for n, info in checkpoint.tensors.items() if info.dtype in FLOAT_DTYPES)
        health = []
        for name in names:
            with acquired([checkpoint.source(name)]):
                health.append(_tensor_health(checkpoint, name))
        return health


def _tensor_health(checkpoint: Checkpoint, name: str) -> TensorHealth:
    info = checkpoint.tensors[name]
    parts, largest, bad, first = [], 0.0, 0, None
    for start in range(0, info.numel, TILE):
        stop = min(start + TILE, info.numel)
        measured = measure(checkpoint.read_new(name, start, stop))
        parts.append(measured.squares)
        largest = max(largest, measured.largest)
        bad += measured.num_nonfinite
        if first is None and measured.first_nonfinite is not None:
            first = start + measured.first_nonfinite
    if not info.numel:
        return TensorHealth(
            name=name,
            dtype=info.dtype,
            numel=0,
            norm=None,
            rms=None,
            largest=None,
            num_nonfinite=0,
            first_nonfinite=None,
        )
    scale, squares = _total_squares(parts)
    norm = scale * math.sqrt(squares)
    rms = scale * math.sqrt(squares / info.numel)
    return TensorHealth(
        name=name,
        dtype=info.dtype,
        numel=info.numel,
        norm=norm,
        rms=rms,
        largest=largest,
        num_nonfinite=bad,
        first_nonfinite=first,
    )


def _total_squares(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(scale, s) with the sum of squares scale^2 s; the product itself may leave float64's range."""
    scale = max(part_scale for part_scale, _ in parts)
    if scale == 0:
        return 0.0, 0.0
    return scale, math.fsum((part_scale / scale) ** 2 * squares for part_scale, squares in parts)
