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
from train.checkpoint import Progress, load_adapter, load_training_state, read_progress, save_checkpoint
from train.compare import Comparison
from train.config import TrainConfig
from train.drift import drift
from train.evaluate import evaluate, sample
from train.model import LossModel, check_model, prepare_model, shard_model
from train.optim import Optimizer
from train.output import first_writes
from train.retention import best_checkpoint, checkpoint_path, list_checkpoints, prune
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
    judges: dict[str, Comparison]
    progress: Progress = field(default_factory=lambda: Progress(step=0))
    lr: float = 0.0  # of the step under way
    best_score: float = math.inf  # the lowest of this run's evaluations and of earlier checkpoints
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def is_last(self) -> bool:
        return self.progress.step >= self.mixture.steps or self.stops_early

    @property
    def stops_early(self) -> bool:
        return self.config.stop_after is not None and self.progress.since_best >= self.config.stop_after

    def resume(self, folder: Path) -> bool:
        """Restore the state that was saved in `folder`, except a whole model's weights: it was loaded from there.

        False when the random numbers start anew.
        """
        self.progress = read_progress(folder)
        if self.config.lora is not None:
            load_adapter(folder, self.model.model)
        self.best_score = self.world.share(best_checkpoint(self.output)[0])
        return load_training_state(folder, self.optimizer, self.generators, self.world)

    def count(self, result: StepResult) -> None:
        """Count one more step, done or skipped."""
        was = self.progress
        if result.is_finite:
            tokens, skipped, in_a_row = was.tokens + result.labelled, was.skipped, 0
        else:
            tokens, skipped, in_a_row = was.tokens, was.skipped + 1, was.skipped_in_a_row + 1
        self.progress = Progress(was.step + 1, tokens, skipped, in_a_row, since_best=was.since_best)

    def evaluate(self, watch: Watch) -> bool:
        """Measure the held-out rows and generate the samples; True when it is the best evaluation so far."""
        step, config = self.progress.step, self.config
        metrics = evaluate(self.model, self.mixture, self.tokenizer, config, self.judges, self.world, watch, step)
        sample(self.model, self.tokenizer, config, self.world, watch, self.output, step)
        drift(self.model.model, config, self.world, watch, step)
        if not metrics:
            return False
        score = metrics[config.best_by] * (-1 if config.best_by.startswith("accuracy/") else 1)
        is_best = score < self.best_score
        self.progress = replace(self.progress, score=score, since_best=0 if is_best else self.progress.since_best + 1)
        self.best_score = min(score, self.best_score)
        return is_best

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
        needed = self.config.average_of if self.config.final == "average" else 1
        first_writes(self.world, self.output, lambda: prune(self.output, max(needed, self.config.keep_last)))
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
