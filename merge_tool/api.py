"""merge(...): the whole flow as one function, with the defaults. What both commands and Python users call.

open -> plan -> check the output -> run -> side files, report, card -> publish
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from merge_tool.card import card_text
from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.complete import (
    check_exact_tensors,
    check_output,
    check_room,
    final_names,
    is_complete,
    labelled,
    single_facts,
)
from merge_tool.errors import DataError, OutputError, RecipeError, listed, output_failed, reason, shown
from merge_tool.memory import (
    peak_bytes,
    resident_bytes,
    under_pressure,
)
from merge_tool.older import check_conflicts
from merge_tool.output import Work
from merge_tool.plan import MergePlan, ShardPlan
from merge_tool.prepare import Prepared, prepare
from merge_tool.recipe import DEFAULT_MAX_SHARD_BYTES, DEFAULT_T, Recipe, label_t
from merge_tool.report import (
    Findings,
    Summary,
    alarms,
    damaged,
    from_record,
    load_tensors,
    report_lines,
    summarise,
    sums_text,
    to_record,
)
from merge_tool.run import ShardDone, progress_bytes, run_plan
from merge_tool.schedule import Rules
from merge_tool.side_files import CARD, RECIPE, REPORT, SUMS

_FLUSH_BYTES = 8_000_000


@dataclass(frozen=True)
class MergeReport:
    """What was done: where the outputs are, what was found out, what it took.

    `already_complete` is true when the same merge was there and nothing was done. Sizes are bytes.
    """

    outputs: tuple[Path, ...]
    ts: tuple[float, ...]
    method: str
    summary: Summary
    warnings: tuple[str, ...]
    input_bytes: int
    output_bytes: int
    seconds: float
    peak_bytes: int
    already_complete: bool = False
    num_scheduled: int = 0  # tensors with a t of their own
    models: tuple[str, ...] = ()  # of a recipe of any number of models, which has no one t

    @cached_property
    def tensors(self) -> list[dict[str, Any]]:
        """Every tensor of the first output as merge_report.json has it; empty for a one-file output."""
        path = self.outputs[0] / REPORT
        return load_tensors(path) if path.exists() else []


def merge(
    base: str | Path,
    ft: str | Path,
    out: str | Path,
    t: float | Sequence[float] = DEFAULT_T,
    *,
    method: str = "slerp",
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    files_from: str = "base",
    on_mismatch: str = "error",
    extrapolate: bool = False,
    t_for: Rules = (),
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_missing: str = "error",
    vocab: str | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    report_path: str | Path | None = None,
    on_warning: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> MergeReport:
    """Merge the checkpoints `base` (t = 0) and `ft` (t = 1) into `out`, tensor by tensor, in bounded memory.

    `out` is a folder, or one file if its name ends in .safetensors. Several `t` make one sub-folder each
    (`t-0.3`), in one pass over the inputs. `t_for={"self_attn": [0, 0.5, 1], "mlp": 0.2}` gives some tensors a t of
    their own, along the layers where it is a list; the first pattern that matches counts. `memory_bytes` bounds the
    peak resident memory of the whole process, what it holds already included (default: see
    `merge_tool.memory.default_budget`); the rest is as in `Recipe`. `check_resumed` hashes what an earlier run
    finished before it is kept. `on_start(total)` and
    `on_progress(nbytes, tensor)` drive a progress bar.

    Raises a MergeToolError for whatever the user can mend; `out` is then as it was, or can be continued with
    the same call.

    >>> report = merge("memphis-cot", "scribe-ft", "memphis-scribe", t=0.4)  # doctest: +SKIP
    """
    ts: tuple[Any, ...] = tuple(t) if isinstance(t, Iterable) and not isinstance(t, str) else (t,)
    recipe = Recipe(
        ts, method, dtype, max_shard_bytes, files_from, on_mismatch, extrapolate, t_for, only, exclude, on_missing,
        vocab, pad_vocab_to_multiple_of,
    )  # fmt: skip
    running = Running(overwrite, check_resumed, report_path, on_warning, on_start, on_progress)
    return carry_out(partial(prepare, base, ft, out, recipe, memory_bytes=memory_bytes, jobs=jobs), running)


@dataclass(frozen=True, slots=True)
class Running:
    """How a merge is carried out; as in `merge`."""

    overwrite: bool
    check_resumed: bool
    report: str | Path | None
    on_warning: Callable[[str], None] | None
    on_start: Callable[[int], None] | None
    on_progress: Callable[[int, str], None] | None

    @property
    def report_path(self) -> Path | None:
        return None if self.report is None else Path(self.report)

    def warn(self, message: str) -> None:
        if self.on_warning is not None:
            self.on_warning(message)


def carry_out(prepare_it: Callable[..., Prepared], running: Running) -> MergeReport:
    """Plan a merge by `prepare_it`, of a pair or of many models, and make it. Raises a MergeToolError."""
    started = time.monotonic()
    before_fetch = partial(check_output, overwrite=running.overwrite)
    prepared = prepare_it(report_path=running.report_path, read_samples=True, before_fetch=before_fetch)
    for message in prepared.warnings:
        running.warn(message)
    try:
        return _carry_out(prepared, running, started)
    except OSError as e:  # of the many looks at OUT that have no message of their own
        raise output_failed(Path(e.filename) if isinstance(e.filename, str) else prepared.target.path, e) from e


def _carry_out(prepared: Prepared, running: Running, started: float) -> MergeReport:
    overwrite, report_path = running.overwrite, running.report_path
    if not overwrite and not os.path.lexists(prepared.target.work) and is_complete(prepared):
        return _complete(prepared, report_path, started)
    check_room(prepared, overwrite=overwrite)
    check_exact_tensors(prepared.plan)
    flush = _FLUSH_BYTES if under_pressure(prepared.budget) else None
    with Work(
        prepared.target,
        prepared.plan,
        samples=prepared.samples,
        flush_bytes=flush,
        check_resumed=running.check_resumed,
        inputs=prepared.inputs,
    ) as work:
        if _finds_it_complete(prepared, work, overwrite=overwrite):
            return _complete(prepared, report_path, started)
        try:
            _run(prepared, work, running)
        except DataError:
            work.discard()
            raise
        findings = _findings(work)
        summary = summarise(prepared.plan, findings)
        _write_side_files(prepared, work, findings, summary)
        if report_path is not None:
            _write_report(report_path, report_of(prepared, findings, prepared.plan.ts[0]))
        strangers = work.publish(check_bytes=prepared.budget - resident_bytes())
    if strangers:
        running.warn(f"{shown(prepared.target.path)} also holds what was there before: {listed(strangers, 50)}.")
    for message in alarms(summary):
        running.warn(message)
    return _report(prepared, summary, started)


def _finds_it_complete(prepared: Prepared, work: Work, *, overwrite: bool) -> bool:
    """Begin the work, under its lock; true if another run has finished this very merge meanwhile.

    Raises OutputError when OUT turns out to hold something else, and leaves it as it was.
    """
    resumed = work.begin(overwrite=overwrite)
    try:
        if not resumed and not overwrite and is_complete(prepared):
            work.discard()
            return True
        if not prepared.target.is_file:
            for label in prepared.plan.labels:
                check_conflicts(prepared.target.path / label, final_names(prepared))
    except OutputError:
        if not resumed:
            work.discard()
        raise
    return False


def _complete(prepared: Prepared, report_path: Path | None, started: float) -> MergeReport:
    """The report of a merge that was there already."""
    first = prepared.target.path / prepared.plan.labels[0] / REPORT
    summary = summarise(prepared.plan, _findings_from_report(prepared))
    if report_path is not None:
        _write_report(report_path, [first.read_text(encoding="utf-8")])
    return _report(prepared, summary, started, already_complete=True)


# ----------------------------------------------------------------------------------------------- run


class _WorkSink:
    """What run_plan hands over, as the journal stores it."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def open_shard(self, shard: ShardPlan, header: bytearray) -> list[ShardWriter]:
        return self.work.open_shard(shard, header)

    def finish_shard(self, done: ShardDone, writers: list[ShardWriter]) -> None:
        records = (to_record(t.number, t.sums, t.equal, t.kept_base) for t in done.tensors)
        self.work.finish_shard(done.shard, done.sha256, records, writers)


def _run(prepared: Prepared, work: Work, running: Running) -> None:
    skip = work.done_shards
    if running.on_start is not None:
        running.on_start(progress_bytes(prepared.plan, skip))
    if len(skip) == len(prepared.plan.shards):
        return
    try:
        for _ in run_plan(prepared.plan, _WorkSink(work), prepared.layout, skip=skip, on_progress=running.on_progress):
            pass
    except MemoryError as e:
        raise RecipeError(
            f"The system has less memory left than the budget of {prepared.budget:,} bytes allows ({e}). "
            "Give a smaller --memory or fewer --jobs, then run the same command: it continues."
        ) from e


def _findings(work: Work) -> Findings:
    found = Findings()
    for record in work.journal.records():
        if record.get("record") == "tensor":
            found.add(record["number"], from_record(record))
    return found


def _findings_from_report(prepared: Prepared) -> Findings:
    report, found = prepared.target.path / prepared.plan.labels[0] / REPORT, Findings()
    try:
        by_name = {tensor["name"]: tensor for tensor in load_tensors(report)}
        for job in prepared.plan.jobs():
            tensor = by_name[job.out.name]
            found.add(job.number, from_record({**tensor, "kept_base": tensor.get("note") == "differs: base kept"}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise damaged(report, e) from e
    return found


def _write_side_files(prepared: Prepared, work: Work, findings: Findings, summary: Summary) -> None:
    """Complete each output in the work folder: copies, index, card, report, checksums."""
    plan, side_files = prepared.plan, prepared.side_files
    if prepared.target.is_file or work.is_publishing:
        return
    digests = {r["number"]: r["sha256"] for r in work.journal.records() if r.get("record") == "shard"}
    for number, (label, t) in enumerate(labelled(plan)):
        sums = {shard.file_name: digests[shard.number][number] for shard in plan.shards}
        for file in side_files.copied:
            sums[file.target] = work.add(label, file.target, side_files.read(file, plan.config_dtype))
        if (index := plan.index()) is not None:
            sums[plan.index_name] = work.add(label, plan.index_name, [index])
        if plan.text:
            sums[RECIPE] = work.add(label, RECIPE, [plan.text.encode()])
        report = report_of(prepared, findings, t)
        sums[REPORT] = work.add(label, REPORT, (line.encode() for line in report))
        sums[CARD] = work.add(label, CARD, [card_of(prepared, summary, t).encode()])
        work.add(label, SUMS, [sums_text(sums)])


def report_of(prepared: Prepared, findings: Findings, t: float) -> Iterator[str]:
    """merge_report.json of the output of `t`, its head first."""
    digest, facts = single_facts(prepared.plan, t)
    return report_lines(prepared.plan, findings, t, digest, facts, prepared.samples)


def card_of(prepared: Prepared, summary: Summary, t: float) -> str:
    """The model card of the output of `t`."""
    return card_text(
        prepared.plan,
        summary,
        t,
        _command(prepared.plan, t),
        base_card=prepared.base_card,
        is_transformers=prepared.is_transformers,
        has_code=any(file.source.endswith(".py") for file in prepared.side_files.copied),
    )


def _command(plan: MergePlan, t: float) -> str:
    """The command that makes this output, without the user's paths."""
    recipe = plan.recipe
    words = ["merge-tool", "run", "RECIPE.yaml", "OUT"]
    if plan.is_pair:
        words = ["slerp-merge", *(_quoted(name) for name in plan.names), "OUT", "--t", label_t(t)]
    for option, value, default in (
        ("--method", recipe.method, "slerp"),
        ("--dtype", recipe.dtype if plan.is_pair else None, None),
        ("--seed", plan.seed, 0),
        ("--max-shard-size", recipe.max_shard_bytes, DEFAULT_MAX_SHARD_BYTES),
        ("--files-from", recipe.files_from, "base"),
        ("--on-mismatch", recipe.on_mismatch, "error"),
        ("--on-missing", recipe.on_missing, "error"),
        ("--vocab", recipe.vocab, None),
        ("--pad-vocab-to-multiple-of", recipe.pad_vocab_to_multiple_of, None),
    ):
        if value != default:
            words += [option, str(value)]
    for rule in recipe.rules:
        words += ["--t-for", _quoted(str(rule), 10_000)]
    for option, patterns in (("--only", recipe.only), ("--exclude", recipe.exclude)):
        for pattern in patterns:
            words += [option, _quoted(pattern, 10_000)]
    beyond = any(not 0 <= value <= 1 for value in (t, *(value for rule in recipe.rules for value in rule.values)))
    return " ".join(words + ["--extrapolate"] * beyond)


def _quoted(name: str, limit: int = 200) -> str:
    name = shown(name, limit)
    return name if re.fullmatch(r"[\w@%+=:,./-]+", name) else "'" + name.replace("'", "'\\''") + "'"


def _write_report(path: Path, lines: Iterable[str]) -> None:
    """Write the report that was asked for beside the output; it appears whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as e:
        raise OutputError(f"{shown(path)}: the report cannot be written ({reason(e)}).") from e


def _report(prepared: Prepared, summary: Summary, started: float, *, already_complete: bool = False) -> MergeReport:
    plan, target = prepared.plan, prepared.target.path
    return MergeReport(
        tuple(target / label for label in plan.labels) if not prepared.target.is_file else (target,),
        plan.ts,
        plan.method,
        summary,
        (*prepared.warnings, *alarms(summary)),
        plan.input_bytes,
        plan.output_bytes,
        time.monotonic() - started,
        peak_bytes(),
        already_complete,
        plan.num_scheduled,
        () if plan.is_pair else plan.names,
    )


__all__ = ["MergeReport", "merge"]
