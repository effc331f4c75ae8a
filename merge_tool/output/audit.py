"""An audit of finished weight files by other code: the safetensors library must find the planned tensors in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from merge_tool.errors import OutputError, reason, shown
from merge_tool.plan.plan import MergePlan

_LIBRARY_BYTES = 2_000  # bytes that the library holds for each tensor of an open file, at most


def check_with_library(folders: Iterable[Path], plan: MergePlan, most_bytes: int) -> None:
    """Open the weight files in each output's folder with the safetensors library: names, shapes and types must be as
    planned. A file is skipped if opening it takes more than `most_bytes` of memory. Raises OutputError."""
    for folder in folders:
        for shard in plan.shards:
            if len(shard.jobs) <= most_bytes // _LIBRARY_BYTES:
                tensors = ((job.out.name, job.out.shape, job.out.dtype) for job in shard.jobs)
                check_file(folder / shard.file_name, tensors, len(shard.jobs))


def check_file(path: Path, tensors: Iterable[tuple[str, Sequence[int], str]], count: int) -> None:
    """Open one weight file with the safetensors library: it must hold these `count` tensors, by name, shape and type.
    Raises OutputError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as weights:
            names = set(weights.keys())
            slices = ((weights.get_slice(name), shape, dtype) for name, shape, dtype in tensors if name in names)
            good = sum((s.get_shape(), s.get_dtype()) == ([*shape], dtype) for s, shape, dtype in slices)
    except SafetensorError as e:
        raise OutputError(
            f"{shown(path.name)}: was changed after it was written; the safetensors library refuses it "
            f"({reason(e)}). Run the same command with --check-resumed. Nothing was published."
        ) from e
    if good != count or len(names) != good:
        raise OutputError(
            f"{shown(path.name)}: the safetensors library finds {good:,} of {count:,} tensors "
            "as planned. This is a bug; please report it. Nothing was published."
        )
