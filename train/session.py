"""A run from its first step to its last: the parts that stay the same, and the state that changes with each step.

The loop decides when to evaluate and to save; a `Session` owns the state and knows how.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from train.batches import Mixture
from train.checkpoint import Progress, load_training_state, read_progress, save_checkpoint
from train.config import TrainConfig
from train.evaluate import evaluate, sample
from train.model import LossModel, check_model, prepare_model, shard_model
from train.optim import Optimizer
from train.output import first_writes
from train.retention import checkpoint_path, list_checkpoints, lowest_eval_loss, prune
from train.step import StepResult
from train.watch import Watch
from train.world import World

SAVE_SECONDS = 1800  # between checkpoints, where `save_every` does not say otherwise


@dataclass
class Session:
    """A run under way. `model.model` is the Hugging Face model."""

    config: TrainConfig
    world: World
    model: LossModel
    tokenizer: Any
    mixture: Mixture
    optimizer: Optimizer
    generators: dict[str, torch.Generator]
    progress: Progress = field(default_factory=lambda: Progress(step=0))
    lr: float = 0.0  # of the step under way
    lowest_eval_loss: float = math.inf  # the lowest loss of this run's evaluations and of earlier checkpoints
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def is_last(self) -> bool:
        return self.progress.step >= self.mixture.steps

    def resume(self, folder: Path) -> bool:
        """Restore the state that was saved in `folder`, except the weights: the model was loaded from there.

        False when the random numbers start anew.
        """
        self.progress = read_progress(folder)
        self.lowest_eval_loss = self.world.share(lowest_eval_loss(self.output))
        return load_training_state(folder, self.optimizer, self.generators, self.world)

    def count(self, result: StepResult) -> None:
        """Count one more step, done or skipped."""
        was = self.progress
        if result.is_finite:
            self.progress = Progress(was.step + 1, was.tokens + result.labelled, was.skipped)
        else:
            self.progress = Progress(was.step + 1, was.tokens, was.skipped + 1, was.skipped_in_a_row + 1)

    def evaluate(self, watch: Watch) -> bool:
        """Measure the held-out rows and generate the samples; True when the loss beats all before it."""
        step = self.progress.step
        loss = evaluate(self.model, self.mixture, self.world, watch, step)
        sample(self.model.model, self.tokenizer, self.config, self.world, watch, self.output, step)
        self.progress = replace(self.progress, eval_loss=loss)
        if loss is None or not loss < self.lowest_eval_loss:
            return False
        self.lowest_eval_loss = loss
        return True

    def is_save_due(self) -> bool:
        """By `save_every`, or by the first process's clock. All processes call it."""
        if self.config.save_every is not None:
            return self.progress.step % self.config.save_every == 0
        return self.world.share(time.monotonic() - self.saved_at > SAVE_SECONDS)

    def save(self) -> None:
        """Write a checkpoint, and delete those that need not be kept. All processes call it."""
        save_checkpoint(
            checkpoint_path(self.output, self.progress.step),
            self.model.model,
            self.tokenizer,
            self.optimizer,
            self.progress,
            self.generators,
            self.world,
            self.config.max_shard_bytes,
        )
        first_writes(self.world, self.output, lambda: prune(self.output, self.config.keep_last))
        self.saved_at = time.monotonic()

    def way_back(self) -> str:
        """What the same command would do next, for error messages."""
        saved = list_checkpoints(self.output)
        return f"Start again to go on from {saved[-1].name}." if saved else "There is no checkpoint yet."


def seeded_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """Every source of random numbers of this process: torch's own (NEFTune, dropout) and the rounding's."""
    torch.manual_seed(seed)
    generators = {"torch": torch.default_generator, "rounding": torch.Generator(device).manual_seed(seed)}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[device.index]
    return generators


def ready_model(hf_model: Any, config: TrainConfig, world: World) -> LossModel:
    """Checked, frozen, checkpointed, on its device, and sharded when there are several processes."""
    model = LossModel(
        hf_model,
        neftune_alpha=config.neftune_alpha,
        fused=config.fused_loss,
        one_row=config.packing and config.attention == "flash_attention_2",
    )
    if world.size == 1:
        model.to(world.device)
    check_model(model, config, hf_model.device)
    prepare_model(hf_model, config)
    if world.size > 1:
        shard_model(model, world.size, world.device.type)  # from host memory, a layer at a time; sums in float32
    elif config.accumulates(1) and config.accumulate_in == "float32":
        for parameter in hf_model.parameters():
            parameter.grad_dtype = torch.float32
    return model.train()
