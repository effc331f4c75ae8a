"""Output tensors -> files: their order, their shards, names and sizes, every offset."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from merge_tool.arrays import FLOAT8_DTYPES, FLOAT_DTYPES
from merge_tool.checkpoint.folder import is_pickle
from merge_tool.checkpoint.header import TensorInfo, build_header, write_order
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.plan.plan import ShardPlan, TensorJob
from merge_tool.recipe.recipe import Recipe

_PICKLED_STEMS = frozenset({"diffusion_pytorch_model", "adapter_model"})  # pickles and safetensors share these names


def lay_out(
    infos: Sequence[TensorInfo],
    first: Checkpoint,
    stem: str,
    max_bytes: int | None,
    single_file: str | None,
    job: Callable[[int, TensorInfo], TensorJob],
) -> tuple[ShardPlan, ...]:
    """The output's files: the tensors in the order of `infos`, cut into shards. `job(number, placed)` makes each
    tensor's job."""
    groups = _split(infos, max_bytes)
    metadata = {**first.metadata, "format": first.metadata.get("format", "pt")}
    shards, number = [], 0
    for position, group in enumerate(groups):
        name = single_file or _shard_name(stem, position, len(groups))
        header, placed = build_header(group, metadata)
        jobs = tuple(job(number + k, out) for k, out in enumerate(placed))
        number += len(jobs)
        size = len(header) + sum(out.nbytes for out in placed)
        shards.append(ShardPlan(number=position, file_name=name, size=size, jobs=jobs, metadata=metadata))
    return tuple(shards)


def _split(infos: Sequence[TensorInfo], max_bytes: int | None) -> list[list[TensorInfo]]:
    """Consecutive groups of at most `max_bytes` of data; a larger tensor stands alone."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and max_bytes is not None and filled + info.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    return [sorted(group, key=write_order) for group in groups]


def output_dtype(recipe: Recipe, dtype: str) -> str:
    """The dtype code of an output tensor whose source has `dtype`."""
    if dtype not in FLOAT_DTYPES:
        return dtype
    if recipe.options.dtype is None:
        return "BF16" if dtype in FLOAT8_DTYPES else dtype
    return recipe.dtype_code or dtype


def output_stem(first: Checkpoint, variant: str | None) -> str:
    """The stem of the output's file names: that of BASE's index, or only file, without a variant. So a loader of BASE
    also loads the output."""
    if first.folder is None:
        return "model"
    name = first.index_name or first.files[0].file_name
    if variant is not None:
        name = re.sub(rf"(\.index)?\.{re.escape(variant)}(?:-[0-9]+-of-[0-9]+)?(?=\.)", r"\1", name, count=1)
    if is_pickle(name.removesuffix(".index.json")):  # written as safetensors, under the name that loaders look for
        name = PurePosixPath(name.removesuffix(".index.json")).stem
        return name if name in _PICKLED_STEMS else "model"
    return name.removesuffix(".index.json").removesuffix(".safetensors")


def _shard_name(stem: str, position: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{position + 1:05d}-of-{count:05d}.safetensors"
