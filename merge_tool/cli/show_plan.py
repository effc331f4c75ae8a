"""What was asked, layer by layer, before anything is done: the effective t, or a recipe's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge_tool.errors import shown
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.plan.stacks import natural_key
from merge_tool.recipe.recipe import label_t
from merge_tool.recipe.schedule import Schedule, split_layer

_MOST = 500  # lines of a table
_AVERAGES = frozenset({
    "linear", "nuslerp", "multislerp", "task_arithmetic", "dare_linear", "breadcrumbs", "della_linear",
})  # fmt: skip


def first_line(plan: MergePlan) -> str:
    names = [shown(name) for name in plan.names]
    if plan.is_pair:
        return f"Plan: {plan.method} at t = {ts_text(plan.ts)}; t=0 is BASE ({names[0]}), t=1 is FT ({names[1]})"
    return f"Plan: {plan.method} of {', '.join(names)}; configuration and tokenizer of {names[plan.donor]}"


def asked_json(plan: MergePlan) -> dict[str, Any]:
    if not plan.is_pair:
        return {"models": list(plan.names), "method": plan.method, "settings": _settings_rows(plan)}
    return {
        "base": plan.names[0],
        "ft": plan.names[1],
        "method": plan.method,
        "t": list(plan.ts),
        "schedule": [
            {"layer": place, "t": dict(zip(_columns(plan), ts, strict=True))} for place, ts in _schedule(plan)
        ],
    }


def effective_lines(plan: MergePlan) -> Iterator[str]:
    """What the rules come to, a line per layer; nothing where one t holds for all."""
    titles, rows = _schedule_table(plan) if plan.is_pair else _settings_table(plan)
    if not rows:
        return
    yield ""
    yield from table_lines([titles, *rows[:_MOST]])
    if len(rows) > _MOST:
        yield f"and {len(rows) - _MOST:,} more lines"
    yield ""


# ------------------------------------------------------------------------------------ a pair's t by layer


def _schedule_table(plan: MergePlan) -> tuple[list[str], list[list[str]]]:
    """The t of each layer's tensors, a column per rule."""
    titles = ["t of", *(shown(column, 40) for column in _columns(plan))]
    return titles, [[shown(place, 60), *map(_ts_of, ts)] for place, ts in _schedule(plan)]


def _columns(plan: MergePlan) -> list[str]:
    return [*(rule.pattern.text for rule in plan.recipe.rules), "the rest"]


def _schedule(plan: MergePlan) -> list[tuple[str, list[list[float]]]]:
    """Each layer's name, and for each column the t of its tensors in every output; nothing for a plan without rules."""
    schedule = Schedule(plan.recipe.rules, [job.out.name for job in plan.jobs()])
    rows: dict[str, list[list[float]]] = {}
    for job in plan.jobs() if schedule.rules else ():
        if job.is_copied or job.is_scales:
            continue
        rule = schedule.find(job.out.name)
        columns = rows.setdefault(_place(job), [[] for _ in _columns(plan)])
        columns[-1 if rule is None else rule] = list(job.ts)
    return sorted(rows.items(), key=lambda row: _order(row[0]))


def _place(job: TensorJob) -> str:
    stack, layer = split_layer(job.out.name) or ("", None)
    return "outside layers" if layer is None else f"{stack}{layer}"


def _order(place: str) -> tuple[bool, str]:
    return place == "outside layers", natural_key(place)


def _ts_of(values: Sequence[float]) -> str:
    return ", ".join(f"{t:.4g}" for t in (values if len(set(values)) > 1 else values[:1])) or "-"


# ------------------------------------------------------------------------------------ a recipe's parameters


def _settings_rows(plan: MergePlan) -> list[dict[str, Any]]:
    """The tensors of one layer with the same models and parameters, once: what gradients and filters come to."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for job in plan.jobs():
        place, settings = _place(job), _settings(job)
        models = sorted({plan.names[side] for side in job.sides})
        row = {"layer": place, "settings": settings, "models": models, "num_tensors": 0, "first": job.out.name}
        rows.setdefault((place, f"{settings}{models}"), row)["num_tensors"] += 1
    return sorted(rows.values(), key=lambda row: _order(row["layer"]))


def _settings(job: TensorJob) -> dict[str, Any]:
    if job.given is not None:
        return {**job.given.shared, **{name: list(values) for name, values in job.given.each.items()}}
    return {} if job.is_copied or job.exact else {"t": job.ts[0]}


def _settings_table(plan: MergePlan) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            shown(row["layer"], 60),
            _tensors(row),
            _settings_text(plan.method, row["settings"]),
            "all" if len(row["models"]) == len(set(plan.names)) else shown(", ".join(row["models"]), 80),
        ]
        for row in _settings_rows(plan)
    ]
    return ["layer", "tensors", "parameters", "models"], rows


def _settings_text(method: str, settings: dict[str, Any]) -> str:
    told = ", ".join(f"{name} {_value(value)}" for name, value in settings.items())
    return told + _shares(method, settings) or "as they are"


def _tensors(row: dict[str, Any]) -> str:
    """The first tensor of a line, by what follows its layer, and how many more there are."""
    more = f" + {row['num_tensors'] - 1:,}" if row["num_tensors"] > 1 else ""
    return shown(row["first"].removeprefix(f"{row['layer']}."), 60) + more


def _shares(method: str, settings: dict[str, Any]) -> str:
    """What weights come to that are divided by their sum, where that is one sum for all elements."""
    weights, total = settings.get("weight", ()), sum(settings.get("weight", ()))
    is_divided = method == "nuslerp" or True in (settings.get("normalize"), settings.get("normalize_weights"))
    if method not in _AVERAGES or not is_divided or not total or abs(total - 1) < 1e-9:
        return ""
    return f" (shares {_value([weight / total for weight in weights])})"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ words


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns in line: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def ts_text(ts: Sequence[float]) -> str:
    return ", ".join(label_t(t) for t in ts)
