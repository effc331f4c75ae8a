"""The scores of a sweep in the same folder: a search begins with them, without merging these candidates again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tool.api import plan_recipe
from merge_tool.errors import MergeToolError, OutputError, shown
from merge_tool.recipe.pair import pair
from merge_tool.sweeps.journal import JOURNAL, read_lines
from merge_tool.sweeps.sweep import sweep_facts


def sweep_scores(
    folder: Path, models: Sequence[str | Path], options: Mapping[str, Any], command: Sequence[str]
) -> tuple[list[tuple[float, dict[str, float]]], str]:
    """(t, scores) of each merge of a sweep in `folder`, if the sweep has the same BASE, FT, options and judge. If it
    has others, no scores, and the reason as the second result."""
    path = folder / JOURNAL
    if not path.exists():
        return [], ""
    try:
        facts, *lines = list(read_lines(path)) or [{}]
        base, ft = models
        prepared = plan_recipe(pair(base, ft, 0.5, **options), folder / "models" / "t", read_samples=True)
    except OutputError as e:
        return [], f"{e} Its scores are not used."
    except MergeToolError as e:
        return [], f"{shown(path)}: its scores are not used ({e})."
    own = json.loads(json.dumps(sweep_facts(prepared, ["t"], command)))
    different = [key for key in {**own, **facts} if key != "command" and own.get(key) != facts.get(key)]
    if _plain(facts.get("command", ())) != _plain(command):
        different.append("command")
    if different:
        return [], f"{shown(path)}: is of another sweep ({', '.join(different)} differ); its scores are not used."
    scored = [(line["values"]["t"], line["scores"]) for line in lines if "scores" in line]
    return [(float(t), scores) for t, scores in scored], ""


def _plain(command: Sequence[str]) -> list[str]:
    """A command without the word for the model's folder, if that is the last word."""
    words = ["{}" if word == "{out}" else word for word in command]
    return words[:-1] if words[-1:] == ["{}"] else words
