"""What the caller of a merge gets: calls while it runs (`Watch`), and the result (`MergeReport`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_tool.errors import counted, listed, shown, sized
from merge_tool.models.side_files import REPORT
from merge_tool.output.report import Summary, load_tensors, remarks
from merge_tool.plan.target import out_text
from merge_tool.recipe.recipe import label_t

_MOST_WARNINGS = 5  # of the text for a screen


@dataclass(frozen=True, slots=True)
class Watch:
    """Callbacks of a running merge: `on_warning(message)`, `on_note(message)` about what an earlier run has done,
    `on_start(total)` and `on_progress(nbytes, tensor)`."""

    on_warning: Callable[[str], None] | None = None
    on_start: Callable[[int], None] | None = None
    on_progress: Callable[[int, str], None] | None = None
    on_note: Callable[[str], None] | None = None

    def warn(self, messages: Iterable[str]) -> None:
        for message in messages if self.on_warning is not None else ():
            self.on_warning(message)  # type: ignore[misc]  # asked for above


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: where the outputs are, the findings, the time and memory used.

    `ts` has the t of each output, if outputs have one; `models` are the models' names. `already_complete` is true if
    OUT already held this merge and nothing was done; otherwise an earlier run had finished `num_resumed` of the
    `num_shards` output files. Sizes are bytes. `num_scheduled` counts the tensors that have
    parameters of their own. `num_merged` models are merged, beside a base model that they
    are compared with if it `has_base`. On the Hub the output is at `url`; if it is not published, it waits in the
    `pull_request` of that number; this run has uploaded `uploaded_bytes` of weights. Its text is what the command line
    prints.
    """

    outputs: tuple[Path, ...]
    ts: tuple[float, ...]
    method: str
    models: tuple[str, ...]
    summary: Summary
    warnings: tuple[str, ...]
    input_bytes: int
    output_bytes: int
    seconds: float
    peak_bytes: int
    already_complete: bool = False
    num_scheduled: int = 0
    moved_bytes: int = 0  # read and written by this run: a resumed one moves less
    num_merged: int = 2
    has_base: bool = False
    num_resumed: int = 0
    num_shards: int = 1
    url: str = ""
    pull_request: int | None = None
    is_published: bool = True
    uploaded_bytes: int = 0

    @cached_property
    def tensors(self) -> list[dict[str, Any]]:
        """Every tensor of the first output, as in merge_report.json; empty for a one-file output."""
        path = self.outputs[0] / REPORT
        return load_tensors(path) if path.exists() else []

    def __repr__(self) -> str:
        warnings = [f"Warning: {warning}" for warning in self.warnings[:_MOST_WARNINGS]]
        if len(self.warnings) > _MOST_WARNINGS:
            warnings.append(f"and {counted(len(self.warnings) - _MOST_WARNINGS, 'more warning')}")
        return "\n".join([*summary_lines(self), *warnings])


def summary_lines(report: MergeReport) -> Iterator[str]:
    """The result in a few lines: what was made, how long it took, how far apart the models are."""
    summary, where = report.summary, listed(map(out_text, report.outputs), 12)
    if report.already_complete:
        yield f"{where}: already complete, nothing to do."
        if not report.is_published:
            yield _draft_line(report)
        return
    what = f"{report.method} of {counted(report.num_merged, 'model')}{' and a base' if report.has_base else ''}"
    if report.ts:
        what = f"{report.method} at t = {', '.join(map(label_t, report.ts))}"
    if report.num_scheduled:
        what += f" ({counted(report.num_scheduled, 'tensor')} with {'a t' if report.ts else 'parameters'} of their own)"
    yield f"{where}: {what}, {counted(summary.num_tensors, 'tensor')}, {sized(report.output_bytes)}"
    resumed = f"; {report.num_resumed:,} of {counted(report.num_shards, 'shard')} were done by an earlier run"
    yield (
        f"{report.seconds:.1f} s, {report.moved_bytes / 1e6 / max(report.seconds, 1e-9):,.0f} MB/s read and written, "
        f"peak memory {sized(report.peak_bytes)}{resumed if report.num_resumed else ''}"
    )
    if summary.median_degrees is not None and summary.largest_degrees is not None:
        yield (
            f"Angle between the models: median {summary.median_degrees:.3g} degrees, largest "
            f"{summary.largest_degrees:.3g} ({shown(summary.largest_name)})"
        )
    yield from remarks(summary)
    if report.url and report.is_published:
        yield f"{report.url}: published; {sized(report.uploaded_bytes)} of weights uploaded"
    elif report.url:
        yield _draft_line(report)


def _draft_line(report: MergeReport) -> str:
    return (
        f"{report.url}/discussions/{report.pull_request}: not published. Merge pull request {report.pull_request}, or "
        "run the same command without --no-publish."
    )
