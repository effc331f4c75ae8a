"""What the user asks for, checked as far as that goes without opening a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.methods.inner import METHODS
from merge_tool.recipe.schedule import Pattern, Rule, Rules, parse_rules

DEFAULT_T = 0.5
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
OUTPUT_DTYPES = {"base": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
QUANTISE_LATER = (
    "8 bits are written only as BASE has them, by --dtype base. Otherwise write bfloat16 (the default) and quantise it "
    "afterwards, with llm-compressor or the tool that made the inputs."
)
_NOT_WRITTEN = ("fp8", "f8", "float8", "int8", "int4", "nf4", "mxfp")
SIDES = ("base", "ft")
ON_MISMATCH = ("error", "base")
VOCABS = ("base", "ft", "union")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as asked: nothing here depends on what the checkpoints hold.

    `ts` are the interpolation parameters, one output each: 0 is the base, 1 the finetune. `dtype` is a key of
    OUTPUT_DTYPES; None is every tensor's dtype in the base, but bfloat16 for 8-bit floats, which "base" writes as the
    base has them, with scales where it has such. `files_from` names the
    side whose configuration and tokenizer are copied. `on_mismatch` says what happens to integer tensors that
    differ and to tensors of another shape or type, `on_missing` to those that only one side has. `t_for` gives some
    tensors a t of their own, in all outputs: rules as PATTERN=VALUE[,VALUE...], or a mapping from patterns to values;
    of those that match a tensor the first counts. Merged are the tensors that a pattern of `only` matches (all,
    without one) and none of `exclude`; the rest is the base's. With `vocab` rows of embeddings and heads are matched by
    token, and the output has the tokens of that side, or of both; its rows are padded to a multiple, if one is asked.
    Raises RecipeError for values out of range.
    """

    ts: tuple[float, ...] = (DEFAULT_T,)
    method: str = "slerp"
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    files_from: str = "base"
    on_mismatch: str = "error"
    extrapolate: bool = False
    t_for: Rules = ()
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    on_missing: str = "error"
    vocab: str | None = None
    pad_vocab_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        if self.dtype is not None:
            if self.dtype.lower().startswith(_NOT_WRITTEN):
                raise RecipeError(f"dtype is '{shown(self.dtype)}': {QUANTISE_LATER}")
            _check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        _check_choice("files_from", self.files_from, SIDES)
        _check_choice("on_mismatch", self.on_mismatch, ON_MISMATCH)
        _check_choice("on_missing", self.on_missing, ON_MISMATCH)
        if self.vocab is not None:
            _check_choice("vocab", self.vocab, VOCABS)
        if self.pad_vocab_to_multiple_of is not None:
            if self.vocab is None:
                raise RecipeError("--pad-vocab-to-multiple-of goes with --vocab, which is not given.")
            if not 1 <= self.pad_vocab_to_multiple_of <= 1_000_000:
                raise RecipeError(
                    f"The vocabulary's multiple is {self.pad_vocab_to_multiple_of}, expected 1 to 1000000."
                )
        if self.max_shard_bytes < 1:
            raise RecipeError(f"The largest shard is {self.max_shard_bytes} bytes, expected at least 1.")
        object.__setattr__(self, "ts", _check_ts(self.ts, self.extrapolate))
        object.__setattr__(self, "t_for", parse_rules(self.t_for))
        for field in ("only", "exclude"):
            given = getattr(self, field)
            object.__setattr__(self, field, (given,) if isinstance(given, str) else tuple(given))
            for text in getattr(self, field):
                Pattern(text)
        for rule in self.rules:
            for t in rule.values:
                _check_range(t, self.extrapolate, f" for {shown(rule.pattern.text)}")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """`t_for`, parsed."""
        return self.t_for  # type: ignore[return-value]  # set so in __post_init__

    @property
    def selection(self) -> dict[str, Any]:
        """What is asked of some tensors only, in words; empty for a plain merge."""
        found = {
            "t_for": [str(rule) for rule in self.rules],
            "only": list(self.only),
            "exclude": list(self.exclude),
            "on_missing": "" if self.on_missing == "error" else self.on_missing,
            "vocab": self.vocab,
            "pad_vocab_to_multiple_of": self.pad_vocab_to_multiple_of,
        }
        return {key: value for key, value in found.items() if value}


def _check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise RecipeError(f"{what} is '{shown(value)}', expected one of: {', '.join(choices)}.")


def _check_ts(values: Iterable[float], extrapolate: bool) -> tuple[float, ...]:
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


def label_t(t: float) -> str:
    """The shortest text that reads back as `t`: 0.3, 1, 1e-05."""
    return repr(t).removesuffix(".0")
