"""Adapters that mlx-lm trains: LoRA and DoRA under other names, with both factors transposed and a scale of its own.

W + scale * (lora_b^T lora_a^T), as mlx_lm.fuse computes it; of an embedding W + scale * (lora_a lora_b), which a tied
head follows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint, CheckpointFile, open_one_file
from merge_tool.checkpoint.source import LocalFile, TensorSource
from merge_tool.checkpoint.weight_files import MLX_WEIGHTS
from merge_tool.errors import CheckpointError, MismatchError, counted, listed, shown
from merge_tool.models.heads import find_tie, renamed
from merge_tool.models.lora_config import CONFIG, adapter_prefix
from merge_tool.models.low_rank import Factor, LowRankTensor
from merge_tool.models.renaming import Names
from merge_tool.models.rescaled import Factors, RescaledTensor

_PARTS = ("lora_a", "lora_b", "m")


def apply_mlx(base: Checkpoint, folder: Folder, max_header_bytes: int) -> Checkpoint:
    """`base` with the adapter. Raises CheckpointError for an adapter of another kind, MismatchError with every tensor
    that does not fit `base`."""
    config = folder.load_json(CONFIG)
    scale, is_dora = _settings(folder.name, config)
    opened = open_one_file(folder, MLX_WEIGHTS, max_header_bytes=max_header_bytes)
    modules: dict[str, dict[str, TensorSource]] = {}
    odd = []
    for name in sorted(opened.tensors):
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            modules.setdefault(module, {})[part] = opened.source(name)
        else:
            odd.append(name)
    settings = LocalFile(folder.regular(CONFIG), f"{folder.name}/{CONFIG}")
    names, made, problems = Names(base.tensors), dict[str, TensorSource](), list[str]()
    if odd:
        problems.append(f"{counted(len(odd), 'tensor')} of another kind: {listed(odd)}")
    for module, parts in modules.items():
        target = names.find(f"{module}.weight")
        expected = {*_PARTS} if is_dora else {"lora_a", "lora_b"}
        if target is None or parts.keys() != expected:
            what = (
                "no place there"
                if target is None
                else f"has {listed(sorted(parts))}, expected {listed(sorted(expected))}"
            )
            problems.append(f"{shown(module)}: {what}")
        elif (changed := _changed(base.source(target), parts, scale, settings)) is None:
            shapes = [list(source.info.shape) for source in parts.values()]
            problems.append(f"{shown(module)}: {shapes} do not fit {shown(target)} {list(base.tensors[target].shape)}")
        else:
            made[target] = changed
    if problems:
        raise MismatchError(
            f"{folder.name} is not an adapter of {base.name}, or not in a form that is read.\n  "
            + "\n  ".join(problems[:20])
            + "\nGive the model that it was trained on, not quantised, or make a model of it: mlx_lm.fuse --dequantize."
        )
    tie = find_tie(base)
    if tie is not None and tie.copy is not None and tie.embedding in made and tie.copy not in made:
        made[tie.copy] = renamed(made[tie.embedding], tie.copy)
    prefix = adapter_prefix(base)
    files = (
        *(replace(file, file_name=f"{prefix}/{file.file_name}") for file in opened.files),
        CheckpointFile(f"{prefix}/{CONFIG}", settings, hashlib.sha256(folder.read(CONFIG)).hexdigest()),
    )
    notices = (*base.notices, *_notices(base, folder.name, config))
    return base.with_made(f"{base.name}+{folder.name}", files, made, notices)


def _notices(base: Checkpoint, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    trained_on = str(config.get("model") or "")
    if trained_on and trained_on.rstrip("/").rpartition("/")[2].lower() != base.name.rpartition("/")[2].lower():
        yield f"{name} was trained on {shown(trained_on)}, says its {CONFIG}; it is applied to {base.name}."


def _settings(name: str, config: Mapping[str, Any]) -> tuple[float, bool]:
    """(scale, whether it is DoRA). Raises CheckpointError for other kinds of training."""
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    where = f"{name}/{CONFIG}"
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"{where}: fine_tune_type is '{shown(kind)}'; only lora and dora are read. {_fuse(name)}")
    if not isinstance(parameters, dict) or "alpha" in parameters:
        raise CheckpointError(f"{where}: has the settings of an older mlx-lm, whose scale is another. {_fuse(name)}")
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise CheckpointError(f"{where}: scale is '{shown(scale)}', expected a number.")
    return float(scale), kind == "dora"


def _fuse(name: str) -> str:
    return f"Make a model of it: mlx_lm.fuse --model MODEL --adapter-path {name} --save-path FUSED, and give FUSED."


def _changed(base: TensorSource, parts: Mapping[str, TensorSource], scale: float, settings: LocalFile) -> Any:
    """The tensor with its change; None if the shapes or types do not fit."""
    a, b, w = parts["lora_a"].info, parts["lora_b"].info, base.info
    dtypes = {base.info.dtype, *(source.info.dtype for source in parts.values())}
    if len(w.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or 0 in a.shape:
        return None
    is_linear, is_embedding = ((a.shape[0], b.shape[1]) == shape for shape in (w.shape[::-1], w.shape))
    is_embedding = is_embedding and base.info.name.rpartition(".")[0].endswith(("embed_tokens", "wte"))
    if not dtypes <= FLOAT_DTYPES or not (is_linear or is_embedding):
        return None
    inner = Factor(parts["lora_a"], a.shape[1], a.shape[0], by_rank=False)
    outer = Factor(parts["lora_b"], a.shape[1], b.shape[1], by_rank=True)
    left, right = (inner, outer) if is_embedding else (outer, inner)
    info = TensorInfo(w.name, "F64" if w.dtype == "F64" else "F32", w.shape, 0)
    tensor = LowRankTensor(info=info, base=base, left=left, right=right, scale=scale, also_read=(settings,))
    if (magnitude := parts.get("m")) is None:
        return tensor
    if magnitude.info.shape != w.shape[:1]:
        return None
    return RescaledTensor(info=info, factors=Factors(tensor, magnitude, of_rows=True))
