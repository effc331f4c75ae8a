"""Recipe + headers -> MergePlan: the offset of every output byte, or every mismatch at once. Reads no weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from merge_tool._version import __version__
from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.alike import Shelf
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import RecipeError, listed, shown
from merge_tool.methods.passes import check_spec
from merge_tool.methods.registry import METHODS
from merge_tool.methods.steps import Method
from merge_tool.models.heads import lone_head
from merge_tool.models.layer_counts import num_layers
from merge_tool.models.naming import natural_key
from merge_tool.models.renaming import find_renaming, renaming_warnings
from merge_tool.plan.expand import Expansion, OutputTensor
from merge_tool.plan.fit import Fit, fit, no_match
from merge_tool.plan.layout import lay_out, output_dtype, output_stem
from merge_tool.plan.plan import MergePlan, TensorJob, Values, words_of
from merge_tool.plan.published import published
from merge_tool.plan.scaled import ScaledPlan, Scaling, plan_scaled
from merge_tool.plan.stack_fit import check_stack
from merge_tool.recipe.options import as_json
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.settings import meant
from merge_tool.vocabulary.rows import rows_note

_SCALES = "scales of the merged values"
_CALIBRATED = "scale of activations: the base's"
_EMPTY = "empty: copied"
_ONE_HAS_IT = "only one model has it: copied"


def plan_merge(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    *,
    methods: Mapping[str, Method] = METHODS,
    single_file: str | None = None,
) -> MergePlan:
    """Plan the merge of `models`, opened in the recipe's order. `single_file` names the one file to write, if the
    output is one file.

    Raises MismatchError with all mismatches at once; RecipeError if the donor of files has none, if a pattern matches
    no tensor, or if a parameter lacks a value for some tensors.
    """
    method, first = methods[recipe.method], models[recipe.first]
    donor = models[recipe.donor]
    if donor.folder is None and first.folder is not None:
        raise RecipeError(
            f"--files-from {shown(recipe.options.files_from)}: {donor.name} is a single file, it has no other files to "
            "copy."
        )
    renamings = {k: find_renaming(first, model) for k, model in enumerate(models) if k != recipe.first}
    counts = [num_layers((model.stored or model).config) for model in models]
    names = [model.tensors.keys() for model in models]
    expansion = Expansion(recipe, method, names, renamings, counts, lone_head(first))
    fitted = fit(recipe, expansion, models)
    check_stack(recipe, expansion, models, fitted.names)
    scaled = plan_scaled(recipe, method, models)
    jobs = _Jobs(recipe=recipe, method=method, models=models, expansion=expansion, kept=fitted.kept, scaled=scaled)
    stem, max_bytes = (
        output_stem(first, recipe.options.variant),
        None if single_file else recipe.options.max_shard_bytes,
    )
    shards = lay_out(jobs.infos(fitted), first, stem, max_bytes, single_file, jobs)
    expansion.check_values()
    warnings = [
        *recipe.warnings,
        *(w for k, renaming in renamings.items() if k in recipe.sources
          for w in renaming_warnings(first, models[k], renaming, {*fitted.kept, *fitted.unchosen})),
        *fitted.warnings,
        *_beyond(expansion, models),
        *(scaled.warnings() if scaled else ()),
        *_idle_choices(recipe, expansion, fitted.names),
    ]  # fmt: skip
    stacked, language = expansion.stacked_layers(), expansion.language_stack()
    warnings += [
        f"The layers of {shown(stack)} are stacked anew, and config.json is not changed for them: set their number, "
        f"and what it says layer by layer. The output has {len(layers):,}."
        for stack, layers in stacked.items()
        if stack != language
    ]
    text = published(recipe)
    plan = MergePlan(
        recipe=recipe,
        method=method,
        names=tuple(model.name for model in models),
        shards=shards,
        stem=stem,
        facts=_facts(recipe, models, stem, text, single_file),
        warnings=tuple(dict.fromkeys(warnings)),
        layers=stacked.get(language or "", ()),
        num_layers=len(stacked.get(language or "", ())) or counts[recipe.donor],
        text=text,
        num_scheduled=expansion.num_scheduled,
        is_scaled=scaled is not None,
    )
    _check_outputs_differ(plan)
    return plan


@dataclass(slots=True)
class _Jobs:
    """Makes the job of each output tensor: its sources and parameters."""

    recipe: Recipe
    method: Method
    models: Sequence[Checkpoint]
    expansion: Expansion
    kept: Mapping[str, str]
    scaled: ScaledPlan | None
    _shared: dict[str, tuple[TensorJob, Scaling]] = field(default_factory=dict)
    _alike: Shelf = field(default_factory=Shelf)
    _sides: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)  # one object for all that have them
    _checked: set[tuple[int, int, bool]] = field(default_factory=set)

    def infos(self, fitted: Fit) -> list[TensorInfo]:
        """The output's tensors in natural order, in the dtypes that they will have."""
        stored = {info.name: info for info in (self.scaled.infos() if self.scaled else ())}
        names: Sequence[str] = fitted.names
        if stored.keys() - set(names):
            names = sorted(sorted({*names, *stored}), key=natural_key)
        return [stored.get(name) or self._info(name) for name in names]

    def _info(self, name: str) -> TensorInfo:
        model, own = self._sources(self.expansion.tensor(name))[0]
        info, stored = self.models[model].tensors[own], self.models[model].stored_dtype(own)
        dtype = stored if name in self.kept else output_dtype(self.recipe, stored)
        return info if (info.name, info.dtype) == (name, dtype) else replace(info, name=name, dtype=dtype)

    def _sources(self, tensor: OutputTensor) -> tuple[tuple[int, str], ...]:
        if tensor.name not in self.kept:
            return self.expansion.sources(tensor)
        return (self.expansion.origin(tensor),)

    def __call__(self, number: int, out: TensorInfo) -> TensorJob:
        if self.scaled is not None:
            if (source := self.scaled.scaled.activations.get(out.name)) is not None:
                return TensorJob(number, out, (source,), (self.recipe.first,), note=_CALIBRATED)
            if (weight := self.scaled.weights.get(out.name)) is not None:
                return self._in_8_bits(number, out, weight, self.scaled)
        return self._plain(number, out)

    def _plain(self, number: int, out: TensorInfo) -> TensorJob:
        tensor = self.expansion.tensor(out.name)
        origin = self._sources(tensor)
        sources = self._alike.sources(tuple(self.models[k].source(name) for k, name in origin))
        sides = self._sides.setdefault(sides := tuple(k for k, _ in origin), sides)
        if (reason := self.kept.get(out.name)) is not None:
            return TensorJob(number, out, sources, sides, note=reason)
        if out.numel == 0:
            return TensorJob(number, out, sources[:1], sides[:1], note=_EMPTY)
        exact = sources[0].info.dtype not in FLOAT_DTYPES
        if exact and len(sources) > 1:
            return TensorJob(number, out, sources, sides, exact=True)
        has_base = self.expansion.has_base(tensor)
        values = self.expansion.values(tensor)
        job = TensorJob(
            number=number,
            out=out,
            sources=sources,
            sides=sides,
            values=values,
            has_base=has_base,
            note=rows_note(sources[0]),
        )
        if len(sources) == 1 and (exact or self.method.steps is None or all(map(_is_plain_copy, values))):
            return replace(job, values=(), note=_ONE_HAS_IT)
        self._check(job)
        return job

    def _check(self, job: TensorJob) -> None:
        """Raise RecipeError for parameters that the method cannot work with, before anything is read."""
        if self.expansion.lacks_values:  # `check_values` names all tensors that lack one
            return
        for output, values in enumerate(job.values):
            key = id(values), len(job.sources), job.has_base
            if key in self._checked:
                continue
            self._checked.add(key)
            try:
                check_spec(self.method, spec := job.spec(0, output))
            except ValueError as e:
                where = self._where(str(e))
                raise RecipeError(f"{where}: {e} (The first such tensor: {shown(job.out.name)}.)") from e
            if self.method.granularity(spec) != self.method.granularity(job.spec(0)):
                raise RecipeError(
                    f"{shown(job.out.name)}: is merged by rows in one output and as a whole in another, which is not "
                    "one pass. Make them one after the other."
                )

    def _where(self, problem: str) -> str:
        """Where the recipe sets the parameters that a method's message names."""
        words = set(re.findall(r"\w+", problem))
        settings = (setting for scope in self.recipe.scopes() for key, setting in scope.items() if key in words)
        lines = sorted({choice.line for setting in settings for choice in setting.choices if choice.line})
        return shown(self.recipe.where) + (f", line {listed(lines)}" if lines else "")

    def _in_8_bits(self, number: int, out: TensorInfo, weight: str, scaled: ScaledPlan) -> TensorJob:
        """Codes and scales are treated as the weight that they belong to."""
        info = self.models[self.recipe.first].tensors[weight]
        reason = self.kept.get(weight, "" if info.numel else _EMPTY)
        if reason:
            return TensorJob(number, out, (scaled.kept(out.name),), (self.recipe.first,), note=reason)
        if weight not in self._shared:
            job = self._plain(number, info)
            self._shared[weight] = job, scaled.scaling(weight, job.sources[1])
        job, scaling = self._shared[weight]
        note = "" if out.name == weight else _SCALES
        return replace(job, number=number, out=out, note=note, scaling=scaling)


def _is_plain_copy(values: Values) -> bool:
    """Whether a single input is copied unchanged."""
    return set(values.each) <= {"scale"} and all(scale in (None, 1, 1.0) for scale in values.each.get("scale", ()))


def _idle_choices(recipe: Recipe, expansion: Expansion, names: Sequence[str]) -> Iterator[str]:
    """Warnings about patterns without effect. If the recipe is strict, a pattern that matches no tensor is a
    RecipeError."""
    for key, choice in expansion.idle_choices():
        assert choice.pattern is not None
        matches = any(map(choice.pattern.matches, names))
        if recipe.is_strict:
            option = f"--{key}-for {shown(choice)}"
            if not matches:
                raise RecipeError(no_match(option, choice.pattern, names))
            yield f"{option} has no effect: its tensors are not merged, or have their {key} from one before it."
        elif not matches and not any(map(choice.pattern.matches, chain.from_iterable(expansion.known))):
            yield (
                f"The filter '{shown(choice.pattern.text)}' of '{shown(key)}' occurs in no tensor's name."
                f"{meant(choice.pattern.text, names)} A filter is a part of the name, not a glob or a regular "
                "expression."
            )


def _beyond(expansion: Expansion, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Warnings about layers that lie outside the stack by a model's config.json."""
    for number, stack, more in expansion.beyond():
        depth = expansion.depth(number, stack)
        names = f"{stack}{depth}" if more == 1 else f"{stack}{depth} to {stack}{depth + more - 1}"
        yield (
            f"{shown(names)} of {models[number].name} {'lies' if more == 1 else 'lie'} outside the layers: its "
            f"config.json says that it has {depth:,}. Tensors outside the layers are merged with the value for the "
            "rest; in a stack they come from the last slice and are numbered behind the layers."
        )


def _check_outputs_differ(plan: MergePlan) -> None:
    if len(plan.labels) > 1 and not any(len(set(job.values)) > 1 for job in plan.jobs()):
        values = words_of([output.words for output in plan.recipe.outputs])
        key = " and ".join(key for key, texts in values.items() if len(set(texts)) > 1)
        raise RecipeError(
            f"No tensor has its {key} from the several values given, so all outputs would be the same. Give one value."
        )


# ------------------------------------------------------------------------------------------------ facts


def _facts(
    recipe: Recipe, models: Sequence[Checkpoint], stem: str, text: str, single_file: str | None
) -> dict[str, Any]:
    """The facts that decide the output's bytes, in a form that can be compared when a merge is resumed."""
    options = as_json(recipe.options, all_of_them=True)
    if single_file:
        options["max_shard_bytes"] = None
    return {
        "version": __version__,
        "method": recipe.method,
        **words_of([output.words for output in recipe.outputs]),
        **recipe.words,
        **({"recipe_sha256": hashlib.sha256(text.encode()).hexdigest()} if text else {}),
        **options,
        "one_file": single_file is not None,
        "stem": stem,
        **{name: input_facts(model) for name, model in zip(recipe.names, models, strict=True)},
    }


def input_facts(model: Checkpoint) -> dict[str, Any]:
    """The facts that identify an input, as far as headers show it."""
    files = {f.file_name: {"size": f.source.size, "header_sha256": f.header_sha256} for f in model.files}
    return {"name": model.name, "files": files}
