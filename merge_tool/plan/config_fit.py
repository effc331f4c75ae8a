"""What config.json must say of the output's tensors where the model that it is copied from has others: how many rows
the embedding has, and whether the head is the embedding. Loaders believe it, and make up what they do not find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.models.naming import is_head
from merge_tool.models.renaming import says_tied
from merge_tool.models.side_files import SideFiles, counts_layers
from merge_tool.vocabulary.align import config_sizes
from merge_tool.vocabulary.row_tensors import embedding_rows


def fit_config(
    found: SideFiles, outputs: Iterable[TensorInfo], donor: Checkpoint, models: Sequence[Checkpoint]
) -> tuple[SideFiles, list[str]]:
    """The side files with config.json as the output's tensors are, and what to tell of it."""
    infos = list(outputs)
    ties, told = _ties(infos, donor, models), []
    if ties is not None:
        head = "has no head of its own" if ties else "has a head of its own"
        told.append(f"tie_word_embeddings in config.json is {str(ties).lower()}: the output {head}.")
    said, rows = frozenset(config_sizes(donor)), embedding_rows(infos)
    sizes = found.vocab_sizes
    if sizes is None and rows is not None and said and rows not in said and _has_other_rows(donor, rows):
        sizes = said, rows
        told.append(
            f"vocab_size in config.json is {rows:,}, the rows of the output's embedding; {donor.name} says "
            f"{', '.join(f'{size:,}' for size in sorted(said))}. Its tokenizer may name other tokens."
        )
    if found.layers and donor.config is not None and not counts_layers(donor.config):
        told.append(
            f"config.json of {donor.name} does not say under a known name how many layers there are. The output has "
            f"{len(found.layers):,}: set that number in its config.json."
        )
    return replace(found, ties=ties, vocab_sizes=sizes), told


def _has_other_rows(donor: Checkpoint, rows: int) -> bool:
    """Whether the donor's own file does not have so many: if it has, what it says of itself is its own affair."""
    stored = donor.stored or donor
    return embedding_rows(stored.tensors.values()) != rows


def _ties(outputs: Sequence[TensorInfo], donor: Checkpoint, models: Sequence[Checkpoint]) -> bool | None:
    """What tie_word_embeddings must say instead; None if the donor's config.json is right."""
    if not any(is_head(name) for model in models for name in model.tensors):
        return None
    said, donor_has_head = says_tied(donor.config or {}), any(map(is_head, donor.tensors))
    is_tied = not any(is_head(info.name) for info in outputs)
    if is_tied:
        return True if said is False or (said is None and donor_has_head) else None
    if all(says_tied(model.config or {}) for model in models):  # a copy of the embedding in all of them
        return None
    return False if said or (said is None and not donor_has_head) else None
