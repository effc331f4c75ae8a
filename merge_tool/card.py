"""The model card of an output: the Hub's metadata, what was merged, how far apart the parents are.

No template engine, no path of the user's; what is inherited from the base's card are plain strings only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from merge_tool._version import __version__
from merge_tool.errors import CheckpointError, reason, shown
from merge_tool.methods import METHODS
from merge_tool.plan import MergePlan
from merge_tool.recipe import label_t
from merge_tool.report import Summary, median, remarks


def card_text(
    plan: MergePlan,
    summary: Summary,
    t: float,
    command: str,
    *,
    base_card: Path | None,
    is_transformers: bool,
    has_code: bool,
) -> str:
    """The model card: the Hub's metadata, then what was merged and how far apart the parents are."""
    from huggingface_hub import ModelCardData  # 2 MB; ModelCard, which only joins the two parts, 13 MB more

    inherited = _inherited(base_card)
    if is_transformers:
        inherited.setdefault("library_name", "transformers")
    names = (part for name in plan.names for part in name.split("+"))  # MODEL+ADAPTER are two
    parents, tags = list(dict.fromkeys(names)), ["merge", "slerp-merge"]
    data = ModelCardData(base_model=parents, base_model_relation="merge", tags=tags, **inherited)
    body = "\n\n".join(_card_sections(plan, summary, t, command, has_code))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _card_sections(plan: MergePlan, summary: Summary, t: float, command: str, has_code: bool) -> Iterator[str]:
    names = [_plain(name) for name in plan.names]
    yield f"# {' + '.join(names)}"
    yield from _how(plan, t, names)
    yield f"```\n{command}\n```"
    donor = plan.donor if plan.recipe.files_from == "base" else 1
    yield (
        f"{summary.num_tensors:,} tensors, {summary.num_parameters:,} parameters. Side files (configuration, "
        f"tokenizer) are those of {names[donor]}.{_tokenizer(plan, names)}"
    )
    if plan.num_quantised:
        yield (
            f"{plan.num_quantised:,} weights are 8-bit floats with scales, as in {names[0]}: merged in their real "
            "values and quantised again."
        )
    if has_code:
        yield "The folder holds Python code of that model, copied as it is and not run; read it before you trust it."
    if summary.groups or plan.is_pair:
        yield "## How far apart the parents are"
        yield "\n".join(_angle_table(summary))
    yield from remarks(summary)
    what = "angle, norms and weights" if plan.is_pair else "sources and parameters"
    yield f"Every tensor's {what} are in `merge_report.json`; `SHA256SUMS` lists the files' digests."


def _how(plan: MergePlan, t: float, names: list[str]) -> Iterator[str]:
    made = f"made with slerp-merge {__version__}:"
    if plan.is_pair:
        yield (
            f"A merge of **{names[0]}** (t = 0) and **{names[1]}** (t = 1) by {METHODS[plan.method].summary} at "
            f"t = {label_t(t)}{_exceptions(plan)}, {made}"
        )
        return
    summary = plan.steps.summary if plan.steps else METHODS[plan.method].summary
    yield f"A merge of {', '.join(f'**{name}**' for name in names)} by {summary} (`{_plain(plan.method)}`), {made}"
    yield f"```yaml\n{_fenced(plan.text)}\n```"


def _fenced(text: str) -> str:
    """A recipe's text, such that it cannot end its own code block."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return "\n".join(lines).strip("\n").replace("```", "~~~")


def _exceptions(plan: MergePlan) -> str:
    return f" ({plan.num_scheduled:,} tensors at a t of their own)" if plan.num_scheduled else ""


def _angle_table(summary: Summary, most: int = 40) -> Iterator[str]:
    yield "| tensors | count | median angle | largest angle |"
    yield "|---|---:|---:|---:|"
    groups = sorted(summary.groups.items(), key=lambda item: (-max(item[1]), item[0]))
    for kind, angles in groups[:most]:
        yield f"| `{_plain(kind)}` | {len(angles):,} | {median(angles):.3f}° | {max(angles):.3f}° |"
    if len(groups) > most:
        yield f"| {len(groups) - most:,} more kinds | | | |"


def _tokenizer(plan: MergePlan, names: Sequence[str]) -> str:
    """A sentence about a vocabulary that was chosen."""
    chosen = {"base": f"tokens are those of {names[0]}", "ft": f"tokens are those of {names[-1]}"}
    vocab = plan.recipe.vocab
    if vocab is None:
        return ""
    both = f"tokens are those of {names[0]}, then those that only {names[-1]} has"
    return f" Rows were matched by token; the {chosen.get(vocab, both)}."


def _plain(name: str) -> str:
    """A name that cannot end a code span, a cell or a line of Markdown."""
    return shown(name).replace("`", "'").replace("|", "/").replace("<", "(").replace(">", ")")


_NOTHING = ("", "~", "null", "Null", "NULL")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def _inherited(base_card: Path | None) -> dict[str, Any]:
    """Licence, language, task and library of the base's card, as far as they are plain strings."""
    found: dict[str, Any] = {}
    for key, value in _front_matter(base_card).items():
        is_list = isinstance(value, list) and len(value) < 200 and all(isinstance(v, str) for v in value)
        is_text = isinstance(value, str) and value not in _NOTHING
        if key in _INHERITED and (is_text or is_list) and len(str(value)) < 4000:
            found[key] = value
    return found


def _front_matter(card: Path | None) -> dict[str, Any]:
    import yaml

    if card is None:
        return {}
    try:
        with card.open("rb") as file:
            head = file.read(65_536).decode("utf-8", "replace")
    except OSError as e:
        raise CheckpointError(
            f"{shown(card.name)}, the model card of the first model: cannot be read ({reason(e)}). Mend that, then run "
            "the same command: it continues where it stopped."
        ) from e
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", head, re.DOTALL)
    if not match:
        return {}
    try:
        # Text, lists and mappings only: no merge keys that multiply, no numbers or dates to overflow, and the
        # language `no` stays Norwegian.
        found = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
