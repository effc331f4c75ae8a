"""The exact sums and pass results of an earlier merge of the same inputs, read from its merge_report.json.

A merge with other parameters then skips the passes whose results do not depend on these parameters. Sums of two models
depend on no parameter at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, reason, shown
from merge_tool.output.report import report_head, stream_report
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.plan.prepare import Prepared
from merge_tool.recipe.candidates import without_parameters
from merge_tool.run.findings import Finding, from_record


class EarlierFindings:
    """The findings of an earlier merge of the same models with the same options; its parameters may differ. Raises
    ValueError if the report cannot be read, or belongs to other files or weights."""

    def __init__(self, report: Path, prepared: Prepared) -> None:
        self._records: dict[str, dict[str, Any]] = {}
        plan = prepared.plan
        try:
            with report.open(encoding="utf-8", newline="") as lines:
                stream = stream_report(lines)
                _check_head(next(stream)[1], prepared)
                for _, record in stream:
                    self._records[record["name"]] = _kept(record)
        except (OSError, KeyError, TypeError, AttributeError, StopIteration, RecipeError) as e:
            raise ValueError(f"{shown(report)}: is no report of a merge ({reason(e)})") from e
        if any(job.out.name not in self._records for job in plan.jobs()):
            raise ValueError(f"{shown(report)}: has other tensors")
        self._plan = plan

    def __call__(self, job: TensorJob) -> Finding | None:
        """The finding of a tensor in a merge with these parameters; None where its passes must be made."""
        name = job.first.info.name if job.is_scales else job.out.name
        record = self._records.get(name)
        if record is None or record["sources"] != hash(_sources(self._plan, job)):
            return None
        if job.exact:
            return from_record(record)
        finding = from_record(record)
        is_weighted = self._plan.is_weighted(job)
        if job.is_copied or not _knows_equality(self._plan, job, record, finding):
            return None
        keeps_equal = all(_copies(self._plan, job, values) for values in _settings_of(job))
        if finding.equal and keeps_equal:
            return finding
        if is_weighted:
            return Finding(sums=finding.sums) if finding.sums is not None else None
        if finding.equal or finding.passes is None or not _same_passes(self._plan, job, record):
            return None
        return finding


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tensor's line that is needed."""
    kept = {key: record[key] for key in ("equal", "sums", "passes", "settings") if key in record}
    sources = tuple((source["model"], source["name"], source["dtype"]) for source in record["sources"])
    return {**kept, "kept_base": record.get("note") == "differs: base kept", "sources": hash(sources)}


def _sources(plan: MergePlan, job: TensorJob) -> tuple[tuple[str, str, str], ...]:
    """A tensor's sources as its line of the report names them."""
    pairs = zip(job.sides, job.sources, strict=True)
    return tuple((plan.recipe.names[side], source.info.name, source.info.dtype) for side, source in pairs)


def _check_head(head: Mapping[str, Any], prepared: Prepared) -> None:
    facts = prepared.plan.facts
    inputs = {name: head["inputs"][name]["files"] for name in prepared.plan.recipe.names}
    if inputs != {name: facts[name]["files"] for name in prepared.plan.recipe.names}:
        raise ValueError("the report is of other files")
    if list(head["samples_sha256"]) != list(prepared.samples):
        raise ValueError("the report is of other weights")
    now = json.loads(json.dumps(report_head(prepared.plan, 0, prepared.samples)))
    if _request(head) != _request(now):
        raise ValueError("the report is of another merge")


def _request(head: Mapping[str, Any]) -> list[Any]:
    """The version, the method and the options, without parameters."""
    words = {key: value for key, value in head["words"].items() if key != "t_for"}
    return [head["tool"], head["method"], words, head["options"], without_parameters(head.get("recipe", ""))]


def _settings_of(job: TensorJob) -> list[dict[str, Any]]:
    return [{**values.shared, **{name: list(each) for name, each in values.each.items()}} for values in job.values]


def _copies(plan: MergePlan, job: TensorJob, settings: Mapping[str, Any]) -> bool:
    """Whether inputs of the same bytes would be copied with these parameters."""
    spec = job.spec(plan.seed)
    shared = {name: settings[name] for name in spec.shared}
    each = {name: tuple(settings[name]) for name in spec.each}
    return plan.method.copies_equal(type(spec)(spec.shape, spec.num_inputs, spec.has_base, shared, each, spec.key))


def _knows_equality(plan: MergePlan, job: TensorJob, record: Mapping[str, Any], finding: Finding) -> bool:
    """Whether the earlier merge compared the inputs' bytes, or this merge does not need the comparison."""
    if finding.equal or _copies(plan, job, record["settings"]):
        return True
    return not any(_copies(plan, job, settings) for settings in _settings_of(job))


def _same_passes(plan: MergePlan, job: TensorJob, record: Mapping[str, Any]) -> bool:
    """Whether the passes would have the same results: the parameters that they depend on have the same values."""
    if len(set(job.values)) != 1:
        return False
    (now,), before = _settings_of(job)[:1], record["settings"]
    names = set(now) if plan.method.passes_by is None else set(now) & plan.method.passes_by
    return now.keys() == before.keys() and all(now[name] == before[name] for name in names)
