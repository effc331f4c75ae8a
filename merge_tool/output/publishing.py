"""Where a merge's output goes: OUT as the user wrote it, with the options for a repository of the Hub or a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_tool.checkpoint.addresses import is_store, store_url
from merge_tool.checkpoint.hub import hub_id
from merge_tool.errors import OutputError, RecipeError
from merge_tool.plan.target import Target, is_remote, remote_target
from merge_tool.recipe.recipe import Recipe

if TYPE_CHECKING:  # most merges need none
    from merge_tool.output.hub_output import HubOutput


@dataclass(frozen=True, slots=True)
class Publishing:
    """How a merge goes to the Hub: whether a new repository is private, whether it `publishes` or leaves the pull
    request open, and where shards wait (`work`; None: in the cache of the Hub's client)."""

    private: bool = False
    publishes: bool = True
    work: Path | None = None


def target_of(out: str | Path, publishing: Publishing | None = None) -> Target:
    """The target that OUT names. Raises OutputError, and RecipeError for options of the Hub beside a path."""
    chosen = publishing or Publishing()
    if is_remote(out):
        target = remote_target(out, chosen.work)
        if is_store(target.repo) and (chosen.private or not chosen.publishes):
            raise RecipeError(f"{'--private' if chosen.private else '--no-publish'} is for an output on the Hub.")
        return target
    given = {"--private": chosen.private, "--no-publish": not chosen.publishes, "--work": chosen.work is not None}
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise RecipeError(f"{wrong[0]} is for an output on the Hub: hub:org/name as OUT.")
    return Target(Path(out))


def check_no_input(target: Target, models: Iterable[str]) -> None:
    """Raise OutputError if the output is the repository of an input, which it would replace."""
    for model in models:
        if is_store(target.repo) and is_store(model) and _overlap(store_url(model), target.repo):
            raise OutputError(f"{target.name}: is, or lies inside or around, an input of this merge. Choose another.")
        if target.repo and (hub_id(model) or ("",))[0] == target.repo:
            raise OutputError(f"{target.name}: is an input of this merge. Choose another repository.")


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


@contextmanager
def hub_of(
    target: Target, publishing: Publishing | None, recipe: Recipe, *, overwrite: bool
) -> Iterator[HubOutput | None]:
    """The repository of the Hub or folder of a bucket that the output goes to; None for a folder or file here."""
    if not target.repo:
        yield None
        return
    from merge_tool.output.hub_output import HubOutput

    asked = recipe.options.max_shard_bytes
    with HubOutput(target, publishing or Publishing(), asked, overwrite=overwrite) as hub:
        yield hub
