"""merge_models(...): a recipe of any number of models, from mergekit's YAML or Python, to a merged model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_tool.api import MergeReport, Running, carry_out
from merge_tool.chat_template import choose_template
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import RecipeError, listed, reason, shown
from merge_tool.joined_vocab import join_vocabularies
from merge_tool.matching import NOT_CHOSEN, NOT_IN_ALL, NOTHING_CHOSEN, find_unchosen
from merge_tool.methods.many import STEPS_METHODS
from merge_tool.methods.steps import StepsMethod
from merge_tool.naming import is_derived
from merge_tool.output import Target
from merge_tool.plan import MergePlan
from merge_tool.plan_models import plan_models
from merge_tool.prepare import Asked, Prepared, prepare_plan
from merge_tool.recipe import DEFAULT_MAX_SHARD_BYTES, Recipe
from merge_tool.recipes.expand import Ask, Keeping, expand_keeping
from merge_tool.recipes.mergekit import parse_recipe
from merge_tool.recipes.models_recipe import PAIRS, ModelsRecipe
from merge_tool.renaming import find_renaming, renaming_warnings

_LARGEST_RECIPE = 1_000_000  # bytes
Methods = Mapping[str, StepsMethod]


def merge_models(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    methods: Methods | None = None,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    on_mismatch: str = "error",
    on_missing: str = "error",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    extrapolate: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    report_path: str | Path | None = None,
    on_warning: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> MergeReport:
    """Merge the models that `recipe` names into `out`, tensor by tensor, in bounded memory.

    `recipe` is a YAML file as mergekit reads it, or the same as a mapping. `methods` are further ones by name, beside
    the built-in ones (docs/adding_a_method.md). `seed` decides the random bits of the methods that have any. The rest
    is as in `merge`.

    Raises a MergeToolError for whatever the user can mend; `out` is then as it was, or can be continued with the same
    call.

    >>> report = merge_models("ties.yaml", "merged")  # doctest: +SKIP
    """
    options = Recipe(
        max_shard_bytes=max_shard_bytes,
        on_mismatch=on_mismatch,
        extrapolate=extrapolate,
        only=only,
        exclude=exclude,
        on_missing=on_missing,
    )
    plan_it = partial(
        prepare_models, recipe, out, options, methods=methods, seed=seed, memory_bytes=memory_bytes, jobs=jobs
    )
    return carry_out(plan_it, Running(overwrite, check_resumed, report_path, on_warning, on_start, on_progress))


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
    text, where = _recipe_text(recipe)
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


def _recipe_text(recipe: str | Path | Mapping[str, Any]) -> tuple[str, str]:
    """The recipe as YAML, and what to call it in messages."""
    if isinstance(recipe, Mapping):
        import yaml

        try:
            return yaml.safe_dump(dict(recipe), sort_keys=False), "the recipe"
        except yaml.YAMLError as e:
            raise RecipeError(f"The recipe holds what YAML cannot: {shown(e)}. Give texts, numbers and lists.") from e
    path = Path(recipe)
    try:
        if path.stat().st_size > _LARGEST_RECIPE:
            raise RecipeError(
                f"{shown(path)}: has {path.stat().st_size:,} bytes, at most {_LARGEST_RECIPE:,} are read."
            )
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, ValueError) as e:
        raise RecipeError(f"{shown(path)}: cannot be read ({reason(e)}).") from e
