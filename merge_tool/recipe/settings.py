"""A parameter's value for a tensor: by patterns that match the tensor's name, and by its position along the layers.

Names, numbers and positions only. A recipe's filter and an option such as --t-for are the same thing: a `Choice` of
values with a pattern; the first choice that fits a tensor's name counts.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from merge_tool.errors import RecipeError, shown

# What Python users may give: {"self_attn": [0, 0.5, 1], "mlp": 0.2}, or the command line's "PATTERN=VALUES" texts.
Rules: TypeAlias = "Mapping[str, float | Sequence[float]] | Iterable[str | Choice]"
_MOST_NAMES = 5_000  # at most so many names are compared with a pattern


@dataclass(frozen=True)
class Pattern:
    """A choice of tensors by name: `re:` and a regular expression, searched anywhere in the name; a glob (`*`, `?`,
    `[`) for the whole name; any other text, or with `is_part` every text, is a part of the name.

    >>> [Pattern(text).matches("model.layers.1.mlp.up") for text in ("mlp", "*.mlp.*", "mlp.*", "re:layers.[12]")]
    [True, True, False, True]
    """

    text: str
    is_part: bool = False

    def __post_init__(self) -> None:
        if self.is_part:
            return
        if not self.text.removeprefix("re:") or not self.text.isprintable():
            raise RecipeError(f"The pattern '{shown(self.text)}' is empty or not printable, expected a part of a name.")
        try:
            _ = self._compiled
        except (re.error, RecursionError, OverflowError) as e:
            raise RecipeError(f"The pattern '{shown(self.text)}' is not a regular expression ({shown(e)}).") from e

    @cached_property
    def _compiled(self) -> re.Pattern[str] | None:
        if self.is_regex:
            return re.compile(self.text.removeprefix("re:"))
        return re.compile(fnmatch.translate(self.text)) if self._is_glob else None

    @property
    def is_regex(self) -> bool:
        return not self.is_part and self.text.startswith("re:")

    @property
    def is_part_of_names(self) -> bool:
        """Whether it matches the names that it is a part of."""
        return not (self.is_regex or self._is_glob)

    @property
    def _is_glob(self) -> bool:
        return not self.is_part and any(sign in self.text for sign in "*?[") and not self.text.startswith("re:")

    def matches(self, name: str) -> bool:
        if self._compiled is None:
            return self.text in name
        return (self._compiled.match if self._is_glob else self._compiled.search)(name) is not None

    def hint(self, names: Iterable[str]) -> str:
        """A hint for a pattern that matches none of these names."""
        glob = " A glob must match the whole name: write *PATTERN*, perhaps." if self._is_glob else ""
        return glob + meant(self.text, names)


def meant(text: str, names: Iterable[str]) -> str:
    """` Did you mean ...?`, with the parts of tensor names that resemble a pattern without a match; or nothing.

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
    import difflib

    close = difflib.get_close_matches(wanted.lower(), parts, 2, cutoff=0.7)
    return f" Did you mean {' or '.join(shown(parts[one]) for one in close)}?" if close else ""


@dataclass(frozen=True)
class Choice:
    """`values` for the tensors that `pattern` matches, or for all tensors if it is None. Several values run along the
    layers; if they `grow`, tensors behind the layers have the last value rather than the first. `line` is the line in
    the recipe, 0 if the recipe has no lines."""

    pattern: Pattern | None
    values: tuple[Any, ...]
    line: int = field(default=0, compare=False)
    grow: bool = False

    def __str__(self) -> str:
        """In the form of --t-for: PATTERN=VALUE[,VALUE...]."""
        pattern = self.pattern.text if self.pattern else ""
        return f"{pattern}={','.join(repr(value).removesuffix('.0') for value in self.values)}"

    def at(self, position: float) -> Any:
        """The value at `position`, 0 (first layer) to 1 (last layer): numbers are interpolated between neighbours,
        switches and words are not.

        >>> choice = Choice(Pattern("mlp"), (0.0, 0.4, 1.0))
        >>> [choice.at(p) for p in (0, 0.25, 0.5, 1)], Choice(None, (True, False)).at(0.75)
        ([0.0, 0.2, 0.4, 1.0], True)
        """
        last = len(self.values) - 1
        along = position * last
        before = min(int(along), last)
        low, high = self.values[before], self.values[min(before + 1, last)]
        if not isinstance(low, float):
            return low
        share = along - before
        return min(max((1 - share) * low + share * high, min(low, high)), max(low, high))  # never past a neighbour


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter's choices; the first choice that matches a tensor's name counts."""

    choices: tuple[Choice, ...]

    def find(self, name: str) -> Choice | None:
        """The choice for a tensor; None if the next outer scope decides."""
        return next((choice for choice in self.choices if choice.pattern is None or choice.pattern.matches(name)), None)

    @property
    def is_constant(self) -> bool:
        """Whether it has one value for all tensors."""
        first = self.choices[0]
        return first.pattern is None and len(first.values) == 1


Settings: TypeAlias = Mapping[str, Setting]


def constant(value: Any) -> Setting:
    """A setting of one value for all tensors."""
    return Setting((Choice(None, (value,)),))


def find_choice(key: str, scopes: Iterable[Settings], name: str) -> Choice | None:
    """The choice that gives a tensor its parameter `key`: from the first scope that has one."""
    for scope in scopes:
        if key in scope and (choice := scope[key].find(name)):
            return choice
    return None


# ------------------------------------------------------------------------------- PATTERN=VALUE[,VALUE...]


def parse_rules(rules: Rules) -> tuple[Choice, ...]:
    """The rules in their order. Raises RecipeError for one that is not PATTERN=VALUE[,VALUE...] with finite values."""
    if isinstance(rules, str):
        rules = (rules,)
    if isinstance(rules, Mapping):
        return tuple(_rule(pattern, values) for pattern, values in rules.items())
    return tuple(rule if isinstance(rule, Choice) else _parse_rule(rule) for rule in rules)


def _parse_rule(text: str) -> Choice:
    pattern, equals, values = text.rpartition("=")  # the last =, because a regular expression may contain others
    if not equals or not pattern:
        raise RecipeError(f"'{shown(text)}' is not PATTERN=VALUE[,VALUE...], as in self_attn=0.3 or mlp=0,0.5,1.")
    return _rule(pattern, values.split(","))


def _rule(pattern: str, values: Any) -> Choice:
    items = values if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    try:
        numbers = tuple(float(value) + 0.0 for value in items)
    except (TypeError, ValueError) as e:
        raise RecipeError(
            f"The t of '{shown(pattern)}' is not a number or a list of numbers ({shown(e)}): 0 is the base, 1 the "
            "finetune. Write --t-for 'PATTERN=0.3', or 'PATTERN=0,0.5,1' along the layers."
        ) from e
    if not numbers or not all(math.isfinite(value) for value in numbers):
        wrong = "a value that is not finite" if numbers else "no value"
        raise RecipeError(
            f"The t of '{shown(pattern)}' has {wrong}: 0 is the base, "
            "1 the finetune. Write --t-for 'PATTERN=0.3', or 'PATTERN=0,0.5,1' along the layers."
        )
    return Choice(Pattern(pattern), numbers)


# ------------------------------------------------------------------------------------ in its own process


def main() -> None:
    """Try regular expressions on names. This may never end; the caller sets the time limit."""
    from merge_tool.apart import answer

    answer(lambda request: ([any(re.search(p, name) for name in request[1]) for p in request[0]], ()))
