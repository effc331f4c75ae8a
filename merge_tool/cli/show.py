"""What the commands print: plans, reports and inspections as lines for people and as JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from merge_tool.cli.show_plan import effective_lines, first_line, recipe_json, table_lines
from merge_tool.errors import counted, listed, shown, sized
from merge_tool.plan.stacks import Stacks
from merge_tool.plan.target import out_text
from merge_tool.recipe.recipe import label_t

if TYPE_CHECKING:  # only for types: these modules need not be loaded to print
    from merge_tool.compare.diff import Diff, DiffPlan, GroupDiff, TensorDiff
    from merge_tool.compare.prompting import Answer
    from merge_tool.models.inputs import Download
    from merge_tool.output.merge_report import MergeReport
    from merge_tool.output.upload import Push
    from merge_tool.plan.prepare import Prepared
    from merge_tool.sweeps.results import SweepReport
    from merge_tool.sweeps.sweep import SweepPlan
    from merge_tool.verification.inspection import Inspection, TensorHealth
    from merge_tool.verification.verify import Verification, VerifyPlan


_MOST_SETTINGS = 40  # lines of a table
ABSENT = "not there"  # as merge_tool.compare.files has it


def inspection_lines(inspection: Inspection) -> Iterator[str]:
    counts = f"{counted(inspection.num_tensors, 'tensor')}, {counted(inspection.num_parameters, 'parameter')}"
    yield f"{shown(inspection.name)}: {counts}, {sized(inspection.nbytes)}"
    for shard in inspection.shards:
        yield f"  {shown(shard.name)}: {counted(shard.num_tensors, 'tensor')}, {sized(shard.nbytes)}"
    for dtype, (tensors, parameters) in inspection.dtypes.items():
        yield f"  {dtype}: {counted(tensors, 'tensor')}, {counted(parameters, 'parameter')}"
    for key, value in inspection.metadata.items():
        yield f"  metadata {shown(key)}: {shown(value)}"
    for notice in inspection.notices:
        yield f"  note: {notice}"


def health_json(tensors: Sequence[TensorHealth]) -> dict[str, Any]:
    finite = [
        {k: None if v == math.inf else v for k, v in asdict(t).items()} for t in tensors
    ]  # JSON has no infinity; the norm of float64 values may be one
    return {"num_nonfinite": sum(t.num_nonfinite for t in tensors), "tensors": finite}


def health_lines(tensors: Sequence[TensorHealth]) -> Iterator[str]:
    """The tensors with the smallest, median and largest values, and all tensors with values that are not finite."""
    bad = [t for t in tensors if t.num_nonfinite]
    for tensor in bad[:50]:
        yield (
            f"  NOT FINITE: {shown(tensor.name)}: {tensor.num_nonfinite:,} of {tensor.numel:,} values, the first at "
            f"{tensor.first_nonfinite:,}"
        )
    if len(bad) > 50:
        yield f"  NOT FINITE: {len(bad) - 50:,} more tensors"
    ranked = sorted((t for t in tensors if t.rms is not None and t.numel), key=lambda t: t.rms or 0.0)
    named = {"smallest": ranked[:1], "median": ranked[len(ranked) // 2 :][:1], "largest": ranked[-1:]}
    for what, some in named.items():
        for tensor in some:
            yield (
                f"  {what} root mean square {tensor.rms:.4g}: {shown(tensor.name)} (norm {tensor.norm:.6g}, "
                f"largest value {tensor.largest:.4g})"
            )
    zero = [t.name for t in tensors if t.largest == 0 and t.numel]
    if zero:
        yield f"  all zero: {listed(zero)}"
    checked = sum(t.numel for t in tensors)
    if not bad:
        yield f"  all {checked:,} floating-point values are finite"


def verification_json(result: Verification) -> dict[str, Any]:
    return {**asdict(result), "path": str(result.path)}


def verification_lines(result: Verification) -> Iterator[str]:
    path = shown(result.path)
    for problem in result.problems:
        yield f"{path}: {problem}"
    for name in result.others:
        yield f"{path}: not of the merge: {shown(name)}"
    if result.problems:
        yield f"{path}: NOT VERIFIED, {counted(len(result.problems), 'problem')}"
        return
    sums = " and all sums" if result.full else ""
    again = f"; {result.num_compared:,} of {result.num_elements:,} elements{sums} merged again, bit for bit the same"
    yield (
        f"{path}: verified: {counted(result.num_files, 'file')}, {sized(result.nbytes)}, "
        f"{counted(result.num_tensors, 'tensor')}{again if result.num_compared else ''}"
    )


def push_lines(pushed: Push) -> Iterator[str]:
    kept = f", {counted(pushed.kept_files, 'file was', 'files were')} there already" if pushed.kept_files else ""
    if pushed.number is None:
        yield f"{shown(pushed.url)}: has this output already."
    elif pushed.is_published:
        yield f"{shown(pushed.url)}: published; {sized(pushed.uploaded_bytes)} uploaded{kept}"
    else:
        yield (
            f"{shown(pushed.url)}/discussions/{pushed.number}: {sized(pushed.uploaded_bytes)} uploaded{kept}; not "
            "published. Merge that pull request, or run the same command without --no-publish."
        )
    if pushed.others:
        yield f"The repository also has {listed(pushed.others)}."


def plan_json(prepared: Prepared, complete: bool) -> dict[str, Any]:
    plan, layout = prepared.plan, prepared.layout
    return {
        **recipe_json(plan),
        "out": prepared.target.name if prepared.target.repo else str(prepared.target.path),
        "num_tensors": plan.num_tensors,
        "num_parameters": plan.num_parameters,
        "num_kept": plan.num_kept,
        "num_quantised": plan.num_quantised,
        "read_bytes": prepared.read_bytes,
        "input_bytes": plan.input_bytes,
        "write_bytes": prepared.disk_bytes,
        "here_bytes": prepared.here_bytes,
        "free_disk_bytes": prepared.free_disk_bytes,
        "download_bytes": prepared.download.nbytes,
        "cached_bytes": prepared.download.cached_bytes,
        "is_streamed": prepared.download.is_streamed,
        "spool_bytes": prepared.download.spool_bytes,
        "shards": [{"name": s.file_name, "bytes": s.size, "num_tensors": len(s.jobs)} for s in plan.shards],
        "jobs": layout.jobs,
        "memory_budget_bytes": prepared.budget,
        "expected_peak_bytes": prepared.expected_peak_bytes,
        "side_files": [file.target for file in prepared.side_files.copied],
        "skipped_files": list(prepared.side_files.skipped),
        "already_complete": complete,
        "warnings": list(prepared.warnings),
    }


def plan_lines(prepared: Prepared, complete: bool) -> Iterator[str]:
    plan, layout = prepared.plan, prepared.layout
    many = len(plan.labels) > 1
    yield first_line(plan)
    layers = Stacks((job.out.name for job in plan.jobs()), plan.num_layers).in_words
    yield f"  tensors   {plan.num_tensors:,} ({plan.num_parameters:,} parameters{f', {layers}' if layers else ''})"
    if plan.num_kept:
        yield f"  merged    {plan.num_tensors - plan.num_kept:,}; {plan.num_kept:,} copied from one model, unchanged"
    if plan.num_quantised:
        base = shown(plan.names[plan.recipe.first])
        yield f"  8 bits    {counted(plan.num_quantised, 'weight')}, quantised again as in {base}"
    read_bytes = prepared.read_bytes
    again = " (what does not fit the memory more than once)" if read_bytes > plan.input_bytes else ""
    yield f"  read      {sized(read_bytes)}{again}"
    yield f"  write     {sized(prepared.disk_bytes)} to {prepared.target.name}" + (
        f" ({len(plan.labels)} outputs)" if many else ""
    )
    if prepared.target.repo:
        yield f"  waiting   at most {sized(prepared.here_bytes)} of it here, in {shown(prepared.target.path)}"
    free = prepared.free_disk_bytes
    yield f"  disk      {'free space unknown' if free is None else f'{sized(free)} free'}"
    if size := _download(prepared.download):
        yield f"  download  {size}"
    peak, allowed = sized(prepared.expected_peak_bytes), sized(prepared.budget)
    yield f"  memory    about {peak} at the peak, {allowed} allowed, {counted(layout.jobs, 'job')}"
    yield f"  shards    {len(plan.shards):,}"
    for shard in plan.shards[:10]:
        yield f"            {shown(shard.file_name)}: {counted(len(shard.jobs), 'tensor')}, {sized(shard.size)}"
    if len(plan.shards) > 10:
        yield f"            and {len(plan.shards) - 10:,} more"
    yield f"  copied    {counted(len(prepared.side_files.copied), 'other file')}"
    yield from effective_lines(plan)
    yield "Already complete; nothing would be done." if complete else _what_was_read(prepared.download.fetched_bytes)


def _download(download: Download) -> str:
    """What is to be fetched from the Hub, and what is in its cache; an empty text without models of the Hub."""
    cached = f"{sized(download.cached_bytes)} {'more ' * (download.nbytes > 0)}are in its cache"
    if not download.nbytes:
        return f"nothing from the Hub ({cached})" if download.cached_bytes else ""
    how = f", by range; a spool of at most {sized(download.spool_bytes)}" if download.is_streamed else ""
    return f"{sized(download.nbytes)} from {download.sources}{how}" + (f" ({cached})" if download.cached_bytes else "")


def _what_was_read(fetched_bytes: int) -> str:
    if not fetched_bytes:
        return "Nothing was read but headers; nothing was written."
    return (
        f"Fetched into the Hub's cache: {sized(fetched_bytes)} of pickles, adapters or weights in sub-folders. Nothing "
        "else was read but headers; nothing was written to OUT."
    )


def report_json(report: MergeReport, said: Sequence[Answer] = ()) -> dict[str, Any]:
    summary = report.summary
    return {
        "outputs": [out_text(path) for path in report.outputs],
        "method": report.method,
        "models": list(report.models),
        **({"t": list(report.ts)} if report.ts else {}),
        "num_tensors": summary.num_tensors,
        "num_parameters": summary.num_parameters,
        "num_equal": summary.num_equal,
        "num_kept": summary.num_copied,
        "median_angle_degrees": summary.median_degrees,
        "largest_angle_degrees": summary.largest_degrees,
        "largest_angle_tensor": summary.largest_name,
        "input_bytes": report.input_bytes,
        "output_bytes": report.output_bytes,
        "seconds": round(report.seconds, 3),
        "peak_bytes": report.peak_bytes,
        "already_complete": report.already_complete,
        "num_shards": report.num_shards,
        "num_resumed": report.num_resumed,
        **(_hub_json(report) if report.url else {}),
        "warnings": list(report.warnings),
        **({"answers": [asdict(answer) for answer in said]} if said else {}),
    }


def _hub_json(report: MergeReport) -> dict[str, Any]:
    return {
        "url": report.url,
        "pull_request": report.pull_request,
        "is_published": report.is_published,
        "uploaded_bytes": report.uploaded_bytes,
    }


def answer_lines(said: Sequence[Answer]) -> Iterator[str]:
    """The answers of several models below each other."""
    width = max(len(shown(answer.model)) for answer in said)
    yield from (f"  {shown(answer.model):<{width}}  {answer}" for answer in said)


def diff_lines(diff: Diff, *, every_tensor: bool) -> Iterator[str]:
    """Tables by layer, by module and with `every_tensor` by tensor; then the tensors that could not be compared."""
    base, ft = (shown(name) for name in diff.names)
    equal = sum(tensor.equal for tensor in diff.tensors)
    yield f"{base} and {ft}: {counted(len(diff.tensors), 'tensor')} compared, {equal:,} of them equal"
    head = ["tensors", "angle (median)", "(largest)", "norm ratio", "relative change"]
    for title, groups in (("by layer", diff.layers), ("by module", diff.modules)):
        if groups:
            yield ""
            yield from table_lines([[title, *head], *([shown(g.name), *_group_cells(g)] for g in groups)])
    if every_tensor:
        yield ""
        rows = [[shown(t.name), *_tensor_cells(t)] for t in diff.tensors]
        yield from table_lines([["tensor", "angle", "norm ratio", "relative change", ""], *rows])
    else:
        largest = sorted((t for t in diff.tensors if t.angle_degrees), key=lambda t: -(t.angle_degrees or 0))[:5]
        if largest:
            yield ""
            yield "Furthest apart: " + ", ".join(f"{shown(t.name)} ({t.angle_degrees:.3g}°)" for t in largest)
    for what, names in (
        (f"only in {base}", diff.only_base),
        (f"only in {ft}", diff.only_ft),
        ("differ in shape or type", diff.unlike),
        ("hold NaN or infinity, or are integers that differ", _without_figures(diff)),
    ):
        if names:
            yield f"{counted(len(names), 'tensor')} {what}: {listed(names)}"
    yield from _file_lines(diff)
    yield from (f"note: {notice}" for notice in diff.notices)


def _file_lines(diff: Diff) -> Iterator[str]:
    """What differs in the configurations, as a table, and in the tokenizers."""
    base, ft = (shown(name) for name in diff.names)
    if diff.settings:
        yield ""
        rows = [[one.file, one.key, _setting(one.base), _setting(one.ft)] for one in diff.settings[:_MOST_SETTINGS]]
        yield from table_lines([["settings that differ", "", base, ft], *rows])
        if len(diff.settings) > _MOST_SETTINGS:
            yield f"and {len(diff.settings) - _MOST_SETTINGS:,} more settings; --json has them all"
    if diff.tokenizers:
        yield ""
        yield from (f"Tokenizers: {line}" for line in diff.tokenizers)


def _setting(value: Any) -> str:
    return value if value == ABSENT else shown(json.dumps(value, ensure_ascii=False), 40)


def _without_figures(diff: Diff) -> list[str]:
    return [t.name for t in diff.tensors if t.note in ("holds NaN or infinity", "integers that differ")]


def _group_cells(group: GroupDiff) -> list[str]:
    angles = (_degrees(group.median_degrees), _degrees(group.largest_degrees))
    return [f"{group.num_tensors:,}", *angles, _number(group.norm_ratio), _number(group.relative_change)]


def _tensor_cells(tensor: TensorDiff) -> list[str]:
    return [
        _degrees(tensor.angle_degrees), _number(tensor.norm_ratio), _number(tensor.relative_change), tensor.note,
    ]  # fmt: skip


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}°"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def sweep_lines(report: SweepReport) -> Iterator[str]:
    """A table: the parameters, a column per score, a star at Pareto-optimal points."""
    from merge_tool.sweeps.results import values_text

    rows = [[*report.keys, *report.names, ""]]
    for point in report.points:
        values = [label_t(value) for value in point.values.values()]
        rows.append([*values, *(f"{point.scores[n]:g}" for n in report.names), "*" * point.is_pareto])
    yield from table_lines(rows)
    alone = report.keys[0] if len(report.keys) == 1 else ""
    texts = [values_text(point.values) for point in report.points if point.is_pareto]
    best = f"{alone} = " + ", ".join(text.removeprefix(f"{alone} = ") for text in texts) if alone else "; ".join(texts)
    less = [shown(name) for name in report.names if name in report.less_is_better]
    rest = "" if len(less) == len(report.names) else "; more for the rest" if less else "More is better"
    wanted = f"Less is better for {', '.join(less)}" if less else ""
    yield f"Pareto-optimal (*): {best}. {wanted}{rest}."
    yield f"{shown(report.folder)}: sweep.csv has the table."


def sweep_plan_json(plan: SweepPlan) -> dict[str, Any]:
    points = [dict(values) for values in plan.points]
    return {"points": points, "num_done": plan.num_done, "batch": plan.batch, "first": plan_json(plan.first, False)}


def sweep_plan_lines(plan: SweepPlan) -> Iterator[str]:
    from merge_tool.sweeps.results import values_text

    done = f"; {plan.num_done:,} have their scores already" if plan.num_done else ""
    points = [values_text(values) for values in plan.points[:12]]
    more = f"; and {len(plan.points) - 12:,} more" if len(plan.points) > 12 else ""
    number = counted(len(plan.points), "merge")
    yield f"Sweep: {number}, {plan.batch:,} at a time{done}: {'; '.join(points)}{more}"
    yield "The first of them:"
    yield from plan_lines(plan.first, False)


def verify_plan_lines(plan: VerifyPlan) -> Iterator[str]:
    compared = f"; {plan.num_compare:,} of {plan.num_elements:,} elements to merge again" if plan.has_parents else ""
    yield f"{shown(plan.path)}: {counted(plan.num_files, 'file')} to read, {sized(plan.nbytes)}{compared}"


def diff_plan_lines(plan: DiffPlan) -> Iterator[str]:
    base, ft = (shown(name) for name in plan.names)
    download = f", {sized(plan.download_bytes)} of them from the Hub" if plan.download_bytes else ""
    yield f"{base} and {ft}: {counted(plan.num_tensors, 'tensor')} to compare, {sized(plan.nbytes)} to read{download}"
    for what, names in (
        (f"only in {base}", plan.only_base), (f"only in {ft}", plan.only_ft), ("differ in shape or type", plan.unlike)
    ):  # fmt: skip
        if names:
            yield f"{counted(len(names), 'tensor')} {what}: {listed(names)}"
    yield "Nothing was read but headers."
