"""Is a response right? Its answer is extracted by a regular expression, then compared with the question's."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from train.compare import COMPARISONS, Comparison, is_function, load_comparison
from train.contrast.generate import Response
from train.contrast.options import VerifyConfig
from train.contrast.questions import Question, to_lines
from train.errors import TrainError

Answered = Sequence[tuple[Question, Response]]


def verify(config: VerifyConfig, answered: Answered) -> list[bool]:
    """Whether each response is right. Raises TrainError when the function or command of `compare` fails."""
    found = [extract(config, response) for _, response in answered]
    if (compare := comparison(config.compare)) is not None:
        return [f is not None and bool(compare(f, q.answer)) for f, (q, _) in zip(found, answered, strict=True)]
    return [f is not None and ok for f, ok in zip(found, _command(config.compare, found, answered), strict=True)]


def extract(config: VerifyConfig, response: Response) -> str | None:
    """The answer in a response; None when there is none, or the response did not end."""
    if not response.is_finished:
        return None
    if config.extract is None:
        return response.text.strip()
    matches = list(re.finditer(config.extract, response.text.rstrip() + "\n"))
    return (matches[-1][min(1, matches[-1].re.groups)] or "").strip() if matches else None


def comparison(name: str) -> Comparison | None:
    """The function that `compare` names; None for a command. Raises TrainError when there is no such thing."""
    if name in COMPARISONS or is_function(name):
        return load_comparison("contrast.verify.compare", name)
    if shutil.which((_words(name) or [""])[0]) is None:
        known = ", ".join(COMPARISONS)
        raise TrainError(f"contrast.verify.compare is {name!r}, which is neither {known} nor a command here.")
    return None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as e:
        raise TrainError(f"contrast.verify.compare is {command!r}, which cannot be split into words ({e}).") from e


def _command(command: str, found: Sequence[str | None], answered: Answered) -> list[bool]:
    lines = to_lines([
        {"question": q.number, "prompt": q.text, "response": r.text, "found": f, "answer": q.answer}
        for f, (q, r) in zip(found, answered, strict=True)
    ])  # fmt: skip
    try:
        done = subprocess.run(
            _words(command), input=lines, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError) as e:
        raise TrainError(f"contrast.verify.compare: the command {command!r} failed ({e}). Correct it.") from e
    told = done.stdout.split()
    if len(told) != len(answered) or not {*told} <= {"0", "1"}:
        raise TrainError(
            f"contrast.verify.compare: {command!r} printed {' '.join(told[:5])!r} ({len(told)} words), expected 0 or 1 "
            f"for each of {len(answered)} responses."
        )
    return [word == "1" for word in told]
