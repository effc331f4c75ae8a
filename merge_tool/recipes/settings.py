"""A parameter as a recipe sets it: a value, values along the layers, or those per part of a tensor's name.
Strings, numbers and positions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Choice:
    """`values` for the tensors in whose names `part` occurs; for all of them, if it is None. `line` is the recipe's."""

    part: str | None
    values: tuple[Any, ...]
    line: int = field(default=0, compare=False)

    def at(self, position: float) -> Any:
        """The value at `position` in 0 to 1: numbers are interpolated, switches and words are not.

        >>> Choice(None, (0.0, 1.0, 0.5)).at(0.75), Choice(None, (True, False)).at(0.75)
        (0.75, True)
        """
        last = len(self.values) - 1
        place = position * last
        before = int(place)
        low, high = self.values[before], self.values[min(before + 1, last)]
        if not isinstance(low, float):
            return low
        share = place - before
        return min(max((1 - share) * low + share * high, min(low, high)), max(low, high))  # never past a neighbour


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter's choices; the first that fits a tensor's name counts."""

    choices: tuple[Choice, ...]

    def find(self, name: str) -> Choice | None:
        """The choice for a tensor, or None: then whatever stands further out decides."""
        return next((choice for choice in self.choices if choice.part is None or choice.part in name), None)


Settings: TypeAlias = Mapping[str, Setting]
MISSING: Any = object()


def resolve(key: str, scopes: Iterable[Settings], name: str, position: float) -> Any:
    """The value of parameter `key` for a tensor: of the first scope that has a choice for it; MISSING if none has."""
    for scope in scopes:
        if key in scope and (choice := scope[key].find(name)):
            return choice.at(position)
    return MISSING
