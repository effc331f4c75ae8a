"""Which tensors are merged, and with which of FT's: names and shapes only. All mismatches are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from merge_tool.errors import MismatchError, RecipeError, listed, shown
from merge_tool.naming import has_token_rows, is_derived
from merge_tool.recipe import Recipe
from merge_tool.recipes.stacks import Stacks
from merge_tool.renaming import Renaming, find_renaming, renaming_warnings
from merge_tool.schedule import Pattern

NOT_CHOSEN = "not chosen: base kept"
MISSING = "not in the finetune: base kept"
UNLIKE = "another shape or type in the finetune: base kept"
NOT_IN_ALL = "not in all models: base kept"
UNLIKE_IN_SOME = "another shape or type in some model: base kept"
NOTHING_CHOSEN = "--only and --exclude leave no tensor to merge."


@dataclass(frozen=True, slots=True)
class Matching:
    """What becomes of BASE's tensors: those in `kept` stay as they are, for the reason told; the others are merged."""

    kept: Mapping[str, str]
    ft_names: Mapping[str, str]  # where FT calls them otherwise
    warnings: tuple[str, ...]


def match_tensors(recipe: Recipe, base: Checkpoint, ft: Checkpoint) -> Matching:
    """Find each tensor's fate. Raises MismatchError with all that does not fit, unless the recipe says what to do then;
    RecipeError for a pattern that matches nothing, and where nothing is left to merge."""
    unchosen = find_unchosen(recipe, base.tensors.keys() | ft.tensors.keys())
    renaming = find_renaming(base, ft)
    differences = _differences(base, ft, renaming, unchosen)
    _check(recipe, base, ft, differences)
    kept = dict.fromkeys((name for name in base.tensors if name in unchosen), NOT_CHOSEN)
    if len(kept) == len(base.tensors):
        raise RecipeError(NOTHING_CHOSEN)
    kept |= dict.fromkeys(differences.lacking, MISSING)
    kept |= dict.fromkeys((name for name, _ in (*differences.shapes, *differences.kinds)), UNLIKE)
    if len(kept) == len(base.tensors):
        raise MismatchError(
            f"{base.name} and {ft.name} have no tensor in common that could be merged. Are these related models?"
        )
    told = (*renaming_warnings(base, ft, renaming, unchosen), *_warnings(base, ft, differences))
    return Matching(kept, renaming.ft_names, told)


def find_unchosen(recipe: Recipe, names: Iterable[str]) -> frozenset[str]:
    """The names that --only and --exclude leave out. Raises RecipeError for a pattern that matches none."""
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
    hint = pattern.hint(some)
    return f"{option}: matches no tensor.{hint} The tensors are {listed(some[:: len(some) // 4 or 1])}."


def natural_key(name: str) -> str:
    """Sort key under which numbers inside names compare as numbers: each is preceded by its length."""
    return re.sub(r"[0-9]+", lambda digits: f"{len(digits[0].lstrip('0')):06d}{digits[0].lstrip('0')}", name)


# ---------------------------------------------------------------------------------------- differences


@dataclass(frozen=True, slots=True)
class _Differences:
    """Names in natural order: those that one side lacks; (name, both sides in words) of those that do not fit."""

    lacking: list[str]
    extra: list[str]
    shapes: list[tuple[str, str]]
    kinds: list[tuple[str, str]]


def _differences(base: Checkpoint, ft: Checkpoint, renaming: Renaming, unchosen: frozenset[str]) -> _Differences:
    """All that does not fit, as far as it is chosen."""
    ft_names = renaming.ft_names
    lacking, extra = (
        sorted(sorted(here.tensors.keys() - there.tensors.keys() - known - unchosen), key=natural_key)
        for here, there, known in ((base, ft, ft_names.keys()), (ft, base, renaming.explained))
    )
    shapes, kinds = [], []
    for name in sorted((base.tensors.keys() & ft.tensors.keys() | ft_names.keys()) - unchosen):
        a, b = base.tensors[name], ft.tensors[ft_names.get(name, name)]
        if a.shape != b.shape:
            shapes.append((name, f"{list(a.shape)} in {base.name}, {list(b.shape)} in {ft.name}{_vocab(a, b)}"))
        elif a.dtype != b.dtype and not {a.dtype, b.dtype} <= FLOAT_DTYPES:
            kinds.append((name, f"{a.dtype} in {base.name}, {b.dtype} in {ft.name}"))
    return _Differences(lacking, extra, shapes, kinds)


def _check(recipe: Recipe, base: Checkpoint, ft: Checkpoint, found: _Differences) -> None:
    """Raise MismatchError for the differences that the recipe does not allow, and say what would."""
    problems, ways = [], []
    if recipe.on_missing == "error":
        for all_names, where in ((found.lacking, base.name), (found.extra, ft.name)):
            if names := [name for name in all_names if not is_derived(name)]:
                problems.append(f"{len(names):,} tensors only in {where}: {listed(names)}")
        if problems:
            ways.append("--on-missing base: what only BASE has is taken as it is, what only FT has is left out.")
    if recipe.on_mismatch == "error":
        for unlike, what in ((found.shapes, "shapes differ"), (found.kinds, "dtypes cannot be merged")):
            if unlike:
                lines = [f"{shown(name)}: {sides}" for name, sides in unlike]
                problems.append(f"{len(lines):,} {what}:\n    " + _first_lines(lines))
        if found.shapes or found.kinds:
            ways.append("--on-mismatch base: such tensors are BASE's as they are.")
        if any("vocabulary mismatch" in sides for _, sides in found.shapes):
            ways.append("--vocab base, ft or union: rows are matched by token; the output has those tokens.")
    if problems:
        raise MismatchError(
            f"{base.name} and {ft.name} do not have the same tensors.\n  "
            + "\n  ".join(problems)
            + f"\n{_sizes(base)}; {_sizes(ft)}."
            + "\nBoth must be the same architecture, with one vocabulary. If you know better:\n  "
            + "\n  ".join([*ways, "--exclude PATTERN: what it matches is not merged."])
        )


def _sizes(model: Checkpoint) -> str:
    layers, count = Stacks(model.tensors).told, sum(info.numel for info in model.tensors.values())
    return f"{model.name} has {count:,} parameters{f' and {layers}' if layers else ''}"


def _warnings(base: Checkpoint, ft: Checkpoint, found: _Differences) -> Iterator[str]:
    """What is kept and left out although nobody chose it tensor by tensor."""
    unlike = [name for name, _ in (*found.shapes, *found.kinds)]
    for names, what in (
        (found.lacking, f"are not in {ft.name}; {base.name}'s are kept"),
        (found.extra, f"are only in {ft.name}; they are left out"),
        (unlike, f"have another shape or type in {ft.name}; {base.name}'s are kept"),
    ):
        if names:
            yield f"{len(names):,} tensors {what}: {listed(names, 50)}."


def _first_lines(lines: list[str], most: int = 5) -> str:
    more = [f"and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n    ".join(lines[:most] + more)


def _vocab(a: TensorInfo, b: TensorInfo) -> str:
    if has_token_rows(a.name) and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]:
        return f" (a vocabulary mismatch: {a.shape[0]:,} and {b.shape[0]:,} tokens)"
    return ""
