"""Results of a story -> a table, `forgetting.png`, `report.html`. Every number comes from the results."""

import base64
import html
import statistics
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure
from story import REPLAY, REPLAY_MERGED, TS, Scores, Story, run_story

BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
Results = list[dict[str, Any]]


def demo_command(story: Story, default: Path) -> click.Command:
    """The command of a demo: run the story into FOLDER, report it, print the table."""

    @click.command(help=f"{story.title}. Results go to FOLDER.")
    @click.argument("folder", type=click.Path(path_type=Path), default=default)
    @click.option("--seeds", type=click.IntRange(1), default=1)
    @click.option("--quick", is_flag=True, help="A few steps on a few problems, to try the demo out.")
    def main(folder: Path, seeds: int, quick: bool) -> None:
        results = run_story(story, folder, seeds, quick=quick)
        print("\n" + write_report(story, folder, results))

    return main


def write_report(story: Story, folder: Path, results: Results) -> str:
    """Write the picture and the page into `folder`; returns the table and the findings as Markdown."""
    findings = list(finding_lines(story, results))
    plot(story, results, folder / "forgetting.png")
    write_page(story, folder, results, findings)
    files = f"{folder}/forgetting.png, {folder}/report.html"
    return "\n".join([*table_lines(story, results), "", *findings, "", files])


# ------------------------------------------------------------------------------------------- the table


def shown_scores(story: Story) -> list[tuple[str, str]]:
    """The name and label of each score that has a column."""
    more = [(story.more, story.more_label)] if story.more else []
    return [(story.skill, story.skill_label), *more, (story.prose, story.prose_label)]


def headings(story: Story) -> list[str]:
    first, *others = (label for _, label in shown_scores(story))
    return ["", f"SLERP: {first}", *others, f"linear: {first}", *others]


def rows(story: Story, results: Results) -> Iterator[list[str]]:
    """A label, then every score by SLERP and by linear interpolation; the parents stand in both."""
    yield ["CoT model (t = 0)", *cells(story, results, story.cot, story.cot)]
    for t in TS:
        chosen = sum(result["chosen_t"] == t for result in results)
        mark = "" if not chosen else " ← chosen" if len(results) == 1 else f" ← chosen {chosen} of {len(results)} times"
        yield [f"merge, t = {t}{mark}", *cells(story, results, f"slerp/t-{t}", f"linear/t-{t}")]
    yield ["finetune (t = 1)", *cells(story, results, story.ft, story.ft)]
    if story.replay:
        yield ["finetune with replay (t = 1)", *cells(story, results, REPLAY, REPLAY)]
        merged = cells(story, results, REPLAY_MERGED)
        yield ["finetune with replay, merged at the chosen t", *merged, *[""] * len(merged)]


def cells(story: Story, results: Results, *models: str) -> list[str]:
    return [spread([r["test"][m][score] for r in results]) for m in models for score, _ in shown_scores(story)]


def spread(values: list[float]) -> str:
    """The mean and, of several, their standard deviation: to one decimal, small numbers to three."""
    digits = 1 if statistics.mean(values) >= 10 else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table_lines(story: Story, results: Results) -> Iterator[str]:
    yield f"| {' | '.join(headings(story))} |"
    yield "|---" + "|---:" * (len(headings(story)) - 1) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows(story, results))


# ---------------------------------------------------------------------------------------- the findings


def finding_lines(story: Story, results: Results) -> Iterator[str]:
    """What came out, in sentences: nothing here is known before the numbers are."""
    kept, left, gained = [], [], []
    for result in results:
        cot, ft = result["test"][story.cot], result["test"][story.ft]
        chosen = result["test"][f"slerp/t-{result['chosen_t']}"] if result["chosen_t"] else cot
        kept.append(100 * story.kept(chosen, cot, ft))
        left.append(100 * story.kept(ft, cot, ft))
        gained.append(100 * gain(story, result["test"], chosen))
    seeds = "" if len(results) == 1 else f" (means over {len(results)} seeds)"
    yield (
        f"The finetune keeps {spread(left)} % of the CoT model's skill. The merge at the chosen t keeps "
        f"{spread(kept)} % of it, and has {spread(gained)} % of what the finetune gained in prose (log "
        f"perplexity){seeds}."
    )
    skill, prose = (
        max(abs(r["test"][f"slerp/t-{t}"][score] - r["test"][f"linear/t-{t}"][score]) for r in results for t in TS)
        for score in (story.skill, story.prose)
    )
    angle = statistics.median(angle for result in results for angle in result["angles"])
    yield (
        f"SLERP and linear interpolation at the same t differ by at most {skill:.3g} in {story.skill_label} and "
        f"{prose:.2g} in {story.prose_label}, at an angle of {angle:.2g} degrees between the models (median over "
        "tensors)."
    )
    if story.more:
        yield from _more_lines(story, results)
    yield (
        f"t is the largest that keeps {story.least_kept:.0%} of the skill on {story.validation_note}. "
        "The test data were scored once."
    )


def _more_lines(story: Story, results: Results) -> Iterator[str]:
    found: dict[str, list[float]] = {}
    for result in results:
        merged = f"slerp/t-{result['chosen_t']}" if result["chosen_t"] else story.cot
        for label, model in (("the CoT model", story.cot), ("that merge", merged), ("the finetune", story.ft)):
            found.setdefault(label, []).append(result["test"][model][story.more])
    yield f"{story.more_label}: {', '.join(f'{label} {spread(values)}' for label, values in found.items())}."


def gain(story: Story, test: dict[str, Scores], scores: Scores) -> float:
    """Of the finetune's gain in log perplexity, the share that these scores have."""
    start, end, here = (log(s[story.prose]) for s in (test[story.cot], test[story.ft], scores))
    return (start - here) / (start - end) if start != end else 0.0


# ----------------------------------------------------------------------------------------- the picture


def plot(story: Story, results: Results, path: Path) -> None:
    """Skill kept against prose gained: up and to the right is better."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    chosen = "chosen t: " + ", ".join(str(t) for t in sorted({result["chosen_t"] for result in results}))
    for number, result in enumerate(results):
        draw_seed(axes, story, result, chosen, with_labels=number == 0, alpha=1.0 if len(results) == 1 else 0.6)
    axes.invert_xaxis()
    if story.skill_label.endswith("%"):
        axes.set_ylim(-3, 103)
    else:
        axes.invert_yaxis()
    better = "" if story.skill_label.endswith("%") else " (upwards is better)"
    axes.set(xlabel=f"{story.prose_label}, held out (to the right is better)", ylabel=f"{story.skill_label}{better}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def draw_seed(axes: Any, story: Story, result: dict[str, Any], chosen: str, *, with_labels: bool, alpha: float) -> None:
    def place(*models: str) -> tuple[list[float], list[float]]:
        scores = [result["test"][model] for model in models]
        return [s[story.prose] for s in scores], [s[story.skill] for s in scores]

    def label(text: str) -> str | None:
        return text if with_labels else None

    merges = {m: [story.cot, *(f"{m}/t-{t}" for t in TS), story.ft] for m in ("slerp", "linear")}
    for method, line, colour in (("slerp", "-o", BLUE), ("linear", ":x", ORANGE)):
        axes.plot(*place(*merges[method]), line, color=colour, ms=6, alpha=alpha, label=label(f"merges, {method}"))
    axes.scatter(*place(story.cot), marker="s", s=60, color=BLACK, zorder=3, label=label("CoT model"))
    axes.scatter(*place(story.ft), marker="D", s=60, color=BLACK, zorder=3, label=label("finetune"))
    if t := result["chosen_t"]:
        star = {"marker": "*", "s": 280, "color": BLUE, "edgecolors": "white", "zorder": 4}
        axes.scatter(*place(f"slerp/t-{t}"), **star, label=label(chosen))


# -------------------------------------------------------------------------------------------- the page


def write_page(story: Story, folder: Path, results: Results, findings: list[str]) -> None:
    """report.html: one file, pictures included."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings(story))
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows(story, results))
    pictures = (
        (folder / "forgetting.png", "Skill kept against prose gained"),
        (folder / "seed-0/angles.png", "Angles between the CoT model and the finetune, layer by layer (seed 0)"),
    )
    (folder / "report.html").write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(story.title)}</title><style>{STYLE}</style><h1>{html.escape(story.title)}</h1>"
        f"{''.join(f'<p>{html.escape(line)}</p>' for line in findings)}<table><tr>{head}</tr>{body}</table>"
        f"{''.join(figure(path, caption) for path, caption in pictures)}</html>\n",
        encoding="utf-8",
    )


def figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ccc}"
    "td:first-child{text-align:left}figure{margin:2rem 0}img{max-width:100%}"
)
