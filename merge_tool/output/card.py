"""The model card of an output: the Hub's metadata, what was merged, how far apart the parents are.

No template engine, none of the user's paths; only plain strings are inherited from the parents' cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_tool._version import __version__
from merge_tool.errors import counted, shown
from merge_tool.models.cards import Cards, inherited, licences, terms_in_words
from merge_tool.output.next_steps import next_steps
from merge_tool.output.report import Summary, remarks
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.published import hub_names, is_extrapolated
from merge_tool.recipe.average import are_weights
from merge_tool.recipe.options import as_words
from merge_tool.recipe.pair import PairOptions, is_pair
from merge_tool.recipe.recipe import label_t
from merge_tool.run.findings import median


def card_of(prepared: Prepared, summary: Summary, output: int) -> str:
    """The model card of one output, by its number."""
    return card_text(
        prepared.plan,
        summary,
        output,
        first_card=prepared.first_card,
        cards=prepared.cards,
        is_transformers=prepared.is_transformers,
        architecture=prepared.architecture,
        has_own_rows=prepared.has_own_rows,
        has_code=any(file.source.endswith(".py") for file in prepared.side_files.copied),
        files=[file.target for file in prepared.side_files.copied],
    )


def _command(plan: MergePlan, output: int) -> str:
    """The command that makes this output, without the user's paths."""
    recipe, words = plan.recipe, plan.recipe.outputs[output].words
    if is_pair(recipe):
        command = ["slerp-merge", *(_quoted(name) for name in plan.names), "OUT", "--t", label_t(words["t"])]
    else:
        command = ["merge-tool", "run", "RECIPE.yaml", "OUT"]
        for key, value in words.items():
            command += ["--set", f"{key}={label_t(value)}"]
    options = [*(as_words(PairOptions(**recipe.words)) if is_pair(recipe) else ()), *as_words(recipe.options)]
    command += [word if word.startswith("--") else _quoted(word, 10_000) for word in options]
    return " ".join(command + ["--extrapolate"] * is_extrapolated(plan, output))


def _quoted(name: str, limit: int = 200) -> str:
    name = shown(name, limit)
    return name if re.fullmatch(r"[\w@%+=:,./-]+", name) else "'" + name.replace("'", "'\\''") + "'"


def card_text(
    plan: MergePlan,
    summary: Summary,
    output: int,
    *,
    first_card: Path | None,
    cards: Cards,
    is_transformers: bool,
    architecture: str,
    has_own_rows: bool,
    has_code: bool,
    files: Sequence[str] = (),
) -> str:
    """The model card: the Hub's metadata, then what was merged and how far apart the parents are."""
    from huggingface_hub import ModelCardData  # 2 MB; ModelCard, which only joins the two parts, 13 MB more

    terms = licences(cards)
    fields = {key: value for key, value in inherited(first_card).items() if not key.startswith("license")}
    if is_transformers:
        fields.setdefault("library_name", "transformers")
    parents, tags = hub_names(plan.recipe), ["merge", "slerp-merge"]
    data = ModelCardData(base_model=parents, base_model_relation="merge", tags=tags, **terms.fields, **fields)
    words = terms_in_words(terms, files, plan.names[plan.recipe.donor])
    sections = _card_sections(plan, summary, output, words, has_own_rows, has_code)
    steps = next_steps(architecture, has_code=has_code, is_quantised=bool(plan.num_quantised))
    body = "\n\n".join([*sections, *steps])
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _card_sections(
    plan: MergePlan, summary: Summary, output: int, terms: str, has_own_rows: bool, has_code: bool
) -> Iterator[str]:
    names = [_plain(name) for name in plan.names]
    yield f"# {' + '.join(names if len(names) <= 12 else [names[0], '...', names[-1]])}"
    yield from _how(plan, output, names)
    yield f"```\n{_command(plan, output)}\n```"
    yield (
        f"{counted(summary.num_tensors, 'tensor')}, {counted(summary.num_parameters, 'parameter')}. Side files "
        "(configuration, "
        f"tokenizer) are those of {names[plan.recipe.donor]}.{_tokenizer(plan, names) if has_own_rows else ''}"
    )
    if terms:
        yield _plain(terms, 2000)
    if plan.num_quantised:
        yield (
            f"{counted(plan.num_quantised, 'weight is', 'weights are')} 8-bit floats with scales, as in "
            f"{names[plan.recipe.first]}: "
            "merged in real values and quantised again."
        )
    if has_code:
        yield "The folder holds Python code of that model, copied as it is and not run; read it before you trust it."
    if summary.groups:
        yield "## How far apart the parents are"
        yield "\n".join(_angle_table(summary))
    yield from remarks(summary)
    yield (
        "Every tensor's sources and parameters, and angle, norms and weights where it has any, are in "
        "`merge_report.json`; `SHA256SUMS` lists the files' digests."
    )


def _how(plan: MergePlan, output: int, names: list[str]) -> Iterator[str]:
    made = f"made with slerp-merge {__version__}:"
    words = plan.recipe.outputs[output].words
    if is_pair(plan.recipe):
        yield (
            f"A merge of **{names[0]}** (t = 0) and **{names[1]}** (t = 1) by {plan.method.summary} at "
            f"t = {label_t(words['t'])}{_exceptions(plan)}, {made}"
        )
        return
    values = "".join(f", {key} = {label_t(value)}" for key, value in words.items())
    if are_weights(words):  # the command has them
        values = f", {counted(len(words), 'weight')}"
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    models = ", ".join(f"**{name}**" for name in names[:12]) + more
    yield f"A merge of {models} by {plan.method.summary} (`{_plain(plan.recipe.method)}`{values}), {made}"
    yield f"```yaml\n{_fenced(plan.text)}\n```"


def _fenced(text: str) -> str:
    """A recipe's text in a code block that the text itself cannot end."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return "\n".join(lines).strip("\n").replace("```", "~~~")


def _exceptions(plan: MergePlan) -> str:
    return f" ({counted(plan.num_scheduled, 'tensor')} at a t of their own)" if plan.num_scheduled else ""


def _angle_table(summary: Summary, most: int = 40) -> Iterator[str]:
    yield "| tensors | count | median angle | largest angle |"
    yield "|---|---:|---:|---:|"
    groups = sorted(summary.groups.items(), key=lambda item: (-max(item[1]), item[0]))
    for kind, angles in groups[:most]:
        yield f"| `{_plain(kind)}` | {len(angles):,} | {median(angles):.3f}° | {max(angles):.3f}° |"
    if len(groups) > most:
        yield f"| {len(groups) - most:,} more kinds | | | |"


def _tokenizer(plan: MergePlan, names: Sequence[str]) -> str:
    """A sentence about the output's vocabulary; empty if rows were not matched by token."""
    if (tokenizer := plan.recipe.tokenizer) is None:
        return ""
    lead = names[tokenizer.source if isinstance(tokenizer.source, int) else plan.recipe.first]
    more = ", then those that only other models have" if tokenizer.source == "union" else ""
    return f" Rows were matched by token; the tokens are those of {lead}{more}."


def _plain(name: str, limit: int = 200) -> str:
    """A name that cannot end a code span, a cell or a line of Markdown."""
    return shown(name, limit).replace("`", "'").replace("|", "/").replace("<", "(").replace(">", ")")
