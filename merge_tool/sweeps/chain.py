"""A file of several recipes: each is a merge of its own, one after the other. The outputs of named parts stay in
OUT.parts until the last part that uses them is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from merge_tool.checkpoint.folder import is_there
from merge_tool.errors import CheckpointError, OutputError, reason, shown
from merge_tool.plan.published import check_places
from merge_tool.recipe.parts import Part
from merge_tool.recipe.recipe import Recipe


def merge_parts(parts: Sequence[Part], out: Path, make: Callable[[Recipe, Path, str], None]) -> None:
    """Make all parts with `make(recipe, output, name)`, the last part into `out`. After a stop the same call continues,
    and keeps complete parts.

    Raises a MergeToolError. A missing model, or a model with the name of a part, is found before anything is made.
    """
    folder = out.with_name(f"{out.name}.parts")
    for part in parts:
        _check(part)
    for number, part in enumerate(parts):
        if part.name:
            _make_folder(folder)
        make(part.with_models_in(folder), folder / part.name if part.name else out, part.name)
        needed = {name for later in parts[number + 1 :] for name in later.uses}
        for done in parts[: number + 1]:
            if done.name and done.name not in needed:
                _remove(folder / done.name)
    _remove_empty(folder)


def _check(part: Part) -> None:
    check_places(_without_parts(part))
    for name in part.uses:
        if is_there(name):
            raise CheckpointError(
                f"{shown(part.recipe.where)}: {shown(name)} is a part of the recipe, and also a file or folder here. "
                "Give the part another name."
            )


def _without_parts(part: Part) -> Recipe:
    others = tuple(ref for ref in part.recipe.models if ref.path not in part.uses)
    return replace(part.recipe, models=others)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise OutputError(f"{shown(folder)}: cannot be made ({reason(e)}).") from e


def _remove(output: Path) -> None:
    """Remove the output of a part that no later part needs."""
    if output.is_dir() and not output.is_symlink():
        shutil.rmtree(output, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something else, or does not exist
        folder.rmdir()
