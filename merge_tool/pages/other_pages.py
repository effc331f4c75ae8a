"""A comparison, or a sweep -> the data of its page."""

from __future__ import annotations

from typing import Any

from merge_tool.compare.diff import Diff
from merge_tool.pages.columns import Columns, shape_text
from merge_tool.recipe.recipe import label_t
from merge_tool.sweeps.results import SweepReport


def diff_data(diff: Diff) -> dict[str, Any]:
    """The data of a comparison's page."""
    columns = Columns()
    for tensor in diff.tensors:
        columns.add(
            tensor.name,
            angle=tensor.angle_degrees,
            change=tensor.relative_change,
            ratio=tensor.norm_ratio,
            norm0=tensor.norm_base,
            norm1=tensor.norm_ft,
            shape=shape_text(tensor.shape),
            dtype=", ".join(dict.fromkeys([tensor.dtype_base, tensor.dtype_ft])),
            note=tensor.note or ("equal" if tensor.equal else ""),
        )
    lists = {"only in the first": diff.only_base, "only in the second": diff.only_ft, "unlike": diff.unlike}
    return {
        "kind": "diff",
        "title": " and ".join(diff.names),
        "models": list(diff.names),
        "facts": [
            ["tensors compared", f"{len(diff.tensors):,}"],
            ["equal", f"{sum(tensor.equal for tensor in diff.tensors):,}"],
            *([title, f"{len(names):,}: {', '.join(names[:20])}"] for title, names in lists.items() if names),
        ],
        "warnings": [*diff.notices, *diff.tokenizers],
        "pair": {"t": 0.5, "method": "slerp"},
        **columns.as_json(),
    }


def sweep_data(report: SweepReport) -> dict[str, Any]:
    """The data of a sweep's page: a point for each merge, drawn over the first varied parameter."""
    is_number = all(isinstance(p.values[report.keys[0]], int | float) for p in report.points)
    return {
        "kind": "sweep",
        "title": report.folder.absolute().name,
        "models": list(report.models),
        "keys": list(report.keys),
        "scores": list(report.names),
        "less": sorted(report.less_is_better),
        "numeric": is_number and not any(isinstance(p.values[report.keys[0]], bool) for p in report.points),
        "points": [
            {
                "x": point.values[report.keys[0]],
                "line": ", ".join(f"{key} = {label_t(point.values[key])}" for key in report.keys[1:]),
                "words": [f"{key}={label_t(value)}" for key, value in point.values.items()],
                "scores": [point.scores[name] for name in report.names],
                "pareto": point.is_pareto,
            }
            for point in report.points
        ],
    }
