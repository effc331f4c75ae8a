"""A finished output -> the data of its page: the models and settings, how far apart the models are, the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tool.errors import OutputError, counted, reason, shown, sized
from merge_tool.models.side_files import REPORT
from merge_tool.output.older import read_sums
from merge_tool.output.report import stream_report
from merge_tool.pages.columns import Columns, shape_text

if TYPE_CHECKING:
    from merge_tool.output.merge_report import MergeReport

_FORMULAS = {
    "slerp": "SLERP of the two tensors, flattened, at t; linear where they point the same way",
    "linear": "the weighted mean of the models' tensors",
}


def merge_data(out: Path, report: MergeReport | None = None) -> dict[str, Any]:
    """The data of an output's page. `report` is given for a merge that was just made, and adds its seconds, memory and
    warnings. Raises OutputError if the folder has no report, or a damaged one."""
    path, columns = out / REPORT, Columns()
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            parts = stream_report(lines)
            head = next(parts)[1]
            for _, tensor in parts:
                _add(columns, tensor)
        models = [str(model["name"]) for model in head["inputs"].values()]
        facts = _facts(head, columns, report)
    except FileNotFoundError as e:
        raise OutputError(f"{shown(out)}: holds no merge: it has no {REPORT}. Give the output of a merge.") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise OutputError(f"{shown(path)}: cannot be read ({reason(e)}). merge-tool verify shows more.") from e
    is_pair = "base" in head["inputs"] and len(models) == 2 and head["method"] in ("slerp", "linear")
    return {
        "kind": "merge",
        "title": out.absolute().name,
        "models": models,
        "facts": facts,
        "recipe": head.get("recipe", ""),
        "warnings": list(report.warnings) if report is not None else [],
        "files": _files(out, head["shards"]),
        "pair": {"t": head["parameters"].get("t"), "method": head["method"]} if is_pair else None,
        **columns.as_json(),
    }


def _add(columns: Columns, tensor: Mapping[str, Any]) -> None:
    settings, norms = tensor.get("settings", {}), tensor.get("norms") or (None, None)
    t = settings.get("t")
    columns.add(
        tensor["name"],
        angle=tensor.get("angle_degrees"),
        change=tensor.get("relative_change"),
        ratio=tensor.get("norm_ratio"),
        norm0=norms[0],
        norm1=norms[1],
        t=float(t) if isinstance(t, int | float) else None,
        settings=json.dumps(settings, ensure_ascii=False) if settings else "",
        shape=shape_text(tensor["shape"]),
        dtype=tensor["dtype"],
        note=tensor.get("note") or ("equal: copied" if tensor["equal"] else ""),
        source=", ".join(dict.fromkeys(str(source["model"]) for source in tensor["sources"])),
    )


def _facts(head: Mapping[str, Any], columns: Columns, report: MergeReport | None) -> list[list[str]]:
    """Lines of a name and a value."""
    settings = {**head["parameters"], **head["words"], **head["options"]}
    facts = [
        ["method", f"{head['method']}: {_FORMULAS[head['method']]}" if head["method"] in _FORMULAS else head["method"]],
        *([str(key), value if isinstance(value, str) else json.dumps(value)] for key, value in settings.items()),
        ["tensors", f"{len(columns.numbers.get('layer', [])):,}"],
        ["size", f"{sized(sum(head['shards'].values()))} in {counted(len(head['shards']), 'file')}"],
    ]
    for side, model in head["inputs"].items():
        size = sum(file["size"] for file in model["files"].values())
        facts.append([str(side), f"{model['name']}, {sized(size)}"])
    if report is not None and not report.already_complete:
        facts.append(["time", f"{report.seconds:.1f} s"])
        facts.append(["peak memory", sized(report.peak_bytes)])
    return [*facts, ["made by", str(head["tool"])]]


def _files(out: Path, shards: Mapping[str, int]) -> list[list[Any]]:
    sums = read_sums(out)
    sizes = {name: shards[name] if name in shards else (out / name).stat().st_size for name in sums}
    return [[name, sizes[name], digest] for name, digest in sums.items()]
