"""The `parameters` of a recipe's text -> Settings: names, types and ranges, as the method knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merge_tool.errors import shown
from merge_tool.recipes.models_recipe import PAIRS, Terms
from merge_tool.recipes.settings import Choice, Setting, Settings
from merge_tool.recipes.yaml_text import Text, Value, kind

# Keys that mergekit knows, knew or is often given, and that change nothing.
INERT = {
    "int8_mask": "it chose what mergekit keeps its masks in",
    "embed_slerp": "mergekit no longer reads it; a filter for embed_tokens or lm_head does what it did",
    "random_seed": "mergekit does not read it; the seed is given on the command line",
}
_FRACTIONS = frozenset({"density", "gamma", "select_topk"})


class Parameters:
    """What the parameters of one method may be."""

    def __init__(self, text: Text, name: str, methods: Mapping[str, Terms], extrapolate: bool) -> None:
        self._text = text
        self._name = name
        self._extrapolate = extrapolate
        self._shared, self._each = methods[name].shared, methods[name].each
        self._defaults: Mapping[str, Any] = {**self._shared, **self._each}
        self._elsewhere = {key for method in methods.values() for key in (*method.shared, *method.each)}

    def parse(self, value: Value | None, what: str, *, of_model: bool = False) -> Settings:
        """The settings in one place. Those `of_model` are for one input: parameters that all inputs share are an error
        there, as nothing would read them."""
        if value is None or value.plain is None:
            return {}
        given = self._text.mapping(value, what)
        kept = {key: found for key, found in given.items() if self._counts(key, found, what, of_model)}
        return {key: self._setting(key, found) for key, found in kept.items()}

    def _counts(self, key: str, value: Value, what: str, of_model: bool) -> bool:
        if of_model and key in self._shared and key not in self._each and key not in INERT:
            raise self._text.error(
                value.key_line,
                f"'{shown(key)}' stands in {what}, but {self._name} has one for all models: put it into the recipe's "
                "`parameters:` (or a slice's).",
            )
        if key in self._defaults:
            return True
        if key in INERT:
            self._text.warn(value.key_line, key, INERT[key])
        elif key in self._elsewhere:
            self._text.warn(value.key_line, key, f"{self._name} has no such parameter")
        else:
            known = ", ".join(sorted(self._defaults)) or "none"
            meant = self._text.meant(key, self._defaults.keys())
            raise self._text.error(
                value.key_line, f"{self._name} has no parameter '{shown(key)}'{meant}. It has: {known}."
            )
        return False

    def _setting(self, key: str, value: Value) -> Setting:
        if isinstance(value.plain, Mapping):
            return Setting((self._choice(key, value),))
        if isinstance(value.plain, tuple) and value.plain and isinstance(value.plain[0].plain, Mapping):
            return self._reached(key, value.plain, Setting(tuple(self._choice(key, item) for item in value.plain)))
        return Setting((Choice(None, self._values(key, value), value.line),))

    def _reached(self, key: str, items: tuple[Value, ...], setting: Setting) -> Setting:
        parts = [choice.part for choice in setting.choices]
        if None in parts[:-1]:
            line = items[parts.index(None) + 1].line
            self._text.warn(line, key, "what stands after a value without a filter is never reached")
        return setting

    def _choice(self, key: str, value: Value) -> Choice:
        fields = self._text.fields(value, f"an entry of '{key}'", ("value", "filter"))
        if "value" not in fields:
            raise self._text.error(value.line, f"an entry of '{key}' has no value; write {{filter: PART, value: 0.3}}.")
        part = fields.get("filter")
        everywhere = part is None or part.plain in (None, "*")
        return Choice(
            None if everywhere or part is None else self._text.string(part, f"the filter of '{key}'"),
            self._values(key, fields["value"]),
            fields["value"].line,
        )

    def _values(self, key: str, value: Value) -> tuple[Any, ...]:
        if not isinstance(value.plain, tuple):
            return (self._scalar(key, value),)
        values = tuple(self._scalar(key, item) for item in self._text.items(value, f"'{key}'"))
        if len(values) > 1 and type(values[0]) is int:
            raise self._text.error(value.line, f"'{key}' is a list, expected one whole number.")
        return values

    def _scalar(self, key: str, value: Value) -> Any:
        default = self._defaults[key]
        if isinstance(default, bool):
            if value.plain in (True, False):  # 1 and 0, too, which mergekit-evolve writes as 1.0 and 0.0
                return bool(value.plain)
            raise self._wrong(key, value, "true or false")
        if isinstance(default, str):
            return self._text.string(value, f"'{key}'")
        number = self._number(key, value)
        self._check_range(key, number, value)
        if isinstance(default, int):
            if not number.is_integer() or number < 0:
                raise self._wrong(key, value, "a whole number")
            return int(number)
        return number

    def _number(self, key: str, value: Value) -> float:
        """`1e-5` is a word to YAML 1.1; it is a number here."""
        if isinstance(value.plain, (int, float, str)) and not isinstance(value.plain, bool):
            try:
                number = float(value.plain) + 0.0  # -0.0 is 0.0
            except (ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                return number
        raise self._wrong(key, value, "a finite number, a list of them, or entries of {filter: PART, value: 0.3}")

    def _check_range(self, key: str, number: float, value: Value) -> None:
        if 0 <= number <= 1:
            return
        if key in _FRACTIONS:
            raise self._wrong(key, value, "a number from 0 to 1")
        if key == "t" and self._name in PAIRS and not self._extrapolate:
            raise self._text.error(
                value.line,
                f"'t' is {shown(value.text)}, expected 0 (base_model) to 1 (the other model). Give --extrapolate if "
                "you mean it.",
            )

    def _wrong(self, key: str, value: Value, expected: str) -> Exception:
        return self._text.error(value.line, f"'{key}' is {kind(value)}, expected {expected}.")
