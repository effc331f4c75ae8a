"""Differences between the configurations and tokenizers of the models to be merged, for warnings; if the models do not
fit, for the error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import sub_configs
from merge_tool.errors import CheckpointError, MismatchError, reason, shown
from merge_tool.recipe.recipe import Recipe
from merge_tool.vocabulary.align import TOKENIZER_FILES, explain
from merge_tool.vocabulary.join import compare_tokenizers
from merge_tool.vocabulary.row_tensors import rows_of
from merge_tool.vocabulary.tokenizer_json import TOKENIZER

_COMPARED_SETTINGS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)
# Settings to warn about even if only one model has them.
_ONE_SIDED = frozenset({"num_attention_heads", "num_key_value_heads", "rope_theta"})


def parent_warnings(models: Sequence[Checkpoint], way: str) -> Iterable[str]:
    """The models' notices, and the differences between each model and the first. `way` is the option that matches rows
    by token; empty if it is in use."""
    for model in models:
        yield from model.notices
    for other in models[1:]:
        yield from _differences(models[0], other)
        yield from _tokenizer_differences(models[0], other, way)


def check_vocabularies(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if a row means different tokens in two models: if the recipe is strict, for any difference
    between tokenizers, else only if a token's id differs."""
    base, *others = models
    for other in others:
        here, there = base.tokenizer_folder, other.tokenizer_folder
        if here is None or there is None or not (here.has(TOKENIZER) and there.has(TOKENIZER)):
            continue
        if rows_of(base) is None or _same_bytes(here, there, TOKENIZER):
            continue
        try:
            comparison = compare_tokenizers(here, there)
        except CheckpointError:
            continue  # a warning covers it
        if comparison.num_moved or (recipe.is_strict and any(comparison.num_alone)):
            raise MismatchError(
                f"{base.name} and {other.name} have different vocabularies, so rows of one number mean other tokens. "
                f"{explain(base, other)}.\nWith {recipe.rows_option} rows are matched by token; --exclude PATTERN "
                "keeps what it matches (embeddings, heads) as the base has it."
            )


def explain_rows(models: Sequence[Checkpoint]) -> str:
    """How far vocabularies agree, for models whose embeddings differ in their number of rows; empty if none do."""
    base, *others = models
    lines = [f"\n{text}." for other in others if _has_other_rows(base, other) and (text := _compared(base, other))]
    return "".join(lines)


def _has_other_rows(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether the embeddings differ in their number of rows."""
    rows = rows_of(base), rows_of(other)
    return None not in rows and rows[0] != rows[1]


def _compared(base: Checkpoint, ft: Checkpoint) -> str:
    try:
        return explain(base, ft)
    except CheckpointError as e:
        return f"The vocabularies cannot be compared: {str(e).rstrip('.')}"


def _differences(base: Checkpoint, ft: Checkpoint) -> Iterable[str]:
    a, b = (_settings(model.config or {}) for model in (base, ft))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) == b.get(key) or base.config is None or ft.config is None:
            continue
        if key.endswith("tie_word_embeddings") and base.tensors.keys() != ft.tensors.keys():
            continue  # another warning covers the heads
        if (key in a and key in b) or key.split(".")[-1] in _ONE_SIDED:
            here, there = (shown(side.get(key, "nothing")) for side in (a, b))
            yield f"{key} differs: {here} in {base.name}, {there} in {ft.name}. Are these related models?"


def _tokenizer_differences(base: Checkpoint, ft: Checkpoint, way: str) -> Iterable[str]:
    here, there = base.tokenizer_folder, ft.tokenizer_folder
    if here is None or there is None:
        return
    for name in TOKENIZER_FILES:
        if not (here.has(name) and there.has(name)) or _same_bytes(here, there, name):
            continue
        difference = f"{name} differs between {base.name} and {ft.name}: tokens may not mean the same in both."
        if name != TOKENIZER:
            yield difference
        elif way:
            yield f"{difference} {_compared(base, ft)}. With {way} rows are matched by token."


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to compare; those of a part are named `text_config.num_attention_heads`."""
    settings: dict[str, Any] = {}
    for keys, part in sub_configs(config):
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            part = {"rope_theta": rope["rope_theta"], **part}
        named = {key: ".".join((*keys, key)) for key in _COMPARED_SETTINGS}
        settings |= {name: part[key] for key, name in named.items() if part.get(key) is not None}
    return settings


def _same_bytes(base: Folder, ft: Folder, name: str) -> bool:
    paths = base.regular(name), ft.regular(name)
    try:
        if paths[0].stat().st_size != paths[1].stat().st_size:
            return False
        with paths[0].open("rb") as a, paths[1].open("rb") as b:
            while True:
                left, right = a.read(65_536), b.read(65_536)
                if left != right or not left:
                    return left == right
    except OSError as e:
        raise CheckpointError(f"{name} of {base.name} or {ft.name}: cannot be read ({reason(e)}).") from e
