"""One optimizer step: forward and backward over its micro-batches, one division, one update.

The loss of a step is a sum over tokens. It is divided once, by the labelled tokens of the whole global batch, over
all micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from train.batches import Batch
from train.config import TrainConfig
from train.errors import TrainError
from train.model import LossModel
from train.optim import Optimizer, grad_norm
from train.world import StopSignals, World


@dataclass(frozen=True)
class StepResult:
    """Over all processes and micro-batches: mean loss per labelled token, and counts."""

    loss: float
    grad_norm: float | None  # before clipping; None with fused backward
    labelled: int
    tokens: int
    is_finite: bool
    stop: bool


def train_step(
    model: LossModel,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    config: TrainConfig,
    world: World,
    lr: float,
    stop: StopSignals,
) -> StepResult:
    """One step; skipped, without changing a weight, when the loss or the gradient is not finite.

    Raises TrainError when no token of the whole global batch has a label, or fused backward meets a gradient that is
    not finite.
    """
    batches = list(batches)
    counts = torch.stack([_counts(batch) for batch in batches]).sum(0)
    labelled, tokens = (int(n) for n in world.sum(counts.to(world.device)))
    if labelled == 0:
        raise TrainError(f"no token of the batch has a label (sources {', '.join(titles(batches, world))})")
    scale = world.size / labelled  # FSDP averages gradients over the processes
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches = [batch.to(world.device) for batch in batches]
    sharded: Any = model
    for number, batch in enumerate(batches, 1):
        if world.size > 1 and config.accumulate_in == "float32":
            sharded.set_requires_gradient_sync(number == len(batches))
        loss, _ = model(batch, config.mixing_ratio)  # no host waits for the device from here to the last backward
        total[0] += loss.detach()
        if config.fused_backward and not math.isfinite(world.sum(total[0].clone())):
            break  # backward would already change weights
        (loss * scale).backward()
    total[1] = float(stop.requested)  # as late as can be: a step may take minutes
    loss_sum, stops = world.sum(total).tolist()
    is_finite, norm = math.isfinite(loss_sum), None
    if not config.fused_backward:
        norm = clip(model, config.max_grad_norm)
        is_finite = is_finite and math.isfinite(norm)
        if is_finite:
            optimizer.step(lr)
        for parameter in model.parameters():
            parameter.grad = None
    return StepResult(
        loss=loss_sum / labelled, grad_norm=norm, labelled=labelled, tokens=tokens, is_finite=is_finite, stop=stops > 0
    )


def _counts(batch: Batch) -> torch.Tensor:
    return torch.stack([(batch.learned_labels != -100).sum(), (batch.lengths > 0).sum()])


def clip(model: torch.nn.Module, most: float | None) -> float:
    """The gradients' global norm; above `most` they are scaled down to it."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(grad_norm(gradients))
    if most is not None and math.isfinite(norm) and norm > most:
        for gradient in gradients:
            gradient.mul_(most / norm)
    return norm


def titles(batches: Iterable[Batch], world: World) -> list[str]:
    """The sources inside these batches, over all processes, sorted."""
    mine = sorted({title for batch in batches for title in batch.sources})
    return sorted({title for rank in world.gather(mine) for title in rank})
