"""Patterns of tensor names, and the t of a name: rules in order, values along the layers. Floats and strings only."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from merge_tool.errors import RecipeError, shown

# What Python users may give: {"self_attn": [0, 0.5, 1], "mlp": 0.2}, or the command line's "PATTERN=VALUES" texts.
Rules: TypeAlias = "Mapping[str, float | Sequence[float]] | Iterable[str | Rule]"

_MOST_NAMES = 5_000  # that a pattern is compared with
_LAYER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")


@dataclass(frozen=True)
class Pattern:
    """Which tensors are meant: `re:` and a regular expression, found anywhere in the name; a glob (`*`, `?`, `[`) for
    the whole name; anything else is a part of the name.

    >>> [Pattern(text).matches("model.layers.1.mlp.up") for text in ("mlp", "*.mlp.*", "mlp.*", "re:layers.[12]")]
    [True, True, False, True]
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.removeprefix("re:") or not self.text.isprintable():
            raise RecipeError(f"The pattern '{shown(self.text)}' is empty or not printable, expected a part of a name.")
        try:
            _ = self._compiled
        except (re.error, RecursionError, OverflowError) as e:
            raise RecipeError(f"The pattern '{shown(self.text)}' is not a regular expression ({shown(e)}).") from e

    @cached_property
    def _compiled(self) -> re.Pattern[str] | None:
        if self.text.startswith("re:"):
            return re.compile(self.text.removeprefix("re:"))
        return re.compile(fnmatch.translate(self.text)) if self._is_glob else None

    @property
    def _is_glob(self) -> bool:
        return any(sign in self.text for sign in "*?[") and not self.text.startswith("re:")

    def matches(self, name: str) -> bool:
        if self._compiled is None:
            return self.text in name
        return (self._compiled.match if self._is_glob else self._compiled.search)(name) is not None

    def hint(self, names: Iterable[str]) -> str:
        """What may be wrong with a pattern that matches none of these names."""
        glob = " A glob must match the whole name: write *PATTERN*, perhaps." if self._is_glob else ""
        return glob + meant(self.text, names)


@dataclass(frozen=True)
class Rule:
    """The t of all tensors that `pattern` matches: one value, or several along the layers."""

    pattern: Pattern
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.pattern.text}={','.join(repr(v).removesuffix('.0') for v in self.values)}"

    def at(self, position: float) -> float:
        """The value at `position`, 0 (first layer) to 1 (last layer): linear between neighbours.

        >>> [Rule(Pattern("mlp"), (0.0, 0.4, 1.0)).at(p) for p in (0, 0.25, 0.5, 1)]
        [0.0, 0.2, 0.4, 1.0]
        """
        place = position * (len(self.values) - 1)
        before = min(int(place), len(self.values) - 1)
        low, high = self.values[before], self.values[min(before + 1, len(self.values) - 1)]
        share = place - before
        return min(max(low * (1 - share) + high * share, min(low, high)), max(low, high))  # never past a neighbour


def meant(text: str, names: Iterable[str]) -> str:
    """` Did you mean ...?`, with the parts of tensors' names that a pattern resembles which is in none; or nothing.

    >>> meant("self_atn", ["model.layers.0.self_attn.q_proj.weight"])
    ' Did you mean self_attn?'
    """
    names = list(names)
    words = (word.lstrip(".") for word in re.findall(r"[\w.]*\w", text.removeprefix("re:")))
    wanted = next((w for w in sorted(words, key=len, reverse=True) if not any(w in name for name in names)), "")
    length, parts = wanted.count(".") + 1, dict[str, str]()
    for pieces in (name.split(".") for name in names[:_MOST_NAMES] if wanted):
        for start in range(len(pieces) - length + 1):
            part = ".".join(pieces[start : start + length])
            parts.setdefault(part.lower(), part)
    close = difflib.get_close_matches(wanted.lower(), parts, 2, cutoff=0.7)
    return f" Did you mean {' or '.join(shown(parts[one]) for one in close)}?" if close else ""


def parse_rules(given: Rules) -> tuple[Rule, ...]:
    """The rules in their order. Raises RecipeError for one that is not PATTERN=VALUE[,VALUE...] with finite values."""
    if isinstance(given, str):
        given = (given,)
    if isinstance(given, Mapping):
        return tuple(_rule(pattern, values) for pattern, values in given.items())
    return tuple(rule if isinstance(rule, Rule) else _parse_rule(rule) for rule in given)


def _parse_rule(text: str) -> Rule:
    pattern, equals, values = text.rpartition("=")  # the last one: a regular expression may hold others
    if not equals or not pattern:
        raise RecipeError(f"'{shown(text)}' is not PATTERN=VALUE[,VALUE...], as in self_attn=0.3 or mlp=0,0.5,1.")
    return _rule(pattern, values.split(","))


def _rule(pattern: str, values: Any) -> Rule:
    listed = values if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    try:
        found = tuple(float(value) + 0.0 for value in listed)
    except (TypeError, ValueError) as e:
        raise RecipeError(
            f"The t of '{shown(pattern)}' is not a number or a list of numbers ({shown(e)}): 0 is the base, 1 the "
            "finetune. Write --t-for 'PATTERN=0.3', or 'PATTERN=0,0.5,1' along the layers."
        ) from e
    if not found or not all(math.isfinite(value) for value in found):
        raise RecipeError(
            f"The t of '{shown(pattern)}' has {'a value that is not finite' if found else 'no value'}: 0 is the base, "
            "1 the finetune. Write --t-for 'PATTERN=0.3', or 'PATTERN=0,0.5,1' along the layers."
        )
    return Rule(Pattern(pattern), found)


def split_layer(name: str) -> tuple[str, int] | None:
    """The stack that a tensor belongs to, and its layer: what is before the first number, and that number.

    >>> split_layer("model.layers.3.mlp.experts.7.w1.weight"), split_layer("lm_head.weight")
    (('model.layers.', 3), None)
    """
    found = _LAYER.search(name)
    return (name[: found.start()], int(found[0])) if found else None


class Schedule:
    """Rules applied to a model's tensors: of those that match a name the first counts.

    A list lies along the layers of the tensor's stack: layer k of L is at k / (L - 1), the only layer of a stack of
    one at the end, a tensor outside any layers at the beginning.
    """

    def __init__(self, rules: Sequence[Rule], names: Iterable[str]) -> None:
        self.rules = rules
        self._last: dict[str, int] = {}
        for stack, layer in filter(None, map(split_layer, names if rules else ())):
            self._last[stack] = max(layer, self._last.get(stack, 0))

    def find(self, name: str) -> int | None:
        """The number of the first rule that matches `name`."""
        return next((k for k, rule in enumerate(self.rules) if rule.pattern.matches(name)), None)

    def t(self, rule: int, name: str) -> float:
        """The t that a rule gives to a tensor."""
        return self.rules[rule].at(self._position(name))

    def _position(self, name: str) -> float:
        found = split_layer(name)
        if found is None:
            return 0.0
        stack, layer = found
        return layer / self._last[stack] if self._last[stack] else 1.0
