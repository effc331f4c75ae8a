"""Decide about each tensor: merged, kept from the base, or left out. Or report every mismatch at once.

Names, shapes and dtypes only: every error that they can cause is raised here, in one message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.quantised import is_integer_weight
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import MismatchError, RecipeError, counted, listed, shown
from merge_tool.models.given_names import suggested_names
from merge_tool.models.layer_counts import num_layers
from merge_tool.models.naming import has_token_rows, is_derived, natural_key
from merge_tool.plan.expand import Expansion, OutputTensor
from merge_tool.plan.stacks import Stacks, split_layer
from merge_tool.recipe.options import Options
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.settings import Pattern

NOT_CHOSEN = "not chosen: base kept"
MISSING = "not in all models: base kept"
ADDED = "not in the base: another model's, copied"
UNLIKE = "another shape or type in some model: base kept"
NOTHING_CHOSEN = "--only and --exclude leave no tensor to merge."
_MOST = 5  # at most so many mismatches of a kind are named


@dataclass(frozen=True, slots=True)
class Fit:
    """The output's tensors in natural order (layer 2 before layer 10). `kept` maps tensors that are not merged to the
    reason. `unchosen` are all names that --only and --exclude leave out, in the output or not."""

    names: Sequence[str]
    kept: Mapping[str, str]
    unchosen: Collection[str]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Differences:
    """`lacking`: the names that each model lacks. `shapes`, `dtypes`, `codes`: by name, the two sides of a mismatch in
    words; `codes` are integers in the place of a weight."""

    lacking: dict[int, list[str]] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)


def fit(recipe: Recipe, expansion: Expansion, models: Sequence[Checkpoint]) -> Fit:
    """Decide about every tensor.

    Raises MismatchError with all mismatches that the recipe does not allow; RecipeError for a pattern that matches no
    tensor, and if no tensor is left to merge.
    """
    options, differences = recipe.options, _Differences()
    names, kept, merged = list(expansion.names()), dict[str, str](), list[str]()
    left_out: list[str] = []
    unchosen = find_unchosen(options, [*names, *expansion.copies])
    for name in names:
        tensor = expansion.tensor(name)
        reason = NOT_CHOSEN if name in unchosen else _reason(options, expansion, tensor, models, differences)
        if reason == "":
            merged.append(name)
        elif expansion.base_of(tensor) is not None:
            kept[name] = reason
        elif reason == MISSING and options.on_missing == "ft" and not is_derived(name):
            kept[name] = ADDED
        elif reason != NOT_CHOSEN:
            left_out.append(name)
    _check(recipe, expansion, models, differences)
    _check_depth(models[recipe.first], [name for name, reason in kept.items() if reason == ADDED])
    if not merged:
        if any(reason != NOT_CHOSEN for reason in kept.values()):
            raise MismatchError(f"{_all(models)} have no tensor in common that could be merged. Are they related?")
        raise RecipeError(NOTHING_CHOSEN)
    merged += kept
    merged.sort()
    merged.sort(key=natural_key)
    return Fit(merged, kept, unchosen, tuple(_warnings(recipe, models, kept, left_out)))


def _reason(
    options: Options, expansion: Expansion, tensor: OutputTensor, models: Sequence[Checkpoint], unlike: _Differences
) -> str:
    """The reason why a tensor is not merged; empty if it is merged. Notes mismatches in `unlike`."""
    if lacking := expansion.lacking(tensor):
        if options.on_missing == "error" and not is_derived(tensor.name):
            for model in lacking:
                unlike.lacking.setdefault(model, []).append(tensor.name)
        return MISSING
    sources = expansion.sources(tensor)
    infos = [models[model].tensors[name] for model, name in sources]
    for (model, _), info in zip(sources[1:], infos[1:], strict=True):
        here, there = models[sources[0][0]].name, models[model].name
        if {info.dtype, infos[0].dtype} & FLOAT_DTYPES and any(map(is_integer_weight, (info, infos[0]))):
            sides = f"{infos[0].dtype} {list(infos[0].shape)} in {here}, {info.dtype} {list(info.shape)} in {there}"
            unlike.codes[tensor.name] = sides
            return UNLIKE
        if info.shape != infos[0].shape:
            sides = f"{list(infos[0].shape)} in {here}, {list(info.shape)} in {there}{_vocabulary(infos[0], info)}"
            unlike.shapes[tensor.name] = sides
            return UNLIKE
        if info.dtype != infos[0].dtype and not {info.dtype, infos[0].dtype} <= FLOAT_DTYPES:
            unlike.dtypes[tensor.name] = f"{infos[0].dtype} in {here}, {info.dtype} in {there}"
            return UNLIKE
    return ""


def _vocabulary(a: TensorInfo, b: TensorInfo) -> str:
    if has_token_rows(a.name) and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]:
        return f" (a vocabulary mismatch: {a.shape[0]:,} and {b.shape[0]:,} tokens)"
    return ""


def _check(recipe: Recipe, expansion: Expansion, models: Sequence[Checkpoint], differences: _Differences) -> None:
    """Raise MismatchError for the differences that the recipe does not allow, and name the options that allow them."""
    problems, ways = list[str](), list[str]()
    suggested = _suggested(recipe, models, differences)
    if differences.lacking:
        for model, names in differences.lacking.items():
            others = [k for k in sorted(recipe.sources) if k != model]
            where = f"only in {models[others[0]].name}" if len(others) == 1 else f"not in {models[model].name}"
            problems.append(f"{counted(len(names), 'tensor')} {where}: {listed(_natural(names))}")
        ways.append(
            "--on-missing base: tensors that a model lacks are copied from BASE; tensors that BASE lacks are left out."
        )
        if recipe.first in differences.lacking:
            ways.append("--on-missing ft: the same, but tensors that BASE lacks are copied from a model that has them.")
        lines = [f"{shown(their)} {shown(our)}" for their, our in sorted(suggested.items())]
        if lines:
            ways.append(
                "--names-from FILE with these lines, if they are the same tensors (--names-to FILE writes them):\n    "
                + _first_lines(lines)
            )
    if differences.codes:
        lines = [f"{shown(name)}: {differences.codes[name]}" for name in _natural(differences.codes)]
        problems.append(
            f"{counted(len(lines), 'tensor holds', 'tensors hold')} integers in one model, perhaps the codes of a "
            "quantised layer, which have no meaning without its other parts. Give models with their original weights.\n"
            "    " + _first_lines(lines)
        )
    if recipe.options.on_mismatch == "error":
        for unlike, what in ((differences.shapes, "shapes differ"), (differences.dtypes, "dtypes cannot be merged")):
            if unlike:
                lines = [f"{shown(name)}: {unlike[name]}" for name in _natural(unlike)]
                problems.append(f"{len(lines):,} {what}:\n    " + _first_lines(lines))
        if (differences.shapes or differences.dtypes) and not differences.codes:
            ways.append("--on-mismatch base: such tensors are copied from BASE.")
        if any("vocabulary mismatch" in sides for sides in differences.shapes.values()):
            ways.append(f"{recipe.rows_option}: rows are matched by token; the output has those tokens.")
    sizes = f"\n{'; '.join(_size(models[k]) for k in sorted(recipe.sources))}."
    if expansion.range_problems and not problems:
        layers = "\n  ".join(expansion.range_problems)
        raise MismatchError(f"The models do not have all layers that the recipe names.\n  {layers}{sizes}")
    if problems:
        raise MismatchError(
            f"{_all([models[k] for k in sorted(recipe.sources)])} do not have the same tensors.\n  "
            + "\n  ".join([*expansion.range_problems, *problems])
            + sizes
            + "\nAll must be the same architecture, with one vocabulary. To merge them anyway:\n  "
            + "\n  ".join([*ways, "--exclude PATTERN: matching tensors are copied from BASE."])
            + ("" if recipe.is_strict else "\nGive `slices` where the numbers of layers differ."),
            suggested,
        )


def _check_depth(base: Checkpoint, added: Sequence[str]) -> None:
    """Raise MismatchError for layers that BASE does not have: config.json counts BASE's layers, and a loader ignores
    others."""
    layers = {name: layer for name in added if (layer := split_layer(name)) is not None}
    if not layers:
        return
    known = {layer for name in base.tensors if (layer := split_layer(name)) is not None}
    stacks = {stack for stack, _ in known}
    if deeper := [name for name, layer in layers.items() if layer[0] in stacks and layer not in known]:
        raise MismatchError(
            f"--on-missing ft: {counted(len(deeper), 'tensor is', 'tensors are')} in layers that {base.name} does not "
            f"have: {listed(_natural(deeper))}. A loader would ignore them. Give models of equal depth, or slices in a "
            "recipe."
        )


def _suggested(recipe: Recipe, models: Sequence[Checkpoint], differences: _Differences) -> dict[str, str]:
    """FT's names and BASE's names, if both have tensors of their own whose shapes allow only one pairing."""
    other = max(recipe.sources)
    if not recipe.is_strict or not {recipe.first, other} <= differences.lacking.keys():
        return {}
    ours, theirs = (
        [models[k].tensors[name] for name in differences.lacking[lacking] if name in models[k].tensors]
        for k, lacking in ((recipe.first, other), (other, recipe.first))
    )
    return suggested_names(ours, theirs)


def _all(models: Sequence[Checkpoint]) -> str:
    *some, last = (model.name for model in models)
    return f"{', '.join(some)} and {last}" if some else last


def _size(model: Checkpoint) -> str:
    layers, count = (
        Stacks(model.tensors, num_layers(model.config)).in_words,
        sum(info.numel for info in model.tensors.values()),
    )
    return f"{model.name} has {counted(count, 'parameter')}{f' and {layers}' if layers else ''}"


def _warnings(
    recipe: Recipe, models: Sequence[Checkpoint], kept: Mapping[str, str], left_out: Sequence[str]
) -> Iterator[str]:
    """Warnings about tensors that are kept or left out because of an option, not by name."""
    base, others = models[recipe.first].name, [models[k].name for k in sorted(recipe.sources) if k != recipe.first]
    other = others[0] if len(others) == 1 else "some model"
    where = f"only in {other}" if len(others) == 1 else f"not in {base}"
    kinds = (MISSING, UNLIKE, ADDED)
    missing, unlike, added = ([name for name, reason in kept.items() if reason == what] for what in kinds)
    for names, what in (
        (missing, f"not in {other}; {base}'s are kept"),
        (left_out, f"{where}; left out"),
        (added, f"{where}; copied"),
        (unlike, f"of another shape or type in {other}; {base}'s are kept"),
    ):
        if names:
            yield f"{counted(len(names), 'tensor is', 'tensors are')} {what}: {listed(_natural(names), 50)}."


def _natural(names: Iterable[str]) -> list[str]:
    return sorted(sorted(names), key=natural_key)


def _first_lines(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MOST:,} more"] if len(lines) > _MOST else []
    return "\n    ".join(lines[:_MOST] + more)


# ------------------------------------------------------------------------------------------- patterns


def find_unchosen(options: Options, names: Sequence[str]) -> frozenset[str]:
    """The names that --only and --exclude leave out. Raises RecipeError for a pattern that matches none."""
    only, exclude = ([Pattern(text) for text in texts] for texts in (options.only, options.exclude))
    for option, patterns in (("--only", only), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(map(pattern.matches, names)):
                raise RecipeError(no_match(f"{option} {shown(pattern.text)}", pattern, names))
    return frozenset(
        name
        for name in (names if only or exclude else ())
        if (only and not any(p.matches(name) for p in only)) or any(p.matches(name) for p in exclude)
    )


def no_match(option: str, pattern: Pattern, names: Iterable[str]) -> str:
    """The message for a pattern that matches no tensor: probably a typo."""
    some = _natural(names)
    hint = pattern.hint(some)
    return f"{option}: matches no tensor.{hint} The tensors are {listed(some[:: len(some) // 4 or 1])}."
