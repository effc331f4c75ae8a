"""Everything that can go wrong for the user before the first byte is written: open, plan, check, warn.

Reads headers and side files only; writes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint, open_checkpoint
from merge_tool.errors import OutputError, RecipeError, listed, shown
from merge_tool.memory import (
    LEAST_BYTES,
    Layout,
    default_budget,
    default_jobs,
    estimate_peak,
    plan_layout,
    resident_bytes,
)
from merge_tool.output import Target, check_target
from merge_tool.plan import MergePlan, plan_merge
from merge_tool.recipe import Recipe, label_t
from merge_tool.report import read_digest
from merge_tool.side_files import CARD, REPORT, SUMS, SideFiles, plan_side_files

_SPARE_DISK_BYTES = 16_000_000  # journal, index, card and report of a usual model, and the file system's own


@dataclass(frozen=True)
class Prepared:
    """A merge that headers say will work: what `--dry-run` shows and `merge` carries out."""

    plan: MergePlan
    side_files: SideFiles
    base_card: Path | None
    is_transformers: bool
    layout: Layout
    budget: int
    held_bytes: int
    target: Target
    warnings: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        """Disk space that the outputs take."""
        return self.plan.output_bytes + len(self.plan.ts) * self.side_files.size

    @property
    def free_disk_bytes(self) -> int:
        return shutil.disk_usage(_existing(self.target.path)).free

    @property
    def expected_peak_bytes(self) -> int:
        return estimate_peak(self.plan, self.layout, self.held_bytes)


def prepare(
    base: str | Path,
    ft: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    memory_bytes: int | None = None,
    jobs: int | None = None,
) -> Prepared:
    """Open both checkpoints, plan the merge and check all that headers show; writes nothing."""
    target = Target(Path(out))
    if target.is_file and len(recipe.ts) > 1:
        raise RecipeError(f"{shown(out)}: is one file, but {len(recipe.ts)} values of t need a folder.")
    check_target(target, (Path(base), Path(ft)))
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected at least 1.")
    budget = default_budget(resident_bytes()) if memory_bytes is None else memory_bytes
    if budget < LEAST_BYTES:
        raise RecipeError(f"The memory budget is {budget:,} bytes, expected at least {LEAST_BYTES // 10**6}MB.")
    most = max(4_000_000, (budget - resident_bytes()) // 3)
    models = open_checkpoint(base, max_header_bytes=most), open_checkpoint(ft, max_header_bytes=most)
    plan = plan_merge(recipe, models, single_file=target.single_file)
    donor = models[recipe.files_from == "ft"]
    side_files = plan_side_files(None if target.is_file else donor.folder, donor.weight_files)
    base_card = models[0].folder.path(CARD) if models[0].folder and models[0].folder.has(CARD) else None
    is_transformers = "architectures" in (models[0].config or {})
    warnings = tuple(_warnings(models, side_files))
    del models, donor  # for 10,000 tensors 2 MB that the plan does not need
    held = resident_bytes()
    layout = plan_layout(plan, budget, jobs or default_jobs(), held=held)
    return Prepared(plan, side_files, base_card, is_transformers, layout, budget, held, target, warnings)


# -------------------------------------------------------------------------------------------- checks

_COMPARED_SETTINGS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)


def _warnings(models: Sequence[Checkpoint], side_files: SideFiles) -> Iterable[str]:
    base, ft = models
    for model in models:
        yield from model.notices
    for key in _COMPARED_SETTINGS:
        a, b = ((model.config or {}).get(key) for model in models)
        if a != b and a is not None and b is not None:
            yield f"{key} differs: {shown(a)} in {base.name}, {shown(b)} in {ft.name}. Are these related models?"
    if base.folder and ft.folder:
        for name in _TOKENIZER_FILES:
            if base.folder.has(name) and ft.folder.has(name) and not _same_bytes(base, ft, name):
                yield f"{name} differs between {base.name} and {ft.name}: the same token may have different rows."
    if side_files.unmerged:
        yield f"Copied without merging, as parts of the model: {listed(side_files.unmerged)}."
    if side_files.skipped:
        yield f"Not copied: {listed(side_files.skipped)}."


def _same_bytes(base: Checkpoint, ft: Checkpoint, name: str) -> bool:
    if base.folder is None or ft.folder is None:
        return False
    paths = base.folder.path(name), ft.folder.path(name)
    if paths[0].stat().st_size != paths[1].stat().st_size:
        return False
    with paths[0].open("rb") as a, paths[1].open("rb") as b:
        while True:
            left, right = a.read(65_536), b.read(65_536)
            if left != right:
                return False
            if not left:
                return True


def is_complete(prepared: Prepared) -> bool:
    """Whether OUT already holds this very merge; raises OutputError when it holds anything else.

    A merge made before its inputs last changed does not count, nor does one with a file missing or resized.
    """
    target = prepared.target
    if target.work.exists() or not target.path.exists():
        return False
    if target.is_file:
        raise OutputError(f"{shown(target.path)}: exists already. Give --overwrite to replace it.")
    if not any(target.path.iterdir()):
        return False
    if all(_is_output(prepared, target.path / label, t) for label, t in labelled(prepared.plan)):
        changed = _changed_since(prepared, target.path / prepared.plan.labels[0] / REPORT)
        if not changed:
            return True
        raise OutputError(
            f"{shown(target.path)}: holds this merge, but {listed(changed)} changed since. "
            "Give --overwrite to merge again."
        )
    raise OutputError(
        f"{shown(target.path)}: is not empty, and not the result of this merge. "
        "Choose another folder, or give --overwrite to replace the model in it once the new one is complete."
    )


def labelled(plan: MergePlan) -> Iterable[tuple[str, float]]:
    return zip(plan.labels, plan.ts, strict=True)


def _is_output(prepared: Prepared, folder: Path, t: float) -> bool:
    digest, _ = single_facts(prepared.plan, t)
    if read_digest(folder / REPORT) != digest or not (folder / SUMS).is_file():
        return False
    sizes = {folder / shard.file_name: shard.size for shard in prepared.plan.shards}
    if len(prepared.plan.shards) > 1 and not (folder / prepared.plan.index_name).is_file():
        return False
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _changed_since(prepared: Prepared, report: Path) -> list[str]:
    """Input files written (or put in place: st_ctime, where that is what it means) after the report was."""
    written = report.stat().st_mtime_ns
    sources = {job.base.file.name: job.base.file for job in prepared.plan.jobs()}
    sources |= {job.ft.file.name: job.ft.file for job in prepared.plan.jobs()}
    return [name for name, source in sources.items() if source.changed_ns > written]


def single_facts(plan: MergePlan, t: float) -> tuple[str, dict[str, Any]]:
    """Digest and facts of the merge with this t alone: what one output of several says of itself."""
    facts = {**plan.facts, "t": [label_t(t)]}
    return replace(plan, facts=facts).digest, facts


def check_room(prepared: Prepared, *, overwrite: bool) -> None:
    """Raise OutputError unless the disk can take the outputs beside what is there (less what a resumed run has)."""
    have = sum(p.stat().st_size for p in prepared.target.work.rglob("*") if p.is_file())
    need = prepared.disk_bytes + _SPARE_DISK_BYTES - have
    free = prepared.free_disk_bytes
    if need > free:
        beside = " The old output stays until the new one is complete." if overwrite else ""
        raise OutputError(
            f"{shown(prepared.target.path)}: the output takes {need:,} bytes, the disk has {free:,} free.{beside} "
            "Free some space or choose another disk."
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
