"""The results of a sweep: a point for each model, the Pareto-optimal ones marked; as a table and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.recipe.recipe import label_t

LESS_IS_BETTER = ("perplexity", "ppl", "loss", "nll", "error", "wer")  # scores with these in their names are minimised
_MOST_POINTS = 15  # of the text for a screen
Values = Mapping[str, Any]


@dataclass(frozen=True)
class SweepPoint:
    """One merge: the values of the varied parameters, the command's scores, and whether the merge is Pareto-optimal (no
    other is as good in every score and better in one)."""

    values: Values
    scores: Mapping[str, float]
    is_pareto: bool = False

    @property
    def t(self) -> float:
        """The t of a merge of a pair."""
        return float(self.values["t"])


@dataclass(frozen=True)
class SweepReport:
    """All points, in order of their parameters. `less_is_better` are the scores to minimise, `folder` holds the files,
    `models` are the names of the merged models. The repr shows the first points."""

    folder: Path
    points: tuple[SweepPoint, ...]
    less_is_better: frozenset[str]
    models: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The parameters that are varied."""
        return tuple(self.points[0].values)

    @property
    def names(self) -> tuple[str, ...]:
        """The scores."""
        return tuple(self.points[0].scores)

    def as_json(self) -> dict[str, Any]:
        points = [{**p.values, "scores": dict(p.scores), "pareto": p.is_pareto} for p in self.points]
        return {"less_is_better": sorted(self.less_is_better), "points": points}

    def as_csv(self) -> str:
        """A row for each point: the parameters, the scores, pareto (0 or 1)."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow([*self.keys, *self.names, "pareto"])
        for point in self.points:
            values = [label_t(value) for value in point.values.values()]
            rows.writerow([*values, *(repr(point.scores[n]) for n in self.names), int(point.is_pareto)])
        return text.getvalue()

    def __repr__(self) -> str:
        lines = [f"{shown(self.folder)}: a sweep of {len(self.points)} merges; * is Pareto-optimal"]
        for point in self.points[:_MOST_POINTS]:
            lines.append(f"  {point_text(point)}{'  *' * point.is_pareto}")
        if len(self.points) > _MOST_POINTS:
            lines.append(f"  and {len(self.points) - _MOST_POINTS:,} more")
        return "\n".join(lines)


def values_text(values: Values) -> str:
    """`t = 0.3`, or `density = 0.5, weight = 1`."""
    return ", ".join(f"{shown(key, 60)} = {label_t(value)}" for key, value in values.items())


def point_text(point: SweepPoint) -> str:
    """`t = 0.3: loss 1.2, accuracy 0.5`."""
    scores = ", ".join(f"{shown(name)} {value:g}" for name, value in point.scores.items())
    return f"{values_text(point.values)}: {scores}"


def build_report(
    folder: Path,
    scored: Iterable[tuple[Values, Mapping[str, float]]],
    minimize: Iterable[str],
    models: tuple[str, ...] = (),
) -> SweepReport:
    """The points with their Pareto marks. Raises RecipeError if `minimize` names a score that does not exist."""
    ordered = sorted(scored, key=lambda item: [(isinstance(v, str), v) for v in item[0].values()])
    names = tuple(ordered[0][1])
    less = check_minimize(names, minimize)
    marks = pareto([[-s[n] if n in less else s[n] for n in names] for _, s in ordered])
    points = (SweepPoint(values, scores, mark) for (values, scores), mark in zip(ordered, marks, strict=True))
    return SweepReport(folder, tuple(points), less, models)


def check_minimize(names: Sequence[str], minimize: Iterable[str]) -> frozenset[str]:
    """The scores for which less is better. Raises RecipeError if `minimize` names a score that does not exist."""
    if unknown := sorted(set(minimize) - set(names)):
        raise RecipeError(f"--minimize {shown(unknown[0])}: there is no such score; found: {', '.join(names)}.")
    return frozenset(minimize) | {n for n in names if any(part in n.lower() for part in LESS_IS_BETTER)}


def pareto(rows: Sequence[Sequence[float]]) -> list[bool]:
    """For each row of scores (more is better): whether no other row is as good in all scores and better in one."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)

    return [not any(beats(other, row) for other in rows) for row in rows]
