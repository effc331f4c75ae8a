"""What `evidence.py` compares: the candidates of each arm, and the one rule by which every arm chooses. No model is
opened here.

The rule: of the candidates that keep at least 90 % of the parent's skill on the validation data, the one with the least
prose perplexity; if none keeps so much, the one that keeps most. `value` says it as one number, so that a search can
go after what the others are chosen by.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any

LEAST_KEPT = 0.9
MOST_CANDIDATES = 60  # of an arm
STEPS = 10  # of t from 0 to 1
FINER = tuple(k / 50 for k in (-4, -3, -2, -1, 1, 2, 3, 4))  # then around the best of these
WINDOWS = (2, 3, 5, 8, 10)  # checkpoints in an average; the run leaves nine and its result
WEIGHTS = ("uniform", "sqrt")
MERGED_WINDOWS = (3, 10)  # of the averages that are merged with the parent
PARENT, FINETUNE, REPLAY, AVERAGES = "cot/final", "ft/final", "replay/final", "averages"

Scores = Mapping[str, float]  # skill: problems solved, %; prose_perplexity


@dataclass(frozen=True)
class Candidate:
    """A recipe to merge (or its file), or the folder of a model that is there. `finer` makes the candidates that are
    tried next, if this one is the best."""

    label: str
    recipe: Mapping[str, Any] | Path | None = None
    model: Path | None = None
    finer: Callable[[], list["Candidate"]] | None = None


@dataclass(frozen=True)
class Arm:
    """`candidates` makes them for the folder of a seed; None for a search, which makes its own as it goes."""

    name: str
    title: str
    candidates: Callable[[Path], list[Candidate]] | None


def value(scores: Scores, parent: Scores, finetune: Scores) -> float:
    """The share of the finetune's gain in prose; below -0.9 and less, the less skill is kept, for a candidate that
    keeps too little. The rule takes the largest."""
    kept = scores["skill"] / max(parent["skill"], 1e-9)
    return gained(scores, parent, finetune) if kept >= LEAST_KEPT else kept - LEAST_KEPT - 1


def gained(scores: Scores, parent: Scores, finetune: Scores) -> float:
    """Of the finetune's gain in log perplexity of prose, the share that these scores have."""
    start, end, here = (log(one["prose_perplexity"]) for one in (parent, finetune, scores))
    return (start - here) / (start - end) if start != end else 0.0


def choose(validation: Iterable[tuple[str, Scores]], parent: Scores, finetune: Scores) -> str:
    """The label of the candidate with the largest value; of equal ones, the first."""
    return max(validation, key=lambda one: value(one[1], parent, finetune))[0]


# ------------------------------------------------------------------------------------ the candidates


def along(recipe_at: Callable[[float], Mapping[str, Any]], before: str = "") -> list[Candidate]:
    """t from 0 to 1; then, around the best, steps of 0.02."""

    def at(t: float, finer: Callable[[], list[Candidate]] | None = None) -> Candidate:
        return Candidate(f"{before}t = {t:.3g}", recipe_at(t), finer=finer)

    def around(t: float) -> list[Candidate]:
        near = [round(t + step, 4) for step in FINER]
        return [at(one) for one in near if 0 < one < 1]

    return [at(k / STEPS, partial(around, k / STEPS)) for k in range(STEPS + 1)]


def slerps(folder: Path, model: str, before: str = "") -> list[Candidate]:
    """Parent and model, by SLERP with one t for all tensors."""
    return along(partial(slerp, folder, model), before)


def slerp(folder: Path, model: str, t: Any) -> Mapping[str, Any]:
    parent, other = str(folder / PARENT), str(folder / model)
    models = [{"model": parent}, {"model": other}]
    return {"merge_method": "slerp", "base_model": parent, "models": models, "parameters": {"t": t}}


def linears(folder: Path) -> list[Candidate]:
    """The same, interpolated linearly."""

    def linear(t: float) -> Mapping[str, Any]:
        weights = {PARENT: 1 - t, FINETUNE: t}
        models = [{"model": str(folder / name), "parameters": {"weight": w}} for name, w in weights.items()]
        return {"merge_method": "linear", "models": models}

    return along(linear)


def growing(folder: Path) -> list[Candidate]:
    """LiNeS: t grows along the layers, in steps of 0.2 for the first and for the last one; then, around the best, of
    0.1."""

    def at(first: int, last: int, finer: Callable[[], list[Candidate]] | None = None) -> Candidate:  # in tenths
        lines = {"alpha": first / 10, "beta": (last - first) / 10}
        return Candidate(f"t = {first / 10} to {last / 10}", slerp(folder, FINETUNE, {"lines": lines}), finer=finer)

    def around(first: int, last: int) -> list[Candidate]:
        near = [(first + a, last + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
        return [at(a, b) for a, b in near if 0 <= a <= b <= 10]

    ends = [(first, last) for first in range(0, 10, 2) for last in range(first + 2, 11, 2)]
    return [at(*one, partial(around, *one)) for one in ends]


def averages(folder: Path) -> list[Candidate]:
    """Averages of the last checkpoints of the finetune, by themselves."""
    return [
        Candidate(f"the last {window}, {kind}", model=folder / average_name(window, kind))
        for kind in WEIGHTS
        for window in WINDOWS
    ]


def merged_averages(folder: Path) -> list[Candidate]:
    found = []
    for window in MERGED_WINDOWS:
        found += slerps(folder, average_name(window, "uniform"), f"the last {window}, ")
    return found


def checkpoints(folder: Path) -> list[Path]:
    """Those that the finetune left, the oldest first; the last one is its result."""
    return [*sorted((folder / FINETUNE).parent.glob("checkpoints/step-*")), folder / FINETUNE]


def average_name(window: int, kind: str) -> str:
    return f"{AVERAGES}/window-{window}-weights-{kind}"


def _is_there(name: str) -> Callable[[Path], list[Candidate]]:
    return lambda folder: [Candidate("", model=folder / name)]


def _checkpoints(folder: Path) -> list[Candidate]:
    return [Candidate(re.sub("step-0*", "step ", model.name), model=model) for model in checkpoints(folder)]


BASELINE, SEARCH = "slerp", "search"
ARMS = (
    Arm("parent", "parent", _is_there(PARENT)),
    Arm("finetune", "finetune", _is_there(FINETUNE)),
    Arm("checkpoint", "one checkpoint of the finetune", _checkpoints),
    Arm("average", "average of its checkpoints", averages),
    Arm(BASELINE, "SLERP, one t", lambda folder: slerps(folder, FINETUNE)),
    Arm("linear", "linear, one t", linears),
    Arm("lines", "SLERP, t grows along the layers (LiNeS)", growing),
    Arm(SEARCH, "SLERP, 12 values of t by search", None),
    Arm("average-slerp", "average of its checkpoints, SLERP, one t", merged_averages),
    Arm("replay", "finetune with 2 % replay", _is_there(REPLAY)),
    Arm("replay-slerp", "finetune with 2 % replay, SLERP, one t", lambda folder: slerps(folder, REPLAY)),
)
