"""The results of a merge: findings -> merge_report.json, SHA256SUMS, a summary.

Everything written here depends only on the inputs and the recipe: no times, budgets or paths.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merge_tool._version import __version__
from merge_tool.errors import OutputError, counted, reason, shown
from merge_tool.methods.inner import Weights, pair_angle
from merge_tool.models.lora import parts
from merge_tool.plan.plan import MergePlan, TensorJob, differences, words_of
from merge_tool.plan.stacks import split_layer
from merge_tool.recipe.options import Options, as_json
from merge_tool.run.findings import Finding, Findings, hex_results, hex_sums, median

FORMAT = 2  # of merge_report.json
_LARGEST_HEAD = 32_000_000  # characters; 1,000 shards on each side have about 300,000
_TENSORS = ',\n "tensors": [\n'
CLOSE_DEGREES = 1.8  # below it slerp and lerp differ by at most 1.25e-4 relative, half a bfloat16 step is 2e-3


# --------------------------------------------------------------------------------------- one tensor


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One merged tensor: angle in degrees, norms of its two inputs, |y - x| / |x|; None if it has no such value."""

    angle_degrees: float | None
    norms: tuple[float, float] | None
    relative_change: float | None
    weights: Weights | None
    note: str


def describe(plan: MergePlan, job: TensorJob, finding: Finding, output: int) -> TensorReport:
    """The report of one tensor in the output of that number."""
    note = "equal: copied" if finding.equal else "differs: base kept" if finding.kept_base else ""
    sums = finding.sums
    if sums is None or not math.isfinite(sums.xx + sums.xd + sums.dd):
        return TensorReport(angle_degrees=None, norms=None, relative_change=None, weights=None, note=note)
    angle = pair_angle(sums)
    degrees = None if angle is None else math.degrees(angle.theta)
    n0, n1 = (norm / sums.scale for norm in sums.norms)
    change = math.sqrt(sums.dd / sums.xx) if sums.xx else None
    weights = None
    if not finding.equal and plan.method.weights is not None:
        weights = plan.method.weights(sums, job.spec(plan.seed, output))
    return TensorReport(
        angle_degrees=degrees,
        norms=(n0, n1),
        relative_change=change,
        weights=weights,
        note=note or (weights.note if weights else ""),
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity; a float64 norm may be one."""
    return value if math.isfinite(value) else None


def _tensor_json(plan: MergePlan, job: TensorJob, finding: Finding, output: int) -> dict[str, Any]:
    report = describe(plan, job, finding, output)
    content: dict[str, Any] = {"name": job.out.name, "shape": list(job.out.shape), "dtype": job.out.dtype}
    content["sources"] = [
        {"model": plan.recipe.names[side], "name": source.info.name, "dtype": source.info.dtype}
        for side, source in zip(job.sides, job.sources, strict=True)
    ]
    if job.values:
        values = job.values[output]
        content["settings"] = {**values.shared, **{name: list(each) for name, each in values.each.items()}}
    content["equal"] = finding.equal
    if job.is_scales:
        content["scales_of"] = job.first.info.name
    if note := report.note or job.note:
        content["note"] = note
    if report.norms is not None:
        n0, n1 = report.norms
        content["angle_degrees"] = report.angle_degrees
        content["norms"] = [_finite(n0), _finite(n1)]
        content["norm_ratio"] = _finite(n1 / n0) if n0 and math.isfinite(n0) else None
        content["relative_change"] = report.relative_change
    if report.weights is not None:
        content["weights"] = [report.weights.w0, report.weights.w1]
    if finding.sums is not None and report.norms is not None:
        content["sums"] = hex_sums(finding.sums)
    if isinstance(finding.passes, list):
        distinct = list(dict.fromkeys(job.values))
        content["passes"] = [hex_results(finding.passes[distinct.index(job.values[output])])]
    return content


def tensor_text(plan: MergePlan, job: TensorJob, finding: Finding, output: int) -> str:
    """One tensor's line of merge_report.json, in the output of that number."""
    return json.dumps(_tensor_json(plan, job, finding, output), ensure_ascii=False, allow_nan=False)


# ------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Summary:
    """A merge in a few numbers. `groups` maps a kind of tensor to its angles in degrees."""

    num_tensors: int
    num_parameters: int
    num_equal: int
    num_kept_base: int
    num_close: int
    num_angles: int
    median_degrees: float | None
    largest_degrees: float | None
    largest_name: str | None
    num_copied: int = 0  # not merged
    copied_from: Mapping[str, int] = field(default_factory=dict)  # of these, each model's; empty if all are the base's
    antiparallel: tuple[str, ...] = ()
    groups: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)


def summarise(plan: MergePlan, findings: Findings) -> Summary:
    """Median and largest angle, and how many tensors are equal or close."""
    groups: dict[str, array[float]] = {}
    copied: Counter[int] = Counter()
    largest: tuple[float, str] | None = None
    antiparallel = []
    for job in plan.jobs():
        if job.is_copied:
            copied[job.sides[0]] += 1
        report = describe(plan, job, findings[job.number], 0)
        if report.note.startswith("antiparallel"):
            antiparallel.append(job.out.name)
        if report.angle_degrees is None or _is_across_layers(job):
            continue
        groups.setdefault(_kind(job.out.name), array("d")).append(report.angle_degrees)
        if largest is None or report.angle_degrees > largest[0]:
            largest = report.angle_degrees, job.out.name
    angles = array("d")
    for group in groups.values():
        angles.extend(group)
    return Summary(
        num_tensors=plan.num_tensors,
        num_parameters=plan.num_parameters,
        num_equal=sum(findings[number].equal for number in findings),
        num_kept_base=sum(findings[number].kept_base for number in findings),
        num_close=sum(angle < CLOSE_DEGREES for angle in angles),
        num_angles=len(angles),
        median_degrees=median(angles) if angles else None,
        largest_degrees=largest[0] if largest else None,
        largest_name=largest[1] if largest else None,
        num_copied=plan.num_kept,
        copied_from={} if {*copied} <= {plan.recipe.base} else _by_name(plan, copied),
        antiparallel=tuple(antiparallel),
        groups=groups,
    )


def _by_name(plan: MergePlan, numbers: Counter[int]) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    for model in sorted(numbers):
        folded = " with its adapter folded in" if len(parts(str(plan.recipe.models[model]))) > 1 else ""
        counts[f"{plan.names[model]}{folded}"] += numbers[model]
    return counts


def _is_across_layers(job: TensorJob) -> bool:
    """Whether the layers that are merged have different numbers. Their angle does not show how far apart the models
    are."""
    names = {source.info.name for source in job.sources}
    return len(names) > 1 and len({layer[1] for layer in map(split_layer, names) if layer}) > 1


def _kind(name: str) -> str:
    """A tensor's name without its layer: `model.layers.*.mlp.up_proj.weight`."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)


def remarks(summary: Summary) -> list[str]:
    """Remarks on the angles for the user, in sentences."""
    lines = []
    if summary.num_close and summary.num_equal < summary.num_tensors:
        which = "all" if summary.num_close == summary.num_angles else f"{summary.num_close:,} of"
        lines.append(
            f"In {which} {summary.num_angles:,} tensors the models are within {CLOSE_DEGREES} degrees: SLERP and "
            "linear interpolation agree there to less than half a bfloat16 step."
        )
    if summary.num_copied:
        what = counted(summary.num_copied, "tensor is", "tensors are")
        each = ", ".join(f"{number:,} of {shown(name)}" for name, number in summary.copied_from.items())
        own = "the base's is kept" if summary.num_copied == 1 else "the base's are kept"
        how = "not merged with another model's" if "folded in" in each else "copied, not merged"
        lines.append(f"{what} {how}: {each}." if each else f"{what} not merged: {own}.")
    if summary.num_kept_base:
        lines.append(f"{counted(summary.num_kept_base, 'integer tensor')} not alike: the base's are kept.")
    return lines


def alarms(summary: Summary) -> list[str]:
    """Warnings about a result that looks wrong."""
    lines = []
    if summary.num_equal and summary.num_equal == summary.num_tensors - summary.num_copied:
        which = (
            "every tensor that is merged" + ("" if summary.copied_from else ": the output is the base")
            if summary.num_copied
            else "every tensor: the output equals them"
        )
        lines.append(f"The models are the same in {which}.")
    if summary.median_degrees is not None and summary.median_degrees > 60:
        lines.append(
            f"The median angle is {summary.median_degrees:.0f} degrees: are these related models? "
            "A merge of unrelated models rarely works."
        )
    lines.extend(
        f"{shown(name)}: the two tensors point in opposite directions; merged linearly."
        for name in summary.antiparallel[:5]
    )
    if len(summary.antiparallel) > 5:
        lines.append(
            f"{counted(len(summary.antiparallel) - 5, 'more tensor points', 'more tensors point')} in opposite "
            "directions."
        )
    return lines


# ------------------------------------------------------------------------------------------ the files


def report_lines(plan: MergePlan, findings: Findings, output: int, samples: Sequence[str]) -> Iterator[str]:
    """merge_report.json of the output of that number: the head, then a line for each tensor."""
    head = report_head(plan, output, samples)
    yield json.dumps(head, indent=1, ensure_ascii=False)[:-2] + _TENSORS
    count = plan.num_tensors
    for number, job in enumerate(plan.jobs(), 1):
        line = tensor_text(plan, job, findings[job.number], output)
        yield f"  {line}" + ("\n" if number == count else ",\n")
    yield " ]\n}\n"


def report_head(plan: MergePlan, output: int, samples: Sequence[str]) -> dict[str, Any]:
    """The head of one output's merge_report.json: the facts about the whole merge."""
    recipe, facts = plan.recipe, plan.facts_of(output)
    head: dict[str, Any] = {
        "format": FORMAT,
        "tool": f"slerp-merge {__version__}",
        "plan_sha256": plan.digest_of(output),
        "samples_sha256": list(samples),
        "method": recipe.method,
        "parameters": dict(recipe.outputs[output].words),
        "words": dict(recipe.words),
        "options": as_json(recipe.options),
        "inputs": {name: facts[name] for name in recipe.names},
        "shards": {shard.file_name: shard.size for shard in plan.shards},
    }
    if plan.text:
        head["recipe"] = plan.text
    return head


def read_head(report: Path) -> dict[str, Any]:
    """The head of a merge_report.json; empty if the file is missing or damaged."""
    try:
        with report.open(encoding="utf-8", newline="") as lines:
            return next(stream_report(lines))[1]
    except (OSError, ValueError, RecursionError):
        return {}


def head_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differences between two merges in words, from the heads of their reports; the likely reasons first."""
    try:
        (old, *_), (new, *_) = before, now
        parts = differences(*(_head_facts(heads) for heads in (before, now)))
        if not parts and old["samples_sha256"] != new["samples_sha256"]:
            pairs = zip(new["inputs"], old["samples_sha256"], new["samples_sha256"], strict=False)
            parts = [f"the weights of {shown(side)} changed" for side, was, now_is in pairs if was != now_is]
        return [*parts, *_recipe_difference(old.get("recipe"), new.get("recipe"))]
    except (KeyError, TypeError, AttributeError, ValueError):  # a head of a stranger's
        return []


def _head_facts(heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of one merge of several outputs, in the form that `differences` compares."""
    head = heads[0]
    return {
        "method": head["method"],
        **words_of([one["parameters"] for one in heads]),
        **head["inputs"],
        **head["words"],
        **as_json(Options(), all_of_them=True),
        **head["options"],  # the options that are not at their default
        "version": head["tool"],
    }


def _recipe_difference(before: str | None, now: str | None) -> Iterator[str]:
    """The first line in which two recipes differ."""
    if before is None or now is None or before == now:
        return
    lines = zip_longest(before.splitlines(), now.splitlines(), fillvalue="")
    number, (old, new) = next((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1])
    yield f"line {number} of the recipe was '{shown(old.strip(), 60)}', now '{shown(new.strip(), 60)}'"


def sums_text(digests: Mapping[str, str]) -> bytes:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    lines = []
    for name in sorted(digests):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if escaped == name else chr(92)}{digests[name]}  {escaped}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def stream_report(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a merge_report.json with its text: the head, then a line for each tensor.

    Raises ValueError for a line that report_lines does not write.
    """
    head, start, size = [], _TENSORS.split("\n")[1], 0
    numbered = enumerate(lines, 1)
    for _, line in numbered:
        if line.rstrip("\n") == start:
            break
        head.append(line)
        size += len(line)
        if size > _LARGEST_HEAD:
            raise ValueError("its head is too long")
    text = "".join(head).rstrip("\n").removesuffix(",") + "\n}"
    yield text, _object(text)
    for number, line in numbered:
        if line == " ]\n":
            break
        text = line.strip().removesuffix(",")
        if line not in (f"  {text},\n", f"  {text}\n"):
            raise ValueError(f"line {number:,} is not as it was written: '{shown(line, 60)}'")
        try:
            yield text, _object(text)
        except ValueError as e:
            raise ValueError(f"line {number:,} is not as it was written: {shown(e)}") from e
    if "".join(line for _, line in numbered) != "}\n":
        raise ValueError("it does not end as a report does")


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("a line is not a JSON object")
    return content


def load_tensors(report: Path) -> list[dict[str, Any]]:
    """The tensors of a merge_report.json. Raises OutputError if the file is damaged."""
    try:
        return list(json.loads(report.read_text(encoding="utf-8"))["tensors"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise damaged(report, e) from e


def damaged(report: Path, e: Exception) -> OutputError:
    """The error for a damaged merge_report.json."""
    return OutputError(f"{shown(report)}: cannot be read ({reason(e)}). Give --overwrite to merge again.")


def read_identity(report: Path) -> tuple[str | None, tuple[str, ...]]:
    """The plan digest and the inputs' samples of a merge_report.json; (None, ()) if the file is not a report."""
    try:
        with report.open(encoding="utf-8") as file:
            head = file.read(65_536)
    except (OSError, UnicodeDecodeError):
        return None, ()
    digest = re.search(r'"plan_sha256": "([0-9a-f]{64})"', head)
    samples = re.search(r'"samples_sha256": \[\s*((?:"[0-9a-f]{64}",?\s*)*)\]', head)
    return digest and digest[1], tuple(re.findall("[0-9a-f]{64}", samples[1])) if samples else ()
