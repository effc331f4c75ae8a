"""Checkpoints of one training run, the oldest first -> a recipe of `linear`: weights by age, and an output for each
window and kind of weights. Opens no checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_tool.errors import RecipeError, counted, listed, reason, shown
from merge_tool.recipe.options import option
from merge_tool.recipe.recipe import Output, Recipe
from merge_tool.recipe.settings import constant

if TYPE_CHECKING:
    from merge_tool.methods.steps import Method

_EXPECTED = "expected uniform, linear, sqrt, ema:DECAY (ema:0.9), or a file with a number for each checkpoint"
_WEIGHT = re.compile(r"models\.\d+\.parameters\.weight")
_ROWS = "merge-tool run RECIPE.yaml OUT, a recipe of linear with tokenizer_source: union"
_LARGEST_FILE = 1_000_000  # bytes


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """Which checkpoints are averaged, and with which weights; several windows or weights make an output each.

    A kind of weights is uniform, linear, sqrt, ema:DECAY, a file, or the numbers themselves.
    """

    weights: Sequence[Any] = option(
        (), "--weights",
        "Each checkpoint's weight, by its place: uniform, linear (1, 2, 3, ...), ema:DECAY, sqrt (as a learning rate "
        "that decays by 1 - sqrt), or a FILE with a number a line. Several make an output each.  [default: uniform]",
        metavar="KIND[,KIND...]", is_many=True,
    )  # fmt: skip
    window: Sequence[Any] = option(
        (), "--window",
        "Average the last N only. Several (4,8,16) make an output each, in one reading.  [default: all]",
        metavar="N[,N...]", is_many=True,
    )  # fmt: skip
    last: int | None = option(None, "--last", "Leave out all but the last N of the CHECKPOINTs.", metavar="N",
                              is_whole=True)  # fmt: skip
    every: int = option(1, "--every", "Take every Nth checkpoint, counted back from the last.", metavar="N",
                        is_whole=True)  # fmt: skip

    def __post_init__(self) -> None:
        kinds = (self.weights,) if isinstance(self.weights, str) else tuple(self.weights)
        if kinds and all(isinstance(one, Real) for one in kinds):
            kinds = (kinds,)
        kinds = tuple(kind for one in kinds for kind in _listed(one))
        object.__setattr__(self, "weights", tuple(map(_parse_kind, kinds)) or (_parse_kind("uniform"),))
        windows = (
            self.window if isinstance(self.window, Sequence) and not isinstance(self.window, str) else [self.window]
        )
        object.__setattr__(self, "window", tuple(n for one in windows for n in _parse_window(one)))
        for flag, number in (("--last", self.last), ("--every", self.every)):
            if number is not None and number < 1:
                raise RecipeError(f"{flag} is {number}, expected at least 1.")
        for flag, several in (("--window", self.window), ("--weights", [kind.name for kind in self.weights])):
            if twice := [one for one in several if several.count(one) > 1]:
                raise RecipeError(f"{flag} {shown(twice[0])} is given more than once.")


class _Kind(NamedTuple):
    """A kind of weights: its name for a folder, its text, its decay, or its numbers."""

    name: str
    text: str
    decay: float = 0.0
    numbers: tuple[float, ...] = ()
    is_list: bool = False  # the numbers are the caller's own, not a file's


def average_recipe(
    checkpoints: Sequence[str],
    own: AverageOptions,
    methods: Mapping[str, Method],
    *,
    warnings: Sequence[str] = (),
    **options: Any,
) -> Recipe:
    """The recipe that averages `checkpoints`, the oldest first. `options` are the fields of Options. Raises
    RecipeError: too few checkpoints for a window, a wrong number of weights, a sum of weights of 0, equal outputs."""
    from merge_tool.recipe.mergekit import read_recipe

    chosen = choose(checkpoints, own)
    rows = dict(_rows(len(chosen), own))
    longest = max(own.window or (len(chosen),))
    chosen, rows = chosen[-longest:], {label: weights[-longest:] for label, weights in rows.items()}
    if same := [one for one in rows if sum(weights == rows[one] for weights in rows.values()) > 1]:
        raise RecipeError(f"{listed(same)} would be the same average. Leave out one of them.")
    single = next(iter(rows.values())) if len(rows) == 1 else [1.0] * len(chosen)
    models = [{"model": path, "parameters": {"weight": weight}} for path, weight in zip(chosen, single, strict=True)]
    recipe = read_recipe({"merge_method": "linear", "models": models}, methods, **options)
    recipe = replace(recipe, rows_option=_ROWS, warnings=(*warnings, *recipe.warnings))
    if len(rows) == 1:
        return recipe
    return replace(recipe, outputs=tuple(output_of(label, weights) for label, weights in rows.items()))


def choose(checkpoints: Sequence[str], own: AverageOptions) -> list[str]:
    """The checkpoints that `last` and `every` leave. Raises RecipeError if fewer than two are left."""
    if own.last is not None and own.last > len(checkpoints):
        raise RecipeError(f"--last {own.last}: there are {counted(len(checkpoints), 'checkpoint')}. Give no more.")
    chosen = list(checkpoints[-(own.last or 0) :])[:: -own.every][::-1]
    if len(chosen) < 2:
        left = "" if len(checkpoints) == 1 else f" of {len(checkpoints)} (--last, --every)"
        raise RecipeError(f"1 checkpoint{left} cannot be averaged. Give two or more.")
    return chosen


def _rows(count: int, own: AverageOptions) -> Iterator[tuple[str, list[float]]]:
    """The label and the weights of each output."""
    if own.window and max(own.window) > count:
        raise RecipeError(
            f"--window {max(own.window)} is larger than the number of checkpoints to average, {count}. Give --window "
            f"{count} or less, or more checkpoints."
        )
    for window in own.window or (count,):
        for kind in own.weights:
            words = [f"window-{window}"] * (len(own.window) > 1) + [f"weights-{kind.name}"] * (len(own.weights) > 1)
            yield "-".join(words), [0.0] * (count - window) + weights_of(kind, window)


def are_weights(words: Mapping[str, Any]) -> bool:
    """Whether an output's values are the weights of several models, as for an average."""
    return len(words) > 1 and all(_WEIGHT.fullmatch(key) for key in words)


def is_average_label(name: str) -> bool:
    """Whether a folder may be one of several averages, by its name.

    >>> [is_average_label(name) for name in ("window-4", "weights-ema-0.9", "window-8-weights-sqrt", "window", "t-0.3")]
    [True, True, True, False, False]
    """
    return re.fullmatch(r"window-\d+(-weights-[\w.-]+)?|weights-[\w.-]+", name) is not None


def weights_of(kind: _Kind, count: int) -> list[float]:
    """The weights of so many checkpoints, the oldest first; `linear` divides them by their sum.

    `sqrt`: C. Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging", 2025, section 3. A constant
    rate, averaged with weights c, is a rate that decays as w_i = sum_{j >= i} c_j; so c_j = w_j - w_{j+1}, here for
    w_i = 1 - sqrt(i / count). (A linear decay makes the uniform average.)

    >>> [round(c, 3) for c in weights_of(_parse_kind("sqrt"), 4)], weights_of(_parse_kind("ema:0.5"), 3)
    ([0.5, 0.207, 0.159, 0.134], [0.25, 0.25, 0.5])
    """
    if kind.numbers:
        if len(kind.numbers) != count:
            raise RecipeError(
                f"--weights {shown(kind.text)}: has {counted(len(kind.numbers), 'number')}, the average has "
                f"{counted(count, 'checkpoint')}. Give one for each, the oldest first."
            )
        if abs(math.fsum(kind.numbers)) <= 1e-9 * math.fsum(map(abs, kind.numbers)):
            raise RecipeError(f"--weights {shown(kind.text)}: its numbers add up to 0, so they make no average.")
        return list(kind.numbers)
    if kind.text == "linear":
        return [float(place) for place in range(1, count + 1)]
    if kind.text == "sqrt":
        return [math.sqrt((j + 1) / count) - math.sqrt(j / count) for j in range(count)]
    if kind.decay:
        return [(1 - kind.decay if j else 1.0) * kind.decay ** (count - 1 - j) for j in range(count)]
    return [1.0] * count


def _listed(kind: Any) -> Sequence[Any]:
    """The kinds in a text with commas, unless the whole text is the name of a file."""
    return kind.split(",") if isinstance(kind, str) and "," in kind and not Path(kind).is_file() else [kind]


def _parse_kind(given: Any) -> _Kind:
    if not isinstance(given, str):
        return _Kind("given", ", ".join(map(str, given)), numbers=_finite(given, "weights"), is_list=True)
    if given in ("uniform", "linear", "sqrt"):
        return _Kind(given, given)
    if given.startswith("ema:"):
        try:
            decay = float(given.removeprefix("ema:"))
        except ValueError:
            decay = math.nan
        if not 0 < decay < 1:
            raise RecipeError(f"--weights {shown(given)}: the decay must be above 0 and below 1, as in ema:0.9.")
        return _Kind(f"ema-{decay!r}", given, decay=decay)
    return _Kind(re.sub(r"[^\w.-]", "_", Path(given).stem)[:50], given, numbers=_read_numbers(Path(given)))


def _read_numbers(path: Path) -> tuple[float, ...]:
    """The numbers of a file: one in each line, or several with spaces or commas; lines that begin with # are left
    out."""
    where = f"--weights {shown(path)}"
    try:
        if not path.is_file():
            raise RecipeError(f"{where}: is neither a kind of weights nor a file, {_EXPECTED}.")
        if path.stat().st_size > _LARGEST_FILE:
            raise RecipeError(f"{where}: has more than {_LARGEST_FILE:,} bytes, {_EXPECTED}.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as e:
        raise RecipeError(f"{where}: cannot be read ({reason(e)}).") from e
    words = [word for line in lines if not line.lstrip().startswith("#") for word in line.replace(",", " ").split()]
    if not words:
        raise RecipeError(f"{where}: holds no number, {_EXPECTED}.")
    return _finite(words, str(path))


def _finite(values: Sequence[Any], what: str) -> tuple[float, ...]:
    for value in values:
        try:
            is_finite = math.isfinite(float(value))
        except (TypeError, ValueError, OverflowError):
            is_finite = False
        if not is_finite:
            raise RecipeError(f"--weights {shown(what)}: {shown(value)} is not a finite number, {_EXPECTED}.")
    return tuple(map(float, values))


def _parse_window(given: Any) -> list[int]:
    texts = given.split(",") if isinstance(given, str) else [given]
    try:
        numbers = [int(text) for text in texts]
    except (TypeError, ValueError) as e:
        raise RecipeError(f"--window {shown(given)}: is not a whole number, or several as in 4,8,16.") from e
    if min(numbers) < 1:
        raise RecipeError(f"--window is {min(numbers)}, expected at least 1.")
    return numbers


def output_of(label: str, weights: Sequence[float]) -> Output:
    """An output with these weights. Its words are as `--set` would give them, so it can be made again alone."""
    words = {f"models.{number}.parameters.weight": weight for number, weight in enumerate(weights)}
    of_models = {number: {"weight": constant(weight)} for number, weight in enumerate(weights)}
    return Output(label, words, {}, of_models)
