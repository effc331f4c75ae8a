"""The results of a search: every candidate, the Pareto front, the point that a stated rule chooses, and tests of which
points of the front differ."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, counted, shown
from merge_tool.recipe.recipe import label_t
from merge_tool.sweeps.results import pareto
from merge_tool.sweeps.study import Objective, Tried

CHOSEN, FRONT, TABLE, RESULT = "chosen.yaml", "front", "search.csv", "search.json"
ALPHA = 0.05  # if p is below it, two points differ
_MOST_POINTS = 12  # of the text for a screen
_MOST_COMPARED = 16  # points of the front, by pairs: some seconds


@dataclass(frozen=True)
class Comparison:
    """Two candidates' single items of one score: the difference of the scores (a - b), and the p of a paired
    permutation test, corrected for all comparisons of this list."""

    a: int
    b: int
    name: str
    difference: float
    p: float

    @property
    def differs(self) -> bool:
        return self.p < ALPHA


@dataclass(frozen=True)
class SearchReport:
    """All candidates, in their order. `front`, `chosen` and `uniform` are candidates' numbers: the Pareto front, the
    chosen one, and the best candidate with one value everywhere. `comparisons` compare points of the front,
    `against_uniform` the chosen with the best uniform candidate; both need the judge's items. `test_scores` are the
    chosen candidate's scores on test data."""

    folder: Path
    objectives: tuple[Objective, ...]
    tried: tuple[Tried, ...]
    front: tuple[int, ...]
    chosen: int | None
    uniform: int | None
    rule: str
    comparisons: tuple[Comparison, ...] = ()
    against_uniform: tuple[Comparison, ...] = ()
    test_scores: Mapping[str, float] | None = None

    def point(self, number: int) -> Tried:
        return next(one for one in self.tried if one.number == number)

    @property
    def recipe(self) -> Path | None:
        """The chosen recipe's file."""
        return None if self.chosen is None else self.folder / CHOSEN

    def as_json(self) -> dict[str, Any]:
        return {
            "objectives": {one.name: one.direction for one in self.objectives},
            "candidates": [_as_json(one) for one in self.tried],
            "front": list(self.front),
            "chosen": self.chosen,
            "best_uniform": self.uniform,
            "rule": self.rule,
            "comparisons": [_compared(one) for one in self.comparisons],
            "against_uniform": [_compared(one) for one in self.against_uniform],
            "test_scores": None if self.test_scores is None else dict(self.test_scores),
        }

    def as_csv(self) -> str:
        """A row for each candidate: its number, kind and state, a column for each knob and each score, front (0 or
        1)."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        knobs = list(dict.fromkeys(name for one in self.tried for name in one.values))
        names = list(dict.fromkeys(name for one in self.tried for name in one.scores or ()))
        rows.writerow(["number", "kind", "state", *knobs, *names, "front"])
        for one in self.tried:
            scores = one.scores or {}
            values = [label_t(one.values[name]) if name in one.values else "" for name in knobs]
            own = [repr(scores[name]) if name in scores else "" for name in names]
            rows.writerow([one.number, one.kind, state_of(one), *values, *own, int(one.number in self.front)])
        return text.getvalue()

    def __repr__(self) -> str:
        return "\n".join(report_lines(self))


def _compared(one: Comparison) -> dict[str, Any]:
    return {"a": one.a, "b": one.b, "score": one.name, "difference": one.difference, "p": one.p}


def _as_json(one: Tried) -> dict[str, Any]:
    record = {"number": one.number, "kind": one.kind, "state": state_of(one), "values": dict(one.values)}
    record["scores"] = None if one.scores is None else dict(one.scores)
    return {**record, **({"error": one.error} if one.error else {}), **({"t": one.t} if one.t is not None else {})}


def state_of(one: Tried) -> str:
    return "pruned" if one.is_pruned else "scored" if one.scores is not None else "failed"


# ---------------------------------------------------------------------------------------- the choice


def build_report(
    folder: Path,
    objectives: Sequence[Objective],
    tried: Sequence[Tried],
    choose: str | None,
    test_scores: Mapping[int, Mapping[str, float]],
    *,
    compare: bool = True,
) -> SearchReport:
    """The front, the chosen point, and, with `compare`, the comparisons of these candidates."""
    scored = [one for one in tried if one.scores is not None]
    marks = pareto([_more_is_better(objectives, one) for one in scored])
    front = [one for one, mark in zip(scored, marks, strict=True) if mark]
    chosen = _choose(objectives, front, front, choose)
    uniform = _choose(objectives, [one for one in scored if one.t is not None], front, choose)
    others = [(chosen, uniform)] if chosen and uniform and chosen is not uniform else []
    against = _compare(objectives, others if compare else [])
    pairs = list(combinations(front[:_MOST_COMPARED], 2)) if compare else []
    return SearchReport(
        folder=folder,
        objectives=tuple(objectives),
        tried=tuple(tried),
        front=tuple(one.number for one in front),
        chosen=None if chosen is None else chosen.number,
        uniform=None if uniform is None else uniform.number,
        rule=rule_in_words(objectives, choose),
        comparisons=tuple(_compare(objectives, pairs)),
        against_uniform=tuple(against),
        test_scores=None if chosen is None else test_scores.get(chosen.number),
    )


def check_choose(objectives: Sequence[Objective], choose: str | None) -> None:
    """Raise RecipeError if `choose` names no objective."""
    if choose is not None and choose not in (names := [one.name for one in objectives]):
        raise RecipeError(f"--choose {shown(choose)}: is not searched for. Choose by one of: {', '.join(names)}.")


def rule_in_words(objectives: Sequence[Objective], choose: str | None) -> str:
    if choose is not None or len(objectives) == 1:
        one = next(o for o in objectives if choose is None or o.name == choose)
        return f"the {'smallest' if one.is_less_better else 'largest'} {one.name}"
    names = " and ".join(one.name for one in objectives)
    return f"the point of the front nearest to the best {names}, each scaled to the front's range"


def _more_is_better(objectives: Sequence[Objective], one: Tried) -> list[float]:
    assert one.scores is not None
    return [-one.scores[o.name] if o.is_less_better else one.scores[o.name] for o in objectives]


def _choose(
    objectives: Sequence[Objective], points: Sequence[Tried], front: Sequence[Tried], choose: str | None
) -> Tried | None:
    """The point that the rule chooses; among equal points, the first that was tried."""
    if not points:
        return None
    if choose is not None or len(objectives) == 1:
        place = next(k for k, o in enumerate(objectives) if choose is None or o.name == choose)
        return max(points, key=lambda one: _more_is_better(objectives, one)[place])
    rows = [_more_is_better(objectives, one) for one in front]
    best, worst = ([end(column) for column in zip(*rows, strict=True)] for end in (max, min))

    def distance(one: Tried) -> float:
        ends = zip(_more_is_better(objectives, one), best, worst, strict=True)
        return math.hypot(*((high - value) / (high - low) if high > low else high - value for value, high, low in ends))

    return min(points, key=distance)


def _compare(objectives: Sequence[Objective], pairs: Sequence[tuple[Tried, Tried]]) -> list[Comparison]:
    from merge_tool.sweeps.paired import holm, p_value

    found = []
    for a, b in pairs:
        for objective in objectives:
            own, other = ((one.items or {}).get(objective.name) for one in (a, b))
            if own is None or other is None or len(own) != len(other):
                continue
            assert a.scores is not None
            assert b.scores is not None
            difference = a.scores[objective.name] - b.scores[objective.name]
            found.append(Comparison(a.number, b.number, objective.name, difference, p_value(own, other)))
    corrected = holm([one.p for one in found])
    return [Comparison(one.a, one.b, one.name, one.difference, p) for one, p in zip(found, corrected, strict=True)]


# -------------------------------------------------------------------------------------------- words


def tried_text(one: Tried, objectives: Sequence[Objective]) -> str:
    """`candidate 12 (t = 0.4): skill 0.5, perplexity 3.1`."""
    what = f"candidate {one.number}{'' if one.t is None else f' (t = {label_t(one.t)})'}"
    if one.scores is None:
        return f"{what}: {'stopped early' if one.is_pruned else f'no scores ({shown(one.error.splitlines()[0], 200)})'}"
    return f"{what}: {', '.join(f'{shown(o.name)} {one.scores[o.name]:g}' for o in objectives)}"


def report_lines(report: SearchReport) -> Iterator[str]:
    states = [state_of(one) for one in report.tried]
    counts = ", ".join(f"{states.count(state):,} {state}" for state in ("pruned", "failed") if state in states)
    yield f"{shown(report.folder)}: {counted(len(states), 'candidate')}{f' ({counts})' if counts else ''}"
    if report.chosen is None:
        yield "No candidate has scores yet."
        return
    yield "The Pareto front:"
    for number in report.front[:_MOST_POINTS]:
        mark = "  <- chosen" if number == report.chosen else ""
        yield f"  {tried_text(report.point(number), report.objectives)}{mark}"
    if len(report.front) > _MOST_POINTS:
        yield f"  and {len(report.front) - _MOST_POINTS:,} more"
    yield f"Chosen by {report.rule}: {shown(report.folder / CHOSEN)}"
    yield from _front_lines(report)
    yield from _uniform_lines(report)
    if report.test_scores is not None:
        yield f"On test data: {', '.join(f'{shown(n)} {value:g}' for n, value in report.test_scores.items())}"


def _front_lines(report: SearchReport) -> Iterator[str]:
    if not report.comparisons:
        return
    pairs = {(one.a, one.b): False for one in report.comparisons}
    pairs |= {(one.a, one.b): True for one in report.comparisons if one.differs}
    alike = [f"{a} and {b}" for (a, b), differs in pairs.items() if not differs]
    yield (
        f"{sum(pairs.values()):,} of {counted(len(pairs), 'pair')} of the front differ in some score (paired "
        f"permutation test, Holm, p < {ALPHA})"
        + (
            f"; no difference is shown between {', '.join(alike[:6])}{' ...' if len(alike) > 6 else ''}."
            if alike
            else "."
        )
    )


def _uniform_lines(report: SearchReport) -> Iterator[str]:
    if report.uniform is None or report.chosen is None:
        return
    uniform = report.point(report.uniform)
    if report.uniform == report.chosen:
        yield f"Nothing beat one value for all layers: the chosen one is t = {label_t(uniform.t or 0.0)} everywhere."
        return
    ps = {one.name: one for one in report.against_uniform}
    own, other = report.point(report.chosen).scores or {}, uniform.scores or {}
    parts = []
    for o in report.objectives:
        test = ps.get(o.name)
        words = "" if test is None else f" (p = {test.p:.2g}{'' if test.differs else ', no difference shown'})"
        parts.append(f"{shown(o.name)} {own[o.name] - other[o.name]:+g}{words}")
    words = tried_text(uniform, report.objectives)
    yield f"Against the best with one value for all layers, {words}: {'; '.join(parts)}"
