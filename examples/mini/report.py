"""Results of the demo -> a table, `forgetting.png`, `report.html`. Every number comes from results.json."""

import base64
import html
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
TS = [round(0.1 * k, 1) for k in range(1, 10)]
SCORES = ("skill", "prose_perplexity")


def write_report(folder: Path, results: list[dict[str, Any]], angles: Path) -> str:
    """Write the picture and the page into `folder`; returns the table and the findings as Markdown."""
    table, findings = "\n".join(table_lines(results)), "\n".join(finding_lines(results))
    plot(results, folder / "forgetting.png")
    write_page(folder, results, findings, angles)
    return f"{table}\n\n{findings}\n\n{folder}/forgetting.png, {folder}/report.html"


def rows(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(label, cells): skill and perplexity of SLERP, then of linear; the parents' stand in both."""
    found = [("CoT model (t = 0)", cells(results, "cot/final", "cot/final"))]
    for t in TS:
        chosen = [r["seed"] for r in results if r["chosen_t"] == t]
        mark = " ← chosen" if len(results) == 1 and chosen else f" ← chosen by {len(chosen)}" if chosen else ""
        found.append((f"merge, t = {t}{mark}", cells(results, f"slerp/t-{t}", f"linear/t-{t}")))
    return [*found, ("finetune (t = 1)", cells(results, "ft/final", "ft/final"))]


def cells(results: list[dict[str, Any]], *models: str) -> list[str]:
    return [spread([r["test"][model][score] for r in results]) for model in models for score in SCORES]


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def table_lines(results: list[dict[str, Any]]) -> list[str]:
    head = "| | SLERP: sums right, % | prose perplexity | linear: sums right, % | prose perplexity |"
    return [head, "|---|---:|---:|---:|---:|", *(f"| {label} | {' | '.join(row)} |" for label, row in rows(results))]


def finding_lines(results: list[dict[str, Any]]) -> list[str]:
    """What came out, in sentences: nothing here is known before the numbers are."""
    chosen = [
        (r, r["test"][f"slerp/t-{r['chosen_t']:g}"] if r["chosen_t"] else r["test"]["cot/final"]) for r in results
    ]
    kept = [100 * s["skill"] / r["test"]["cot/final"]["skill"] for r, s in chosen if r["test"]["cot/final"]["skill"]]
    left = [
        100 * r["test"]["ft/final"]["skill"] / r["test"]["cot/final"]["skill"]
        for r in results
        if r["test"]["cot/final"]["skill"]
    ]
    gains = [100 * share(r["test"], s) for r, s in chosen]
    gap = {score: max(abs(difference(r, t, score)) for r in results for t in TS) for score in SCORES}
    middle = statistics.median(angle for r in results for angle in r["angles"])
    runs = "" if len(results) == 1 else f" (means over {len(results)} seeds)"
    lines = []
    if kept:
        lines.append(
            f"The finetune keeps {statistics.mean(left):.0f} % of the CoT model's skill. The merge at the chosen t "
            f"keeps {statistics.mean(kept):.0f} % of it, and {statistics.mean(gains):.0f} % of what the finetune gained "
            f"in prose (in log perplexity){runs}."
        )
    lines.append(
        f"SLERP and linear interpolation at the same t differ by at most {gap['skill']:.1f} points of skill and "
        f"{gap['prose_perplexity']:.2f} of perplexity: the models are {middle:.1f} degrees apart (median over "
        "tensors), and so close to each other the arc and the chord nearly coincide."
    )
    lines.append(
        "t is the largest that keeps 90 % of the CoT model's skill on 200 validation problems; the figures are of 300 "
        "other problems (standard error up to 3 points) and of prose that no model saw."
    )
    return lines


def share(test: dict[str, dict[str, float]], scores: dict[str, float]) -> float:
    """Of the finetune's gain in log perplexity, what this model has."""
    from math import log

    start, end, here = (log(s["prose_perplexity"]) for s in (test["cot/final"], test["ft/final"], scores))
    return (start - here) / (start - end)


def difference(result: dict[str, Any], t: float, score: str) -> float:
    found: float = result["test"][f"slerp/t-{t}"][score] - result["test"][f"linear/t-{t}"][score]
    return found


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Skill kept against prose gained: up and to the right is better."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(results):
        test, faint = result["test"], 1.0 if len(results) == 1 else 0.6
        for method, colour, style in (("linear", ORANGE, "--"), ("slerp", BLUE, "-")):
            points = [test["cot/final"], *(test[f"{method}/t-{t}"] for t in TS), test["ft/final"]]
            label = {"slerp": "merges by SLERP", "linear": "merges, linear"}[method] if not number else None
            axes.plot(*place(points), style, color=colour, marker="o", markersize=4, alpha=faint, label=label)
        for name, marker, label in (("cot/final", "s", "CoT model"), ("ft/final", "D", "finetune")):
            axes.scatter(
                *place([test[name]]), marker=marker, s=60, color=BLACK, zorder=3, label=None if number else label
            )
        if (t := result["chosen_t"]) in TS:
            label = None if number else "chosen t"
            where = place([test[f"slerp/t-{t}"]])
            axes.scatter(*where, marker="*", s=260, color=BLUE, edgecolors="white", zorder=4, label=label)
            axes.annotate(f"t = {t}", (where[0][0], where[1][0]), xytext=(9, 6), textcoords="offset points")
    axes.invert_xaxis()
    axes.set(xlabel="perplexity of held-out prose (to the right is better)", ylabel="sums solved (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def place(points: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [p["prose_perplexity"] for p in points], [p["skill"] for p in points]


def write_page(folder: Path, results: list[dict[str, Any]], findings: str, angles: Path) -> None:
    head = "".join(
        f"<th>{h}</th>"
        for h in ("", "SLERP: sums right, %", "prose perplexity", "linear: sums right, %", "prose perplexity")
    )
    body = "".join(
        f"<tr><th>{html.escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for label, row in rows(results)
    )
    pictures = "".join(
        f'<figure><img alt="{caption}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{caption}</figcaption></figure>"
        for path, caption in (
            (folder / "forgetting.png", "Skill kept against prose gained"),
            (angles, "Angles between the CoT model and the finetune, seed 0"),
        )
    )
    text = "".join(f"<p>{html.escape(line)}</p>" for line in findings.splitlines())
    (folder / "report.html").write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>A merge that remembers</title><style>{STYLE}</style>"
        f"<h1>A merge that remembers</h1>{text}<table><tr>{head}</tr>{body}</table>{pictures}</html>\n",
        encoding="utf-8",
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ccc}"
    "th:first-child{text-align:left}figure{margin:2rem 0}img{max-width:100%}"
)
