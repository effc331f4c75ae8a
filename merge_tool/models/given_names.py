"""A model's tensors under the names that the user gives them (--names-from); and names that only shapes suggest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import MismatchError, listed
from merge_tool.models.heads import renamed


def with_names(model: Checkpoint, base: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The model with its tensors called as `names` says. Raises MismatchError with all names that are not there, and
    with those that would hide a tensor of the model's own."""
    kept = model.tensors.keys() - names.keys()
    problems = [
        f"{what}: {listed(sorted(wrong), 20)}"
        for what, wrong in (
            (f"not in {model.name}", names.keys() - model.tensors.keys()),
            (f"not in {base.name}", set(names.values()) - base.tensors.keys()),
            (
                f"{model.name} has other tensors of these names, which need one of their own",
                kept & set(names.values()),
            ),
        )
        if wrong
    ]
    if problems:
        raise MismatchError("--names-from: names that do not fit.\n  " + "\n  ".join(problems))
    made = {new: renamed(model.source(old), new) for old, new in names.items()}
    return model.with_made(model.name, (), made, model.notices, without=names.keys() - made.keys())


def suggested_names(ours: Iterable[TensorInfo], theirs: Iterable[TensorInfo]) -> dict[str, str]:
    """Their name -> our name, for tensors whose shape exactly one tensor has on each side."""
    by_shape: dict[tuple[int, ...], tuple[list[str], list[str]]] = {}
    for side, infos in enumerate((ours, theirs)):
        for info in infos:
            by_shape.setdefault(info.shape, ([], []))[side].append(info.name)
    return {there[0]: here[0] for here, there in by_shape.values() if len(here) == len(there) == 1}
