"""What a checkpoint holds, from its headers: shards, tensors, parameters, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.reader import open_checkpoint


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

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["dtypes"] = {
            dtype: {"num_tensors": tensors, "num_parameters": parameters}
            for dtype, (tensors, parameters) in self.dtypes.items()
        }
        return content


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read the headers of a model folder or .safetensors file; quantised checkpoints and odd dtypes are welcome.

    Raises CheckpointError when there is no checkpoint there.
    """
    with open_checkpoint(path, mergeable=False) as checkpoint:
        counts: dict[str, int] = {}
        dtypes: dict[str, tuple[int, int]] = {}
        for info in checkpoint.tensors.values():
            file_name = checkpoint.source(info.name).name
            counts[file_name] = counts.get(file_name, 0) + 1
            tensors, parameters = dtypes.get(info.dtype, (0, 0))
            dtypes[info.dtype] = tensors + 1, parameters + info.numel
        shards = tuple(
            ShardInspection(file.file_name, counts.get(file.source.name, 0), file.source.size)
            for file in checkpoint.files
        )
        return Inspection(
            checkpoint.name,
            len(checkpoint.tensors),
            sum(parameters for _, parameters in dtypes.values()),
            sum(info.nbytes for info in checkpoint.tensors.values()),
            shards,
            dict(sorted(dtypes.items())),
            checkpoint.metadata,
            checkpoint.notices,
        )
