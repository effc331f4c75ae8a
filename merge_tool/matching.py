"""Which tensors are merged, and with which of FT's: names and shapes only. All mismatches are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from merge_tool.errors import MismatchError, RecipeError, listed, shown
from merge_tool.recipe import Recipe
from merge_tool.schedule import Pattern

NOT_CHOSEN = "not chosen: base kept"


@dataclass(frozen=True, slots=True)
class Matching:
    """What becomes of BASE's tensors: those in `kept` stay as they are, for the reason told; the others are merged."""

    kept: Mapping[str, str]


def match_tensors(recipe: Recipe, base: Checkpoint, ft: Checkpoint) -> Matching:
    """Find each tensor's fate. Raises MismatchError with all that does not fit, unless the recipe says what to do then;
    RecipeError for a pattern that matches nothing, and where nothing is left to merge."""
    unchosen = _unchosen(recipe, base.tensors.keys() | ft.tensors.keys())
    _check_same_tensors(base, ft, unchosen)
    kept = {name: NOT_CHOSEN for name in base.tensors if name in unchosen}
    if len(kept) == len(base.tensors):
        raise RecipeError("--only and --exclude leave no tensor to merge.")
    return Matching(kept)


def _unchosen(recipe: Recipe, names: Iterable[str]) -> frozenset[str]:
    """The names, of either side, that --only and --exclude leave out."""
    only, exclude = ([Pattern(text) for text in texts] for texts in (recipe.only, recipe.exclude))
    if not (only or exclude):
        return frozenset()
    names = list(names)
    for option, patterns in (("--only", only), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(map(pattern.matches, names)):
                raise RecipeError(no_match(f"{option} {shown(pattern.text)}", pattern, names))
    return frozenset(
        name
        for name in names
        if (only and not any(p.matches(name) for p in only)) or any(p.matches(name) for p in exclude)
    )


def no_match(option: str, pattern: Pattern, names: Iterable[str]) -> str:
    """The message for a pattern that is probably a typo."""
    some = sorted(sorted(names), key=natural_key)
    return f"{option}: matches no tensor.{pattern.hint} The tensors are {listed(some[:: len(some) // 4 or 1])}."


def natural_key(name: str) -> str:
    """Sort key under which numbers inside names compare as numbers: each is preceded by its length."""
    return re.sub(r"[0-9]+", lambda digits: f"{len(digits[0].lstrip('0')):06d}{digits[0].lstrip('0')}", name)


# --------------------------------------------------------------------------------------------- checks


def _check_same_tensors(base: Checkpoint, ft: Checkpoint, unchosen: frozenset[str]) -> None:
    """Raise MismatchError unless both have the same tensors with the same shapes and kinds, as far as chosen."""
    problems = []
    for here, there in ((base, ft), (ft, base)):
        if only := sorted(sorted(here.tensors.keys() - there.tensors.keys() - unchosen), key=natural_key):
            problems.append(f"{len(only):,} tensors only in {here.name}: {listed(only)}")
    shapes, kinds = [], []
    for name in sorted((base.tensors.keys() & ft.tensors.keys()) - unchosen):
        a, b = base.tensors[name], ft.tensors[name]
        if a.shape != b.shape:
            shapes.append(f"{shown(name)}: {list(a.shape)} in {base.name}, {list(b.shape)} in {ft.name}{_vocab(a, b)}")
        elif a.dtype != b.dtype and not {a.dtype, b.dtype} <= FLOAT_DTYPES:
            kinds.append(f"{shown(name)}: {a.dtype} in {base.name}, {b.dtype} in {ft.name}")
    if shapes:
        problems.append(f"{len(shapes):,} shapes differ:\n    " + _first_lines(shapes))
    if kinds:
        problems.append(f"{len(kinds):,} dtypes cannot be merged:\n    " + _first_lines(kinds))
    if problems:
        raise MismatchError(
            f"{base.name} and {ft.name} do not have the same tensors.\n  "
            + "\n  ".join(problems)
            + "\nBoth must be the same architecture, with one vocabulary."
        )


def _first_lines(lines: list[str], most: int = 5) -> str:
    more = [f"and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n    ".join(lines[:most] + more)


def _vocab(a: TensorInfo, b: TensorInfo) -> str:
    is_embedding = re.search(r"embed|wte|lm_head|word_embeddings|output\.weight", a.name) is not None
    if is_embedding and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]:
        return f" (a vocabulary mismatch: {a.shape[0]:,} and {b.shape[0]:,} tokens)"
    return ""
