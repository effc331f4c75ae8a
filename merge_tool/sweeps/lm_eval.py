"""The ready judge of a sweep: lm-evaluation-harness, as a program that prints a model's scores as JSON.

    python -m merge_tool.sweeps.lm_eval TASK,TASK [OPTION...] -- FOLDER...

The options (--limit 100, --num_fewshot 5, --batch_size auto ...) are lm_eval's own and are passed on. Each folder is
scored by one call of lm_eval, whose results are read from the file that it writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(words: Sequence[str]) -> int:
    """Score every folder. Returns the exit code: 0, or that of the first lm_eval that failed."""
    tasks, *rest = words
    cut = len(rest) - 1 - rest[::-1].index("--")  # the last one: lm_eval takes none
    options, folders = rest[:cut], rest[cut + 1 :]
    rows = []
    for folder in folders:
        with tempfile.TemporaryDirectory() as results:
            command = [
                sys.executable,
                "-m",
                "lm_eval",
                "run",
                *_arguments(tasks, options, folder),
                "--output_path",
                results,
            ]
            if code := subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                return code
            files = sorted(Path(results).rglob("results*.json"))
            rows.append(dict(scores(json.loads(files[-1].read_text(encoding="utf-8")))))
    print(json.dumps(rows))
    return 0


def _arguments(tasks: str, options: Sequence[str], folder: str) -> list[str]:
    """lm_eval's arguments for one model. The user's --model_args are added to the model's path."""
    model_args, rest = model_arguments(options)
    has_model = any(word == "-M" or word.partition("=")[0] == "--model" for word in rest)
    return [
        *([] if has_model else ["--model", "hf"]),
        "--model_args",
        ",".join([f"pretrained={folder}", *model_args]),
        "--tasks",
        tasks,
        *rest,
    ]


def model_arguments(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The model's arguments for lm_eval (`dtype=float32`), in whatever form they are written, and all other words.

    >>> model_arguments(["--limit", "5", "-a", "dtype=float32", "parallelize=True", "--model_args=x=1,y=2"])
    (['dtype=float32', 'parallelize=True', 'x=1', 'y=2'], ['--limit', '5'])
    """
    found, rest, is_inside = list[str](), list[str](), False
    for word in options:
        name, equals, value = word.partition("=")
        is_option = name in ("--model_args", "-a")
        is_inside = not equals if is_option else is_inside and not word.startswith("-")
        if is_option:
            found += [value] * bool(equals)
        else:
            (found if is_inside else rest).append(word)
    return [part for text in found for part in text.split(",") if part], rest


def scores(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every score in a results file of lm_eval, without standard errors: (`gsm8k/exact_match,strict-match`, 0.5)."""
    groups = {**results["results"], **results.get("groups", {})}
    for task, measured in groups.items():
        for metric, value in measured.items():
            name = metric.removesuffix(",none")
            is_score = isinstance(value, int | float) and not isinstance(value, bool)
            if is_score and "," in metric and "_stderr" not in metric:
                yield f"{task}/{name}", float(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
