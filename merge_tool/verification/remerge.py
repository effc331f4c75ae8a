"""A stored output against its parents: the same plan, the same elements, the same report. Writes nothing.

The plan is made anew from the parents' headers. Then either a sample of tiles is merged again with the report's sums,
or everything, by a whole merge whose writers compare with the existing files instead of writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merge_tool._version import __version__
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.source import ByteSource, LocalFile
from merge_tool.errors import CheckpointError, OutputError, listed, reason, shown
from merge_tool.methods.registry import METHODS
from merge_tool.models.inputs import Inputs
from merge_tool.models.lora import open_models
from merge_tool.models.side_files import CARD, RECIPE, REPORT
from merge_tool.output.card import card_of
from merge_tool.output.report import report_lines, stream_report, summarise, tensor_text
from merge_tool.plan.memory import Machine, machine
from merge_tool.plan.patterns import check_patterns
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.prepare import Prepared, prepare
from merge_tool.plan.published import recipe_file
from merge_tool.plan.target import Target, check_target
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.recipe.options import DEFAULT_MAX_SHARD_BYTES, Options, as_json
from merge_tool.recipe.pair import is_pair, pair_again
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.settings import Pattern
from merge_tool.run.findings import Finding, Findings, from_record
from merge_tool.run.run import progress_bytes, run_plan
from merge_tool.verification.bits import Comparison, Sample
from merge_tool.verification.checks import Checks


@dataclass(frozen=True)
class StoredReport:
    """A merge_report.json: its head, and its tensors line by line, read from the file at each use."""

    path: Path
    head: Mapping[str, Any]

    def tensors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.path.open(encoding="utf-8", newline="") as lines:
            stream = stream_report(lines)
            next(stream)
            yield from stream


# -------------------------------------------------------------------------------------- plan and report


def plan_again(
    out: Path,
    report: StoredReport,
    against: tuple[str | Path, str | Path] | None,
    recipe_path: str | Path | None,
    models_dir: str | Path | None,
    memory_bytes: int | None,
    jobs: int | None,
    *,
    fetch: bool = True,
) -> Prepared:
    """The merge's plan: from its parents or the recipe, their headers, and the options in the report. Without `fetch`
    no weights of the Hub are downloaded, and none are read."""
    recipe, target = recipe_again(report.head, against, recipe_path, models_dir), Target(out)
    limits = machine(memory_bytes, jobs)
    with Inputs(map(str, recipe.models), variant=recipe.options.variant) as inputs:
        check_target(target, inputs.paths)
        if fetch:
            inputs.fetch()
        return plan_with(recipe, inputs, target, limits, read_samples=fetch)


def plan_with(recipe: Recipe, inputs: Inputs, target: Target, limits: Machine, *, read_samples: bool) -> Prepared:
    """The plan of a recipe from a report, which may be a stranger's, with open inputs."""
    if patterns := _regular_expressions(recipe):
        models = open_models(
            inputs.refs,
            coming=inputs.coming,
            max_header_bytes=limits.header_bytes,
            variant=recipe.options.variant,
        )
        check_patterns(patterns, (name for model in models for name in model.tensors), REPORT)
        del models
    return prepare(recipe, inputs, target, limits, read_samples=read_samples)


def recipe_again(
    head: Mapping[str, Any],
    against: tuple[str | Path, str | Path] | None,
    recipe_path: str | Path | None,
    models_dir: str | Path | None,
) -> Recipe:
    if ("recipe" in head) != (recipe_path is not None):
        of_recipe, of_pair = "a recipe's output. Give --recipe RECIPE.yaml", "a pair. Give --against BASE FT"
        raise OutputError(f"{REPORT}: is that of {of_recipe if 'recipe' in head else of_pair}.")
    try:
        if recipe_path is not None:
            return read_recipe(
                recipe_path,
                METHODS,
                extrapolate=True,
                values=head["parameters"],
                models_dir=models_dir,
                **{**as_json(Options(), all_of_them=True), **_options(head["options"])},
            )
        assert against is not None
        return pair_again(*against, {**head, "options": _options(head["options"])})
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise OutputError(f"{REPORT}: its options are not those of a merge ({reason(e)}).") from e


def _options(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {**stored, "max_shard_bytes": stored.get("max_shard_bytes") or DEFAULT_MAX_SHARD_BYTES}


def _regular_expressions(recipe: Recipe) -> list[str]:
    """The patterns that came from the report, which may be a stranger's."""
    patterns = [Pattern(text) for text in (*recipe.options.only, *recipe.options.exclude)]
    for setting in (setting for output in recipe.outputs for setting in output.all_settings()):
        patterns += [choice.pattern for choice in setting.choices if choice.pattern is not None]
    return [pattern.text.removeprefix("re:") for pattern in dict.fromkeys(patterns) if pattern.is_regex]


def check_parents(
    checks: Checks,
    folder: Folder,
    report: StoredReport,
    prepared: Prepared,
    *,
    sample: float,
    full: bool,
    there: Mapping[str, ByteSource] | None = None,
) -> None:
    """Compare an output with a merge of its parents. Its files are in `folder`, but for those `there`, on a server."""
    plan = prepared.plan
    if not _check_head(checks, report, prepared):
        return
    names, there = {shard.number: shard.file_name for shard in plan.shards}, there or {}
    files = {n: there[name] if name in there else LocalFile(folder.regular(name), name) for n, name in names.items()}
    if wrong := [shard.file_name for shard in plan.shards if files[shard.number].size != shard.size]:
        checks.add(f"{shown(wrong[0])}: is not as large as a merge of these parents makes it; no element was compared.")
        return
    try:
        findings = _load_findings(checks, report, plan)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        checks.add(f"{REPORT}: its tensors cannot be read ({reason(e)}); no element was compared.")
        return
    if full:
        sink = Comparison(checks, files)
        checks.progress.start(progress_bytes(plan))
        for _ in run_plan(plan, sink, prepared.layout, on_progress=checks.progress.advance):
            pass
        findings = sink.findings
        _check_lines(checks, report, plan, findings)
    else:
        Sample(checks=checks, files=files, prepared=prepared, findings=findings, share=sample).check()
        _check_lines(checks, report, plan, findings)
    if _has_same_names(report, plan):
        _check_words(checks, folder, report, prepared, findings)
    if prepared.target.path.is_dir():
        _check_side_files(checks, folder, prepared)


def _check_head(checks: Checks, report: StoredReport, prepared: Prepared) -> bool:
    """Whether the report is of a merge of these parents; their folders may have been renamed since."""
    head, plan = report.head, prepared.plan
    before = len(checks.problems)
    arguments = ("BASE", "FT") if is_pair(plan.recipe) else plan.names
    inputs = {side: head["inputs"].get(side) for side in plan.recipe.names}
    files = {side: facts.get("files") if isinstance(facts, dict) else None for side, facts in inputs.items()}
    if is_pair(plan.recipe) and _are_swapped(files, head["samples_sha256"], prepared):
        checks.add("BASE and FT are swapped: what the report says of BASE is true of FT. Give --against FT BASE.")
        return False
    for side, argument in zip(plan.recipe.names, arguments, strict=True):
        if files[side] != plan.facts[side]["files"]:
            which = _unlike(files[side], plan.facts[side]["files"])
            checks.add(f"{argument}: its files are not those that the report names ({which}); no element was compared.")
    for argument, stored, sampled in zip(arguments, head["samples_sha256"], prepared.samples, strict=False):
        if stored != sampled:
            checks.add(f"{argument}: its weights are not those that were merged; no element was compared.")
    shards = {shard.file_name: shard.size for shard in plan.shards}
    if head["shards"] != shards:
        checks.add(f"{REPORT}: its shards are not those that a merge of these parents has; no element was compared.")
    return len(checks.problems) == before


def _are_swapped(files: Mapping[str, Any], sampled: Sequence[Any], prepared: Prepared) -> bool:
    """Whether the report's facts about each of two parents are true of the other one."""
    files_now = [prepared.plan.facts[side]["files"] for side in prepared.plan.recipe.names]
    stored, now = [list(files.values()), list(sampled)], [files_now, list(prepared.samples)]
    return stored != now and stored == [part[::-1] for part in now]


def _unlike(stored: Any, now: Mapping[str, Any]) -> str:
    """Which of a model's files differ from the report's."""
    stored = stored if isinstance(stored, dict) else {}
    kinds = (
        ("differ", [name for name in now if name in stored and stored[name] != now[name]]),
        ("are not in the report", [name for name in now if name not in stored]),
        ("are missing", [name for name in stored if name not in now]),
    )
    return "; ".join(f"{listed(names)} {kind}" for kind, names in kinds if names)


def _load_findings(checks: Checks, report: StoredReport, plan: MergePlan) -> Findings:
    """The report's finding for every tensor. Raises ValueError if tensors are missing or in another order."""
    findings = Findings()
    for job, entry in zip_longest(plan.jobs(), report.tensors()):
        if job is None or entry is None or entry[1].get("name") != job.out.name:
            raise ValueError("they are not the plan's tensors in its order")
        if job.is_copied:  # copied from the base: it has no finding
            findings.add(job.number, Finding())
            continue
        kept = job.exact and entry[1].get("note") == "differs: base kept"
        findings.add(job.number, from_record({**entry[1], "kept_base": kept}))
    return findings


def _check_lines(checks: Checks, report: StoredReport, plan: MergePlan, findings: Findings) -> None:
    """Compare every line of the report with the line that the sums give."""
    for job, (text, _) in zip(plan.jobs(), report.tensors(), strict=True):
        expected = tensor_text(plan, job, findings[job.number], 0)
        if text != expected:
            checks.add(f"{REPORT}: {shown(job.out.name)}: says {shown(_difference(text, expected), 600)}.")


def _difference(text: str, expected: str) -> str:
    stored, ours = json.loads(text), json.loads(expected)
    keys = [key for key in {**ours, **stored} if stored.get(key) != ours.get(key)]
    return "; ".join(f"{key} {stored.get(key)}, found {ours.get(key)}" for key in keys) or "the same in other words"


def _has_same_names(report: StoredReport, plan: MergePlan) -> bool:
    """Whether this version wrote the report and the parents' folders still have their names; the report contains
    both."""
    names = [report.head["inputs"][side].get("name") for side in plan.recipe.names]
    return report.head.get("tool") == f"slerp-merge {__version__}" and names == list(plan.names)


def _check_words(checks: Checks, folder: Folder, report: StoredReport, prepared: Prepared, findings: Findings) -> None:
    """Compare the report's head, and the card without its YAML, which another library formats."""
    head = next(report_lines(prepared.plan, findings, 0, prepared.samples))
    with report.path.open(encoding="utf-8", newline="") as lines:
        if lines.read(len(head)) != head:
            checks.add(f"{REPORT}: its head is not that of a merge of these parents.")
    if not prepared.target.path.is_dir():
        return
    card = card_of(prepared, summarise(prepared.plan, findings), 0)
    try:
        stored = folder.regular(CARD).read_text(encoding="utf-8")
    except (CheckpointError, OSError, ValueError) as e:
        checks.add(f"{CARD}: {reason(e)}")
        return
    if _body(stored) != _body(card):
        checks.add(f"{CARD}: is not the card of a merge of these parents.")


def _body(card: str) -> str:
    return card.partition("\n---\n")[2]


def _check_side_files(checks: Checks, folder: Folder, prepared: Prepared) -> None:
    """Compare the copied files with the parent's, and the index with the plan's."""
    plan, side_files = prepared.plan, prepared.side_files
    contents: list[tuple[str, Iterable[bytes]]] = [
        (file.target, side_files.read(file, plan.config_dtype)) for file in side_files.copied
    ]
    if (index := plan.index()) is not None:
        contents.append((plan.index_name, [index]))
    if plan.text:
        contents.append((RECIPE, [recipe_file(plan, 0).encode()]))
    for name, pieces in contents:
        try:
            with folder.regular(name).open("rb") as file:
                same = all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)
        except (CheckpointError, OSError) as e:
            checks.add(f"{shown(name)}: {reason(e)}")
            continue
        if not same:
            checks.add(f"{shown(name)}: is not what a merge of these parents has there.")
