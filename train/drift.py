"""How far a run has moved from its starting model, which is read from its folder piece by piece and never held."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.checkpoint import model_tensors
from train.config import TrainConfig
from train.watch import Watch
from train.world import World

_PIECE = 1 << 22  # elements


@torch.no_grad()
def drift(model: Any, config: TrainConfig, world: World, watch: Watch, step: int) -> None:
    """Record the distance |w - w0| and the angle to the starting weights w0, as the run's dtype has them: over all
    floating-point tensors as one vector, and the median over the tensors. All processes call it."""
    start = _open(config, watch) if world.is_first else None
    sums: list[list[float]] = []
    for name, tensor in _tensors(model):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if start is not None and whole.is_floating_point():
            sums += [_sums(start, n, t) for n, t in _on_disk(model, name, whole) if n in start.tensors]
    if sums:
        each = [_describe(*values) for values in sums if values[0] and values[1]]  # else there is no angle
        norm, relative, angle = _describe(*map(math.fsum, zip(*sums, strict=True)))
        values = {"norm": norm, "relative": relative, "angle_degrees": angle, "tensors": len(sums)}
        values |= {"median_relative": statistics.median(relative for _, relative, _ in each)}
        watch.record("distance", step, **values, median_angle_degrees=statistics.median(a for _, _, a in each))


def _open(config: TrainConfig, watch: Watch) -> Any:
    from transformers.utils.hub import cached_file

    from merge_tool import MergeToolError, open_checkpoint

    try:
        found = cached_file(config.model, "config.json", revision=config.revision)
        return open_checkpoint(Path(str(found)).parent)
    except (MergeToolError, OSError) as e:
        watch.say(f"Note: the distance to {config.model} is not measured: {e}")
        return None


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the model; a weight with an adapter is their sum."""
    for name, tensor in model_tensors(model):
        module, adapted, _ = name.rpartition(".base_layer.weight")
        if adapted:
            yield f"{module}.weight", tensor + model.get_submodule(module).get_delta_weight("default").to(tensor.dtype)
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _on_disk(model: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor under the names of published checkpoints; transformers renames those of some families in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    yield from dict(revert_weight_conversion(model, {name: tensor})).items()


def _sums(start: Any, name: str, tensor: Tensor) -> list[float]:
    """|w0|^2, |w|^2 and |w - w0|^2 in float64."""
    from merge_tool.arrays import NUMPY_DTYPES

    flat = tensor.reshape(-1)
    total = torch.zeros(3, dtype=torch.float64, device=flat.device)
    for at in range(0, len(flat), _PIECE):
        now = flat[at : at + _PIECE].double()
        stored = start.read(name, at, at + len(now), np.empty(len(now), NUMPY_DTYPES[start.tensors[name].dtype]))
        then = torch.from_numpy(stored.astype(np.float32)).to(flat.device, tensor.dtype).double()
        total += torch.stack([then.dot(then), now.dot(now), (now - then).square().sum()])
    return [float(value) for value in total.tolist()]


def _describe(then: float, now: float, apart: float) -> tuple[float, float, float]:
    """Distance, its share of |w0|, and the angle in degrees, from the three sums."""
    half = (apart - (math.sqrt(now) - math.sqrt(then)) ** 2) / (4 * math.sqrt(then * now))
    angle = math.degrees(2 * math.asin(math.sqrt(min(1.0, max(0.0, half)))))
    return math.sqrt(apart), math.sqrt(apart / then), angle
