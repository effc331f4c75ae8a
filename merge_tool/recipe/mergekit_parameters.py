"""The `parameters` of a recipe's text -> Settings: names, types and ranges, as the method knows them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import product
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.methods.steps import Method
from merge_tool.recipe.recipe import Output, label_of
from merge_tool.recipe.settings import Choice, Pattern, Setting, Settings, constant
from merge_tool.recipe.yaml_text import Text, Value, kind, nearest

# Keys without effect that mergekit knows or knew, or that users often write.
INERT = {
    "int8_mask": "it chose what mergekit keeps its masks in",
    "embed_slerp": "mergekit no longer reads it; a filter for embed_tokens or lm_head does what it did",
    "random_seed": "mergekit does not read it; the seed is given on the command line",
}

_OF_MODEL = re.compile(r"models\.([0-9]{1,4})\.parameters\.(.+)")
_SWITCHES = {"true": True, "false": False, "1": 1, "0": 0}


class Parameters:
    """The parameters of one method: names, types and ranges."""

    def __init__(self, text: Text, name: str, methods: Mapping[str, Method], extrapolate: bool) -> None:
        self._text = text
        self._name = name
        self._extrapolate = extrapolate
        self._method = methods[name]
        self._shared, self._each = self._method.shared, self._method.each
        self._defaults: Mapping[str, Any] = {**self._shared, **self._each}
        self._elsewhere = {key for method in methods.values() for key in (*method.shared, *method.each)}

    def parse(self, value: Value | None, what: str, *, of_model: Sequence[Settings] | None = None) -> Settings:
        """The settings in one `parameters` mapping. `of_model`: it is the mapping of one input, and these are the
        settings around it. A parameter that all inputs share is an error there, because nothing would read it, unless
        it repeats the value that counts."""
        if value is None or value.plain is None:
            return {}
        mapping = self._text.mapping(value, what)
        attempt, wrong = self._text.attempt, constant(None)
        kept = {k: item for k, item in mapping.items() if attempt(self._counts, k, item, what, of_model, instead=False)}
        return {key: attempt(self._setting, key, item, instead=wrong) for key, item in kept.items()}

    def outputs(
        self, values: Mapping[str, Sequence[Value]], listed: Sequence[int] = (), base: int | None = None
    ) -> tuple[Output, ...]:
        """One output for each combination of these values, which replace the recipe's: for all models, or for one
        entry of `models`, whose numbers are `listed`. `base` is the number of base_model."""
        chosen = []
        for key, several in values.items():
            name, model = self._place(key, listed, base)
            chosen.append([(key, name, model, self._scalar(name, value)) for value in several])
        outputs = []
        for combination in product(*chosen):
            words = {key: value for key, _, _, value in combination}
            differing = {key: value for key, value in words.items() if len(values[key]) > 1}
            settings = {name: constant(value) for _, name, model, value in combination if model is None}
            of_models: dict[int, dict[str, Setting]] = {}
            for _, name, model, value in combination:
                if model is not None:
                    of_models.setdefault(model, {})[name] = constant(value)
            outputs.append(Output(label_of(differing), words, settings, of_models))
        if len({output.label for output in outputs}) < len(outputs):
            raise self._text.error(0, "two of the values are the same, and so would be two outputs.")
        return tuple(outputs)

    def _place(self, key: str, listed: Sequence[int], base: int | None) -> tuple[str, int | None]:
        """The parameter that `key` names, and the model that it is of: None for all."""
        match = _OF_MODEL.fullmatch(key)
        name = match[2] if match else key
        if name not in self._defaults:
            known = ", ".join(sorted(self._defaults)) or "none"
            meant = nearest(name, self._defaults.keys())
            where = " (write NAME, or models.NUMBER.parameters.NAME)" if "." in name else ""
            raise self._text.error(0, f"{self._name} has no parameter '{shown(name)}'{meant}{where}. It has: {known}.")
        if match is None:
            return name, None
        if name not in self._each:
            raise self._text.error(0, f"'{shown(key)}': {self._name} has one {name} for all models: write {name}.")
        if int(match[1]) >= len(listed):
            raise self._text.error(
                0, f"'{shown(key)}': the recipe has {len(listed)} entries in models, the first is models.0."
            )
        if listed[int(match[1])] == base and self._method.base != "none":
            raise self._text.error(0, f"'{shown(key)}': that entry is base_model, which has no {name} of its own.")
        return name, listed[int(match[1])]

    def _counts(self, key: str, value: Value, what: str, of_model: Sequence[Settings] | None) -> bool:
        if of_model is not None and key in self._shared and key not in self._each and key not in INERT:
            around = next((settings[key] for settings in of_model if key in settings), constant(self._shared[key]))
            if _values(self._setting(key, value)) == _values(around):
                self._text.warn(value.key_line, key, "it says the same as the recipe's value for all models")
                return False
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
        elif (value.plain is False or value.plain is None) and not nearest(key, self._defaults.keys()):
            self._text.warn(value.key_line, key, f"{self._name} has no such switch, and it is off")
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
        parts = [choice.pattern for choice in setting.choices]
        if None in parts[:-1]:
            line = items[parts.index(None) + 1].line
            self._text.warn(line, key, "entries behind a value without a filter are never used")
        return setting

    def _choice(self, key: str, value: Value) -> Choice:
        fields = self._text.fields(value, f"an entry of '{key}'", ("value", "filter", "lines"))
        if "lines" in fields and "value" in fields:
            raise self._text.error(value.line, f"an entry of '{key}' has both value and lines, expected one of them.")
        if "value" not in fields and "lines" not in fields:
            raise self._text.error(value.line, f"an entry of '{key}' has no value; write {{filter: PART, value: 0.3}}.")
        part = fields.get("filter")
        pattern = None
        if part is not None and part.plain not in (None, "*"):
            pattern = Pattern(self._text.string(part, f"the filter of '{key}'"), is_part=True)
        if "lines" in fields:
            return Choice(pattern, self._growth(key, fields["lines"]), fields["lines"].line, grow=True)
        return Choice(pattern, self._values(key, fields["value"]), fields["value"].line)

    def _growth(self, key: str, value: Value) -> tuple[float, float]:
        """The values at the first and at the last layer: alpha, and alpha + beta. K. Wang et al., "LiNeS: post-training
        layer scaling prevents forgetting and enhances model merging", 2024 (https://arxiv.org/abs/2410.17146)."""
        if type(self._defaults[key]) in (bool, int, str):
            raise self._text.error(value.line, f"'{key}' does not grow along the layers, expected a `value`.")
        expected = "{alpha: 0.2, beta: 0.8}: alpha at the first layer, alpha + beta at the last"
        if not isinstance(value.plain, Mapping):
            raise self._text.error(value.line, f"the lines of '{key}' are {kind(value)}, expected {expected}.")
        fields = self._text.fields(value, f"the lines of '{key}'", ("alpha", "beta"))
        if missing := [name for name in ("alpha", "beta") if name not in fields]:
            raise self._text.error(value.line, f"the lines of '{key}' have no {missing[0]}, expected {expected}.")
        alpha, beta = (self._number(key, fields[name]) for name in ("alpha", "beta"))
        last = float(Decimal(repr(alpha)) + Decimal(repr(beta)))
        for number, name in ((alpha, "alpha"), (last, "beta")):
            self._check_range(key, number, Value(fields[name].line, number, f"{number} at an end of its lines"))
        return alpha, last

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
            if value.plain in (True, False):  # also 1 and 0, which mergekit-evolve writes as 1.0 and 0.0
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
        if 0 <= number <= 1 or key not in self._method.fractions:
            return
        if key != "t":
            raise self._wrong(key, value, "a number from 0 to 1")
        if not self._extrapolate:
            raise self._text.error(
                value.line,
                f"'t' is {shown(value.text)}, expected 0 (base_model) to 1 (the other model). Give --extrapolate if "
                "you mean it.",
            )

    def _wrong(self, key: str, value: Value, expected: str) -> Exception:
        return self._text.error(value.line, f"'{key}' is {kind(value)}, expected {expected}.")


def _values(setting: Setting) -> list[tuple[Any, ...]]:
    """A setting without its lines."""
    return [(choice.pattern, choice.values, choice.grow) for choice in setting.choices]


def parse_values(values: Sequence[str] | Mapping[str, Any]) -> dict[str, tuple[Value, ...]]:
    """Parsed values by name, from NAME=VALUE[,VALUE...] texts or a mapping. Raises RecipeError."""
    pairs = list(values.items()) if isinstance(values, Mapping) else [_parse_value(text) for text in values]
    parsed: dict[str, tuple[Value, ...]] = {}
    for key, several in pairs:
        key = key.removeprefix("parameters.")
        if key in parsed:
            raise RecipeError(f"--set: '{shown(key)}' is given twice; write {shown(key)}=VALUE,VALUE.")
        items = several if isinstance(several, (list, tuple)) else [several]
        if not items:
            raise RecipeError(f"--set: '{shown(key)}' has no value; write {shown(key)}=VALUE.")
        parsed[key] = tuple(Value(0, _plain(item), str(item)) for item in items)
    return parsed


def _parse_value(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not all(part.strip() for part in values.split(",")):
        raise RecipeError(f"--set: '{shown(text)}' is not NAME=VALUE[,VALUE...], as in lambda=0.5 or t=0.3,0.5.")
    return key.strip(), [part.strip() for part in values.split(",")]


def _plain(value: Any) -> Any:
    """A word of the command line, read as YAML reads a parameter."""
    return _SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
