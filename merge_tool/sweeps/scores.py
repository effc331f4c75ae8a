"""Run an evaluation command on the folders of merged models, and read the scores that it prints."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from merge_tool.errors import EvaluationError, RecipeError, install, reason, shown

LOG = "evaluation.log"
LM_EVAL = "lm-eval:"  # the command `lm-eval:TASK,TASK OPTION...` is the judge in lm_eval.py
_LAST_LINES = 10
_BEAT_SECONDS = 2.0


def judge(command: Sequence[str]) -> list[str]:
    """The program and arguments of an evaluation command. Raises RecipeError for an empty one, and for
    lm-evaluation-harness if it is not installed or would score another model than the merges."""
    if not command:
        raise RecipeError("The evaluation command is empty, expected a program and its arguments.")
    if not command[0].startswith(LM_EVAL):
        return list(command)
    tasks = command[0].removeprefix(LM_EVAL)
    if not tasks or any(not task for task in tasks.split(",")):
        raise RecipeError(f"'{shown(command[0])}' names no tasks, expected {LM_EVAL}TASK,TASK, as in lm-eval:gsm8k.")
    from merge_tool.sweeps.lm_eval import model_arguments

    if any(re.match(r"\W*pretrained\b", part) for part in model_arguments(command[1:])[0]):
        raise RecipeError(f"{LM_EVAL} has pretrained= in its model arguments: the models are the merges. Leave it out.")
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"{LM_EVAL} needs lm-evaluation-harness: {install('eval')}.")
    return [sys.executable, "-m", "merge_tool.sweeps.lm_eval", tasks, *command[1:], "--"]


def evaluate(
    command: Sequence[str],
    folders: Sequence[Path],
    folder: Path,
    *,
    names: tuple[str, ...] | None,
    beat: Callable[[], None],
) -> list[dict[str, float]]:
    """The command's scores for each of `folders`. `names` are the scores that it printed before. Its stderr goes into
    the log in `folder`; `beat` is called every few seconds."""
    paths = [str(path) for path in folders]
    has_braces = "{}" in command
    args = [arg for word in command for arg in (paths if word == "{}" else [word])] + ([] if has_braces else paths)
    try:
        with (folder / LOG).open("ab") as log:
            start = log.tell()
            code, output = _run(args, log, beat)
    except OSError as e:
        raise EvaluationError(f"The evaluation command {shown(args[0])} cannot be run ({reason(e)}).") from e
    text = output.decode(errors="replace")
    if code:
        raise EvaluationError(
            f"The evaluation command ended with {ending(code)}. Its last lines:\n"
            f"{tail(folder / LOG, start, text)}\nCorrect it, then run the same sweep: it continues with these models."
        )
    try:
        return parse_scores(text, len(folders), names)
    except ValueError as e:
        raise EvaluationError(
            f"The evaluation command's output cannot be read: {e}. It printed:\n{indented(text)}\n"
            "Expected `name value` lines, or JSON, for each folder in order."
        ) from e


def _run(args: Sequence[str], log: IO[bytes], beat: Callable[[], None]) -> tuple[int, bytes]:
    """The exit code and output of a command. `beat` is called while it runs."""
    with subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=_BEAT_SECONDS)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                beat()
            except BaseException:
                process.kill()
                raise


def ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def tail(log: Path, start: int, text: str) -> str:
    """The last lines that the command wrote on stderr (from byte `start` of the log), or else on stdout."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 65_536))
        errors = file.read().decode(errors="replace")
    return indented(errors if errors.strip() else text)


def indented(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return "\n".join(f"    {shown(line)}" for line in lines) or "    (nothing)"


_LINE = re.compile(r"\s*([A-Za-z_][^\s:=]*)\s*[\s:=]\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*%?\s*")


def parse_scores(text: str, count: int, names: tuple[str, ...] | None = None) -> list[dict[str, float]]:
    """The scores of `count` models: JSON, or `name value` lines in the models' order; other lines are ignored.

    Raises ValueError unless every model has the same finite scores (those in `names`, if given).

    >>> parse_scores("loading 3 files\\naccuracy 0.5\\nloss: 2\\naccuracy 0.75\\nloss: 1", 2)
    [{'accuracy': 0.5, 'loss': 2.0}, {'accuracy': 0.75, 'loss': 1.0}]
    """
    rows = _parse_json(text)
    if rows is None:
        rows = _parse_lines(text, count)
    if len(rows) != count:
        raise ValueError(f"scores for {len(rows)} models, expected {count}")
    expected = names or tuple(rows[0])
    if not expected:
        raise ValueError("no score was found")
    for scores in rows:
        if scores.keys() != set(expected):
            raise ValueError(f"the scores are {', '.join(scores)}, expected {', '.join(expected)}")
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise ValueError(f"{bad[0]} is {scores[bad[0]]}")
    return [{name: scores[name] for name in expected} for scores in rows]


def _parse_json(text: str) -> list[dict[str, float]] | None:
    """The output, or its last line, as JSON; None if neither is."""
    for part in (text, text.strip().rpartition("\n")[2]):
        try:
            content = json.loads(part)
        except ValueError:
            continue
        rows = content if isinstance(content, list) else [content]
        if rows and all(isinstance(row, dict) and all(map(is_number, row.values())) for row in rows):
            return [{str(name): float(value) for name, value in row.items()} for row in rows]
    return None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_lines(text: str, count: int) -> list[dict[str, float]]:
    columns: dict[str, list[float]] = {}
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        columns.setdefault(match[1], []).append(float(match[2]))
    if bad := [name for name, values in columns.items() if len(values) != count]:
        raise ValueError(f"{bad[0]} was printed {len(columns[bad[0]])} times for {count} models")
    return [{name: values[k] for name, values in columns.items()} for k in range(count)]
