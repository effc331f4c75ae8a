"""Regular expressions from a file, perhaps a stranger's, are tried in another process before they are used here,
because nothing can interrupt a match."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence

from merge_tool.apart import ask
from merge_tool.errors import OutputError, listed
from merge_tool.models.inputs import Inputs
from merge_tool.models.lora import open_models
from merge_tool.plan.memory import Machine
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.settings import Pattern

_MATCH_SECONDS = 20


def check_lent_patterns(recipe: Recipe, inputs: Inputs, machine: Machine) -> None:
    """Raise OutputError for a regular expression in a published recipe that takes too long on the models' names."""
    patterns = [Pattern(text) for text in recipe.lent_patterns]
    if texts := [pattern.text.removeprefix("re:") for pattern in patterns if pattern.is_regex]:
        models = open_models(
            inputs.refs, coming=inputs.coming, max_header_bytes=machine.header_bytes, variant=recipe.options.variant
        )
        check_patterns(texts, (name for model in models for name in model.tensors), recipe.where)


def check_patterns(patterns: Sequence[str], names: Iterable[str], where: str) -> None:
    """Raise OutputError for a regular expression in the file `where` that takes too long on these names."""
    try:
        ask(
            "merge_tool.recipe.settings",
            [patterns, sorted(set(names))],
            what=where,
            error=OutputError,
            hint="Its patterns cannot be tried.",
            keep_errors=True,
            timeout=_MATCH_SECONDS,
        )
    except subprocess.TimeoutExpired as e:
        raise OutputError(
            f"{where}: its patterns ({listed(patterns)}) take longer than {_MATCH_SECONDS} s to match the parents' "
            "names. A merge does not write such patterns; nothing was compared."
        ) from e
