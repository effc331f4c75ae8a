"""A stored output against its parents: the same plan, the same elements, the same report. Writes nothing.

The plan is made anew from the parents' headers. Then either a sample of tiles is merged again with the report's
sums, or everything: a whole merge whose writers compare with what is there instead of writing.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merge_tool._version import __version__
from merge_tool.api import card_of, report_of
from merge_tool.buffers import WorkerMemory
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.source import LocalFile
from merge_tool.checks import Checks, check_bytes, first_difference
from merge_tool.errors import CheckpointError, OutputError, listed, reason, shown
from merge_tool.lora import open_models
from merge_tool.methods import METHODS, TILE, as_bytes, same_values
from merge_tool.plan import MergePlan, ShardPlan, TensorJob
from merge_tool.prepare import Prepared, prepare
from merge_tool.recipe import DEFAULT_MAX_SHARD_BYTES, Recipe
from merge_tool.remerge_scaled import ScaledSample
from merge_tool.report import Finding, Findings, from_record, stream_report, summarise, tensor_text
from merge_tool.run import ShardDone, run_plan
from merge_tool.side_files import CARD, RECIPE, REPORT
from merge_tool.work import merge_chunk

_PIECE = 1 << 20
_MATCH_SECONDS = 20
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.search(pattern, name)
"""


@dataclass(frozen=True)
class StoredReport:
    """A merge_report.json: its head, and its tensors by line, read again whenever they are asked for."""

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
    against: tuple[str | Path, str | Path],
    memory_bytes: int | None,
    jobs: int | None,
) -> Prepared:
    """The merge's own plan, from its parents' headers and the options in the report."""
    head, options = report.head, report.head["options"]
    if head["t"] is None:
        raise OutputError(f"{REPORT}: is that of a recipe's output. Give --recipe RECIPE.yaml instead of --against.")
    try:
        recipe = Recipe(
            (float(head["t"]),),
            head["method"],
            options["dtype"],
            options["max_shard_bytes"] or DEFAULT_MAX_SHARD_BYTES,
            options["files_from"],
            options["on_mismatch"],
            extrapolate=True,
            t_for=options.get("t_for", ()),
            only=options.get("only", ()),
            exclude=options.get("exclude", ()),
            on_missing=options.get("on_missing") or "error",
            vocab=options.get("vocab"),
            pad_vocab_to_multiple_of=options.get("pad_vocab_to_multiple_of"),
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise OutputError(f"{REPORT}: its options are not those of a merge ({reason(e)}).") from e
    texts = [rule.pattern.text for rule in recipe.rules] + [*recipe.only, *recipe.exclude]
    if _regular_expressions(texts):
        _check_patterns(texts, {name for model in open_models(against) for name in model.tensors})
    return prepare(*against, out, recipe, memory_bytes=memory_bytes, jobs=jobs, read_samples=True)


def plan_recipe_again(
    out: Path, report: StoredReport, recipe: str | Path, memory_bytes: int | None, jobs: int | None
) -> Prepared:
    """The plan of a recipe's merge, from the recipe, its models' headers and the options in the report."""
    from merge_tool.models import prepare_models  # YAML and the methods, which no other merge needs

    options = report.head["options"]
    if report.head["t"] is not None:
        raise OutputError(f"{REPORT}: is that of a pair. Give --against BASE FT instead of --recipe.")
    try:
        seed, on_mismatch = int(options["seed"]), str(options["on_mismatch"])
        max_shard_bytes = int(options["max_shard_bytes"] or DEFAULT_MAX_SHARD_BYTES)
        only, exclude = ([str(text) for text in options.get(key, ())] for key in ("only", "exclude"))
    except (KeyError, TypeError, ValueError) as e:
        raise OutputError(f"{REPORT}: its options are not those of a recipe's merge ({reason(e)}).") from e
    options_of = partial(Recipe, max_shard_bytes=max_shard_bytes, extrapolate=True)
    plan_it = partial(prepare_models, recipe, out, seed=seed, memory_bytes=memory_bytes, jobs=jobs)
    if _regular_expressions([*only, *exclude]):
        whole = plan_it(options_of(on_mismatch="base", on_missing="base"))
        _check_patterns([*only, *exclude], {job.out.name for job in whole.plan.jobs()})
    on_missing = str(options.get("on_missing") or "error")
    chosen = options_of(on_mismatch=on_mismatch, on_missing=on_missing, only=only, exclude=exclude)
    return plan_it(chosen, read_samples=True)


def _regular_expressions(patterns: Iterable[str]) -> list[str]:
    return [text.removeprefix("re:") for text in patterns if text.startswith("re:")]


def _check_patterns(texts: Iterable[str], names: Iterable[str]) -> None:
    """Raise OutputError for a stranger's regular expression that does not come to an end on the parents' names: nothing
    interrupts one, so another process tries them first."""
    patterns = _regular_expressions(texts)
    task = json.dumps([patterns, sorted(names)]).encode("utf-8", "surrogatepass")
    try:
        subprocess.run([sys.executable, "-I", "-c", _MATCH], input=task, timeout=_MATCH_SECONDS, check=False)
    except subprocess.TimeoutExpired as e:
        raise OutputError(
            f"{REPORT}: its patterns ({listed(patterns)}) take longer than {_MATCH_SECONDS} s to match the parents' "
            "names. A merge had no reason to write such; nothing was compared."
        ) from e


def check_parents(
    checks: Checks, folder: Folder, report: StoredReport, prepared: Prepared, *, sample: float, full: bool
) -> None:
    plan = prepared.plan
    if not _check_head(checks, report, prepared):
        return
    files = {shard.number: LocalFile(folder.regular(shard.file_name), shard.file_name) for shard in plan.shards}
    if wrong := [shard.file_name for shard in plan.shards if files[shard.number].size != shard.size]:
        checks.add(f"{shown(wrong[0])}: is not as large as a merge of these parents makes it; no element was compared.")
        return
    try:
        findings = _load_findings(checks, report, plan)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        checks.add(f"{REPORT}: its tensors cannot be read ({reason(e)}); no element was compared.")
        return
    if full:
        sink = _Comparison(checks, files)
        for _ in run_plan(plan, sink, prepared.layout):
            pass
        findings = sink.findings
        _check_lines(checks, report, plan, findings)
    else:
        _check_sample(checks, files, prepared, findings, sample)
        _check_lines(checks, report, plan, findings)
    if _is_told_alike(report, plan):
        _check_words(checks, folder, report, prepared, findings)
    if prepared.target.path.is_dir():
        _check_side_files(checks, folder, prepared)


def _check_head(checks: Checks, report: StoredReport, prepared: Prepared) -> bool:
    """Whether the report is of a merge of these very parents; folders may have been renamed since."""
    head, plan = report.head, prepared.plan
    before = len(checks.problems)
    arguments = ("BASE", "FT") if plan.is_pair else plan.names
    inputs = {side: head["inputs"].get(side) for side in plan.sides}
    files = {side: found.get("files") if isinstance(found, dict) else None for side, found in inputs.items()}
    if plan.is_pair and _are_swapped(files, head["samples_sha256"], prepared):
        checks.add("BASE and FT are swapped: what the report says of BASE is true of FT. Give --against FT BASE.")
        return False
    for side, argument in zip(plan.sides, arguments, strict=True):
        if files[side] != plan.facts[side]["files"]:
            which = _unlike(files[side], plan.facts[side]["files"])
            checks.add(f"{argument}: its files are not those that the report names ({which}); no element was compared.")
    for argument, told, sampled in zip(arguments, head["samples_sha256"], prepared.samples, strict=False):
        if told != sampled:
            checks.add(f"{argument}: its weights are not those that were merged; no element was compared.")
    shards = {shard.file_name: shard.size for shard in plan.shards}
    if head["shards"] != shards:
        checks.add(f"{REPORT}: its shards are not those that a merge of these parents has; no element was compared.")
    return len(checks.problems) == before


def _are_swapped(files: Mapping[str, Any], sampled: Sequence[Any], prepared: Prepared) -> bool:
    """Whether what the report says of each of two parents is true of the other."""
    found = [prepared.plan.facts[side]["files"] for side in prepared.plan.sides]
    told, now = [list(files.values()), list(sampled)], [found, list(prepared.samples)]
    return told != now and told == [part[::-1] for part in now]


def _unlike(told: Any, found: Mapping[str, Any]) -> str:
    """Which of a model's files are others than the report has."""
    told = told if isinstance(told, dict) else {}
    kinds = (
        ("differ", [name for name in found if name in told and told[name] != found[name]]),
        ("are not in the report", [name for name in found if name not in told]),
        ("are missing", [name for name in told if name not in found]),
    )
    return "; ".join(f"{listed(names)} {kind}" for kind, names in kinds if names)


def _load_findings(checks: Checks, report: StoredReport, plan: MergePlan) -> Findings:
    """What the report says of every tensor; tensors that it lacks, or has elsewhere, are an error."""
    findings = Findings()
    for job, told in zip_longest(plan.jobs(), report.tensors()):
        if job is None or told is None or told[1].get("name") != job.out.name:
            raise ValueError("they are not the plan's tensors in its order")
        if job.is_copied:  # the base's: nothing is to be found out about it
            findings.add(job.number, Finding(None, equal=False, kept_base=False))
            continue
        kept = job.exact and told[1].get("note") == "differs: base kept"
        findings.add(job.number, from_record({**told[1], "kept_base": kept}))
    return findings


def _check_lines(checks: Checks, report: StoredReport, plan: MergePlan, findings: Findings) -> None:
    """Every line of the report against what follows from the sums."""
    for job, (text, _) in zip(plan.jobs(), report.tensors(), strict=True):
        expected = tensor_text(plan, job, findings[job.number], 0)
        if text != expected:
            checks.add(f"{REPORT}: {shown(job.out.name)}: says {shown(_difference(text, expected), 600)}.")


def _difference(text: str, expected: str) -> str:
    told, ours = json.loads(text), json.loads(expected)
    keys = [key for key in {**ours, **told} if told.get(key) != ours.get(key)]
    return "; ".join(f"{key} {told.get(key)}, found {ours.get(key)}" for key in keys) or "the same in other words"


def _is_told_alike(report: StoredReport, plan: MergePlan) -> bool:
    """Whether the report is of this version, and its parents' folders still have their names: it holds both."""
    names = [report.head["inputs"][side].get("name") for side in plan.sides]
    return report.head.get("tool") == f"slerp-merge {__version__}" and names == list(plan.names)


def _check_words(checks: Checks, folder: Folder, report: StoredReport, prepared: Prepared, findings: Findings) -> None:
    """The report's head, and the card but for its YAML, whose form is another library's."""
    t = prepared.plan.ts[0]
    head = next(report_of(prepared, findings, t))
    with report.path.open(encoding="utf-8", newline="") as lines:
        if lines.read(len(head)) != head:
            checks.add(f"{REPORT}: its head is not that of a merge of these parents.")
    if not prepared.target.path.is_dir():
        return
    card = card_of(prepared, summarise(prepared.plan, findings), t)
    try:
        told = folder.regular(CARD).read_text(encoding="utf-8")
    except (CheckpointError, OSError, ValueError) as e:
        checks.add(f"{CARD}: {reason(e)}")
        return
    if _body(told) != _body(card):
        checks.add(f"{CARD}: is not the card of a merge of these parents.")


def _body(card: str) -> str:
    return card.partition("\n---\n")[2]


def _check_side_files(checks: Checks, folder: Folder, prepared: Prepared) -> None:
    """The files that were copied are the parent's, and the index is the plan's."""
    plan, side_files = prepared.plan, prepared.side_files
    contents: list[tuple[str, Iterable[bytes]]] = [
        (file.target, side_files.read(file, plan.config_dtype)) for file in side_files.copied
    ]
    if (index := plan.index()) is not None:
        contents.append((plan.index_name, [index]))
    if plan.text:
        contents.append((RECIPE, [plan.text.encode()]))
    for name, pieces in contents:
        try:
            with folder.regular(name).open("rb") as file:
                same = all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)
        except (CheckpointError, OSError) as e:
            checks.add(f"{shown(name)}: {reason(e)}")
            continue
        if not same:
            checks.add(f"{shown(name)}: is not what a merge of these parents has there.")


# --------------------------------------------------------------------------------------- bit for bit


def _check_sample(
    checks: Checks, files: Mapping[int, LocalFile], prepared: Prepared, findings: Findings, share: float
) -> None:
    """Merge some tiles of every tensor again, with the sums of the report."""
    worker, chance = WorkerMemory(prepared.layout), random.Random()
    scaled = ScaledSample(checks, files, prepared.plan, findings, share, worker)
    there = bytearray(max((TILE * 8), 1))
    for shard in prepared.plan.shards:
        check_bytes(checks, files[shard.number], 0, memoryview(shard.header()), "its header")
        for job in shard.jobs:
            if job.scaling is not None:
                scaled.check(job)
                continue
            tiles = -(-job.out.numel // TILE)
            most = max(1, round(share * tiles))
            for tile in sorted(chance.sample(range(tiles), min(tiles, most))):
                if not _check_tile(
                    checks, files[shard.number], prepared.plan, job, findings, tile * TILE, worker, there
                ):
                    break


def _check_tile(
    checks: Checks,
    file: LocalFile,
    plan: MergePlan,
    job: TensorJob,
    findings: Findings,
    start: int,
    worker: WorkerMemory,
    there: bytearray,
) -> bool:
    stop = min(start + TILE, job.out.numel)
    inputs, out = worker.arrays(job, stop - start)
    for source, values in zip(job.sources, inputs, strict=True):
        source.read_into(start, values)
    arrays = inputs[0], inputs[-1], out
    finding, t = findings[job.number], job.ts[0]
    if finding.equal and not same_values(arrays[0], arrays[1]):
        checks.add(f"{REPORT}: {shown(job.out.name)}: says that the parents are equal; they are not.")
        return False
    weights = None
    if not (finding.equal or finding.kept_base or job.exact or job.is_copied):
        if finding.sums is None:
            checks.add(f"{REPORT}: {shown(job.out.name)}: has no sums.")
            return False
        weights = METHODS[plan.method].weights(finding.sums, t)
    merged = merge_chunk(job, t, weights, start, arrays, worker.scratch)
    data = as_bytes(merged)
    checks.num_compared += stop - start
    return check_bytes(checks, file, job.out.offset + start * merged.itemsize, data, job.out.name, there, job)


class _Comparer:
    """A shard's Writer that writes nothing: it compares with the file that is there, and keeps the first difference."""

    def __init__(self, file: LocalFile) -> None:
        self.file, self.first, self.nbytes = file, -1, 0
        self.lock = threading.Lock()  # of `first`

    def write(self, offset: int, data: memoryview) -> None:
        place = first_difference(self.file, offset, data, bytearray(min(len(data), _PIECE) or 1))
        with self.lock:
            if place is not None and (self.first < 0 or place < self.first):
                self.first = place

    def hash_next(self, data: memoryview) -> None:
        self.nbytes += len(data)

    def sync(self) -> str:
        return ""

    def abandon(self) -> None:
        pass


class _Comparison:
    """A Sink that keeps the sums and says where the shards that are there differ from the merge."""

    def __init__(self, checks: Checks, files: Mapping[int, LocalFile]) -> None:
        self.checks, self.files, self.findings = checks, files, Findings()
        self.lock = threading.Lock()  # of findings and checks

    def open_shard(self, shard: ShardPlan, header: bytearray) -> Sequence[_Comparer]:
        comparer = _Comparer(self.files[shard.number])
        comparer.write(0, memoryview(header))
        return [comparer]

    def finish_shard(self, done: ShardDone, writers: Sequence[_Comparer]) -> None:
        with self.lock:
            self._take(done, writers[0].first)

    def _take(self, done: ShardDone, place: int) -> None:
        for tensor in done.tensors:
            self.findings.add(tensor.number, Finding(tensor.sums, tensor.equal, tensor.kept_base))
        self.checks.num_compared += sum(job.out.numel for job in done.shard.jobs)
        if place >= 0:
            jobs = done.shard.jobs
            number = bisect_right([job.out.offset for job in jobs], place) - 1
            what = f"tensor {jobs[number].out.name}" if number >= 0 else "its header"
            self.checks.add(
                f"{shown(done.shard.file_name)}: is not the merge of these parents: from byte {place:,} on "
                f"({shown(what)}) it differs."
            )
