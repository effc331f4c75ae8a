"""Everything that can go wrong for the user before the first byte is written: open, plan, check, warn.

Reads headers, side files, and a few bytes of many tensors; writes nothing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

from merge_tool.chat_template import template_warnings, with_template
from merge_tool.checkpoint.reader import NUMPY_DTYPES, Checkpoint
from merge_tool.config_fit import fit_config
from merge_tool.errors import CheckpointError, MismatchError, OutputError, RecipeError, listed, reason, shown
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
from merge_tool.methods import as_bytes
from merge_tool.output import Target, check_folders, check_target
from merge_tool.overlap import lies_in
from merge_tool.parents import check_vocabularies, explain_rows, parent_warnings
from merge_tool.plan import MergePlan, plan_merge
from merge_tool.recipe import Recipe
from merge_tool.row_tensors import has_row_tensors
from merge_tool.side_files import (
    BASE_CARD,
    CARD,
    FT_CARD,
    SideFiles,
    plan_side_files,
)
from merge_tool.vocab import (
    Alignment,
    align,
    settings_warnings,
    side_files_of,
)


@dataclass(frozen=True)
class Prepared:
    """A merge that headers say will work: what `--dry-run` shows and `merge` carries out.

    `samples` are digests of a few bytes of many tensors of either input (none after a dry run, which reads no
    weights): what tells two finetunes of one layout apart. `refs` are the models by local paths, `inputs` all of these
    paths, adapters' too; `download` is what of them was still to be fetched, after a dry run.
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
    inputs: tuple[Path, ...]
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
        return shutil.disk_usage(existing_folder(self.target.path)).free

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
    asked = Asked(
        (str(base), str(ft)),
        target,
        recipe,
        lambda models: align(recipe, *models),
        lambda models: plan_merge(recipe, models, single_file=target.single_file),
    )
    return prepare_plan(
        asked,
        memory_bytes=memory_bytes,
        jobs=jobs,
        report_path=report_path,
        read_samples=read_samples,
        before_fetch=before_fetch,
    )


@dataclass(frozen=True)
class Asked:
    """A merge as asked: its models by name, where it goes, how they get rows of one vocabulary, and what their headers
    are planned by."""

    refs: Sequence[str]
    target: Target
    recipe: Recipe
    align: Callable[[Sequence[Checkpoint]], tuple[list[Checkpoint], Alignment | None]]
    plan: Callable[[Sequence[Checkpoint]], MergePlan]


def prepare_plan(
    asked: Asked,
    *,
    memory_bytes: int | None,
    jobs: int | None,
    report_path: Path | None,
    read_samples: bool,
    before_fetch: Callable[[Prepared], None],
) -> Prepared:
    """As `prepare`, for any merge."""
    inputs = [part for ref in asked.refs for part in parts(ref)]
    check_target(asked.target, inputs)
    if report_path is not None:
        _check_report_path(report_path, asked.recipe, asked.target, inputs)
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected at least 1.")
    budget = default_budget(resident_bytes()) if memory_bytes is None else memory_bytes
    if budget < LEAST_BYTES:
        raise RecipeError(f"The memory budget is {budget:,} bytes, expected at least {LEAST_BYTES // 10**6}MB.")
    most = max(4_000_000, (budget - resident_bytes()) // 3)
    try:
        with Inputs(asked.refs) as found:
            check_target(asked.target, found.paths)  # again: models of the Hub are elsewhere
            plan_it = partial(_prepare, found, asked, budget, jobs or default_jobs(), most)
            if read_samples and found.coming:
                planned = plan_it(read_samples=False)
                found.download.check_room()
                before_fetch(planned)
                del planned
                found.fetch()
            return plan_it(read_samples=read_samples)
    except OSError as e:
        file = f"{PurePath(e.filename).name} of" if isinstance(e.filename, str) else "A file of"
        raise CheckpointError(f"{shown(file)} the inputs cannot be read ({reason(e)}).") from e


def _prepare(found: Inputs, asked: Asked, budget: int, jobs: int, most: int, *, read_samples: bool) -> Prepared:
    target, recipe = asked.target, asked.recipe
    models, alignment = asked.align(open_models(found.refs, coming=found.coming, max_header_bytes=most))
    plan = _plan(asked.plan, models)
    if alignment is None and has_row_tensors(job.out for job in plan.jobs() if not job.is_copied):
        check_vocabularies(models, is_pair=plan.is_pair)
    donor = models[recipe.files_from == "ft" if plan.is_pair else plan.donor]
    side_files = plan_side_files(
        None if target.is_file else donor.folder,
        donor.weight_files,
        card=FT_CARD if recipe.files_from == "ft" else BASE_CARD,
    )
    side_files = replace(side_files, layers=plan.layers, keeps_quantization=plan.is_scaled)
    told: list[str] = []
    if alignment is not None:
        side_files = side_files_of(alignment, side_files)
        if target.is_file:
            told.append(f"{shown(target.path)} is one file: the tokenizer that goes with its rows is not written.")
        of = next(k for k, model in enumerate(models) if model.folder is donor.folder)
        told += settings_warnings(alignment, of, side_files.folder)
    if side_files.folder is not None:
        side_files, fitted = fit_config(side_files, (job.out for job in plan.jobs()), donor, models)
        told += fitted
    if plan.chat_template and side_files.folder is not None:
        side_files = with_template(side_files, plan.chat_template)
        told += template_warnings(plan.chat_template, side_files)
    check_folders(target, plan.labels, (file.target for file in side_files.copied), found.paths)
    way = "" if alignment is not None else "--vocab" if plan.is_pair else "tokenizer_source"
    first = models[plan.donor]
    base_card = first.folder.regular(CARD) if first.folder and first.folder.has(CARD) else None
    is_transformers = "architectures" in (first.config or {})
    warnings = (
        *plan.warnings,
        *parent_warnings(models, way),
        *_file_warnings(side_files),
        *told,
    )
    samples = tuple(_sample(model) for model in models) if read_samples else ()
    del models, donor, first  # for 10,000 tensors 2 MB that the plan does not need
    held = resident_bytes()
    layout = plan_layout(plan, budget, jobs, held=held)
    facts = plan, side_files, base_card, is_transformers, layout, budget, held, target, warnings, samples
    return Prepared(*facts, found.refs, found.paths, found.download)


def _plan(plan_of: Callable[[Sequence[Checkpoint]], MergePlan], models: Sequence[Checkpoint]) -> MergePlan:
    """The plan; where the models do not fit because their vocabularies differ, with how far they do."""
    try:
        return plan_of(models)
    except MismatchError as e:
        raise MismatchError(f"{e}{explain_rows(models)}") from e


def _file_warnings(side_files: SideFiles) -> Iterable[str]:
    if side_files.unmerged:
        yield f"Copied without merging, as parts of the model: {listed(side_files.unmerged, 50)}."
    if side_files.skipped:
        yield f"Not copied: {listed(side_files.skipped, 50)}."


def _check_report_path(path: Path, recipe: Recipe, target: Target, inputs: Iterable[Path]) -> None:
    where = f"--report {shown(path)}"
    if len(recipe.ts) > 1:
        raise RecipeError(f"{where}: one report for one t; with several, each output folder has its own.")
    try:
        is_harmful = any(lies_in(path, other) for other in (*inputs, target.path, target.work))
        is_folder, has_parent = path.is_dir(), path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as e:
        raise OutputError(f"{where}: cannot be used ({reason(e)}).") from e
    if is_folder or not has_parent:
        raise OutputError(f"{where}: {'is a folder' if is_folder else 'its folder is missing'}. Choose a file's path.")
    if is_harmful:
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


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
