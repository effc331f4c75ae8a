"""Findings -> pictures. The only importer of matplotlib, inside functions.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every axis has its name and unit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tool.errors import RecipeError, shown
from merge_tool.recipe import label_t

if TYPE_CHECKING:
    from merge_tool.sweep import SweepReport

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plot_path(path: Path) -> None:
    """Raise RecipeError unless a picture could be drawn there: said before the work, not after it."""
    if not can_plot():
        raise RecipeError("A picture needs matplotlib: pip install 'slerp-merge[plot]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RecipeError(f"{shown(path)}: a picture is .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{shown(path)}: there is no such folder.")


def plot_sweep(report: SweepReport, path: Path) -> None:
    """A panel per score over t, and for two scores one against the other; Pareto-optimal points are filled."""
    names, points = report.names, report.points
    panels = len(names) + (len(names) == 2)
    figure, rows = _subplots(1, panels, figsize=(3.8 * panels, 3.4))
    ts = [point.t for point in points]
    for axes, name in zip(rows[0], names, strict=False):
        _line(axes, ts, [point.scores[name] for point in points], points)
        better = "less" if name in report.less_is_better else "more"
        axes.set(xlabel="t (0 = base, 1 = finetune)", ylabel=f"{name} ({better} is better)")
    if len(names) == 2:
        axes, (x, y) = rows[0][2], names
        _line(axes, [p.scores[x] for p in points], [p.scores[y] for p in points], points)
        for point in points:
            place = point.scores[x], point.scores[y]
            axes.annotate(label_t(point.t), place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel=x, ylabel=y, title="trade-off, labelled with t")
    rows[0][0].set_title("filled: Pareto-optimal", fontsize=9, loc="left")
    _save(figure, path)


def _line(axes: Any, x: list[float], y: list[float], points: Any) -> None:
    axes.plot(x, y, color=BLUE, linewidth=1.5, zorder=1)
    fills = [BLUE if point.is_pareto else "white" for point in points]
    axes.scatter(x, y, c=fills, edgecolors=BLUE, s=36, zorder=2)
    axes.grid(alpha=0.3)


def _subplots(rows: int, columns: int, figsize: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
