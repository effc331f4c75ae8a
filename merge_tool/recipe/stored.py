"""A recipe as JSON, and back: for the plan file of a merge on many hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_tool.methods.steps import Method
from merge_tool.recipe.average import is_average_label, output_of
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.options import Options, as_json
from merge_tool.recipe.pair import pair
from merge_tool.recipe.recipe import Recipe


def to_json(recipe: Recipe, models: Sequence[str], places: Sequence[str]) -> dict[str, Any]:
    """The recipe, with `models` as names of its models: absolute paths, and models of the Hub at their commits.
    `places` are the same for each place of its text that names a model; those of the Hub as they are there."""
    return {
        "models": list(models),
        "places": list(places),
        "text": recipe.text,
        "where": recipe.where,
        "words": dict(recipe.words),
        "options": as_json(recipe.options),
        **_averages(recipe),
        "values": {key: list(dict.fromkeys(o.words[key] for o in recipe.outputs)) for key in recipe.outputs[0].words},
    }


def _averages(recipe: Recipe) -> dict[str, Any]:
    """The outputs that are averages, by label and weights: not every combination of the weights is one."""
    if not all(is_average_label(label) for label in recipe.labels):
        return {}
    return {"averages": [[output.label, list(output.words.values())] for output in recipe.outputs]}


def from_json(stored: Mapping[str, Any], methods: Mapping[str, Method]) -> Recipe:
    """The recipe that `to_json` stored. Raises RecipeError, and KeyError, TypeError or ValueError for anything else."""
    if not stored["text"]:
        base, ft = stored["models"]
        return pair(base, ft, stored["values"]["t"], extrapolate=True, **stored["words"], **stored["options"])
    from merge_tool.recipe.mergekit import make_options, parse_recipe

    options = {**as_json(Options(), all_of_them=True), **stored["options"]}
    recipe = parse_recipe(
        stored["text"],
        stored["where"],
        methods,
        extrapolate=True,
        values={} if stored.get("averages") else stored["values"],
        options=make_options(**options),
        given=frozenset(options),
    )
    if averages := stored.get("averages"):
        recipe = replace(recipe, outputs=tuple(output_of(label, weights) for label, weights in averages))
    if len(stored["models"]) != len(recipe.models):
        raise ValueError("another number of models")
    places = zip(recipe.places, map(ModelRef, stored["places"]), strict=True)
    return replace(
        recipe,
        models=tuple(map(ModelRef, stored["models"])),
        places=tuple(replace(place, ref=ref) for place, ref in places),
    )
