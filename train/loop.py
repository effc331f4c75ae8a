"""finetune(config): the whole experiment, top to bottom.

Each chapter is a paragraph here; what it calls lives elsewhere: a step in `step.py`, what moves between steps in
`session.py`, files in `output.py`, `record.py` and `checkpoint.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.adapter import fold_adapter
from train.batches import Batch, Mixture
from train.checkpoint import average_models, copy_model, write_model
from train.config import TrainConfig, check_batch
from train.data import SourceReport, open_sources, prepare_sources, report_table
from train.errors import TrainError, install
from train.hub import open_repository, push_folder
from train.judge import load_judges
from train.model import check_context, choose_dtype, load_model, load_model_config, load_tokenizer, notes, padding_id
from train.optim import Optimizer, learning_rate
from train.output import first_writes, hold_output, publish_folder
from train.preflight import preflight
from train.record import check_resume, check_same_run, write_records
from train.retention import best_checkpoint, checkpoint_path, list_checkpoints
from train.session import Session, ready_model, seeded_generators
from train.step import StepResult, titles, train_step
from train.watch import Watch, build_card, check_report_to, plot_loss, read_metrics, run_title
from train.world import StopSignals, World, close_world, open_world

MOST_SKIPPED = 3  # steps in a row


def finetune(config: TrainConfig) -> None:
    """Train as the config says and write the result to `output/final`; resume when there is a checkpoint.

    Raises TrainError for whatever the user can repair.
    """
    world = open_world(config.device)
    try:
        check_batch(config, world.size)
        with hold_output(Path(config.output), world):
            if config.push_to is not None:
                world.first(partial(open_repository, config.push_to))
            if config.contrast is None:
                run_training(config, world)
            else:
                from train.contrast.stage import Stage  # which calls run_training

                Stage(config, config.contrast, world).run()
            if config.push_to is not None and is_done(Path(config.output)):
                address = world.first(partial(push_folder, Path(config.output) / "final", config.push_to))
                speaker(world)(f"Pushed: {address}")
    except torch.OutOfMemoryError as e:
        raise TrainError(
            f"The GPU is out of memory ({str(e).splitlines()[0]}). Lower micro_batch or sequence_length, turn on "
            "activation_checkpointing or fused_backward, or use more processes."
        ) from e
    finally:
        close_world(world)


def run_training(
    config: TrainConfig, world: World, data: Path | None = None, make_mixture: Callable[..., Mixture] = Mixture
) -> None:
    """One training, in an output that is held. `data` has the tokenised examples (default: `output/data`)."""
    output = Path(config.output)
    data = data or output / "data"
    say = speaker(world)

    # ---- is there something to go on from? ----
    saved = list_checkpoints(output)
    final = output / "final"
    done = is_done(output)
    check_resume(config, bool(saved or done))
    record: dict[str, Any] = {**asdict(config), "sequences_per_step": config.sequences_per_step(world.size)}
    if saved or done:
        world.first(lambda: check_same_run(output, record))

    # ---- model: what it will take; loaded and checked before its text is tokenised, which may take hours ----
    judges = load_judges(config)
    check_report_to(config)
    model_config = load_model_config(config.model, config.revision, say)
    tokenizer = load_tokenizer(config.model, config.revision, model_config)
    check_context(model_config, config, say)
    dtype = choose_dtype(config.dtype, world.device)
    generators = seeded_generators(config.seed * 1000 + world.rank, world.device)
    if not done:
        say(preflight(config, model_config, dtype, world.size).lines())
        weights = str(saved[-1]) if saved and config.lora is None else config.model
        hf_model = load_model(weights, config, model_config, dtype)
        for note in notes(hf_model, config):
            say(note)
        model = ready_model(hf_model, config, world)

    # ---- data ----
    names = world.first(lambda: prepare_sources(config, tokenizer, data))
    sources = open_sources(config, data, names)
    reports = [source.report for source in sources]
    if reports:
        say(report_table(reports))
    mixture = make_mixture(sources, config, padding_id(tokenizer, say), world.size)

    # ---- the same run as before? ----
    record["data"] = names
    if saved or done:
        world.first(lambda: check_same_run(output, record))
    if done:
        say(f"{final}: this run is complete already.")
        return
    first_writes(world, output, lambda: write_records(output, record, reports))

    say(f"{mixture.steps:,} steps")

    # ---- optimizer ----
    optimizer = Optimizer(dict(hf_model.named_parameters()), config, generators["rounding"])
    session = Session(
        config=config,
        world=world,
        model=model,
        tokenizer=tokenizer,
        mixture=mixture,
        optimizer=optimizer,
        generators=generators,
        judges=judges,
    )
    if config.fused_backward:
        optimizer.step_in_backward(lambda: session.lr)

    # ---- where it stood ----
    if saved:
        if not session.resume(saved[-1]):
            say("Note: the number or kind of processes changed. The random numbers (NEFTune, rounding) start anew.")
        say(f"Resuming from {saved[-1].name}.")

    # ---- steps ----
    with Watch(config, mixture.steps, session.progress.step, world.is_first) as watch, StopSignals() as stop:
        while not session.is_last:
            started = time.perf_counter()
            session.lr = learning_rate(session.progress.step, mixture.steps, config)
            batches = mixture.step_batches(session.progress.step, world.rank)
            try:
                result = train_step(model, batches, optimizer, config, world, session.lr, stop)
            except TrainError as e:
                raise TrainError(f"Step {session.progress.step + 1}: {e}. {session.way_back()}") from e
            session.count(result)
            _report(session, batches, result, time.perf_counter() - started, watch)
            if session.progress.skipped_in_a_row >= MOST_SKIPPED:
                session.save()  # no skipped step has touched a weight
                raise TrainError(_gave_up(session, batches))

            if session.is_last:
                break
            is_best = False
            if _is_due(config.eval_every, session.progress.step) and not result.stop:
                is_best = session.evaluate(watch)
            if is_best or result.stop or session.is_save_due() or session.stops_early:
                session.save()
            if result.stop:
                watch.record("stop", session.progress.step)
                watch.say(
                    f"Stopped by a signal; saved step {session.progress.step}. The same command goes on from there."
                )
                return

        # ---- the last look, at weights that are safe ----
        last = checkpoint_path(output, session.progress.step)
        has_look = config.eval_every or config.sample_prompts or any(len(source.held_out) for source in mixture.sources)
        if (has_look or config.final == "average") and not last.exists():
            session.save()
        is_best = False
        if session.stops_early:
            say(f"Stopped early: {config.stop_after} evaluations were not better in {config.best_by}.")
        elif has_look:
            is_best = session.evaluate(watch)

    # ---- the result ----
    def write_final(folder: Path) -> None:
        if config.final == "best":
            best = last if is_best else best_checkpoint(output)[1]
            say(f"The result is {best.name}, the best by {config.best_by}.")
            first_writes(world, folder, lambda: copy_model(best, folder))
        elif config.final == "average":
            chosen = list_checkpoints(output)[-config.average_of :]
            say(f"The result is the average of {', '.join(path.name for path in chosen)}.")
            world.first(lambda: average_models(chosen, folder))
        else:
            write_model(folder, hf_model, tokenizer, world, config.max_shard_bytes)
        first_writes(world, folder, lambda: _write_card(folder, session, reports, dtype, say))

    if config.lora is not None and config.lora.output == "merged":
        adapter = output / "adapter"
        if not adapter.exists():
            publish_folder(adapter, write_final, world)

        def fold(folder: Path) -> None:
            world.first(lambda: fold_adapter(config, adapter, folder))
            first_writes(world, folder, lambda: _write_card(folder, session, reports, dtype, say))

        publish_folder(final, fold, world)
    else:
        publish_folder(final, write_final, world)
    say(f"Done: {final}")


# ---- what is said --------------------------------------------------------------------------------------


def _report(session: Session, batches: Sequence[Batch], result: StepResult, seconds: float, watch: Watch) -> None:
    """A line of metrics and the progress line, or which step was skipped."""
    step = session.progress.step
    if not result.is_finite:
        names = titles(batches, session.world)
        watch.record("skip", step, sources=names)
        watch.say(f"Step {step} skipped: the loss or a gradient is not finite (sources {', '.join(names)}).")
        return
    rate = result.tokens / seconds
    watch.record(
        "train", step, loss=result.loss, lr=session.lr, grad_norm=result.grad_norm,
        tokens=session.progress.tokens, tokens_per_second=rate,
    )  # fmt: skip
    watch.advance(result.loss, rate, session.lr)


def _gave_up(session: Session, batches: Sequence[Batch]) -> str:
    last = list_checkpoints(session.output)[-1].name
    return (
        f"{MOST_SKIPPED} steps in a row were not finite, the last with sources "
        f"{', '.join(titles(batches, session.world))}. Lower lr, set max_grad_norm, or look at those sources. "
        f"{last} holds the model before these steps; another run may start from it (model: its folder)."
    )


def _write_card(
    folder: Path, session: Session, reports: Sequence[SourceReport], dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    facts = {
        "steps": session.progress.step,
        "labelled tokens": f"{session.progress.tokens:,}",
        "skipped steps": session.progress.skipped,
        "processes": session.world.size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    metrics = read_metrics(session.output / "metrics.jsonl")
    has_plot = plot_loss(metrics, folder / "loss.png", run_title(session.config))
    if not has_plot:
        say(f"Note: no loss.png without matplotlib. Install it: {install('plot')}.")
    card = build_card(session.config, reports, metrics, facts, has_plot)
    (folder / "README.md").write_text(card, encoding="utf-8")


def is_done(output: Path) -> bool:
    """Whether a run has written its result: a model, or an adapter."""
    return any((output / "final" / name).exists() for name in ("config.json", "adapter_config.json"))


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def speaker(world: World) -> Callable[[str], None]:
    """Prints on stderr, in the first process."""
    return lambda text: print(text, file=sys.stderr, flush=True) if world.is_first else None
