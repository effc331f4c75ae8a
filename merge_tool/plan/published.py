"""The recipe as it is written to the output: the user's local paths are names there, and it can be run again.

Names replace paths in the parsed text, place by place; the rest stays as it was, byte for byte. Models of the Hub keep
their ids. `merge-tool run mergekit_config.yml OUT --models-dir FOLDER` finds the others by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from merge_tool.checkpoint.addresses import is_address, is_store, is_url, store_path
from merge_tool.checkpoint.folder import Folder, distinct_names, is_there, snapshot_of
from merge_tool.checkpoint.hub import hub_id, meant
from merge_tool.errors import CheckpointError, RecipeError, shown
from merge_tool.models.lora import lacking, parts
from merge_tool.plan.plan import MergePlan
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.options import as_json
from merge_tool.recipe.pair import PairOptions, is_pair
from merge_tool.recipe.recipe import Recipe, label_t
from merge_tool.recipe.yaml_edit import replace_scalars, with_own, without_own


def published(recipe: Recipe) -> str:
    """The recipe's text with names in place of local paths, without our options; an empty text if it has none."""
    names = local_names(recipe)
    new = {place.end: place.lead + str(_named(place.ref, names)) for place in recipe.places}
    return without_own(replace_scalars(recipe.text, new)) if recipe.text else ""


def local_names(recipe: Recipe) -> dict[str, str]:
    """The name of each local model and adapter, by its path in the recipe, and of those on object stores, whose buckets
    are nobody's business either. A name with a / begins with `./`: it must not be taken for an id of the Hub."""
    places = {path: _place(path) for path in _all_parts(recipe) if is_store(path) or is_there(path)}
    names = distinct_names(places.values())
    addresses = {path: path.partition("?")[0] for path in _all_parts(recipe) if is_url(path)}  # without a signature
    return {path: _local(names[place], place) for path, place in places.items()} | addresses


def _place(path: str) -> Path:
    """A local path; of a model on an object store the path that it is called by."""
    return Path("/", store_path(path)) if is_store(path) else Path(path)


def _local(name: str, path: Path) -> str:
    return name if "/" not in name or Folder(snapshot_of(path)).is_of_hub else f"./{name}"


def _named(ref: ModelRef, names: dict[str, str]) -> ModelRef:
    lora = ref.lora and "+".join(names.get(path, path) for path in parts(ref.lora))
    path = "+".join(names.get(path, path) for path in parts(ref.path))
    return replace(ref, path=path, lora=lora)


def recipe_file(plan: MergePlan, output: int) -> str:
    """The text of mergekit_config.yml: the recipe with the options and values that this output was made with."""
    own: dict[str, Any] = as_json(plan.recipe.options)
    if words := plan.recipe.outputs[output].words:
        own["set"] = [f"{key}={label_t(value)}" for key, value in words.items()]
    if is_extrapolated(plan, output):
        own["extrapolate"] = True
    return with_own(plan.text, own)


def is_extrapolated(plan: MergePlan, output: int) -> bool:
    """Whether some t of this output is below 0 or above 1."""
    recipe, words = plan.recipe, plan.recipe.outputs[output].words
    if is_pair(recipe):
        ts = [words["t"], *(value for rule in PairOptions(**recipe.words).rules for value in rule.values)]
    else:
        one = replace(recipe, outputs=(recipe.outputs[output],))
        settings = [scope["t"] for scope in one.scopes() if "t" in scope and "t" in plan.method.fractions]
        ts = [value for setting in settings for choice in setting.choices for value in choice.values]
    return any(not 0 <= t <= 1 for t in ts)


def hub_names(recipe: Recipe) -> list[str]:
    """The models and adapters as the Hub's metadata have them, each once: ids of the Hub, and for local ones the id
    that --id gives, else the name, which must not look like an id."""
    names, ids = local_names(recipe), _ids(recipe)
    return list(dict.fromkeys(ids.get(path) or _hub_name(path, names) for path in _all_parts(recipe)))


def _hub_name(path: str, names: Mapping[str, str]) -> str:
    if is_url(path):
        return PurePosixPath(names[path]).stem
    if path in names:
        is_id = names[path].count("/") == 1 and not names[path].startswith("./")
        return names[path].partition("@")[0] if is_id else names[path].removeprefix("./").replace("/", "-")
    repo = hub_id(path)
    return repo[0] if repo else path


def check_ids(recipe: Recipe) -> None:
    """Raise RecipeError for an --id of a model that is not there."""
    known = _callable(recipe)
    for text in recipe.options.ids:
        if (name := text.partition("=")[0]) not in known:
            raise RecipeError(f"--id {shown(text)}: no model is called {shown(name)}. Known: {', '.join(known)}.")


def _ids(recipe: Recipe) -> dict[str, str]:
    known = _callable(recipe)
    pairs = (text.partition("=") for text in recipe.options.ids)
    return {known[name]: repo for name, _, repo in pairs if name in known}


def _callable(recipe: Recipe) -> dict[str, str]:
    """The paths of models and adapters by what --id may call them: base, ft, model-1 ..., or the name in messages."""
    names = {name.removeprefix("./"): path for path, name in local_names(recipe).items()}
    numbered = {name: parts(str(ref))[0] for name, ref in zip(recipe.names, recipe.models, strict=True)}
    return {**names, **numbered}


def _all_parts(recipe: Recipe) -> list[str]:
    return [path for ref in recipe.models for path in parts(str(ref))]


def check_places(recipe: Recipe) -> None:
    """Raise CheckpointError for a local model of a recipe that is not there, with its line: paths are relative to the
    current folder. One that is beside the recipe is not looked up on the Hub, even if it has the form of an id."""
    for path in _all_parts(recipe) if recipe.text else ():
        beside = recipe.folder is not None and Path(recipe.folder, path).exists()
        if is_there(path) or is_address(path) or (hub_id(path) is not None and not beside):
            continue
        ends = [place.end for place in recipe.places if path.partition("@")[0] in str(place.ref)]
        line = f", line {recipe.text[: ends[0]].rstrip().count(chr(10)) + 1}" if ends else ""
        hint = (
            f" It is in the recipe's folder: run the command there, or give --models-dir {shown(recipe.folder)}."
            if beside
            else meant(lacking(path))
        )
        raise CheckpointError(
            f"{shown(recipe.where)}{line}: {shown(path)}: no such file or folder. Paths are relative to the current "
            f"folder, {shown(Path.cwd())}.{hint}"
        )
