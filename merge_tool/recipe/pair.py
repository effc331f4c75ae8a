"""BASE, FT and options -> a Recipe of two models: the only module that knows the options of a pair.

t becomes the method's parameter for it, --t-for a setting with patterns, several t several outputs, --vocab the
tokenizer's source, --files-from the donor. All later code sees only a recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.names import read_names
from merge_tool.recipe.options import Options, as_json, check_choice, option
from merge_tool.recipe.recipe import Module, Output, Recipe, Slice, Source, Tokenizer, label_of, label_t
from merge_tool.recipe.settings import Choice, Rules, Setting, Settings, parse_rules

DEFAULT_T = 0.5
NAMES = ("base", "ft")
VOCABULARIES: Mapping[str, str | int] = {"base": 0, "ft": 1, "union": "union"}


@dataclass(frozen=True, slots=True)
class PairOptions:
    """The options of a pair alone; a recipe in YAML has them in its text.

    `t_for` gives some tensors a t of their own, in all outputs: rules as PATTERN=VALUE[,VALUE...], or a mapping from
    patterns to values; the first rule that matches a tensor counts. With `vocab` the rows of embeddings and heads are
    matched by token, and the output has the tokens of that side, or of both; with `pad_vocab_to_multiple_of` its rows
    are padded.
    """

    t_for: Rules = option(
        (), "--t-for",
        "Another t for the tensors whose names match (a part of the name, a glob, or re:REGEX). A list of t runs from "
        "the first layer to the last. May be given several times: the first match counts.",
        metavar="PATTERN=T[,T...]", is_many=True,
    )  # fmt: skip
    method: str = option("slerp", "--method", "How to interpolate.", choices=("slerp", "linear"))
    vocab: str | None = option(
        None, "--vocab",
        "Match the rows of embeddings and heads by token. The output has the tokens of BASE, of FT, or of both.",
        choices=tuple(VOCABULARIES),
    )  # fmt: skip
    pad_vocab_to_multiple_of: int | None = option(
        None, "--pad-vocab-to-multiple-of", "With --vocab: add rows until their number is a multiple of N.",
        metavar="N", is_whole=True,
    )  # fmt: skip
    names_from: str | None = option(
        None, "--names-from",
        "A file that says what FT calls BASE's tensors: JSON, or a line with FT's name and BASE's for each.",
        metavar="FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice("method", self.method, _PARAMETERS)
        object.__setattr__(self, "t_for", parse_rules(self.t_for))
        if self.names_from is not None:
            object.__setattr__(self, "names_from", read_names(self.names_from))
        if self.vocab is not None:
            check_choice("vocab", self.vocab, VOCABULARIES)
        if (multiple := self.pad_vocab_to_multiple_of) is not None:
            if self.vocab is None:
                raise RecipeError("--pad-vocab-to-multiple-of goes with --vocab, which is not given.")
            if not 1 <= multiple <= 1_000_000:
                raise RecipeError(f"The vocabulary's multiple is {multiple}, expected 1 to 1000000.")

    @property
    def rules(self) -> tuple[Choice, ...]:
        return self.t_for  # type: ignore[return-value]  # parsed in __post_init__


def pair(
    base: str | Path,
    ft: str | Path,
    t: float | Iterable[float] = DEFAULT_T,
    *,
    extrapolate: bool = False,
    **options: Any,
) -> Recipe:
    """The recipe that merges `base` (t = 0) and `ft` (t = 1) at each `t`. `options` are the fields of PairOptions and
    Options. Raises RecipeError for values out of range, and for unknown options."""
    known = {f.name for kind in (PairOptions, Options) for f in fields(kind)}
    if unknown := sorted(options.keys() - known):
        raise RecipeError(f"Unknown option {shown(unknown[0])}. The options are: {', '.join(sorted(known))}.")
    own_names = {f.name for f in fields(PairOptions)}
    own = PairOptions(**{name: value for name, value in options.items() if name in own_names})
    ts = check_ts(t if isinstance(t, Iterable) and not isinstance(t, str) else (t,), extrapolate)
    for rule in own.rules:
        for value in rule.values:
            _check_range(value, extrapolate, f" for {shown(rule.pattern.text if rule.pattern else '')}")
    sources = tuple(Source(number, None, {}) for number in range(2))
    is_first_at_0 = own.method == "slerp"
    return Recipe(
        models=(ModelRef(str(base)), ModelRef(str(ft))),
        names=NAMES,
        base=0,
        method=own.method,
        modules=(Module(None, (Slice(sources, 0 if is_first_at_0 else None, {}),), {}),),
        parameters={},
        outputs=tuple(_output(own, value, label_of({"t": value}) if len(ts) > 1 else "") for value in ts),
        options=Options(**{name: value for name, value in options.items() if name not in own_names}),
        tokenizer=None if own.vocab is None else Tokenizer(VOCABULARIES[own.vocab], {}, own.pad_vocab_to_multiple_of),
        words=as_json(own),
        names_of={1: json.loads(own.names_from)} if own.names_from is not None else {},
        is_strict=True,
        rows_option="--vocab base, ft or union",
    )


def pair_again(base: str | Path, ft: str | Path, head: Mapping[str, Any]) -> Recipe:
    """The recipe in a report's head. Raises KeyError, TypeError or AttributeError if the head has none."""
    return pair(base, ft, float(head["parameters"]["t"]), extrapolate=True, **head["words"], **head["options"])


def is_pair(recipe: Recipe) -> bool:
    """Whether the recipe was made from BASE and FT, not from a text. Only for the wording of messages, report and
    card."""
    return not recipe.text


# ------------------------------------------------------------------------------------------- what t means


def _slerp_parameters(t: Setting) -> tuple[Settings, Mapping[int, Settings]]:
    return {"t": t}, {}


def _linear_parameters(t: Setting) -> tuple[Settings, Mapping[int, Settings]]:
    """Weights 1 - t and t, rounded as decimals: 1 - 0.9 is 0.1, as a user would write it in a recipe."""
    rest = Setting(tuple(Choice(c.pattern, tuple(_one_minus(v) for v in c.values)) for c in t.choices))
    return {}, {0: {"weight": rest}, 1: {"weight": t}}


_PARAMETERS: Mapping[str, Callable[[Setting], tuple[Settings, Mapping[int, Settings]]]] = {
    "slerp": _slerp_parameters,
    "linear": _linear_parameters,
}


def _output(own: PairOptions, t: float, label: str) -> Output:
    setting = Setting((*own.rules, Choice(None, (t,))))
    return Output(label, {"t": t}, *_PARAMETERS[own.method](setting))


def _one_minus(t: float) -> float:
    return float(1 - Decimal(repr(t)))


def check_ts(values: Iterable[float], extrapolate: bool) -> tuple[float, ...]:
    """The values of t, each once. Raises RecipeError if there are none, for values that are no numbers, and for values
    out of range."""
    try:
        ts = tuple(float(t) + 0.0 for t in values)  # -0.0 is 0.0
    except (TypeError, ValueError) as e:
        raise RecipeError(f"t is not a number ({shown(e)}): 0 is the base, 1 the finetune.") from e
    if not ts:
        raise RecipeError("No t is given; 0 is the base, 1 the finetune.")
    for t in ts:
        if not math.isfinite(t):
            raise RecipeError(f"t is {t}, expected a finite number: 0 is the base, 1 the finetune.")
        _check_range(t, extrapolate)
    if repeated := {t for t in ts if ts.count(t) > 1}:
        raise RecipeError(f"t = {', '.join(label_t(t) for t in sorted(repeated))} is given more than once.")
    return ts


def _check_range(t: float, extrapolate: bool, where: str = "") -> None:
    if not 0 <= t <= 1 and not extrapolate:
        raise RecipeError(f"t{where} is {label_t(t)}, expected 0 to 1. Give --extrapolate if you mean it.")
