"""`sweep.jsonl`: the sweep's facts, then a line for each model begun or scored, so that a stopped sweep continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, shown
from merge_tool.files import sync_file, write_whole
from merge_tool.output.lock import FolderLock
from merge_tool.output.older import strangers
from merge_tool.sweeps.scores import is_number

JOURNAL = "sweep.jsonl"
HIDDEN = ".sweep"  # the lock and unfinished files; exists while a sweep runs
Values = Mapping[str, Any]  # of one model: the parameters that are varied


class Journal:
    """`sweep.jsonl`: the sweep's facts, then a line for each model begun or scored, by its name. One process at a time
    holds it."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
        self._path = folder / JOURNAL
        self.scores: dict[str, dict[str, float]] = {}
        self.values: dict[str, Values] = {}
        self.begun: list[str] = []
        hidden = folder / HIDDEN
        hidden.mkdir(exist_ok=True)
        self._hidden, self._lock = hidden, FolderLock(hidden)
        try:
            lines = [] if overwrite else list(read_lines(self._path))
            if lines:
                _check_same(self._path, lines[0], facts)
            elif not overwrite and (others := strangers(folder, [HIDDEN], ())):
                raise OutputError(
                    f"{shown(folder)}: is not empty ({shown(others[0])}) and holds no sweep. Choose another folder."
                )
            # Write the file anew, without a line that was cut short.
            write_beside(self._path, "".join(json.dumps(line) + "\n" for line in (lines or [dict(facts)])))
            for line in lines[1:]:
                self.begun = line.get("begun", self.begun)
                if "scores" in line:
                    self.scores[line["model"]], self.values[line["model"]] = line["scores"], line["values"]
            if len({frozenset(scores) for scores in self.scores.values()}) > 1:
                raise OutputError(
                    f"{shown(self._path)}: its points have different scores. Choose another folder, or --overwrite to "
                    "start anew."
                )
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...] | None:
        return next((tuple(scores) for scores in self.scores.values()), None)

    def begin(self, models: Sequence[str]) -> bool:
        """Note that these models are being merged. True if an earlier run began the same ones, so that its merge can
        continue."""
        was_begun, self.begun = self.begun == list(models), list(models)
        self._append({"begun": self.begun})
        return was_begun

    def add(self, model: str, values: Values, scores: dict[str, float]) -> None:
        self.scores[model], self.values[model] = scores, values
        self._append({"model": model, "values": dict(values), "scores": scores})

    def beat(self) -> None:
        """Show other machines that this sweep works."""
        self._lock.owner.beat()

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            sync_file(file.fileno())

    def close(self) -> None:
        self._lock.remove_with(self._hidden)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines, without a last line that a kill has cut short. Raises OutputError for a damaged line."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_whole(record):
            raise OutputError(
                f"{shown(path)}: line {number + 1} is damaged. Choose another folder, or --overwrite to start anew."
            )
        yield record


def _is_whole(line: Any) -> bool:
    """Whether a line has a sweep's facts, the models that were begun, or the scores of a model."""
    if not isinstance(line, dict):
        return False
    if "scores" in line:
        scores, values = line["scores"], line.get("values")
        is_scored = isinstance(scores, dict) and len(scores) > 0 and all(map(is_number, scores.values()))
        return is_scored and isinstance(line.get("model"), str) and isinstance(values, dict) and len(values) > 0
    begun = line.get("begun", [])
    return isinstance(begun, list) and all(isinstance(name, str) for name in begun)


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError that names the differences from the sweep in the folder."""
    now = json.loads(json.dumps(now))
    if different := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
        key = different[0]
        raise OutputError(
            f"{shown(path)}: is of another sweep: {', '.join(different)} differ "
            f"({key}: {shown(before.get(key, 'nothing'), 80)} there, {shown(now.get(key, 'nothing'), 80)} now). "
            "Choose another folder, or --overwrite to start anew."
        )


def read_scored(folder: Path) -> set[str]:
    """The names of the models that have scores in a sweep's folder, for a dry run."""
    return {line["model"] for line in read_lines(folder / JOURNAL) if "scores" in line}


def write_beside(path: Path, text: str) -> None:
    """Write a file in the lock's folder, then move it into the sweep's folder: a kill leaves the old file, and nothing
    else."""
    write_whole(path, [text.encode()], path.parent / HIDDEN / f"{path.name}.part")
