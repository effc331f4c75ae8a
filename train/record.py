"""run.json: what an output's run was asked, and what differs when it is asked again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.errors import TrainError


def check_same_run(output: Path, asked: dict[str, Any], free: Sequence[str]) -> None:
    """Raise TrainError listing what differs between `asked` and the run that `output` holds.

    Keys in `free` may change between sessions; they do not move a weight.
    """
    path = output / "run.json"
    if not path.exists():
        return
    stored = json.loads(path.read_text())
    asked = json.loads(json.dumps(asked))
    keys = [k for k in sorted({*stored, *asked}) if k not in free and stored.get(k) != asked.get(k)]
    if keys:
        lines = [line for k in keys for line in _changes(k, stored.get(k), asked.get(k))]
        if "data" in keys and "sources" not in keys:
            lines.append("  (the rows of a source, its tokenizer or how they are read changed: `data` are digests)")
        raise TrainError(
            f"{output} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Put them back to resume it, or choose another output."
        )


def _changes(key: str, before: Any, now: Any) -> list[str]:
    """Every leaf that differs: `sources[0].take: 10 -> 20`."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{key}.{k}", before.get(k), now.get(k)) for k in sorted({*before, *now})]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(f"{key}[{k}]", a, b) for k, (a, b) in enumerate(zip(before, now, strict=True))]
    else:
        return [f"  {key}: {_short(before)} -> {_short(now)}"]
    return [line for name, a, b in pairs if a != b for line in _changes(name, a, b)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
