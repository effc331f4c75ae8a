"""The files of an output beside its weights, written into the work folder; and the report of the merge."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from merge_tool.errors import OutputError, reason, shown
from merge_tool.files import write_whole
from merge_tool.models.side_files import CARD, RECIPE, REPORT, SUMS
from merge_tool.output.card import card_of
from merge_tool.output.marks import check_apart_by_mark
from merge_tool.output.merge_report import MergeReport
from merge_tool.output.report import Summary, alarms, damaged, load_tensors, report_lines, summarise, sums_text
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.published import recipe_file
from merge_tool.plan.system_memory import peak_bytes
from merge_tool.run.findings import Findings, from_record


class Work(Protocol):
    """Where an output's files are completed: a WorkFolder, or a HubFolder."""

    is_publishing: bool

    def digests(self) -> dict[int, list[str]]: ...

    def add(self, label: str, name: str, chunks: Iterable[bytes]) -> str: ...


def write_side_files(prepared: Prepared, work: Work, findings: Findings, summary: Summary) -> None:
    """Complete each output in the work folder: copies, index, card, report, checksums."""
    plan, side_files = prepared.plan, prepared.side_files
    if prepared.target.is_file or work.is_publishing:
        return
    digests = work.digests()
    for number, label in enumerate(plan.labels):
        sums = {shard.file_name: digests[shard.number][number] for shard in plan.shards}
        for file in side_files.copied:
            sums[file.target] = work.add(label, file.target, side_files.read(file, plan.config_dtype))
        if (index := plan.index()) is not None:
            sums[plan.index_name] = work.add(label, plan.index_name, [index])
        if plan.text:
            sums[RECIPE] = work.add(label, RECIPE, [recipe_file(plan, number).encode()])
        report = report_lines(plan, findings, number, prepared.samples)
        sums[REPORT] = work.add(label, REPORT, (line.encode() for line in report))
        sums[CARD] = work.add(label, CARD, [card_of(prepared, summary, number).encode()])
        work.add(label, SUMS, [sums_text(sums)])


def write_report(prepared: Prepared, path: Path, lines: Iterable[str]) -> None:
    """Write the report to the path that the user gave; the file appears whole, and never in an input."""
    try:
        check_apart_by_mark(path.parent, prepared.inputs, name=path.name)
        write_whole(path, (line.encode() for line in lines))
    except OSError as e:
        raise OutputError(f"{shown(path)}: the report cannot be written ({reason(e)}).") from e


def earlier_report(prepared: Prepared, report: Path | None, started: float, stored: Path | None = None) -> MergeReport:
    """The report of a merge that an earlier run completed. `stored` is its merge_report.json, if it is not in OUT."""
    stored = stored or prepared.target.path / prepared.plan.labels[0] / REPORT
    summary = summarise(prepared.plan, _stored_findings(prepared, stored))
    if report is not None:
        write_report(prepared, report, [stored.read_text(encoding="utf-8")])
    return report_of(prepared, summary, started, already_complete=True)


def _stored_findings(prepared: Prepared, stored: Path) -> Findings:
    findings = Findings()
    try:
        by_name = {tensor["name"]: tensor for tensor in load_tensors(stored)}
        for job in prepared.plan.jobs():
            tensor = by_name[job.out.name]
            findings.add(job.number, from_record({**tensor, "kept_base": tensor.get("note") == "differs: base kept"}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise damaged(stored, e) from e
    return findings


def report_of(prepared: Prepared, summary: Summary, started: float, *, already_complete: bool = False) -> MergeReport:
    """The result for the caller of a merge that began at `started` (time.monotonic)."""
    plan, target = prepared.plan, Path(prepared.target.name) if prepared.target.repo else prepared.target.path
    has_base = plan.recipe.base is not None and plan.method.base in ("required", "optional")
    return MergeReport(
        outputs=tuple(target / label for label in plan.labels) if not prepared.target.is_file else (target,),
        ts=tuple(output.words["t"] for output in plan.recipe.outputs if "t" in output.words),
        method=plan.recipe.method,
        models=plan.names,
        summary=summary,
        warnings=(*prepared.warnings, *alarms(summary)),
        input_bytes=plan.input_bytes,
        output_bytes=plan.output_bytes,
        seconds=time.monotonic() - started,
        peak_bytes=peak_bytes(),
        already_complete=already_complete,
        num_scheduled=plan.num_scheduled,
        num_merged=len(plan.recipe.sources - ({plan.recipe.base} if has_base else set())),
        has_base=has_base,
        num_shards=len(plan.shards),
    )
