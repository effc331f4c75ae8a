"""Correct the copied config.json to the output's tensors: vocab_size (the embedding's rows) and tie_word_embeddings
(whether the head is the embedding). Loaders trust these values and initialise missing tensors at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import listed, shown
from merge_tool.models.layer_counts import PREDICTED, counts_layers, num_layers
from merge_tool.models.naming import COPIES, is_embedding, is_head, own_name
from merge_tool.models.renaming import says_tied
from merge_tool.models.side_files import SideFiles
from merge_tool.plan.fit import ADDED
from merge_tool.plan.plan import TensorJob
from merge_tool.plan.stacks import Stacks
from merge_tool.vocabulary.align import config_sizes
from merge_tool.vocabulary.row_tensors import embedding_rows

# The keys of a configuration about the task that a model was trained for.
_TASK = ("architectures", "id2label", "label2id", "num_labels", "problem_type")


def fit_config(
    side_files: SideFiles, jobs: Iterable[TensorJob], donor: Checkpoint, models: Sequence[Checkpoint]
) -> tuple[SideFiles, list[str]]:
    """The side files with config.json corrected to the output's tensors, and warnings about the corrections."""
    infos, ends, added = list[TensorInfo](), list[TensorJob](), dict[int, str]()
    for job in jobs:  # jobs are made one at a time: only embeddings and heads are kept
        infos.append(job.out)
        if job.note == ADDED:
            added.setdefault(job.sides[0], job.out.name)
        if is_head(job.out.name) or is_embedding(job.out.name):
            ends.append(job)
    ties, warnings = _ties(ends, donor, models), []
    if ties is not None:
        head = "has no head of its own" if ties else "has a head of its own"
        if not ties and _are_all_tied(models):
            head = "has a head of its own, which is not merged as its embedding is"
        warnings.append(f"tie_word_embeddings in config.json is {str(ties).lower()}: the output {head}.")
    said, rows = frozenset(config_sizes(donor)), embedding_rows(infos)
    sizes = side_files.vocab_sizes
    if sizes is None and rows is not None and said and rows not in said and _has_other_rows(donor, rows):
        sizes = said, rows
        warnings.append(
            f"vocab_size in config.json is {rows:,}, the rows of the output's embedding; {donor.name} says "
            f"{', '.join(f'{size:,}' for size in sorted(said))}. Its tokenizer may name other tokens."
        )
    predicted = _predicted(infos, donor, len(side_files.layers))
    if predicted is not None:
        warnings.append(
            f"config.json announces {predicted:,} layers that predict further tokens, as many as the output has. "
            f"{donor.name} has another number."
        )
    if side_files.layers and donor.config is not None and not counts_layers(donor.config):
        warnings.append(
            f"config.json of {donor.name} does not say under a known name how many layers there are. The output has "
            f"{len(side_files.layers):,}: set that number in its config.json."
        )
    if side_files.layers:
        from merge_tool.models.layer_config import layer_doubts  # 2 MB: for stacks alone

        warnings += layer_doubts(donor.config, side_files.layers)
    task: dict[str, Any] = {}
    for number, tensor in added.items():
        task = {**_task(donor, models[number]), **task}
        warnings += _task_warnings(task, donor, models[number], tensor)
    return replace(side_files, predicted=predicted, ties=ties, vocab_sizes=sizes, task=task), warnings


def _task(donor: Checkpoint, model: Checkpoint) -> dict[str, Any]:
    """The settings of the task in the configuration of `model` that differ from the donor's."""
    if donor is model or donor.config is None:
        return {}
    theirs = model.config or {}
    return {key: theirs[key] for key in _TASK if theirs.get(key) is not None and donor.config.get(key) != theirs[key]}


def _task_warnings(task: dict[str, Any], donor: Checkpoint, model: Checkpoint, tensor: str) -> list[str]:
    if not task:
        return []
    return [
        f"config.json has {listed(list(task))} from {model.name}, as the output has {shown(tensor)} of it; the rest is "
        f"{donor.name}'s."
    ]


def _has_other_rows(donor: Checkpoint, rows: int) -> bool:
    """Whether the donor's own embedding has another number of rows. If not, the donor's config.json stays as it is."""
    stored = donor.stored or donor
    return embedding_rows(stored.tensors.values()) != rows


def _predicted(infos: Sequence[TensorInfo], donor: Checkpoint, stacked: int) -> int | None:
    """The corrected number of layers that predict further tokens; None if the donor's config.json is right, or never
    was."""
    stored = donor.stored or donor
    depth = num_layers(stored.config)
    extra = Stacks(stored.tensors, depth).extra
    announced = {part[key] for part in text_configs(stored.config) for key in PREDICTED if type(part.get(key)) is int}
    if depth is None or extra is None or announced != {extra[1]}:
        return None
    there = Stacks((info.name for info in infos), stacked or depth).extra
    count = there[1] if there is not None and there[0] == extra[0] else 0
    return None if count == extra[1] else count


def _ties(ends: Sequence[TensorJob], donor: Checkpoint, models: Sequence[Checkpoint]) -> bool | None:
    """The corrected tie_word_embeddings; None if the donor's config.json is right."""
    if not any(is_head(name) for model in models for name in model.tensors):
        return None
    if not any(is_embedding(job.out.name) for job in ends):  # perhaps stored under the head's name, as in the donor
        return None
    stored = donor.stored or donor  # the tensors that its config.json describes
    said, donor_has_head = says_tied(stored.config or {}), any(map(is_head, stored.tensors))
    is_tied = not any(is_head(job.out.name) for job in ends)
    if is_tied:
        return True if said is False or (said is None and donor_has_head) else None
    if _are_all_tied(models) and not _come_apart(ends):  # a copy of the embedding in all models, and in the output
        return None
    is_denied = any(says_tied(model.config or {}) is False for model in models)
    return False if said or (said is None and (is_denied or not donor_has_head)) else None


def _are_all_tied(models: Sequence[Checkpoint]) -> bool:
    return all(says_tied(model.config or {}) for model in models)


def _come_apart(ends: Sequence[TensorJob]) -> bool:
    """Whether a head and the embedding that it is a copy of have different parameters, or only one of them is
    merged."""
    for head in (job for job in ends if is_head(job.out.name)):
        alike = (job for job in ends if is_embedding(job.out.name) and job.out.shape == head.out.shape)
        fates = {_fate(job) for job in alike if own_name(job.out.name) not in COPIES}
        if len(fates) == 1 and fates != {_fate(head)}:
            return True
    return False


def _fate(job: TensorJob) -> tuple[Any, ...]:
    return job.is_copied, job.sides, job.values
