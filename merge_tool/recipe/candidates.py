"""A recipe with other values of some parameters, as text: what a search makes, and `merge-tool run` makes again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.methods.registry import METHODS
from merge_tool.recipe.mergekit import recipe_text
from merge_tool.recipe.yaml_edit import OWN
from merge_tool.recipe.yaml_text import Text, parse_yaml, plain_value

_OF_MODEL = re.compile(r"models\.([0-9]{1,4})\.parameters\.(.+)")
_OF_TWO, _OF_MANY = "slerp", "task_arithmetic"


def plain_recipe(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's text as Python has it, whatever it says. Raises RecipeError for what is no mapping in YAML."""
    text, where = recipe_text(recipe)
    plain = plain_value(parse_yaml(Text(where), text))
    if not isinstance(plain, dict):
        raise RecipeError(f"{shown(where)}: is no recipe, expected merge_method and models, at least.")
    return plain


def recipe_of_models(models: Sequence[str | Path], method: str | None) -> dict[str, Any]:
    """The recipe of a base and finetunes, without its parameters. By default two are merged by slerp, more by
    task_arithmetic. Raises RecipeError for a method that has neither t nor weights over a base."""
    name = method or (_OF_TWO if len(models) == 2 else _OF_MANY)
    base, *fts = map(str, models)
    known = METHODS.get(name)
    if known is None:
        raise RecipeError(f"--method {shown(name)}: there is no such method. Known: {', '.join(sorted(METHODS))}.")
    if known.base == "first":
        listed = [base, *fts]
    elif known.base in ("required", "optional") and ("t" in known.shared or "weight" in known.each):
        listed = fts
    else:
        raise RecipeError(
            f"--method {name}: has no t from a base, and no weights of differences from it. Give a recipe and its "
            "space: merge-tool search RECIPE.yaml OUT --space SPACE.yaml."
        )
    return {"merge_method": name, "base_model": base, "models": [{"model": model} for model in listed]}


def default_keys(recipe: Mapping[str, Any]) -> list[str]:
    """The parameters that the recipe of `recipe_of_models` is searched over: t, or the weight of each finetune."""
    if "t" in METHODS[recipe["merge_method"]].shared:
        return ["t"]
    return [f"models.{number}.parameters.weight" for number in range(len(recipe["models"]))]


def with_settings(recipe: Mapping[str, Any], settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The recipe with these entries for its parameters, before its own: `settings` has lists of {filter, value} by a
    parameter's name, or `models.NUMBER.parameters.NAME`. Raises RecipeError for a model that is not there."""
    changed = deepcopy(dict(recipe))
    for key, entries in settings.items():
        if match := _OF_MODEL.fullmatch(key):
            own_scope = _of_entry(changed, key, int(match[1]))
            own_scope.update(_setting(match[2], entries, own_scope))
            continue
        for scope in _scopes(changed):
            if key in scope:
                scope.update(_setting(key, entries, scope))
        top = changed.get("parameters")
        changed["parameters"] = top = top if isinstance(top, dict) else {}
        if key not in top:
            top.update(_setting(key, entries, {}))
    own = changed.get(OWN)
    if isinstance(own, dict) and isinstance(texts := own.get("set"), list):  # these would count before
        own["set"] = [t for t in texts if str(t).partition("=")[0].strip().removeprefix("parameters.") not in settings]
    return changed


def without_parameters(text: str) -> Any:
    """What a recipe's text says beside parameters and our options: for a comparison."""

    def rest(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: rest(value) for key, value in part.items() if key not in ("parameters", OWN)}
        return list(map(rest, part)) if isinstance(part, list) else part

    return rest(plain_value(parse_yaml(Text("the recipe"), text))) if text else None


def with_options(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with options of the command line, under the key that `merge-tool run` reads them from."""
    if not options:
        return dict(recipe)
    own = recipe.get(OWN)
    return {**recipe, OWN: {**(own if isinstance(own, dict) else {}), **options}}


def as_text(recipe: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(dict(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _of_entry(recipe: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    """The parameters of one entry of `models`."""
    entries = recipe.get("models")
    if not isinstance(entries, list) or not 0 <= number < len(entries) or not isinstance(entries[number], dict):
        has = f"{len(entries)} entries" if isinstance(entries, list) else "no entries"
        raise RecipeError(f"'{shown(key)}': the recipe has {has} in models, the first is models.0.")
    own = entries[number].get("parameters")
    entries[number]["parameters"] = own = own if isinstance(own, dict) else {}
    return own


def _setting(name: str, entries: Sequence[Mapping[str, Any]], around: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter with these entries, and for all other tensors what it was."""
    if all("filter" not in entry for entry in entries):
        return {name: entries[0]["value"]}
    if any("filter" not in entry for entry in entries) or name not in around:
        return {name: [dict(entry) for entry in entries]}
    before = around[name]
    is_list = isinstance(before, list) and any(isinstance(item, dict) for item in before)
    rest = before if is_list else [before] if isinstance(before, dict) else [{"value": before}]
    return {name: [*map(dict, entries), *rest]}


def _scopes(part: Any) -> Iterator[dict[str, Any]]:
    """Every `parameters` mapping in a recipe."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "parameters" and isinstance(value, dict):
                yield value
            elif key != OWN:
                yield from _scopes(value)
    elif isinstance(part, list):
        for item in part:
            yield from _scopes(item)
