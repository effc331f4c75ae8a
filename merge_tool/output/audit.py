"""An audit of finished weight files by other code: what the safetensors library finds in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from merge_tool.errors import OutputError, reason, shown
from merge_tool.plan.plan import MergePlan

_LIBRARY_BYTES = 2_000  # bytes that the library holds for each tensor of an open file, at most


def check_with_library(folders: Iterable[Path], plan: MergePlan, most_bytes: int) -> None:
    """Open the weight files in each output's folder with the safetensors library: names, shapes and types must be as
    planned. Files for which that takes more than `most_bytes` of memory are passed over. Raises OutputError."""
    from safetensors import SafetensorError, safe_open

    for folder in folders:
        for shard in plan.shards:
            if len(shard.jobs) > most_bytes // _LIBRARY_BYTES:
                continue
            try:
                with safe_open(str(folder / shard.file_name), framework="numpy") as weights:
                    names = set(weights.keys())
                    slices = ((job, weights.get_slice(job.out.name)) for job in shard.jobs if job.out.name in names)
                    good = sum((tuple(s.get_shape()), s.get_dtype()) == (j.out.shape, j.out.dtype) for j, s in slices)
            except SafetensorError as e:
                raise OutputError(
                    f"{shown(shard.file_name)}: was changed after it was written; the safetensors library refuses it "
                    f"({reason(e)}). Run the same command with --check-resumed. Nothing was published."
                ) from e
            if good != len(shard.jobs) or len(names) != good:
                raise OutputError(
                    f"{shown(shard.file_name)}: safetensors itself finds {good:,} of {len(shard.jobs):,} tensors "
                    "as they were planned. This is a bug; please report it. Nothing was published."
                )
