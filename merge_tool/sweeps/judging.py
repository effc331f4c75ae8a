"""Judge one candidate, with a command that reads the merged model, or a Python function that gets its tensors.

A command prints scores as for a sweep. It may also print these lines, while it runs or at its end:

    step 100 skill 0.31         an intermediate score, by which a hopeless candidate is stopped early
    items skill 1 0 1 1         a score's single items, in an order that is the same for every model

In JSON, `{"skill": 0.75, "items": {"skill": [1, 0, 1, 1]}}`. A function returns such a mapping; one that yields gives
intermediate scores, and its last mapping counts.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.errors import EvaluationError, reason, shown
from merge_tool.sweeps.scores import LOG, ending, indented, is_number, parse_scores, tail

_BEAT_SECONDS = 2.0
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_STEP = re.compile(rf"\s*step\s+(\d+)\s*[\s:]\s*([A-Za-z_][^\s:=]*)\s*[\s:=]\s*({_NUMBER})\s*")
_ITEMS = re.compile(rf"\s*items\s+([A-Za-z_][^\s:=]*)\s*[\s:=]((?:[\s,]*{_NUMBER})+)\s*")
_NOT_FINITE = re.compile(r"\s*([A-Za-z_][^\s:=]*)\s*[\s:=]\s*([-+]?(?:nan|inf(?:inity)?))\s*", re.IGNORECASE)
OnStep = Callable[[int, Mapping[str, float]], bool]  # whether the candidate is hopeless


@dataclass(frozen=True)
class Judgement:
    """A model's scores, and for some scores the single items."""

    scores: Mapping[str, float]
    items: Mapping[str, Sequence[float]]


class Hopeless(Exception):
    """The candidate was stopped early because of its intermediate scores."""


class Names:
    """The names of the scores, and the number of items of each, that every model must have: as the first model."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self._objectives = objectives
        self.scores: tuple[str, ...] | None = None
        self._items: dict[str, int] | None = None

    def learn(self, scores: Iterable[str], items: Mapping[str, Sequence[float]] | None) -> None:
        """`items` are None where they were not looked for."""
        if self.scores is None:
            self.scores = tuple(scores)
        if self._items is None and items is not None:
            self._items = {name: len(values) for name, values in items.items()}

    def check(self, judgement: Judgement) -> None:
        """Raises ValueError."""
        if lacking := [name for name in self._objectives if name not in judgement.scores]:
            raise ValueError(f"there is no score {lacking[0]}; found: {', '.join(judgement.scores)}")
        counts = {name: len(values) for name, values in judgement.items.items()}
        if unknown := [name for name in counts if name not in judgement.scores]:
            raise ValueError(
                f"there are items of {unknown[0]}, which is not a score; found: {', '.join(judgement.scores)}"
            )
        if self._items is not None and counts != self._items:
            raise ValueError(f"the items are {_counts(counts)}, expected {_counts(self._items)}, as before")
        self.learn(judgement.scores, judgement.items)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} of {name}" for name, count in counts.items()) or "none"


# ----------------------------------------------------------------------------------------- a command


def filled(command: Sequence[str], model: Path) -> list[str]:
    """The command with the model's folder in place of {out} or {}, or as its last argument."""
    words = [str(model) if word == "{}" else word.replace("{out}", str(model)) for word in command]
    return words if words != list(command) else [*words, str(model)]


def judge_by_command(
    command: Sequence[str], model: Path, folder: Path, names: Names, *, beat: Callable[[], None], on_step: OnStep
) -> Judgement:
    """The command's judgement of the model. Its stderr goes into the log in `folder`. Raises EvaluationError; and
    Hopeless, after the command was stopped."""
    words = filled(command, model)
    try:
        with (folder / LOG).open("ab") as log:
            start = log.tell()
            code, text = _run(words, log, beat, on_step)
    except OSError as e:
        raise EvaluationError(f"The judge {shown(words[0])} cannot be run ({reason(e)}).") from e
    if code:
        raise EvaluationError(
            f"The judge ended with {ending(code)}. Its last lines:\n{tail(folder / LOG, start, text)}"
        )
    try:
        return parse_judgement(text, names)
    except ValueError as e:
        raise EvaluationError(f"The judge's output cannot be read: {e}. It printed:\n{indented(text)}") from e


def _run(words: Sequence[str], log: Any, beat: Callable[[], None], on_step: OnStep) -> tuple[int, str]:
    """The exit code and the output, read line by line while the command runs."""
    own_group: dict[str, Any] = {} if sys.platform == "win32" else {"start_new_session": True}
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, **own_group
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        text = []
        try:
            for line in _lines(lines, beat):
                text.append(line.decode(errors="replace"))
                if (match := _STEP.fullmatch(text[-1])) and on_step(int(match[1]), {match[2]: float(match[3])}):
                    raise Hopeless
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=_BEAT_SECONDS), "".join(text)
                beat()
        except BaseException:
            _kill(process)
            raise


def _read(stream: Any, lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _lines(lines: queue.SimpleQueue[bytes], beat: Callable[[], None]) -> Iterator[bytes]:
    while True:
        try:
            line = lines.get(timeout=_BEAT_SECONDS)
        except queue.Empty:
            beat()
            continue
        if not line:
            return
        yield line


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the command and all processes that it has started."""
    if sys.platform == "win32":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def parse_judgement(text: str, names: Names) -> Judgement:
    """Scores and items in a command's output. Raises ValueError.

    >>> parse_judgement("step 1 skill 0.2\\nskill 0.5\\nitems skill 0 1", Names(["skill"]))
    Judgement(scores={'skill': 0.5}, items={'skill': (0.0, 1.0)})
    """
    items: dict[str, tuple[float, ...]] = {}
    lines = text.splitlines()
    if (found := _parse_json(text)) is not None:
        content, own = found
        lines, items = [json.dumps(content)], {str(name): _items(name, values) for name, values in own.items()}
    kept = []
    for line in lines:
        if match := _ITEMS.fullmatch(line):
            items[match[1]] = tuple(map(float, re.findall(_NUMBER, match[2])))
        elif not _STEP.fullmatch(line):
            kept.append(line)
    if not any(line.strip() for line in kept):
        raise ValueError("it printed no score")
    if bad := next(filter(None, map(_NOT_FINITE.fullmatch, kept)), None):
        raise ValueError(f"{bad[1]} is {bad[2].lower()}")
    (scores,) = parse_scores("\n".join(kept), 1, names.scores)
    judgement = Judgement(scores, items)
    names.check(judgement)
    return judgement


def _parse_json(text: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The output, or its last line, if it is a JSON object with items: the scores, and the items."""
    for part in (text, text.strip().rpartition("\n")[2]):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(part)
            if isinstance(content, list) and len(content) == 1:
                (content,) = content
            if isinstance(content, dict) and isinstance(items := content.pop("items", None), dict):
                return content, items
    return None


def _items(name: object, values: object) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(is_number(value) and math.isfinite(value) for value in values):
        raise ValueError(f"items of {shown(name)} are not a list of finite numbers")
    return tuple(map(float, values))


# ---------------------------------------------------------------------------------------- a function


def judge_by_function(function: Callable[[Any], Any], tensors: Any, names: Names, *, on_step: OnStep) -> Judgement:
    """A function's judgement of a model's tensors. Raises EvaluationError, also for errors of the function; and
    Hopeless."""
    try:
        answer = function(tensors)
        if inspect.isgenerator(answer):
            answer = _last(answer, on_step)
    except Hopeless:
        raise
    except Exception as e:
        raise EvaluationError(f"The judge raised {type(e).__name__}: {shown(e)}") from e
    try:
        return _from_mapping(answer, names)
    except ValueError as e:
        raise EvaluationError(f"The judge's answer cannot be read: {e}. It was {shown(answer)}.") from e


def _last(answers: Iterable[Any], on_step: OnStep) -> Any:
    last, step = None, 0
    for step, answer in enumerate(answers, 1):
        if last is not None and on_step(step - 1, last):
            raise Hopeless
        last = answer
    return last


def _from_mapping(answer: Any, names: Names) -> Judgement:
    if not isinstance(answer, Mapping):
        raise ValueError("expected a mapping from names to numbers")
    content = {str(name): _plain(value) for name, value in answer.items()}
    own = content.pop("items", {})
    if not isinstance(own, Mapping) or not content or not all(map(is_number, content.values())):
        raise ValueError("expected numbers by their names, and perhaps items")
    items = {str(name): _items(name, _plain(values)) for name, values in own.items()}
    (scores,) = parse_scores(json.dumps(content), 1, names.scores)
    judgement = Judgement(scores, items)
    names.check(judgement)
    return judgement


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers and arrays as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value
