"""run.json and data.json: the settings of a run and what became of its data.

One output holds one run: a session with other settings is refused, except for the keys in FREE_KEYS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.data import SourceReport
from train.errors import TrainError
from train.output import publish_text
from train.retention import list_checkpoints

# Keys that may change between the sessions of one run: they do not move a weight.
FREE_KEYS = (
    "output", "resume", "eval_every", "eval_batches", "save_every", "keep_last", "max_shard_bytes",
    "sample_prompts", "sample_tokens", "report_to", "push_to",
)  # fmt: skip


def write_records(output: Path, record: dict[str, Any], reports: Sequence[SourceReport]) -> None:
    """Write both files. Raises OSError."""
    publish_text(output / "run.json", json.dumps(record, indent=1))
    publish_text(output / "data.json", json.dumps([asdict(report) for report in reports], indent=1))


def check_resume(config: TrainConfig, holds_a_run: bool) -> None:
    """Raise TrainError when `resume` insists on a run that is not there, or refuses the one that is."""
    if config.resume is False and holds_a_run:
        raise TrainError(
            f"{config.output}: holds a run already, and resume is false. Leave resume out to go on, or set another "
            "`output`."
        )
    if config.resume and not holds_a_run:
        raise TrainError(
            f"{config.output}: holds no checkpoint, and resume is true. Leave resume out to start, or correct `output`."
        )


def check_same_run(output: Path, record: dict[str, Any]) -> None:
    """Raise TrainError listing what differs between `record` and the run in `output`.

    Only FREE_KEYS may differ between sessions. A record without `data` is compared before the data are read.
    """
    path = output / "run.json"
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TrainError(
            f"{path}: cannot be read ({e}). Delete it to go on without comparing the settings, or set another `output`."
        ) from e
    record = json.loads(json.dumps(record))
    if "data" not in record:
        stored.pop("data", None)
    keys = [k for k in sorted({*stored, *record}) if k not in FREE_KEYS and stored.get(k) != record.get(k)]
    if keys:
        lines = [line for k in keys for line in _changes(k, stored.get(k), record.get(k))]
        if "data" in keys and "sources" not in keys:
            lines.append("  (data are digests: the rows of a source, the tokenizer or how rows are read changed)")
        raise TrainError(
            f"{output}: holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Put them back to resume it, or set another `output`." + _more_steps(output, keys)
        )


def _more_steps(output: Path, keys: Sequence[str]) -> str:
    """How to train longer, if that is what changed: the learning rate ends with the run's last step."""
    if not {"epochs", "max_steps"} & {*keys}:
        return ""
    folders = [folder for folder in (*list_checkpoints(output), output / "final") if folder.is_dir()]
    if not folders:
        return ""
    start, fold = str(folders[-1]), ""
    if not (folders[-1] / "config.json").exists():  # an adapter
        start, fold = "FOLDED", f"`merge-tool fold MODEL {start} FOLDED`, then "
    begin = f"{fold}`model: {start}` and another `output`"
    return f" More steps are a run of their own, with a schedule of its own: {begin}."


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
