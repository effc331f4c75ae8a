"""A recipe of any number of models, from mergekit's YAML or Python: planned and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import RecipeError, listed
from merge_tool.methods.registry import STEPS_METHODS
from merge_tool.methods.steps import StepsMethod
from merge_tool.models.renaming import find_renaming, is_derived, renaming_warnings
from merge_tool.plan.expand import Ask, Keeping, expand_keeping
from merge_tool.plan.fit import NOT_CHOSEN, NOT_IN_ALL, NOTHING_CHOSEN, find_unchosen
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.plan_models import plan_models
from merge_tool.plan.prepare import Asked, Prepared, prepare_plan
from merge_tool.plan.target import Target
from merge_tool.recipe.mergekit import parse_recipe, recipe_text
from merge_tool.recipe.models_recipe import PAIRS, ModelsRecipe
from merge_tool.recipe.recipe import Recipe
from merge_tool.vocabulary.align import join_vocabularies
from merge_tool.vocabulary.chat_template import choose_template

Methods = Mapping[str, StepsMethod]


def prepare_models(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    options: Recipe,
    *,
    methods: Methods | None = None,
    seed: int = 0,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    report_path: Path | None = None,
    read_samples: bool = False,
    before_fetch: Callable[[Prepared], None] = lambda planned: None,
) -> Prepared:
    """Read the recipe, open its models, plan the merge and check all that can be checked; writes nothing.

    Of `options` counts what the recipe cannot say; `read_samples` and `before_fetch` are as in `prepare`.
    """
    known = {**STEPS_METHODS, **(methods or {})}
    text, where = recipe_text(recipe)
    asked = parse_recipe(text, where, known, extrapolate=options.extrapolate)
    options = replace(options, dtype=asked.out_dtype or asked.dtype)
    target = Target(Path(out))

    def plan(models: Sequence[Checkpoint]) -> MergePlan:
        return _plan(options, asked, models, known, seed, target)

    return prepare_plan(
        Asked([str(ref) for ref in asked.models], target, options, partial(join_vocabularies, asked), plan),
        memory_bytes=memory_bytes,
        jobs=jobs,
        report_path=report_path,
        read_samples=read_samples,
        before_fetch=before_fetch,
    )


def _plan(
    options: Recipe,
    asked: ModelsRecipe,
    models: Sequence[Checkpoint],
    methods: Methods,
    seed: int,
    target: Target,
) -> MergePlan:
    donor = models[asked.donor]
    renamings = {k: find_renaming(donor, model) for k, model in enumerate(models) if model is not donor}
    may_lack = is_derived if options.on_missing == "error" else lambda name: True
    keeping = Keeping(partial(find_unchosen, options), NOT_CHOSEN, NOT_IN_ALL, may_lack)
    names = [model.tensors.keys() for model in models]
    asks, left_out = expand_keeping(asked, names, methods, renamings, keeping)
    if all(ask.kept for ask in asks):
        raise RecipeError(NOTHING_CHOSEN)
    method = None if asked.method in PAIRS else methods[asked.method]
    plan = plan_models(options, asked, asks, models, method, seed=seed, single_file=target.single_file)
    merged = ((models[k], renaming) for k, renaming in renamings.items() if k in asked.sources)
    told = [text for model, renaming in merged for text in renaming_warnings(donor, model, renaming, ())]
    told += _missing_warnings(asks, left_out)
    template = _template(asked, models)
    if asked.chat_template and not template:
        told.append("chat_template: no model has one, so the output has none.")
    return replace(plan, chat_template=template, warnings=(*plan.warnings, *dict.fromkeys(told)))


def _missing_warnings(asks: Sequence[Ask], left_out: Sequence[str]) -> Iterator[str]:
    """What is kept and left out although nobody chose it tensor by tensor."""
    for names, what in (
        ([ask.name for ask in asks if ask.kept == NOT_IN_ALL], "are not in all models; the base's are kept"),
        (left_out, "are not in the base; they are left out"),
    ):
        if names:
            yield f"{len(names):,} tensors {what}: {listed(names, 50)}."


def _template(asked: ModelsRecipe, models: Sequence[Checkpoint]) -> str:
    """The chat template to write; nothing if the one that is copied stays."""
    if asked.chat_template is None:
        return ""
    return choose_template(asked.chat_template, models, asked.donor) or ""
