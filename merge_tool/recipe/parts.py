"""Several recipes in one file, as mergekit-multi has them: YAML documents of which all but one have a `name`. A part
may use the output of a named one as a model. Texts only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, listed, shown
from merge_tool.methods.steps import Method
from merge_tool.recipe.mergekit import make_options, parse_recipe, recipe_text
from merge_tool.recipe.recipe import Recipe

_BREAK = re.compile(r"^(?:---|\.\.\.)(?=[ \t\r\n]|$).*$", re.MULTILINE)
_CONTENT = re.compile(r"^[ \t]*[^\s#]", re.MULTILINE)
_NAME = re.compile(r"^name:[ \t]*([\"']?)(.*?)\1[ \t]*(?:#.*)?\r?$", re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """One recipe of a file. `name` is that of its output, empty for the last; `uses` are the outputs that it merges."""

    name: str
    recipe: Recipe
    uses: frozenset[str]

    def with_models_in(self, folder: Path) -> Recipe:
        """The recipe, with the outputs that it uses as folders in `folder`."""
        models = self.recipe.models
        refs = [replace(ref, path=str(folder / ref.path)) if ref.path in self.uses else ref for ref in models]
        return replace(self.recipe, models=tuple(refs))


def read_parts(path: Path, methods: Mapping[str, Method], **options: Any) -> list[Part]:
    """The parts of a recipe's file in an order in which each finds what it uses; none if the file is one recipe.

    `options` are the fields of Options, for all parts. Raises RecipeError for any part that is no recipe, and for names
    that are used twice, not at all, or in a circle.
    """
    text, where = recipe_text(path)
    documents = _documents(text)
    if len(documents) < 2:
        return []
    named = [_parted(document, where) for document in documents]
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        what = f"the name {shown(min(twice))}" if min(twice) else "no name"
        raise RecipeError(
            f"{where}: {sum(name in twice for name in names)} parts have {what}. Give each part a name of its own, but "
            "one, whose output is OUT; or give each part a file of its own."
        )
    if "" not in names:
        raise RecipeError(f"{where}: all parts have names ({listed(names)}). Take away that of the part which is OUT.")
    parts = []
    for name, document in named:
        recipe = parse_recipe(document, where, methods, options=make_options(**options), given=frozenset(options))
        uses = frozenset(ref.path for ref in recipe.models if ref.path in names and ref.revision is None)
        parts.append(Part(name, replace(recipe, folder=str(path.parent)), uses - {""}))
    if unused := [name for name in names if name and not any(name in part.uses for part in parts)]:
        raise RecipeError(f"{where}: no part uses {listed(unused)}. Leave that out, or give it a file of its own.")
    return _ordered(parts, where)


def _documents(text: str) -> list[str]:
    """The documents that have content, each with as many lines before it as it has in the file."""
    documents, start = [], 0
    for end in [*(match.start() for match in _BREAK.finditer(text)), len(text)]:
        document = _BREAK.sub("", text[start:end], count=1) if start else text[start:end]
        if _CONTENT.search(document):
            documents.append("\n" * text[:start].count("\n") + document)
        start = end
    return documents


def _parted(document: str, where: str) -> tuple[str, str]:
    """(the name, the document without it)."""
    found = list(_NAME.finditer(document))
    if not found:
        return "", document
    name, line = found[0][2], document[: found[0].start()].count("\n") + 1
    if len(found) > 1 or not _PLAIN.fullmatch(name):
        raise RecipeError(f"{where}, line {line}: name is '{shown(name)}', expected one plain word.")
    return name, document[: found[0].start()] + document[found[0].end() :]


def _ordered(parts: Sequence[Part], where: str) -> list[Part]:
    ordered: list[Part] = []
    waiting = list(parts)
    while waiting:
        made = {part.name for part in ordered}
        ready = [part for part in waiting if part.uses <= made]
        if not ready:
            raise RecipeError(f"{where}: {listed(part.name or 'the last part' for part in waiting)} use each other.")
        ordered += ready
        waiting = [part for part in waiting if part not in ready]
    return [part for part in ordered if part.name] + [part for part in ordered if not part.name]
