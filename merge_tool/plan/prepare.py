"""The plan of a merge with its side files, warnings and memory. Every error that the user can cause and that can be
found before the first byte is written is raised here.

Reads headers, side files, and a few bytes of many tensors; writes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from merge_tool.arrays import NUMPY_DTYPES, as_bytes
from merge_tool.checkpoint.folder import folder_name
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import MismatchError, OutputError, RecipeError, input_failed, listed, shown, sized
from merge_tool.files import free_bytes
from merge_tool.methods.registry import METHODS
from merge_tool.methods.steps import Method
from merge_tool.models.cards import Cards, cards_of, licences, terms_in_words
from merge_tool.models.experts import in_layout_of
from merge_tool.models.given_names import with_names
from merge_tool.models.heads import architecture, untie
from merge_tool.models.inputs import Download, Inputs
from merge_tool.models.lora import open_models
from merge_tool.models.naming import is_head
from merge_tool.models.renaming import says_tied
from merge_tool.models.side_files import (
    BASE_CARD,
    CARD,
    FT_CARD,
    RECIPE,
    REPORT,
    SUMS,
    SideFiles,
    card_name,
    plan_side_files,
)
from merge_tool.models.side_names import check_names, named_apart
from merge_tool.plan.architectures import check_architectures
from merge_tool.plan.config_fit import fit_config
from merge_tool.plan.disk import largest_file, largest_of_process, shard_limit, waiting_limit
from merge_tool.plan.memory import Layout, Machine, estimate_peak, plan_layout, region_bytes
from merge_tool.plan.parents import check_vocabularies, explain_rows, parent_warnings
from merge_tool.plan.patterns import check_lent_patterns
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.plan_merge import plan_merge
from merge_tool.plan.system_memory import give_back_free_memory, resident_bytes
from merge_tool.plan.target import Target, existing_folder, held_bytes
from merge_tool.recipe.recipe import Recipe
from merge_tool.vocabulary.align import Alignment, align, settings_warnings, side_files_of
from merge_tool.vocabulary.chat_template import choose_template, template_warnings, with_template
from merge_tool.vocabulary.differences import same_bytes
from merge_tool.vocabulary.row_tensors import has_row_tensors


@dataclass(frozen=True)
class Prepared:
    """A planned merge, checked by headers: `--dry-run` shows it and `merge` runs it.

    `samples` are digests of a few bytes of many tensors of each input: they distinguish two finetunes of one layout. A
    dry run reads no weights and has no samples. `refs` are the models' local paths, `pinned` their absolute paths or
    commits of the Hub, `inputs` all of these paths, including adapters. `download` is the download that is still
    missing after a dry run. `first_card` is the card of the model whose language the output inherits; `cards` are the
    cards of all models, for their licences. `architecture` is the class that the output's config.json names, if any.
    `has_own_rows`: rows were matched by token.
    """

    plan: MergePlan
    side_files: SideFiles
    first_card: Path | None
    cards: Cards
    is_transformers: bool
    architecture: str
    has_own_rows: bool
    layout: Layout
    budget: int
    held_bytes: int
    target: Target
    warnings: tuple[str, ...]
    samples: tuple[str, ...]
    refs: tuple[Path, ...]
    pinned: tuple[str, ...]
    inputs: tuple[Path, ...]
    download: Download

    def __repr__(self) -> str:
        plan, names = self.plan, ", ".join(map(shown, self.plan.names))
        sizes = f"to read {sized(self.read_bytes)}, to write {sized(self.disk_bytes)} to {self.target.name}"
        download = f", to download {sized(self.download.nbytes)}" if self.download.nbytes else ""
        memory = f"memory about {sized(self.expected_peak_bytes)} at the peak"
        return f"{plan.recipe.method} of {names}: {plan.num_tensors:,} tensors, {sizes}{download}, {memory}"

    @property
    def disk_bytes(self) -> int:
        """The disk space that the outputs take."""
        return self.plan.output_bytes + len(self.plan.labels) * self.side_files.size

    @property
    def here_bytes(self) -> int:
        """The disk space that is needed here: for all outputs, or for the Hub the two largest shards and the other
        files."""
        if not self.target.repo:
            return self.disk_bytes
        return waiting_bytes(self.plan) + self.side_files.size

    @property
    def read_bytes(self) -> int:
        """Bytes of weights to be read: tensors that fit the arena or are copied count once, others twice. 8-bit codes
        count once more."""
        arena = self.layout.arena_bytes
        return sum(
            job.input_nbytes
            * (1 if region_bytes(self.plan, job) <= arena or (job.scaling and not job.is_scales) else 2)
            for job in self.plan.jobs()
        )

    @property
    def free_disk_bytes(self) -> int | None:
        """The free bytes on the disk of OUT; None if the file system does not report them."""
        return free_bytes(existing_folder(self.target.path))

    @property
    def expected_peak_bytes(self) -> int:
        return estimate_peak(self.plan, self.layout, self.held_bytes)


def prepare(
    recipe: Recipe,
    inputs: Inputs,
    target: Target,
    machine: Machine,
    *,
    methods: Mapping[str, Method] = METHODS,
    read_samples: bool = False,
) -> Prepared:
    """Open the models, plan their merge into `target`, and check all that can be checked; writes nothing.

    For models of the Hub the headers are enough. With `read_samples` a few hundred kilobytes of weights are read, too,
    to recognise the inputs later. Raises a MergeToolError.
    """
    try:
        check_lent_patterns(recipe, inputs, machine)
        variant = recipe.options.variant
        opened = open_models(inputs.refs, coming=inputs.coming, max_header_bytes=machine.header_bytes, variant=variant)
        if variant is not None:
            opened = _with_variant(opened, variant)
        check_architectures(recipe, opened)
        opened = untie(opened, recipe.first, frozenset(recipe.sources), is_requested=recipe.options.untie)
        lead = opened[recipe.first]
        for number, names in recipe.names_of.items():
            opened[number] = with_names(opened[number], lead, names)
        opened = [model if model is lead else in_layout_of(lead, model) for model in opened]
        models, alignment = align(recipe, opened)
        plan = _plan_for_disk(recipe, models, methods, target)
        warnings = [*plan.warnings, *parent_warnings(recipe, models, alignment)]
        side_files, more = _side_files(recipe, plan, models, alignment, target)
        cards = cards_of(inputs.paths)
        if sum(card is not None for card in cards.values()) > 1 and (terms := licences(cards)).differ:
            files = [file.target for file in side_files.copied]
            warnings.append(terms_in_words(terms, files, models[recipe.donor].name))
        samples = tuple(_sample(model) for model in models) if read_samples else ()
        first = models[recipe.first]
        first_card = first.folder.regular(card) if first.folder and (card := card_name(first.folder)) else None
    except OSError as e:
        raise input_failed(_name_of(e, inputs.paths), e) from e
    is_transformers = "architectures" in (first.config or {})
    named = architecture(models[recipe.donor])
    del opened, models, first, lead  # for 10,000 tensors it takes 2 MB, which the plan does not need
    give_back_free_memory()
    held = resident_bytes()
    return Prepared(
        plan=plan,
        side_files=side_files,
        first_card=first_card,
        cards=cards,
        is_transformers=is_transformers,
        architecture=named,
        has_own_rows=alignment is not None,
        layout=plan_layout(plan, machine.budget, machine.jobs, held=held),
        budget=machine.budget,
        held_bytes=held,
        target=target,
        warnings=tuple(dict.fromkeys((*warnings, *_file_warnings(side_files), *more))),
        samples=samples,
        refs=inputs.refs,
        pinned=inputs.pinned,
        inputs=inputs.paths,
        download=inputs.download,
    )


def _with_variant(models: Sequence[Checkpoint], variant: str) -> list[Checkpoint]:
    """The models, with a warning where one has no such variant. Raises RecipeError if none has."""
    word = re.compile(rf"\.{re.escape(variant)}[-.]")
    have = [any(word.search(file.file_name) for file in model.files) for model in models]
    if not any(have):
        raise RecipeError(f"--variant {shown(variant)}: no model has weights with .{shown(variant)} in their names.")
    lacking = f"has no variant {shown(variant)}: its plain weights are merged."
    return [
        model if has else model.with_notices((*model.notices, f"{model.name} {lacking}"))
        for model, has in zip(models, have, strict=True)
    ]


def _name_of(e: OSError, inputs: Sequence[Path]) -> str:
    """The file that could not be read, under the name of its input: `base/tokenizer.json`."""
    if not isinstance(e.filename, str):
        return "a file of the inputs"
    path = Path(e.filename)
    root = next((root for root in (source.resolve() for source in inputs) if path.is_relative_to(root)), None)
    return path.name if root is None else str(PurePosixPath(folder_name(root)) / path.relative_to(root).as_posix())


def waiting_bytes(plan: MergePlan) -> int:
    """The most disk that the shards of an output on the Hub take: two of them at a time."""
    return sum(sorted(shard.size for shard in plan.shards)[-2:])


def _plan_for_upload(
    recipe: Recipe, models: Sequence[Checkpoint], methods: Mapping[str, Method], target: Target
) -> MergePlan:
    """The plan for a repository of the Hub, with smaller shards if this disk has little room for two of them, or if an
    earlier run began with smaller ones."""
    plan, asked = _plan(recipe, models, methods, target), recipe.options.max_shard_bytes
    free, limit, why = free_bytes(existing_folder(target.path)), asked, ""
    room = None if free is None else free + held_bytes(target.work)
    if target.most_shard_bytes is not None:
        limit, why = min(asked, target.most_shard_bytes), f"{target.name}: was begun with smaller shards"
    elif room is not None and waiting_bytes(plan) > room // 2:
        limit, why = min(asked, waiting_limit(room)), f"{shown(target.path)}: its disk has {sized(room)} of room"
    if limit == asked:
        return plan
    plan = _plan(replace(recipe, options=replace(recipe.options, max_shard_bytes=limit)), models, methods, target)
    smaller = f"{why}, so the shards have at most {sized(limit)}, as with --max-shard-size {limit}."
    return replace(plan, warnings=(*plan.warnings, smaller))


def _plan_for_disk(
    recipe: Recipe, models: Sequence[Checkpoint], methods: Mapping[str, Method], target: Target
) -> MergePlan:
    """The plan, with smaller shards if the disk of OUT, or a limit of this process, does not allow files so large.
    Raises OutputError if a single tensor is too large."""
    plan = (_plan_for_upload if target.repo else _plan)(recipe, models, methods, target)
    limits = {
        ("its disk holds", "Choose another disk"): largest_file(existing_folder(target.path)),
        ("ulimit -f allows", "Raise that limit"): largest_of_process(),
    }
    known = [(size, words) for words, size in limits.items() if size is not None]
    largest, (what, way) = min(known, default=(None, ("", "")))
    if largest is None or all(shard.size <= largest for shard in plan.shards):
        return plan
    where = f"{shown(target.path)}: {what} files of at most {largest:,} bytes"
    if target.is_file:
        raise OutputError(f"{where}, this one has {plan.shards[0].size:,}. {way}, or give a folder as OUT.")
    limit = shard_limit(largest)
    plan = _plan(replace(recipe, options=replace(recipe.options, max_shard_bytes=limit)), models, methods, target)
    if too_large := [shard for shard in plan.shards if shard.size > largest]:
        name = max(too_large[0].jobs, key=lambda job: job.out.nbytes).out.name
        raise OutputError(f"{where}, and {shown(name)} alone needs a larger one. {way}.")
    smaller = f"{where}, so the shards have at most {limit:,} bytes, as with --max-shard-size {limit}."
    return replace(plan, warnings=(*plan.warnings, smaller))


def _plan(recipe: Recipe, models: Sequence[Checkpoint], methods: Mapping[str, Method], target: Target) -> MergePlan:
    """The plan. If vocabularies differ, the MismatchError also says how far they agree."""
    try:
        plan = plan_merge(recipe, models, methods=methods, single_file=target.single_file)
    except MismatchError as e:
        raise MismatchError(f"{e}{explain_rows(models)}", e.suggested) from e
    if recipe.tokenizer is None and has_row_tensors(job.out for job in plan.jobs() if not job.is_copied):
        check_vocabularies(recipe, models)
    wanted = recipe.options.chat_template or recipe.chat_template
    if wanted is None:
        return plan
    template = choose_template(recipe, models) or ""
    lacking = () if template else ("chat_template: no model has one, so the output has none.",)
    return replace(plan, chat_template=template, warnings=(*plan.warnings, *lacking))


def _side_files(
    recipe: Recipe, plan: MergePlan, models: Sequence[Checkpoint], alignment: Alignment | None, target: Target
) -> tuple[SideFiles, list[str]]:
    """The files to copy with their changes, and warnings."""
    donor, warnings = models[recipe.donor], list[str]()
    side_files = plan_side_files(
        None if target.is_file else donor.folder,
        donor.weight_files,
        card=BASE_CARD if recipe.donor == recipe.first else FT_CARD,
    )
    warnings += _module_warnings(side_files, donor, models)
    side_files = replace(side_files, layers=plan.layers, keeps_quantization=plan.is_scaled)
    if alignment is not None:
        side_files = side_files_of(alignment, side_files)
        if target.is_file:
            warnings.append(f"{shown(target.path)} is one file: the tokenizer that goes with its rows is not written.")
        warnings += settings_warnings(alignment, recipe.donor, side_files.folder)
    stored = donor.stored or donor
    is_tied = says_tied(stored.config or {})
    if side_files.folder is None and is_tied and any(is_head(job.out.name) for job in plan.jobs()):
        warnings.append("The output has a head of its own: set tie_word_embeddings to false in its config.json.")
    if side_files.folder is not None:
        side_files, fitted = fit_config(side_files, plan.jobs(), donor, models)
        warnings += fitted
    if plan.chat_template and side_files.folder is not None:
        side_files = with_template(side_files, plan.chat_template)
        warnings += template_warnings(plan.chat_template, side_files)
    ours = (CARD, REPORT, SUMS, RECIPE, plan.index_name, *(shard.file_name for shard in plan.shards))
    copied, renamed = named_apart(side_files.copied, ours)
    check_names(file.target for file in copied)
    return replace(side_files, copied=copied), [*warnings, *renamed]


def _module_warnings(side_files: SideFiles, donor: Checkpoint, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Warnings about parts of the model with weights of their own (sentence-transformers) that differ in the models."""
    own = donor.folder
    for file in side_files.unmerged if own is not None else ():
        there = ((m.name, m.folder) for m in models if m.folder is not None and m.folder is not own)
        unlike = [name for name, folder in there if folder.has(file) and own and not same_bytes(own, folder, file)]
        if unlike:
            part = str(PurePosixPath(file).parent)
            command = f"slerp-merge {shown(donor.name)}/{shown(part)} {shown(unlike[0])}/{shown(part)} PART"
            yield (
                f"{shown(file)} of {unlike[0]} has other weights than {donor.name}'s, which are copied. Merge that "
                f"part by itself ({command}), and put PART's weights into {shown(part)} of the output."
            )


def _file_warnings(side_files: SideFiles) -> Iterable[str]:
    if side_files.unmerged:
        yield f"Copied without merging, as parts of the model: {listed(side_files.unmerged, 50)}."
    if side_files.skipped:
        yield f"Not copied: {listed(side_files.skipped, 50)}."


def _sample(model: Checkpoint, tensors: int = 1024, nbytes: int = 256) -> str:
    """SHA-256 over bytes from the middle of evenly chosen tensors; another finetune differs in nearly all of them."""
    names = sorted(model.tensors)
    places = []
    for name in names[:: -(-len(names) // tensors)]:
        info = model.tensors[name]
        count = min(nbytes // NUMPY_DTYPES[info.dtype].itemsize, info.numel)
        places.append((name, (info.numel - count) // 2, count))
    for name, start, count in places:
        model.source(name).prefetch(start, start + count)  # of a file on a server, many are fetched at a time
    digest = hashlib.sha256()
    for name, start, count in places:
        digest.update(as_bytes(model.read_new(name, start, start + count)))
        model.source(name).forget(start, start + count)
    return digest.hexdigest()
