"""Tensors -> columns: a page's data about each tensor, as numbers and as indices into tables of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_tool.plan.stacks import split_layer

_ATTENTION = ("self_attn", "attention", "attn")
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
_DIGITS = 6  # significant digits of a number on the page


@dataclass
class Columns:
    """One list for each property, in the order of the tensors. A text is an index into `texts`; layer -1 is no
    layer."""

    modules: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, name: str, **values: Any) -> None:
        """Add a tensor. Texts become indices, numbers are rounded, and values that are not finite become None."""
        found = split_layer(name)
        layer = -1 if found is None else found[1]
        module = name if found is None else f"{found[0]}*{name[len(found[0]) + len(str(layer)) :]}"
        if module.replace("*", str(layer), 1) != name:  # a layer written as 007, a star in the name
            module, layer = name, -1
        row = {"module": self.modules.setdefault(module, len(self.modules)), "layer": layer, **values}
        for key, value in row.items():
            self.numbers.setdefault(key, []).append(self._number(value))

    def _number(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.texts.setdefault(value, len(self.texts))
        if isinstance(value, float):
            return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
        return value

    def as_json(self) -> dict[str, Any]:
        return {
            "modules": list(self.modules),
            "texts": list(self.texts),
            "columns": self.numbers,
            "groups": groups(self.modules),
        }


def groups(modules: Iterable[str]) -> list[dict[str, Any]]:
    """Attention and MLP, if the model has them, each with the pattern that finds its tensors (`--t-for`) and the
    indices of its modules. The first pattern that matches counts."""
    inside = [(place, module) for place, module in enumerate(modules) if "*" in module]
    found = []
    for title, patterns in (("attention", _ATTENTION), ("MLP", _MLP)):
        pattern = next((p for p in patterns if any(p in module for _, module in inside)), None)
        if pattern is not None:
            places = [place for place, module in inside if pattern in module]
            found.append({"title": title, "pattern": pattern, "modules": places})
            inside = [one for one in inside if one[0] not in places]
    return found


def shape_text(shape: Sequence[int]) -> str:
    """`[4096, 1024]` -> `4096 x 1024`; `[]` -> `scalar`."""
    return " x ".join(map(str, shape)) or "scalar"
