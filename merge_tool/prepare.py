"""Everything that can go wrong for the user before the first byte is written: open, plan, check, warn.

Reads headers, side files, and a few bytes of many tensors; writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merge_tool.chat_template import template_warnings, with_template
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import NUMPY_DTYPES, Checkpoint
from merge_tool.errors import CheckpointError, DataError, MismatchError, OutputError, RecipeError, listed, shown
from merge_tool.inputs import Download, Inputs
from merge_tool.lora import open_models, parts
from merge_tool.memory import (
    LEAST_BYTES,
    Layout,
    default_budget,
    default_jobs,
    estimate_peak,
    plan_layout,
    region_bytes,
    resident_bytes,
)
from merge_tool.methods import TILE, as_bytes, same_values
from merge_tool.older import check_conflicts, read_sums
from merge_tool.output import Target, check_target
from merge_tool.plan import MergePlan, TensorJob, plan_merge
from merge_tool.recipe import Recipe, label_t
from merge_tool.report import read_identity
from merge_tool.side_files import (
    BASE_CARD,
    CARD,
    FT_CARD,
    RECIPE,
    REPORT,
    SUMS,
    WORK,
    SideFiles,
    plan_side_files,
)
from merge_tool.tokenizer_json import TOKENIZER
from merge_tool.vocab import (
    TOKENIZER_FILES,
    Alignment,
    align,
    explain,
    has_other_rows,
    settings_warnings,
    side_files_of,
)

_SPARE_DISK_BYTES = 16_000_000  # journal, index, card and report of a usual model, and the file system's own


@dataclass(frozen=True)
class Prepared:
    """A merge that headers say will work: what `--dry-run` shows and `merge` carries out.

    `samples` are digests of a few bytes of many tensors of either input (none after a dry run, which reads no
    weights): what tells two finetunes of one layout apart. `refs` are the models by local paths; `download` is what of
    them was still to be fetched, after a dry run.
    """

    plan: MergePlan
    side_files: SideFiles
    base_card: Path | None
    is_transformers: bool
    layout: Layout
    budget: int
    held_bytes: int
    target: Target
    warnings: tuple[str, ...]
    samples: tuple[str, ...]
    refs: tuple[Path, ...]
    download: Download

    @property
    def disk_bytes(self) -> int:
        """Disk space that the outputs take."""
        return self.plan.output_bytes + len(self.plan.ts) * self.side_files.size

    @property
    def read_bytes(self) -> int:
        """Bytes of weights to be read: once what fits the arena or is copied, twice the rest, 8-bit codes thrice."""
        arena = self.layout.arena_bytes
        return sum(
            job.input_nbytes * (1 if region_bytes(job) <= arena else 3 if job.scaling and not job.is_scales else 2)
            for job in self.plan.jobs()
        )

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
    report_path: Path | None = None,
    read_samples: bool = False,
    before_fetch: Callable[[Prepared], None] = lambda planned: None,
) -> Prepared:
    """Open both checkpoints, plan the merge and check all that can be checked; writes nothing.

    With `read_samples` a few hundred kilobytes of weights are read, too, to know the inputs again later. Weights of
    models of the Hub are then fetched, once the plan of their headers stands and `before_fetch` has not refused it;
    otherwise none are.
    """
    target = Target(Path(out))
    if target.is_file and len(recipe.ts) > 1:
        raise RecipeError(f"{shown(out)}: is one file, but {len(recipe.ts)} values of t need a folder.")
    return prepare_plan(
        (str(base), str(ft)),
        target,
        recipe,
        lambda models: align(recipe, *models),
        lambda models: plan_merge(recipe, models, single_file=target.single_file),
        memory_bytes=memory_bytes,
        jobs=jobs,
        report_path=report_path,
        read_samples=read_samples,
        before_fetch=before_fetch,
    )


def prepare_plan(
    refs: Sequence[str],
    target: Target,
    recipe: Recipe,
    align_rows: Callable[[Sequence[Checkpoint]], tuple[list[Checkpoint], Alignment | None]],
    plan_of: Callable[[Sequence[Checkpoint]], MergePlan],
    *,
    memory_bytes: int | None,
    jobs: int | None,
    report_path: Path | None,
    read_samples: bool,
    before_fetch: Callable[[Prepared], None],
) -> Prepared:
    """Open the models, bring their vocabularies together by `align_rows`, plan by `plan_of`, and check all that can be
    checked, as `prepare` does."""
    inputs = [part for ref in refs for part in parts(ref)]
    check_target(target, inputs)
    if report_path is not None:
        _check_report_path(report_path, recipe, target, inputs)
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected at least 1.")
    budget = default_budget(resident_bytes()) if memory_bytes is None else memory_bytes
    if budget < LEAST_BYTES:
        raise RecipeError(f"The memory budget is {budget:,} bytes, expected at least {LEAST_BYTES // 10**6}MB.")
    most = max(4_000_000, (budget - resident_bytes()) // 3)
    with Inputs(refs) as found:
        check_target(target, found.paths)  # again: models of the Hub are elsewhere
        asked = target, recipe, align_rows, plan_of, budget, jobs or default_jobs()
        if read_samples and found.coming:
            planned = _prepare(found, *asked, most, read_samples=False)
            found.download.check_room()
            before_fetch(planned)
            del planned
            found.fetch()
        return _prepare(found, *asked, most, read_samples=read_samples)


def _prepare(
    found: Inputs,
    target: Target,
    recipe: Recipe,
    align_rows: Callable[[Sequence[Checkpoint]], tuple[list[Checkpoint], Alignment | None]],
    plan_of: Callable[[Sequence[Checkpoint]], MergePlan],
    budget: int,
    jobs: int,
    most: int,
    *,
    read_samples: bool,
) -> Prepared:
    models, alignment = align_rows(open_models(found.refs, coming=found.coming, max_header_bytes=most))
    plan = _plan(plan_of, models)
    donor = models[recipe.files_from == "ft" if plan.is_pair else plan.donor]
    try:
        side_files = plan_side_files(
            None if target.is_file else donor.folder,
            donor.weight_files,
            card=FT_CARD if recipe.files_from == "ft" else BASE_CARD,
        )
    except OSError as e:
        raise CheckpointError(f"{donor.name}: its files cannot be listed ({e.strerror}: {shown(e.filename)}).") from e
    side_files = replace(side_files, layers=plan.layers, keeps_quantization=plan.is_scaled)
    told: list[str] = []
    if alignment is not None:
        side_files = side_files_of(alignment, side_files)
        if target.is_file:
            told.append(f"{shown(target.path)} is one file: the tokenizer that goes with its rows is not written.")
        of = next(k for k, model in enumerate(models) if model.folder is donor.folder)
        told += settings_warnings(alignment, of, side_files.folder)
    if plan.chat_template and side_files.folder is not None:
        side_files = with_template(side_files, plan.chat_template)
        told += template_warnings(plan.chat_template, side_files)
    first = models[plan.donor]
    base_card = first.folder.regular(CARD) if first.folder and first.folder.has(CARD) else None
    is_transformers = "architectures" in (first.config or {})
    warnings = (
        *plan.warnings,
        *_warnings(models, side_files, are_matched=alignment is not None, is_pair=plan.is_pair),
        *told,
    )
    samples = tuple(_sample(model) for model in models) if read_samples else ()
    del models, donor, first  # for 10,000 tensors 2 MB that the plan does not need
    held = resident_bytes()
    layout = plan_layout(plan, budget, jobs, held=held)
    facts = plan, side_files, base_card, is_transformers, layout, budget, held, target, warnings, samples
    return Prepared(*facts, found.refs, found.download)


def _plan(plan_of: Callable[[Sequence[Checkpoint]], MergePlan], models: Sequence[Checkpoint]) -> MergePlan:
    """The plan; where the models do not fit because their vocabularies differ, with how far they do."""
    try:
        return plan_of(models)
    except MismatchError as e:
        base, *others = models
        told = [f"\n{text}." for other in others if has_other_rows(base, other) and (text := _compared(base, other))]
        raise MismatchError(f"{e}{''.join(told)}") from e


def _compared(base: Checkpoint, ft: Checkpoint) -> str:
    try:
        return explain(base, ft)
    except CheckpointError as e:
        return f"The vocabularies cannot be compared: {str(e).rstrip('.')}"


def _check_report_path(path: Path, recipe: Recipe, target: Target, inputs: Iterable[Path]) -> None:
    where = f"--report {shown(path)}"
    if len(recipe.ts) > 1:
        raise RecipeError(f"{where}: one report for one t; with several, each output folder has its own.")
    try:
        real = path.resolve()
        forbidden = [other.resolve() for other in (*inputs, target.path, target.work)]
        is_folder, has_parent = path.is_dir(), path.parent.is_dir()
    except (OSError, RuntimeError) as e:
        raise OutputError(f"{where}: cannot be used ({getattr(e, 'strerror', None) or e}).") from e
    if is_folder or not has_parent:
        raise OutputError(f"{where}: {'is a folder' if is_folder else 'its folder is missing'}. Choose a file's path.")
    if any(real == other or real.is_relative_to(other) for other in forbidden):
        raise OutputError(f"{where}: lies inside an input or the output. Choose a path beside them.")


def _sample(model: Checkpoint, tensors: int = 1024, nbytes: int = 256) -> str:
    """SHA-256 over bytes from the middle of evenly chosen tensors: another finetune differs nearly everywhere."""
    names = sorted(model.tensors)
    digest = hashlib.sha256()
    for name in names[:: -(-len(names) // tensors)]:
        info = model.tensors[name]
        count = min(nbytes // NUMPY_DTYPES[info.dtype].itemsize, info.numel)
        start = (info.numel - count) // 2
        digest.update(as_bytes(model.read_new(name, start, start + count)))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- warnings

_COMPARED_SETTINGS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)
_ONE_SIDED = frozenset({"num_attention_heads", "num_key_value_heads", "rope_theta"})  # worth a word if only one says


def _warnings(
    models: Sequence[Checkpoint], side_files: SideFiles, *, are_matched: bool, is_pair: bool
) -> Iterable[str]:
    way = "" if are_matched else "--vocab" if is_pair else "tokenizer_source"
    for model in models:
        yield from model.notices
    for other in models[1:]:
        yield from _differences(models[0], other)
        yield from _tokenizer_differences(models[0], other, way)
    if side_files.unmerged:
        yield f"Copied without merging, as parts of the model: {listed(side_files.unmerged, 50)}."
    if side_files.skipped:
        yield f"Not copied: {listed(side_files.skipped, 50)}."


def _differences(base: Checkpoint, ft: Checkpoint) -> Iterable[str]:
    a, b = (_settings(model.config or {}) for model in (base, ft))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) == b.get(key) or base.config is None or ft.config is None:
            continue
        if key.endswith("tie_word_embeddings") and base.tensors.keys() != ft.tensors.keys():
            continue  # the heads themselves were told of already
        if (key in a and key in b) or key.split(".")[-1] in _ONE_SIDED:
            here, there = (shown(side.get(key, "nothing")) for side in (a, b))
            yield f"{key} differs: {here} in {base.name}, {there} in {ft.name}. Are these related models?"


def _tokenizer_differences(base: Checkpoint, ft: Checkpoint, way: str) -> Iterable[str]:
    """`way` is how rows can be matched by token; nothing if they are."""
    here, there = base.tokenizer_folder, ft.tokenizer_folder
    if here is None or there is None:
        return
    for name in TOKENIZER_FILES:
        if not (here.has(name) and there.has(name)) or _same_bytes(here, there, name):
            continue
        told = f"{name} differs between {base.name} and {ft.name}: tokens may not mean the same in both."
        if name != TOKENIZER:
            yield told
        elif way:
            yield f"{told} {_compared(base, ft)}. With {way} rows are matched by token."


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that matter, those of sub-configs as `text_config.num_attention_heads`."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config = {"rope_theta": rope["rope_theta"], **config}
    found = {f"{prefix}{key}": config[key] for key in _COMPARED_SETTINGS if config.get(key) is not None}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and not prefix:
            found |= _settings(value, f"{key}.")
    return found


def _same_bytes(base: Folder, ft: Folder, name: str) -> bool:
    paths = base.regular(name), ft.regular(name)
    try:
        if paths[0].stat().st_size != paths[1].stat().st_size:
            return False
        with paths[0].open("rb") as a, paths[1].open("rb") as b:
            while True:
                left, right = a.read(65_536), b.read(65_536)
                if left != right or not left:
                    return left == right
    except OSError as e:
        raise CheckpointError(f"{shown(e.filename)}: cannot be read ({e.strerror}).") from e


# -------------------------------------------------------------------------------------- what OUT holds


def is_complete(prepared: Prepared) -> bool:
    """Whether OUT already holds this very merge; raises OutputError when it holds anything else.

    A merge made before its inputs last changed does not count, nor does one with a file missing, nor one whose
    side files have changed since. A work folder in OUT is not looked at.
    """
    target = prepared.target
    try:
        if target.is_file:
            if target.path.exists():
                raise OutputError(f"{shown(target.path)}: exists already. Give --overwrite to replace it.")
            return False
        if not target.path.exists() or not {entry.name for entry in target.path.iterdir()} - {WORK}:
            return False
        if not all(_is_output(prepared, target.path / label, t) for label, t in labelled(prepared.plan)):
            raise OutputError(
                f"{shown(target.path)}: is not empty, and not the result of this merge. Choose another folder, or "
                "give --overwrite to replace the model in it once the new one is complete."
            )
        changed = _changed_since(prepared, target.path / prepared.plan.labels[0])
    except OSError as e:
        raise OutputError(f"{shown(target.path)}: cannot be read ({e.strerror}: {shown(e.filename)}).") from e
    if changed:
        raise OutputError(
            f"{shown(target.path)}: holds this merge, but {listed(changed)} changed since. "
            "Give --overwrite to merge again."
        )
    return True


def labelled(plan: MergePlan) -> Iterable[tuple[str, float]]:
    return zip(plan.labels, plan.ts, strict=True)


def _is_output(prepared: Prepared, folder: Path, t: float) -> bool:
    digest, _ = single_facts(prepared.plan, t)
    found, samples = read_identity(folder / REPORT)
    if found != digest or (prepared.samples and samples != prepared.samples):
        return False
    sizes = {shard.file_name: shard.size for shard in prepared.plan.shards}
    files = read_sums(folder).keys() | sizes.keys() | ({prepared.plan.index_name} if len(sizes) > 1 else set())
    return all((folder / name).is_file() for name in files) and all(
        (folder / name).stat().st_size == size for name, size in sizes.items()
    )


def _changed_since(prepared: Prepared, output: Path) -> list[str]:
    """Input files modified after the report was written, and side files that the output has otherwise."""
    written, sums = (output / REPORT).stat().st_mtime_ns, read_sums(output)
    files = {id(file): file for job in prepared.plan.jobs() for source in job.sources for file in source.files}
    changed = [file.name for file in files.values() if file.mtime_ns > written]
    for file in prepared.side_files.copied:
        digest = hashlib.sha256()
        for chunk in prepared.side_files.read(file, prepared.plan.config_dtype):
            digest.update(chunk)
        if sums.get(file.target) != digest.hexdigest():
            changed.append(file.source)
    return changed


def single_facts(plan: MergePlan, t: float) -> tuple[str, dict[str, Any]]:
    """Digest and facts of the merge with this t alone: what one output of several says of itself."""
    facts = {**plan.facts, "t": [label_t(t)]} if plan.is_pair else dict(plan.facts)
    return replace(plan, facts=facts).digest, facts


def check_output(prepared: Prepared, *, overwrite: bool) -> None:
    """What a merge checks of OUT, for before its inputs are fetched. Raises OutputError, FetchError."""
    if not overwrite and not os.path.lexists(prepared.target.work) and is_complete(prepared):
        return
    check_room(prepared, overwrite=overwrite)
    if not prepared.target.is_file:
        for label in prepared.plan.labels:
            check_conflicts(prepared.target.path / label, final_names(prepared))


def check_room(prepared: Prepared, *, overwrite: bool) -> None:
    """Raise OutputError unless the disk can take the outputs beside what is there, less what a resumed run has; on the
    disk of the Hub's cache beside what is still to be fetched. FetchError where that alone does not fit."""
    prepared.download.check_room()
    have = sum(p.stat().st_size for p in prepared.target.work.rglob("*") if p.is_file())
    need = prepared.disk_bytes + _SPARE_DISK_BYTES - have
    coming = prepared.download.disk_bytes if _is_on_the_disk_of(prepared.target, prepared.download.cache) else 0
    free = prepared.free_disk_bytes
    if need + coming > free:
        besides = f" and what is fetched into the Hub's cache {coming:,}" if coming else ""
        beside = " The old output stays until the new one is complete." if overwrite else ""
        raise OutputError(
            f"{shown(prepared.target.path)}: the output takes {need:,} bytes{besides}, the disk has {free:,} free."
            f"{beside} Free some space or choose another disk."
        )


def _is_on_the_disk_of(target: Target, cache: Path | None) -> bool:
    return cache is not None and cache.stat().st_dev == _existing(target.path).stat().st_dev


def check_exact_tensors(plan: MergePlan) -> None:
    """Raise DataError naming all integer and boolean tensors that differ, unless the base's are to be kept."""
    if plan.keeps_base_on_mismatch:
        return
    differing = [job.out.name for job in plan.jobs() if job.exact and not _same_values(job)]
    if differing:
        raise DataError(
            f"{len(differing):,} integer tensors differ between {' and '.join(plan.names)}, and integers have "
            f"nothing between them: {listed(differing)}. Give --on-mismatch base to keep the base's."
        )


def _same_values(job: TensorJob, chunk: int = TILE) -> bool:
    buffers = [np.empty(min(chunk, job.out.numel), NUMPY_DTYPES[source.info.dtype]) for source in job.sources]
    for start in range(0, job.out.numel, chunk):
        parts = [buffer[: job.out.numel - start] for buffer in buffers]
        for source, values in zip(job.sources, parts, strict=True):
            source.read_into(start, values)
        if not all(same_values(parts[0], other) for other in parts[1:]):
            return False
    return True


def final_names(prepared: Prepared) -> list[str]:
    """The files that every output will have, relative to it."""
    plan = prepared.plan
    index = [plan.index_name] if len(plan.shards) > 1 else []
    side = [file.target for file in prepared.side_files.copied]
    recipe = [RECIPE] if plan.text else []
    return [*(shard.file_name for shard in plan.shards), *index, *side, *recipe, CARD, REPORT, SUMS]


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
