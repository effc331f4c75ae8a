"""The request for a search (models or a recipe, a space, options) -> the recipe of any candidate, and the facts that
must be equal to continue a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_tool.api import plan_recipe
from merge_tool.checkpoint.folder import is_there
from merge_tool.errors import RecipeError, shown
from merge_tool.methods.registry import METHODS
from merge_tool.models.lora import parts
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.stacks import Stacks
from merge_tool.recipe.candidates import (
    as_text,
    default_keys,
    plain_recipe,
    recipe_of_models,
    with_options,
    with_settings,
)
from merge_tool.recipe.mergekit import make_options, parse_recipe
from merge_tool.recipe.options import as_json
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.space import Group, Space, read_space

BANDS = 4  # of the default space
# Parts of names, and what they belong to in models of many families. A name belongs to the first part in it.
_ATTENTION = (
    "self_attn", "self_attention", "linear_attn", "cross_attn", "encoder_attn", "attention.", ".attn.", "SelfAttention",
    "EncDecAttention",
)  # fmt: skip
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "DenseReluDense", ".ffn.", "intermediate.dense", "output.dense")
Models = Sequence[str | Path] | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class SearchPlan:
    """The recipe without its parameters, the space, and the plan of a first candidate."""

    base: Mapping[str, Any]
    space: Space
    num_layers: int
    extrapolate: bool
    first: Prepared
    facts: Mapping[str, Any]

    def recipe_of(self, values: Mapping[str, Any], name: str = "a candidate") -> Recipe:
        """The recipe with a value for each knob. Raises RecipeError."""
        return parse_recipe(self.text_of(values), name, METHODS, extrapolate=self.extrapolate)

    def text_of(self, values: Mapping[str, Any]) -> str:
        rounded = {name: _rounded(value) for name, value in values.items()}
        return as_text(with_settings(self.base, self.space.settings(rounded, self.num_layers)))


def plan_search(
    models: Models,
    out: Path,
    *,
    space: str | Path | Mapping[str, Any] | None,
    method: str | None,
    options: Mapping[str, Any],
    memory_bytes: int | None,
    jobs: int | None,
    read_samples: bool,
) -> SearchPlan:
    """Plan a search from headers (with `read_samples` also from a few bytes of weights). Raises a MergeToolError if the
    first candidate would fail, or if the space does not fit the models."""
    given = dict(options)
    extrapolate = bool(given.pop("extrapolate", False))
    asked = None if space is None else read_space(space)
    base = _base(models, method or (asked.method if asked else None))
    own = {**as_json(make_options(**given)), **({"extrapolate": True} if extrapolate else {})}
    base = with_options(base, own)
    if asked is None and not _is_of_models(models):
        raise RecipeError("--space is missing: a recipe is searched over the parameters that SPACE.yaml names.")
    middles = _middles(asked, base)
    recipe = _parsed(as_text(with_settings(base, middles)), asked, extrapolate)
    recipe = replace(recipe, is_strict=_is_of_models(models))  # different vocabularies are an error, as for a pair
    first = plan_recipe(recipe, out, memory_bytes=memory_bytes, jobs=jobs, read_samples=read_samples)
    merged = [job.out.name for job in first.plan.jobs() if not job.is_copied]
    found = asked or Space({key: default_groups(merged) for key in default_keys(base)}, where="the default space")
    if asked is not None:
        found = found.resolved([job.out.name for job in first.plan.jobs()])
        _check_groups(found, merged)
    plan = SearchPlan(
        base=_pinned(base, recipe, first),
        space=found,
        num_layers=_num_layers(first.plan),
        extrapolate=extrapolate,
        first=first,
        facts=_facts(first, found),
    )
    for end in (0, 1):  # values that the method refuses are an error before anything is merged
        values = {name: (knob.choices or (knob.low, knob.high))[-end] for name, knob in found.knobs.items()}
        _parsed(plan.text_of(values), asked, extrapolate)
    return plan


def _is_of_models(models: Models) -> bool:
    return not isinstance(models, str | Path | Mapping)


def _base(models: Models, method: str | None) -> dict[str, Any]:
    if isinstance(models, str | Path | Mapping):
        if method is not None:
            raise RecipeError("--method goes with BASE and FT; a recipe has its own.")
        return plain_recipe(models)
    if len(models) < 2:
        raise RecipeError(f"{len(models)} models are given, expected BASE and at least one FT.")
    return recipe_of_models(models, method)


def _middles(asked: Space | None, base: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    if asked is None:
        return {key: [{"value": 0.5}] for key in default_keys(base)}
    return {key: [{"value": groups[0].knobs(key)[0].middle}] for key, groups in asked.parameters.items()}


def _parsed(text: str, asked: Space | None, extrapolate: bool) -> Recipe:
    """The recipe in a text that was made from a space. Its errors name the space, not the lines of this text."""
    try:
        return parse_recipe(text, "the recipe", METHODS, extrapolate=extrapolate)
    except RecipeError as e:
        if asked is None:
            raise
        raise RecipeError(f"{shown(asked.where)}: makes a recipe that cannot be used. {e}") from e


def default_groups(names: Iterable[str]) -> tuple[Group, ...]:
    """Attention, MLP and the rest, each in four smooth bands, if the tensors' names show such groups."""
    left, groups = list(names), list[Group]()
    for name, known in (("attention", _ATTENTION), ("mlp", _MLP)):
        filters = []
        for part in known:
            if any(part in tensor for tensor in left):
                filters.append(part)
                left = [tensor for tensor in left if part not in tensor]
        if filters:
            groups.append(Group(name, tuple(filters), BANDS))
    if left or not groups:
        groups.append(Group("rest", (), BANDS))
    return tuple(groups)


def _check_groups(space: Space, merged: Sequence[str]) -> None:
    """Raise RecipeError for a group without tensors."""
    for key, groups in space.parameters.items():
        left = list(merged)
        for group in sorted(groups, key=lambda group: not group.filters):
            rest = [name for name in left if group.filters and not any(part in name for part in group.filters)]
            if len(rest) == len(left):
                what = f"the group '{shown(group.name)}' of '{shown(key)}'" if group.name else f"'{shown(key)}'"
                raise RecipeError(
                    f"{shown(space.where)}: {what} has no tensor: other groups have all of them, or they are not "
                    "merged. Leave it out."
                )
            left = rest


def _num_layers(plan: MergePlan) -> int:
    stacks = Stacks(job.out.name for job in plan.jobs())
    return max(map(stacks.num_layers, stacks.of_layers), default=0)


def _pinned(base: Mapping[str, Any], recipe: Recipe, first: Prepared) -> dict[str, Any]:
    """The recipe with the Hub's models at their commits, because their newest revision may change during the search."""
    pins = {
        str(ref): pinned
        for ref, pinned in zip(recipe.models, first.pinned, strict=True)
        if not all(map(is_there, parts(str(ref))))
    }

    def replaced(part: Any, key: str = "") -> Any:
        if isinstance(part, dict):
            return {name: replaced(value, name) for name, value in part.items()}
        if isinstance(part, list):
            return [replaced(item, key) for item in part]
        is_model = isinstance(part, str) and key in ("model", "base_model", "models", "tokenizer_source", "source")
        return pins.get(part, part) if is_model else part

    return dict(replaced(dict(base)))


def _facts(first: Prepared, space: Space) -> dict[str, Any]:
    merged = {key: value for key, value in first.plan.facts.items() if key != "version"}
    return {**merged, "samples": list(first.samples), "space": space.as_json()}


def _rounded(value: Any) -> Any:
    """Four digits: a recipe that people can read. The recipe is what is merged and scored."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
