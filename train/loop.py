"""finetune(config): the whole experiment, top to bottom; train_step beside it is one step of it.

Nothing else lives here. A step's loss is a sum over tokens; it is divided once, by the labelled tokens of
the whole global batch, over all micro-batches and processes.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.batches import Batch, Mixture
from train.checkpoint import Progress, load_training_state, read_progress, save_checkpoint, write_model
from train.config import TrainConfig, check_batch
from train.data import open_sources, prepare_sources, report_table
from train.errors import TrainError
from train.evaluate import evaluate, sample
from train.model import (
    LossModel,
    check_context,
    check_model,
    choose_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
    padding_id,
    prepare_model,
    shard_model,
)
from train.optim import Optimizer, grad_norm, learning_rate
from train.output import first_writes, hold_output, publish_folder, publish_text
from train.preflight import preflight
from train.record import check_same_run
from train.retention import checkpoint_path, list_checkpoints, lowest_eval_loss, prune
from train.watch import Watch, build_card, plot_loss, read_metrics
from train.world import World, close_world, open_world

# Keys that may change between the sessions of one run: they do not move a weight.
FREE_KEYS = (
    "output", "resume", "eval_every", "eval_batches", "save_every", "keep_last", "max_shard_bytes",
    "sample_prompts", "sample_tokens",
)  # fmt: skip
MOST_SKIPPED = 3  # steps in a row
SAVE_SECONDS = 1800  # between checkpoints, where `save_every` does not say otherwise


def finetune(config: TrainConfig) -> None:
    """Train as the config says and write the result to `output/final`; resume when there is a checkpoint.

    Raises TrainError for whatever the user can repair.
    """
    world = open_world(config.device)
    try:
        check_batch(config, world.size)
        with hold_output(Path(config.output), world):
            _finetune(config, world)
    except torch.OutOfMemoryError as e:
        raise TrainError(
            "out of GPU memory: lower micro_batch or sequence_length, turn on activation_checkpointing or "
            f"fused_backward, or use more processes ({str(e).splitlines()[0]})"
        ) from e
    finally:
        close_world(world)


def _finetune(config: TrainConfig, world: World) -> None:
    output = Path(config.output)
    say = _say if world.is_first else _say_nothing

    # ---- is there something to go on from? ----
    saved = list_checkpoints(output)
    done = (output / "final" / "config.json").exists()
    _check_resume(config, output, bool(saved or done))

    # ---- data ----
    model_config = load_model_config(config.model, config.revision, say)
    tokenizer = load_tokenizer(config.model, config.revision, model_config)
    names = world.first(lambda: prepare_sources(config, tokenizer, output / "data"))
    check_context(model_config, config, say)
    sources = open_sources(config, output / "data", names)
    reports = [source.report for source in sources]
    say(report_table(reports))
    mixture = Mixture(sources, config, padding_id(tokenizer, say), world.size)

    # ---- the same run as before? ----
    asked = {**asdict(config), "data": names, "sequences_per_step": config.sequences_per_step(world.size)}
    if saved or done:
        world.first(lambda: check_same_run(output, asked, FREE_KEYS))
    if done:
        say(f"already complete: {output / 'final'}")
        return
    first_writes(world, output, lambda: _write_records(output, asked, [asdict(r) for r in reports]))

    # ---- what it will take ----
    dtype = choose_dtype(config.dtype, world.device)
    say(preflight(config, model_config, dtype, world.size, mixture.steps).lines())

    # ---- model and optimizer ----
    generators = _seeded_generators(config.seed * 1000 + world.rank, world.device)
    hf_model = load_model(str(saved[-1]) if saved else config.model, config, model_config, dtype)
    model = _ready(hf_model, config, world)
    optimizer = Optimizer(dict(hf_model.named_parameters()), config, generators["rounding"])

    # ---- where it stood ----
    progress = Progress(step=0)
    if saved:
        progress = read_progress(saved[-1])
        if not load_training_state(saved[-1], optimizer, generators, world):
            say("notice: saved by another number of processes; random numbers (NEFTune, rounding) start anew")
        say(f"resuming from {saved[-1].name}")
    now = {"lr": 0.0}
    if config.fused_backward:
        optimizer.step_in_backward(lambda: now["lr"])

    saved_at, best = time.monotonic(), world.share(lowest_eval_loss(output))

    def save() -> None:
        nonlocal saved_at
        folder = checkpoint_path(output, progress.step)
        save_checkpoint(folder, hf_model, tokenizer, optimizer, progress, generators, world, config.max_shard_bytes)
        first_writes(world, output, lambda: prune(output, config.keep_last))
        saved_at = time.monotonic()

    def is_due() -> bool:
        if config.save_every is not None:
            return progress.step % config.save_every == 0
        return bool(world.share(time.monotonic() - saved_at > SAVE_SECONDS))

    # ---- steps ----
    with Watch(output, mixture.steps, progress.step, world.is_first) as watch, StopSignals() as stop:
        while progress.step < mixture.steps:
            started = time.perf_counter()
            now["lr"] = learning_rate(progress.step, mixture.steps, config)
            batches = mixture.step_batches(progress.step, world.rank)
            try:
                result = train_step(model, batches, optimizer, config, world, now["lr"], stop)
            except TrainError as e:
                raise TrainError(f"step {progress.step + 1}: {e}; {_way_back(output)}") from e
            progress = _after(progress, result)
            if result.is_finite:
                _report_step(progress, result, now["lr"], time.perf_counter() - started, watch)
            else:
                _report_skip(batches, progress, result, watch, world)
            if progress.skipped_in_a_row >= MOST_SKIPPED:
                save()  # no skipped step has touched a weight
                raise TrainError(_gave_up(batches, world, output))

            is_last = progress.step == mixture.steps
            is_best = False
            if is_last or (_is_due(config.eval_every, progress.step) and not result.stop):
                progress = replace(progress, eval_loss=evaluate(model, mixture, world, watch, progress.step))
                sample(hf_model, tokenizer, config, world, watch, output, progress.step)
                is_best = progress.eval_loss is not None and progress.eval_loss < best
                best = min(best, progress.eval_loss) if is_best and progress.eval_loss is not None else best
            if (is_best or is_due()) and not (is_last or result.stop):
                save()
            if result.stop and not is_last:
                save()
                watch.record("stop", progress.step)
                watch.say(f"stopped by a signal; saved step {progress.step}. The same command goes on from there")
                return

    # ---- the result ----
    facts = {
        "steps": progress.step,
        "labelled tokens": f"{progress.tokens:,}",
        "skipped steps": progress.skipped,
        "processes": world.size,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def write_final(folder: Path) -> None:
        write_model(folder, hf_model, tokenizer, world, config.max_shard_bytes)
        first_writes(world, folder, lambda: _write_card(folder, config, reports, facts, say))

    publish_folder(output / "final", write_final, world)
    say(f"done: {output / 'final'}")


# ---- one step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """Over all processes and micro-batches: mean loss per labelled token, and counts."""

    loss: float
    grad_norm: float | None
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
    """Forward and backward over the micro-batches, one division, one update; skipped when not finite.

    Raises TrainError when no token of the whole global batch has a label.
    """
    batches = [batch.to(world.device) for batch in batches]
    counts = torch.stack([_counts(batch) for batch in batches]).sum(0)
    labelled, tokens = (int(n) for n in world.sum(counts))
    if labelled == 0:
        raise TrainError(f"no token of the batch has a label (sources {', '.join(_titles(batches, world))})")
    scale = world.size / labelled  # FSDP averages gradients over the processes
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        loss, _ = model(batch, config.mixing_ratio)
        total[0] += loss.detach()
        if config.fused_backward and not math.isfinite(world.sum(total[0].clone())):
            break  # backward would already change weights
        (loss * scale).backward()
    total[1] = float(stop.asked)  # as late as can be: a step may take minutes
    loss_sum, stops = world.sum(total).tolist()
    is_finite, norm = math.isfinite(loss_sum), None
    if not config.fused_backward:
        norm = _clip(model, config.max_grad_norm)
        is_finite = is_finite and math.isfinite(norm)
        if is_finite:
            optimizer.step(lr)
        for parameter in model.parameters():
            parameter.grad = None
    return StepResult(loss_sum / labelled, norm, labelled, tokens, is_finite, stops > 0)


def _counts(batch: Batch) -> torch.Tensor:
    return torch.stack([(batch.labels != -100).sum(), (batch.lengths > 0).sum()])


def _clip(model: LossModel, most: float | None) -> float:
    """The gradients' global norm; above `most` they are scaled down to it."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(grad_norm(gradients))
    if most is not None and math.isfinite(norm) and norm > most:
        for gradient in gradients:
            gradient.mul_(most / norm)
    return norm


def _after(progress: Progress, result: StepResult) -> Progress:
    if result.is_finite:
        return Progress(progress.step + 1, progress.tokens + result.labelled, progress.skipped)
    return Progress(
        progress.step + 1, progress.tokens, progress.skipped + 1, progress.skipped_in_a_row + 1
    )  # fmt: skip


def _report_step(progress: Progress, result: StepResult, lr: float, seconds: float, watch: Watch) -> None:
    rate = result.tokens / seconds
    watch.record(
        "train", progress.step, loss=result.loss, lr=lr, grad_norm=result.grad_norm,
        tokens=progress.tokens, tokens_per_second=rate,
    )  # fmt: skip
    watch.advance(result.loss, rate, lr)


def _report_skip(batches: list[Batch], progress: Progress, result: StepResult, watch: Watch, world: World) -> None:
    titles = _titles(batches, world)
    watch.record("skip", progress.step, sources=titles)
    watch.say(f"step {progress.step} skipped: the loss or a gradient is not finite (sources {', '.join(titles)})")


def _gave_up(batches: list[Batch], world: World, output: Path) -> str:
    last = list_checkpoints(output)[-1].name
    return (
        f"{MOST_SKIPPED} steps in a row were not finite, the last with sources {', '.join(_titles(batches, world))}: "
        f"lower lr, set max_grad_norm, or look at those sources. {last} holds the model before them; another run may "
        "start from it (model: its folder)"
    )


def _titles(batches: Iterable[Batch], world: World) -> list[str]:
    mine = sorted({title for batch in batches for title in batch.sources})
    return sorted({title for titles in world.gather(mine) for title in titles})


# ---- small things --------------------------------------------------------------------------------------


class StopSignals:
    """SIGTERM and SIGINT set `asked`; the loop saves after the step. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _check_resume(config: TrainConfig, output: Path, holds_a_run: bool) -> None:
    if config.resume is False and holds_a_run:
        raise TrainError(f"{output} already holds a run: leave `resume` out to go on, or choose another output")
    if config.resume and not holds_a_run:
        raise TrainError(f"resume was asked for, but {output} holds no checkpoint")


def _seeded_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """Every source of random numbers of this process: torch's own (NEFTune, dropout) and the rounding's."""
    torch.manual_seed(seed)
    generators = {"torch": torch.default_generator, "rounding": torch.Generator(device).manual_seed(seed)}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[device.index]
    return generators


def _ready(hf_model: Any, config: TrainConfig, world: World) -> LossModel:
    """Checked, frozen, checkpointed, on its device, and sharded when there are several processes."""
    model = LossModel(hf_model, neftune_alpha=config.neftune_alpha, fused=config.fused_loss)
    if world.size == 1:
        model.to(world.device)
    check_model(model, config, hf_model.device)
    prepare_model(hf_model, config)
    if world.size > 1:
        shard_model(model, world.size, world.device.type)  # from host memory, a layer at a time
    return model.train()


def _way_back(output: Path) -> str:
    last = list_checkpoints(output)
    return f"start again to go on from {last[-1].name}" if last else "there is no checkpoint yet"


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass


def _write_records(output: Path, asked: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    publish_text(output / "run.json", json.dumps(asked, indent=1))
    publish_text(output / "data.json", json.dumps(reports, indent=1))


def _write_card(folder: Path, config: TrainConfig, reports: Any, facts: dict[str, Any], say: Any) -> None:
    metrics = read_metrics(Path(config.output) / "metrics.jsonl")
    has_plot = plot_loss(metrics, folder / "loss.png")
    if not has_plot:
        say("notice: no loss.png without matplotlib: pip install 'slerp-merge[plot]'")
    (folder / "README.md").write_text(build_card(config, reports, metrics, facts, has_plot), encoding="utf-8")
