"""Findings -> pictures. The only module that imports matplotlib, inside functions. Colours are Okabe and Ito's, which
colour-blind readers can distinguish; every axis has its name and unit.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tool.errors import RecipeError, install, output_failed, shown
from merge_tool.recipe.recipe import label_t

if TYPE_CHECKING:
    from merge_tool.compare.diff import Diff
    from merge_tool.sweeps.results import SweepReport

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plot_path(path: Path) -> None:
    """Raise RecipeError unless a picture can be drawn there. Called before the work begins."""
    if not can_plot():
        raise RecipeError(f"A picture needs matplotlib: {install('plot')}.")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RecipeError(f"{shown(path)}: a picture is .png, .svg or .pdf.")
    if not os.path.isdir(path.absolute().parent):  # noqa: PTH112 - which raises where a name is too long
        raise RecipeError(f"{shown(path)}: there is no such folder.")


def plot_sweep(report: SweepReport, path: Path) -> None:
    """One panel per score over t; for two scores also one score over the other. Pareto-optimal points are filled."""
    names, points = report.names, report.points
    panels = len(names) + (len(names) == 2)
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure, grid = _subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows))
    axes = [axis for row in grid for axis in row]
    ts = [point.t for point in points]
    for axis, name in zip(axes, names, strict=False):
        _line(axis, ts, [point.scores[name] for point in points], points)
        better = "less" if name in report.less_is_better else "more"
        axis.set(xlabel="t (0 = base, 1 = finetune)", ylabel=f"{_short(name)} ({better} is better)")
    if len(names) == 2:
        x, y = names
        _line(axes[2], [p.scores[x] for p in points], [p.scores[y] for p in points], points)
        for point in points:
            where = point.scores[x], point.scores[y]
            axes[2].annotate(label_t(point.t), where, xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes[2].margins(0.12)  # room for the labels
        axes[2].set(xlabel=_short(x), ylabel=_short(y), title="trade-off, labelled with t")
    for empty in axes[panels:]:
        empty.axis("off")
    axes[0].set_title("filled: Pareto-optimal", fontsize=9, loc="left")
    _save(figure, path)


def plot_diff(diff: Diff, path: Path) -> None:
    """A heat map of the angles, layers by modules; tensors outside layers as bars beside it."""
    angles = {(t.module, t.layer): t.angle_degrees for t in diff.tensors if t.angle_degrees is not None}
    inside = [(module, layer) for module, layer in angles if layer is not None]
    outside = [module for module, layer in angles if layer is None]
    if not angles:
        raise RecipeError("No two tensors have an angle between them: there is nothing to draw.")
    modules = list(dict.fromkeys(module for module, _ in inside))[:_MOST_ROWS]
    layers = sorted({layer for _, layer in inside})
    panels = [bool(inside), bool(outside)]
    width = 2.6 + min(9.0, 0.28 * len(layers)) if inside else 0.0
    height = max(2.6, 1.2 + 0.24 * max(len(modules), len(outside[:_MOST_ROWS])))
    figure, rows = _subplots(
        1, sum(panels), (width + 4.2 * panels[1], height),
        width_ratios=[w for w, wanted in zip((width, 4.2), panels, strict=True) if wanted],
    )  # fmt: skip
    if inside:
        _heat_map(figure, rows[0][0], [[angles.get((m, n)) for n in layers] for m in modules], modules, layers)
    if outside:
        _bars(rows[0][-1], outside[:_MOST_ROWS], [angles[module, None] for module in outside[:_MOST_ROWS]])
    _save(figure, path)


_MOST_ROWS = 60  # lines of a picture: a mixture of experts has too many modules to read


def _heat_map(figure: Any, axes: Any, values: list[list[float | None]], modules: list[str], layers: list[int]) -> None:
    grid = [[math.nan if value is None else value for value in row] for row in values]
    axes.set_facecolor("#dddddd")  # no such tensor
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(modules)), [_short(module) for module in modules], fontsize=8)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set(xlabel="layer", title="angle between the models")
    figure.colorbar(image, ax=axes, label="angle (degrees)")


def _bars(axes: Any, names: list[str], angles: list[float]) -> None:
    axes.barh(range(len(names)), angles, color=BLUE)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="angle (degrees)", title="outside the layers")
    axes.grid(axis="x", alpha=0.3)


def _short(module: str) -> str:
    """`model.layers.*.mlp.up_proj.weight` -> `mlp.up_proj.weight`; odd characters escaped, no mathematics."""
    name = shown(module.partition(".*.")[2] or module, 48)
    return name.replace("$", r"\$")


def _line(axes: Any, x: list[float], y: list[float], points: Any) -> None:
    axes.plot(x, y, color=BLUE, linewidth=1.5, zorder=1)
    fills = [BLUE if point.is_pareto else "white" for point in points]
    axes.scatter(x, y, c=fills, edgecolors=BLUE, s=36, zorder=2)
    axes.grid(alpha=0.3)


def _subplots(
    rows: int, columns: int, figsize: tuple[float, float], width_ratios: list[float] | None = None
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise output_failed(path, e) from e
