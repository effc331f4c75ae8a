"""Our scores beside the card's: reads what evaluate.sh left, prints one table.

python examples/scribe/compare.py runs/eval

Takes the newest results_*.json of lm-evaluation-harness below each of runs/eval/NAME. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# The published scores, in percent (January 2024).
CARD = {
    "stablelm": {"gsm8k": 2.05, "agieval": 25.14, "bbh": 36.75},
    "memphis-cot": {"gsm8k": 13.8, "agieval": 26.24, "bbh": 38.24},
    "scribe-ft": {},
    "memphis-scribe": {"gsm8k": 12.28, "agieval": 23.92, "bbh": 38.1},
}
ROWS = {
    "gsm8k": ("GSM8K, strict match", "gsm8k"),
    "agieval-macro": ("AGIEval (Nous), mean of tasks", "agieval"),
    "agieval-sized": ("AGIEval (Nous), by size", "agieval"),
    "bbh": ("BBH, CoT few-shot", "bbh"),
}
CAVEATS = """\
The card's scores are of January 2024. The harness's tasks have changed since (prompts, filters, data sets; its BBH was
3-shot, whatever the card's footnote says), so a difference of a point or two says nothing. What can be compared is the
order of the models within one column of ours. How the card averaged AGIEval is not known: both means stand here, the
harness's own is the one by size. +/- is one standard error of ours, from the number of questions alone."""


class Score(NamedTuple):
    """In percent, with its standard error (NaN where the harness gives none)."""

    value: float
    error: float


class ResultsError(Exception):
    """A file or folder is not what was expected; the message says what was found."""


def newest_results(folder: Path) -> Path | None:
    """The last written results_*.json below `folder`; their names hold their time."""
    return max(folder.rglob("results_*.json"), key=lambda path: path.name, default=None)


def load_scores(path: Path) -> dict[str, Score]:
    """The scores of one results file under the keys of ROWS, as far as its tasks were run. Raises ResultsError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results, samples = found["results"], found["n-samples"]
        return dict(_scores(results, samples, found.get("group_subtasks", {})))
    except OSError as e:
        raise ResultsError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ResultsError(
            f"{path}: is not a results file of lm-evaluation-harness 0.4 ({type(e).__name__}: {e}). "
            "Remove it, and run evaluate.sh again."
        ) from e


def _scores(
    results: Mapping[str, Any], samples: Mapping[str, Any], groups: Mapping[str, Any]
) -> Iterator[tuple[str, Score]]:
    if "gsm8k" in results:
        yield "gsm8k", _score(results["gsm8k"], "exact_match", "strict-match")
    if parts := _parts(results, groups, "agieval_nous"):
        scores = [_score(results[part], "acc_norm", "none") for part in parts]
        yield "agieval-macro", mean(scores, [1] * len(parts))
        yield "agieval-sized", mean(scores, [samples[part]["effective"] for part in parts])
    if parts := _parts(results, groups, "bbh_cot_fewshot"):
        scores = [_score(results[part], "exact_match", "get-answer") for part in parts]
        yield "bbh", mean(scores, [samples[part]["effective"] for part in parts])


def _parts(results: Mapping[str, Any], groups: Mapping[str, Any], group: str) -> list[str]:
    return [part for part in groups.get(group, []) if part in results]


def _score(result: Mapping[str, Any], metric: str, filter_name: str) -> Score:
    error = result.get(f"{metric}_stderr,{filter_name}", "N/A")
    return Score(100 * result[f"{metric},{filter_name}"], 100 * error if error != "N/A" else math.nan)


def mean(scores: list[Score], weights: list[float]) -> Score:
    """The weighted mean of independent scores, and its standard error."""
    total = sum(weights)
    value = sum(w * score.value for score, w in zip(scores, weights, strict=True)) / total
    return Score(value, math.hypot(*(w * score.error for score, w in zip(scores, weights, strict=True))) / total)


def table(found: Mapping[str, Mapping[str, Score]]) -> str:
    """Two columns for each model: ours with its standard error, and the card's."""
    lines = [f"{'in %':32}" + "".join(f"{name:>25}" for name in found)]
    lines.append(f"{'':32}" + f"{'ours':>16}{'card':>9}" * len(found))
    for key, (title, card_key) in ROWS.items():
        cells = ""
        for name, scores in found.items():
            ours = f"{scores[key].value:.2f} +/- {scores[key].error:.2f}" if key in scores else "-"
            card = CARD.get(name, {}).get(card_key)
            cells += f"{ours:>16}{'-' if card is None else f'{card:.2f}':>9}"
        lines.append(f"{title:32}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print our scores beside the card's.")
    parser.add_argument("folder", type=Path, help="holds a folder of results for each model: runs/eval")
    folder = parser.parse_args().folder
    paths = {name: newest_results(folder / name) for name in CARD}
    if not any(paths.values()):
        sys.exit(f"Error: {folder} holds no results_*.json below {', '.join(CARD)}. Run evaluate.sh first.")
    try:
        found = {name: load_scores(path) for name, path in paths.items() if path is not None}
    except ResultsError as e:
        sys.exit(f"Error: {e}")
    print(table(found))
    for name, path in paths.items():
        if path is None:
            print(f"\nNo results yet: {name}")
    print(f"\n{CAVEATS}")


if __name__ == "__main__":
    main()
