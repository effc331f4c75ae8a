"""What `evidence.py` found -> evidence.json's content, a table, comparisons, a picture. Every number of the documents
comes from evidence.json by these functions."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from evidence_arms import ARMS, BASELINE, LEAST_KEPT, gained
from matplotlib import rc_context
from matplotlib.figure import Figure

from merge_tool.sweeps.paired import holm, p_value

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
Results = dict[str, Any]


def results_of(folders: Sequence[Path]) -> Results:
    """For each seed what each arm chose and its scores; and each arm against one t, item by item."""
    seeds = [_seed(folder) for folder in folders]
    items = {arm.name: [_read(folder / "evidence" / arm.name / "test.json") for folder in folders] for arm in ARMS}
    compared = [arm.name for arm in ARMS if arm.name not in (BASELINE, "parent", "finetune")]
    tests = [(name, kind) for name in compared for kind in ("solved", "text_losses")]
    ps = holm([p_value(*(_joined(items[one], kind) for one in (name, BASELINE))) for name, kind in tests])
    return {
        "seeds": seeds,
        "items": {kind: len(_joined(items[BASELINE], kind)) for kind in ("solved", "text_losses")},
        "p": {name: {kind: p for (n, kind), p in zip(tests, ps, strict=True) if n == name} for name in compared},
    }


def _seed(folder: Path) -> dict[str, Any]:
    arms = {}
    for arm in ARMS:
        place = folder / "evidence" / arm.name
        arms[arm.name] = {**_read(place / "chosen.json"), "test": _scores(_read(place / "test.json"))}
    curve = _read(folder / "evidence/curve.json")
    return {"arms": arms, "curve": {label: _scores(scores) for label, scores in curve.items()}}


def _scores(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(scores[name], 4) for name in ("skill", "prose_perplexity")}


def _joined(found: Iterable[Mapping[str, Any]], kind: str) -> list[float]:
    return [item for one in found for item in one[kind]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------- figures


def kept_percent(seed: Mapping[str, Any], name: str) -> float:
    """Of the parent's skill on test data."""
    return 100 * seed["arms"][name]["test"]["skill"] / max(seed["arms"]["parent"]["test"]["skill"], 1e-9)


def gained_percent(seed: Mapping[str, Any], name: str) -> float:
    """Of the finetune's gain in log perplexity of prose, on test data."""
    parent, finetune, own = (seed["arms"][one]["test"] for one in ("parent", "finetune", name))
    return 100 * gained(own, parent, finetune)


def beyond_percent(seed: Mapping[str, Any], name: str) -> float:
    """How much more prose it gained than the merge with one t that keeps as much skill, on test data."""
    parent, finetune = (seed["arms"][one]["test"] for one in ("parent", "finetune"))
    points = [parent, *seed["curve"].values(), finetune]
    curve = [(100 * one["skill"] / max(parent["skill"], 1e-9), 100 * gained(one, parent, finetune)) for one in points]
    return gained_percent(seed, name) - gained_at(curve, kept_percent(seed, name))


def gained_at(curve: Sequence[tuple[float, float]], kept: float) -> float:
    """The most that is gained on the straight lines between these points (kept, gained) where as much is kept; what
    is gained at the point that keeps most, if none keeps so much.

    >>> gained_at([(100, 0), (80, 50), (20, 100)], 90)
    25.0
    """
    found = [g for k, g in curve if k >= kept]
    for (k, g), (next_k, next_g) in pairwise(curve):
        if k != next_k and min(k, next_k) <= kept <= max(k, next_k):
            found.append(g + (next_g - g) * (kept - k) / (next_k - k))
    return max(found) if found else max(curve)[1]


# -------------------------------------------------------------------------------------------- the table

HEADINGS = (
    "mean ± standard deviation over the seeds, test data",
    "candidates",
    "skill kept, %",
    "prose perplexity",
    "prose gained, %",
    "beyond one t",
)


def table(results: Results) -> str:
    """Markdown: a row for each arm."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(results["seeds"]))])


def _rows(seeds: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for arm in ARMS:
        counts = sorted({seed["arms"][arm.name]["candidates"] for seed in seeds})
        prose = [seed["arms"][arm.name]["test"]["prose_perplexity"] for seed in seeds]
        figures = [
            spread([figure(seed, arm.name) for seed in seeds], sign=figure is beyond_percent)
            for figure in (kept_percent, gained_percent, beyond_percent)
        ]
        figures[2] = "" if arm.name in ("parent", "finetune") else figures[2]
        yield [arm.title, " or ".join(map(str, counts)), figures[0], spread(prose), *figures[1:]]


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """The mean and, of several, their standard deviation."""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def chosen_table(results: Results) -> str:
    """Markdown: what each arm chose for each seed; and its skill on validation and on test data."""
    seeds = results["seeds"]
    lines = [f"| chosen | {' | '.join(f'seed {k}' for k in range(len(seeds)))} |", "|---" * (len(seeds) + 1) + "|"]
    for arm in ARMS:
        own = [seed["arms"][arm.name] for seed in seeds]
        if any(one["label"] for one in own):
            cells = [f"{o['label']} ({o['validation']['skill']:.1f}, {o['test']['skill']:.1f})" for o in own]
            lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(results: Results) -> str:
    """Markdown: each arm less one t by SLERP, seed by seed, and the p of the items of all seeds together."""
    seeds = results["seeds"]
    lines = [
        "| less SLERP with one t | skill kept, points | p | prose gained, points | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        if arm.name not in results["p"]:
            continue
        cells = []
        for kind, figure in (("solved", kept_percent), ("text_losses", gained_percent)):
            differences = [figure(seed, arm.name) - figure(seed, BASELINE) for seed in seeds]
            cells += [", ".join(f"{one:+.1f}" for one in differences), p_text(results["p"][arm.name][kind])]
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side(results: Results) -> str:
    """Markdown: the merge alone, replay alone, and both, beside the two models that they start from."""
    lines = ["| mean ± standard deviation | sums solved, % | prose perplexity |", "|---|---:|---:|"]
    for name in ("parent", "finetune", BASELINE, "replay", "replay-slerp"):
        tests = [seed["arms"][name]["test"] for seed in results["seeds"]]
        cells = [spread([test[score] for test in tests]) for score in ("skill", "prose_perplexity")]
        lines.append(f"| {_title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(name: str) -> str:
    return next(arm.title for arm in ARMS if arm.name == name)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


# ------------------------------------------------------------------------------------------ the picture


def plot(results: Results, path: Path) -> None:
    """A row for each arm: a dot for each seed, a line at the mean; what is kept beside what is gained. An SVG whose
    bytes depend on the results alone."""
    seeds = results["seeds"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "evidence", "font.size": 9}):
        figure = Figure(figsize=(8.2, 3.6), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for one, percent, label in (
            (axes[0], kept_percent, "skill kept, %"),
            (axes[1], gained_percent, "prose gained, % of the finetune's"),
        ):
            for place, arm in enumerate(ARMS):
                found = [percent(seed, arm.name) for seed in seeds]
                one.plot(found, [place] * len(found), "o", ms=4, color=BLUE, alpha=0.7)
                one.plot([statistics.mean(found)], [place], "|", ms=14, mew=2, color=ORANGE)
            one.axvline(statistics.mean(percent(seed, BASELINE) for seed in seeds), color=GREY, lw=0.8, ls=":")
            one.set_xlabel(label)
            one.grid(axis="x", alpha=0.3)
        axes[0].axvline(100 * LEAST_KEPT, color=GREY, lw=0.8)
        axes[0].set_yticks(range(len(ARMS)), [arm.title for arm in ARMS])
        axes[0].invert_yaxis()
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def write_report(results: Results, picture: Path) -> str:
    """Draw the picture; returns the tables as Markdown."""
    plot(results, picture)
    return "\n\n".join(part(results) for part in (table, chosen_table, comparison_table))
