"""Findings -> pictures. The only module that imports matplotlib, inside functions. Colours are Okabe and Ito's, which
colour-blind readers can distinguish; every axis has its name and unit.
"""

from __future__ import annotations

import importlib.util
import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tool.errors import RecipeError, install, output_failed, shown
from merge_tool.recipe.recipe import label_t

if TYPE_CHECKING:
    from merge_tool.compare.diff import Diff
    from merge_tool.sweeps.results import SweepPoint, SweepReport

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676")
BLUE = _COLOURS[0]


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
    """One panel for each score over the first parameter, a line for each combination of the others; for two scores also
    one score over the other. Pareto-optimal points are filled."""
    names = report.names
    panels = len(names) + (len(names) == 2)
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure, grid = _subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows + 0.5))
    axes = [axis for row in grid for axis in row]
    lines = _lines(report)
    for axis, name in zip(axes, names, strict=False):
        for number, (label, points) in enumerate(lines.items()):
            _line(axis, [_position(report, p) for p in points], [p.scores[name] for p in points], points, number, label)
        better = "less" if name in report.less_is_better else "more"
        axis.set(xlabel=_parameter(report), ylabel=_text(f"{name} ({better} is better)", 40))
        _name_words(report, axis)
    if len(names) == 2:
        x, y = names
        for number, (label, points) in enumerate(lines.items()):
            _line(axes[2], [p.scores[x] for p in points], [p.scores[y] for p in points], points, number, label)
            for point in points if len(lines) == 1 else ():  # of several lines they would lie on each other
                where = point.scores[x], point.scores[y]
                text = label_t(point.values[report.keys[0]])
                axes[2].annotate(text, where, xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes[2].margins(0.12)  # room for the labels
        title = _text(f"trade-off{f', labelled with {report.keys[0]}' if len(lines) == 1 else ''}", 40)
        axes[2].set(xlabel=_text(x, 40), ylabel=_text(y, 40), title=title)
    for axis in axes[:panels]:
        _plain_ticks(axis, "y")
    for empty in axes[panels:]:
        empty.axis("off")
    axes[0].set_title("filled: Pareto-optimal", fontsize=9, loc="left")
    if len(lines) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    figure.suptitle(_text(" + ".join(report.models), 30 * columns))
    _save(figure, path)


def _lines(report: SweepReport) -> dict[str, list[SweepPoint]]:
    """The points by what all parameters but the first are."""
    lines: dict[str, list[SweepPoint]] = {}
    for point in report.points:
        rest = [f"{key} = {label_t(value)}" for key, value in list(point.values.items())[1:]]
        lines.setdefault(_text(", ".join(rest), 60), []).append(point)
    return lines


def _words(report: SweepReport) -> list[str]:
    """The values of the first parameter if they are words, or switches; nothing if they are numbers."""
    values = [point.values[report.keys[0]] for point in report.points]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return []
    return list(dict.fromkeys(map(label_t, values)))


def _position(report: SweepReport, point: SweepPoint) -> float:
    value = point.values[report.keys[0]]
    return float(words.index(label_t(value)) if (words := _words(report)) else value)


def _name_words(report: SweepReport, axes: Any) -> None:
    if words := _words(report):
        axes.set_xticks(range(len(words)), [_text(word, 20) for word in words])
    else:
        _plain_ticks(axes, "x")


def _parameter(report: SweepReport) -> str:
    """`t (0 = base, 1 = ft)`, with the models' names."""
    key = report.keys[0]
    is_of_pair = key == "t" and len(report.models) == 2
    return _text(f"t (0 = {report.models[0]}, 1 = {report.models[1]})" if is_of_pair else key, 44)


def plot_diff(diff: Diff, path: Path) -> None:
    """A heat map of the angles, layers by modules; tensors outside layers as bars beside it."""
    angles = {(t.module, t.layer): t.angle_degrees for t in diff.tensors if t.angle_degrees is not None}
    inside = [(module, layer) for module, layer in angles if layer is not None]
    outside = [module for module, layer in angles if layer is None]
    if not angles:
        raise RecipeError("No two tensors have an angle between them: there is nothing to draw.")
    modules = list(dict.fromkeys(module for module, _ in inside))
    layers = sorted({layer for _, layer in inside})
    panels = [bool(inside), bool(outside)]
    width = 2.6 + min(9.0, 0.28 * len(layers)) if inside else 0.0
    lines = max(len(modules[:_MOST_ROWS]), len(outside[:_MOST_ROWS]))
    figure, rows = _subplots(
        1, sum(panels), (width + 4.2 * panels[1], max(2.6, 1.6 + 0.24 * lines)),
        width_ratios=[w for w, wanted in zip((width, 4.2), panels, strict=True) if wanted],
    )  # fmt: skip
    if inside:
        shown_modules = modules[:_MOST_ROWS]
        values = [[angles.get((m, n)) for n in layers] for m in shown_modules]
        _heat_map(figure, rows[0][0], values, shown_modules, layers)
        rows[0][0].set_title(f"by layer{_left_out(modules)}", fontsize=9)
    if outside:
        _bars(rows[0][-1], outside[:_MOST_ROWS], [angles[module, None] for module in outside[:_MOST_ROWS]])
        rows[0][-1].set_title(f"outside the layers{_left_out(outside)}", fontsize=9)
    figure.suptitle(_text(f"angle between {diff.names[0]} and {diff.names[1]}", round(9 * (width + 4.2 * panels[1]))))
    _save(figure, path)


def _left_out(names: list[str]) -> str:
    return f" (the first {_MOST_ROWS} of {len(names):,} modules)" if len(names) > _MOST_ROWS else ""


_MOST_ROWS = 60  # lines of a picture: a mixture of experts has too many modules to read


def _heat_map(figure: Any, axes: Any, values: list[list[float | None]], modules: list[str], layers: list[int]) -> None:
    grid = [[math.nan if value is None else value for value in row] for row in values]
    axes.set_facecolor("#dddddd")  # no such tensor
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(modules)), [_of_module(module) for module in modules], fontsize=8)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set(xlabel="layer")
    figure.colorbar(image, ax=axes, label="angle (degrees)")


def _bars(axes: Any, names: list[str], angles: list[float]) -> None:
    axes.barh(range(len(names)), angles, color=BLUE)
    axes.set_yticks(range(len(names)), [_of_module(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="angle (degrees)")
    _plain_ticks(axes, "x")
    axes.grid(axis="x", alpha=0.3)


def _of_module(module: str) -> str:
    """`model.layers.*.mlp.up_proj.weight` -> `mlp.up_proj.weight`."""
    return _text(module.partition(".*.")[2] or module, 60)


def _text(text: str, width: int) -> str:
    """A text for a picture, whole, in lines of at most `width` characters; odd characters escaped, no mathematics."""
    return "\n".join(textwrap.wrap(shown(text, 1000), max(width, 20))).replace("$", r"\$")


def _plain_ticks(axes: Any, axis: str) -> None:
    """Numbers as they are: no offset and no power of ten in a corner."""
    axes.ticklabel_format(axis=axis, style="plain", useOffset=False)


def _line(axes: Any, x: list[float], y: list[float], points: list[SweepPoint], number: int, label: str) -> None:
    colour, style = _COLOURS[number % len(_COLOURS)], ("-", "--", ":")[number // len(_COLOURS) % 3]
    axes.plot(x, y, style, color=colour, linewidth=1.5, zorder=1, label=label)
    fills = [colour if point.is_pareto else "white" for point in points]
    axes.scatter(x, y, c=fills, edgecolors=colour, s=36, zorder=2)
    axes.grid(alpha=0.3)


def _subplots(
    rows: int, columns: int, figsize: tuple[float, float], width_ratios: list[float] | None = None
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as e:
        raise output_failed(path, e) from e
