"""The checkpoints of a training run, as given: folders, files, globs, models of the Hub -> each once, in the order of
the run."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from merge_tool.checkpoint.addresses import is_address
from merge_tool.checkpoint.folder import is_there
from merge_tool.checkpoint.hub import hub_id, meant
from merge_tool.errors import CheckpointError, RecipeError, listed, shown
from merge_tool.models.lora import lacking
from merge_tool.models.naming import natural_key


def in_order(
    given: Sequence[str], numbered_by: str | None = None, *, keep: bool = False
) -> tuple[list[str], list[str]]:
    """The checkpoints, the oldest first, and warnings. `numbered_by` is a file that has a number for each: then no
    order is guessed. With `keep` the given order stays, whatever it looks like.

    A glob gives its matches in natural order (step-200 before step-1000). A shell gives the matches of a glob by their
    spelling: paths in one folder that are sorted so are put into natural order, with a warning. Any other order stays.
    Raises CheckpointError for a path or a glob without a match, RecipeError for a checkpoint that is given twice, or an
    order that would have to be guessed.
    """
    found = [path for text in given for path in _matches(text)]
    warnings = []
    if not keep and _is_sorted_by_shell(found):
        natural = sorted(found, key=natural_key)
        if natural != found:
            names = [Path(path).name for path in natural]
            if numbered_by is not None:
                order = listed([Path(path).name for path in found], 8)
                raise RecipeError(
                    f"--weights {shown(numbered_by)}: has a number for each checkpoint, and these are sorted by "
                    f"spelling, as a shell does: {order}. For the order of their numbers put the pattern in quotes; "
                    "for this order give the weights in a recipe of linear (merge-tool run)."
                )
            warnings.append(
                f"The checkpoints are taken in the order of their numbers: {listed(names, 8)}. Before, they were "
                "sorted by spelling, as a shell does."
            )
        found = natural
    seen: dict[str, str] = {}
    for path in found:
        if (same := str(Path(path).resolve()) if is_there(path) else path) in seen:
            raise RecipeError(
                f"{shown(path)} is given twice; a checkpoint counts once. Its weight is set by --weights."
            )
        seen[same] = path
    return found, warnings


def _matches(text: str) -> list[str]:
    """The paths that a text means: itself, or a glob's matches."""
    if is_there(text) or is_address(text) or hub_id(text) is not None:
        return [text]
    if any(sign in text for sign in "*?["):
        if matches := sorted(glob(text), key=natural_key):  # noqa: PTH207 - the text may be absolute
            return matches
        raise CheckpointError(f"{shown(text)}: the pattern matches no file or folder.{meant(text)}")
    if "+" in text or "@" in text:
        return [text]  # with an adapter or a revision: looked up as in any recipe
    raise CheckpointError(f"{shown(text)}: no such file or folder.{meant(lacking(text))}")


def _is_sorted_by_shell(paths: Sequence[str]) -> bool:
    """Whether these are local paths of one folder, sorted by their spelling."""
    return (
        all(map(is_there, paths)) and len({Path(path).parent for path in paths}) == 1 and list(paths) == sorted(paths)
    )
