"""The parameters that a recipe gives to each layer, printed before the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge_tool.errors import listed, shown
from merge_tool.methods.steps import Method
from merge_tool.models.naming import natural_key
from merge_tool.plan.plan import MergePlan, TensorJob, words_of
from merge_tool.plan.stacks import split_layer
from merge_tool.recipe.average import are_weights
from merge_tool.recipe.pair import is_pair

_MOST = 500  # lines of a table


def first_line(plan: MergePlan) -> str:
    recipe, names = plan.recipe, [shown(name) for name in plan.names]
    words = words_of([output.words for output in recipe.outputs])
    values = [f"{key} = {', '.join(dict.fromkeys(texts))}" for key, texts in words.items()]
    how = recipe.method + (f" at {' and '.join(values)}" if values else "")
    if are_weights(words):  # the table has them
        how = f"{recipe.method} for {listed(recipe.labels, 12)}"
    if is_pair(recipe):
        return f"Plan: {how}; t=0 is BASE ({names[0]}), t=1 is FT ({names[1]})"
    return f"Plan: {how} of {_several(names)}; configuration and tokenizer of {names[recipe.donor]}"


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def recipe_json(plan: MergePlan) -> dict[str, Any]:
    return {
        "models": list(plan.names),
        "method": plan.recipe.method,
        "outputs": [dict(output.words) for output in plan.recipe.outputs],
        "settings": _rows(plan),
    }


def effective_lines(plan: MergePlan) -> Iterator[str]:
    """The parameters that gradients and patterns give: one line for all tensors of a layer with the same models and
    parameters. Nothing for a pair without gradients and patterns."""
    if is_pair(plan.recipe) and not plan.num_scheduled:
        return
    rows = _rows(plan)
    table = [["layer", "tensors", "parameters", "models"]]
    for row in rows[:_MOST]:
        is_all = len(row["models"]) == len(set(plan.names))
        table.append([
            shown(row["layer"], 60),
            _tensors(row),
            _settings_text(plan.method, row["settings"]),
            "all" if is_all else shown(", ".join(row["models"]), 80),
        ])  # fmt: skip
    yield ""
    yield from table_lines(table)
    if len(rows) > _MOST:
        yield f"and {len(rows) - _MOST:,} more lines"
    yield ""


def _rows(plan: MergePlan) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for job in plan.jobs():
        if job.is_scales:
            continue
        layer, settings = _layer(job), _settings(job)
        models = sorted({plan.names[side] for side in job.sides})
        row = {"layer": layer, "settings": settings, "models": models, "num_tensors": 0, "first": job.out.name}
        rows.setdefault((layer, f"{settings}{models}"), row)["num_tensors"] += 1
    return sorted(rows.values(), key=lambda row: (row["layer"] == "outside layers", natural_key(row["layer"])))


def _layer(job: TensorJob) -> str:
    stack, layer = split_layer(job.out.name) or ("", None)
    return "outside layers" if layer is None else f"{stack}{layer}"


def _settings(job: TensorJob) -> dict[str, Any]:
    """The parameters of a tensor; a list for a shared parameter in which outputs differ."""
    if not job.values:
        return {}
    settings: dict[str, Any] = {}
    for key in job.values[0].shared:
        values = [one.shared[key] for one in job.values]
        settings[key] = values[0] if len(set(values)) == 1 else values
    for key in job.values[0].each:
        several = [list(one.each[key]) for one in job.values]
        settings[key] = several[0] if all(one == several[0] for one in several) else several
    return settings


def _settings_text(method: Method, settings: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {_value(value)}" for name, value in settings.items())
    return text + _shares(method, settings) or "as they are"


def _tensors(row: dict[str, Any]) -> str:
    """A line's first tensor, by the part of its name behind the layer, and the number of others."""
    more = f" + {row['num_tensors'] - 1:,}" if row["num_tensors"] > 1 else ""
    return shown(row["first"].removeprefix(f"{row['layer']}."), 60) + more


def _shares(method: Method, settings: dict[str, Any]) -> str:
    """The shares that weights give if they are divided by their sum, and that is one sum for all elements."""
    weights = settings.get("weight", ())
    if any(isinstance(value, list) for value in settings.values() if value is not weights):
        return ""
    if not weights or isinstance(weights[0], list) or not method.divides_weights(settings):
        return ""
    total = sum(weights)
    if not total or abs(total - 1) < 1e-9:
        return ""
    return f" (shares {_value([weight / total for weight in weights])})"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ words


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()
