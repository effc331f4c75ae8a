"""SPACE.yaml -> `Space`: what a search may change in a recipe. Names and numbers only; no optimiser is seen here.

A knob is one number (or one choice): a parameter's value for a group of tensors in a band of layers. The values of a
group's bands are a list along the layers, as a recipe has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, listed, reason, shown
from merge_tool.recipe.settings import Pattern
from merge_tool.recipe.yaml_text import Text, Value, kind, nearest, parse_yaml, plain_value

_SPEC = ("filter", "low", "high", "log", "choices", "bands", "smooth")
_MOST_BANDS = 1_000
_GROUP = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_OF_MODEL = re.compile(r"models\.[0-9]{1,4}\.parameters\.")


@dataclass(frozen=True, slots=True)
class Knob:
    """One number from `low` to `high`, or one of `choices`; with `log` ratios count, not differences."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def fits(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    @property
    def middle(self) -> Any:
        if self.choices:
            return self.choices[0]
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names match one of `filters` (all others, if there is none), and the range of their values in each
    of `bands` bands of layers. If `smooth`, the values are joined by straight lines along the layers; else each
    layer has its band's."""

    name: str
    filters: tuple[str, ...] = ()
    bands: int = 1
    smooth: bool = True
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def knobs(self, key: str) -> tuple[Knob, ...]:
        stem = f"{key}.{self.name}" if self.name else key
        names = [stem] if self.bands == 1 else [f"{stem}.{band}" for band in range(1, self.bands + 1)]
        return tuple(Knob(name, self.low, self.high, self.log, self.choices) for name in names)

    def value(self, values: Sequence[Any], num_layers: int) -> Any:
        """The values of the bands as a recipe has them: one, or a list along the layers."""
        if all(value == values[0] for value in values):
            return values[0]
        if self.smooth or num_layers <= self.bands:
            return list(values)
        return [values[layer * self.bands // num_layers] for layer in range(num_layers)]


@dataclass(frozen=True)
class Space:
    """The groups of each parameter that is searched, by its name in a recipe (`t`, `models.1.parameters.weight`), and
    points to begin with. `text` is what it was made from, for comparisons."""

    parameters: Mapping[str, tuple[Group, ...]]
    method: str | None = None
    points: tuple[Mapping[str, Any], ...] = ()
    where: str = "the space"

    @property
    def knobs(self) -> dict[str, Knob]:
        every = (group.knobs(key) for key, groups in self.parameters.items() for group in groups)
        return {knob.name: knob for several in every for knob in several}

    def as_json(self) -> dict[str, Any]:
        """What decides which candidates there are."""
        return {
            key: [
                [g.name, list(g.filters), g.bands, g.smooth, g.low, g.high, g.log, list(g.choices)] for g in groups
            ]
            for key, groups in self.parameters.items()
        }  # fmt: skip

    def resolved(self, names: Sequence[str]) -> Space:
        """The space with parts of names alone, as a recipe's filters are: other patterns become the names that they
        match. Raises RecipeError for a pattern that is in no name, or that parts of names cannot say."""
        parameters = {
            key: tuple(replace(group, filters=self._parts(key, group, names)) for group in groups)
            for key, groups in self.parameters.items()
        }
        return replace(self, parameters=parameters)

    def _parts(self, key: str, group: Group, names: Sequence[str]) -> tuple[str, ...]:
        parts: list[str] = []
        for text in group.filters:
            pattern = Pattern(text)
            found = [name for name in names if pattern.matches(name)]
            if not found:
                raise RecipeError(
                    f"{shown(self.where)}: the filter '{shown(text)}' of '{shown(key)}' is in no tensor's name."
                    f"{pattern.hint(names)} The tensors are {listed(names, 3)}."
                )
            if pattern.is_part_of_names:
                parts.append(text)
                continue
            ambiguous = next((o for name in found for o in names if name in o and not pattern.matches(o)), None)
            if ambiguous is not None:
                raise RecipeError(
                    f"{shown(self.where)}: the filter '{shown(text)}' of '{shown(key)}' matches a name that is a part "
                    f"of {shown(ambiguous)}, which it does not match; no recipe can say that. Match both, or neither."
                )
            parts += found
        return tuple(dict.fromkeys(parts))

    def settings(self, values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """Each parameter's entries as a recipe has them, from a value for each knob."""
        found = {}
        for key, groups in self.parameters.items():
            entries: list[dict[str, Any]] = []
            for group in sorted(groups, key=lambda group: not group.filters):  # the rest comes last
                own = group.value([values[knob.name] for knob in group.knobs(key)], num_layers)
                entries += [{"filter": part, "value": own} for part in group.filters] or [{"value": own}]
            found[key] = entries
        return found

    def filled(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each knob, from values by the beginnings of their names: {t: 0.4, t.mlp: [0, 1]}. The longest
        beginning counts; a list has a value for each band. Raises RecipeError."""
        values: dict[str, Any] = {}
        for name in sorted(point, key=lambda name: name.count(".")):
            own = [knob for knob in self.knobs if knob == name or knob.startswith(f"{name}.")]
            given = point[name]
            if not own:
                raise self._error(
                    f"a point sets '{shown(name)}'{nearest(name, list(self.knobs))}, which is not searched"
                )
            if isinstance(given, list) and len(given) != len(own):
                raise self._error(f"a point has {len(given)} values for '{shown(name)}', which has {len(own)}")
            values |= dict(zip(own, given if isinstance(given, list) else [given] * len(own), strict=True))
        if missing := [knob for knob in self.knobs if knob not in values]:
            raise self._error(f"a point has no value for '{shown(missing[0])}'")
        for name, knob in self.knobs.items():
            if not knob.fits(values[name]):
                expected = f"one of {knob.choices}" if knob.choices else f"{knob.low:g} to {knob.high:g}"
                raise self._error(f"a point has {shown(values[name])} for '{shown(name)}', expected {expected}")
        return {name: values[name] for name in self.knobs}

    def uniform(self, value: float) -> dict[str, Any] | None:
        """The point with one value everywhere: t, or weights that add up to it. None if the space has other parameters
        or does not reach it."""
        names = {name.rpartition(".")[2] if _OF_MODEL.match(name) else name for name in self.parameters}
        if names not in ({"t"}, {"weight"}):
            return None
        share = value / len(self.parameters)
        return dict.fromkeys(self.knobs, share) if all(knob.fits(share) for knob in self.knobs.values()) else None

    def _error(self, what: str) -> RecipeError:
        return RecipeError(f"{shown(self.where)}: {what}. The knobs are: {_some(self.knobs)}.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# ------------------------------------------------------------------------------------------- the text


def read_space(space: str | Path | Mapping[str, Any]) -> Space:
    """The space in a YAML file, or in an equal mapping. Raises RecipeError with the line."""
    if isinstance(space, Mapping):
        import yaml

        return parse_space(yaml.safe_dump(dict(space), sort_keys=False), "the space")
    path = Path(space)
    try:
        return parse_space(path.read_text(encoding="utf-8"), path.name)
    except (OSError, ValueError) as e:
        raise RecipeError(f"{shown(path)}: cannot be read ({reason(e)}).") from e


def parse_space(content: str, where: str) -> Space:
    """The space in a text. Raises RecipeError with all its errors."""
    text = Text(where)
    fields = text.fields(parse_yaml(text, content), "the space", ("method", "parameters", "points"))
    if "parameters" not in fields:
        raise text.error(1, "there are no parameters, expected `parameters: {t: {low: 0, high: 1}}`.")
    method = text.optional_string(fields, "method")
    nothing: tuple[Group, ...] = ()
    parameters = {
        key.removeprefix("parameters."): text.attempt(_groups, text, key, value, instead=nothing)
        for key, value in text.mapping(fields["parameters"], "parameters").items()
    }
    if not parameters:
        raise text.error(fields["parameters"].line, "parameters is empty, expected `t: {low: 0, high: 1}`.")
    text.check()
    points = text.items(fields["points"], "points") if "points" in fields else ()
    own = tuple({key: plain_value(v) for key, v in text.mapping(point, "a point").items()} for point in points)
    found = Space(parameters, method, own, where)
    for point in found.points:
        found.filled(point)
    return found


def _groups(text: Text, key: str, value: Value) -> tuple[Group, ...]:
    fields = text.mapping(value, f"'{shown(key)}'")
    if {"low", "high", "choices"} & fields.keys():
        return (_group(text, "", value),)
    if not fields:
        raise text.error(value.line, f"'{shown(key)}' is empty, expected {{low: 0, high: 1}}.")
    groups = tuple(text.attempt(_group, text, name, part, instead=Group(name)) for name, part in fields.items())
    if len(rest := [group for group in groups if not group.filters]) > 1:
        line = fields[rest[1].name].line
        raise text.error(line, f"'{shown(key)}' has two groups without a filter, expected one: all other tensors.")
    return groups


def _group(text: Text, name: str, value: Value) -> Group:
    what = f"the group '{shown(name)}'" if name else "the range"
    if name and not _GROUP.fullmatch(name):
        raise text.error(value.key_line or value.line, f"{what}: expected a name of letters, digits, _ and -.")
    fields = text.fields(value, what, _SPEC)
    bands, smooth = _bands(text, fields, what), _switch(text, fields, "smooth", default=True)
    filters = _filters(text, fields, what)
    if "choices" in fields:
        choices = tuple(map(plain_value, text.items(fields["choices"], f"choices of {what}")))
        if any(isinstance(choice, dict | list) for choice in choices) or {"low", "high", "log"} & fields.keys():
            raise text.error(fields["choices"].line, f"choices of {what}: expected single values, and no low or high.")
        return Group(name, filters, bands, smooth, choices=choices)
    low, high = (_number(text, fields, end, value, what) for end in ("low", "high"))
    log = _switch(text, fields, "log", default=False)
    if not low < high or (log and low <= 0):
        above = ", and low above 0 with log" if log else ""
        raise text.error(value.line, f"{what} goes from {low:g} to {high:g}, expected low below high{above}.")
    return Group(name, filters, bands, smooth, low, high, log)


def _filters(text: Text, fields: Mapping[str, Value], what: str) -> tuple[str, ...]:
    part = fields.get("filter")
    if part is None:
        return ()
    items = text.items(part, f"filter of {what}") if isinstance(part.plain, tuple) else (part,)
    filters = tuple(text.string(item, f"filter of {what}") for item in items)
    for own in filters:
        try:
            Pattern(own)
        except RecipeError as e:
            raise text.error(part.line, f"filter of {what}: {e}") from e
    return filters


def _bands(text: Text, fields: Mapping[str, Value], what: str) -> int:
    value = fields.get("bands")
    bands = 1 if value is None else value.plain
    if isinstance(bands, bool) or not isinstance(bands, int) or not 1 <= bands <= _MOST_BANDS:
        assert value is not None
        raise text.error(value.line, f"bands of {what} is {kind(value)}, expected a whole number from 1 on.")
    return bands


def _switch(text: Text, fields: Mapping[str, Value], key: str, *, default: bool) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value.plain, bool):
        raise text.error(value.line, f"{key} is {kind(value)}, expected true or false.")
    return default if value is None else bool(value.plain)


def _number(text: Text, fields: Mapping[str, Value], key: str, around: Value, what: str) -> float:
    if (value := fields.get(key)) is None:
        raise text.error(around.line, f"{what} has no {key}, expected low and high (or choices).")
    try:
        number = float(value.plain)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value.plain, bool) or not math.isfinite(number):
        raise text.error(value.line, f"{key} of {what} is {kind(value)}, expected a finite number.")
    return number
