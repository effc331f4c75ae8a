"""The plan file: which merge, of which inputs, by which versions; its shards, pieces and parts. Its SHA-256 is the
merge's identity. It names no tensors: a few kilobytes for any model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.folder import is_there
from merge_tool.errors import OutputError, RecipeError, listed, reason, shown
from merge_tool.files import write_whole
from merge_tool.hosts.pieces import Piece, cut, share_out
from merge_tool.methods.registry import METHODS
from merge_tool.models.lora import parts as paths_of
from merge_tool.output.versions import versions
from merge_tool.output.work_folder import plan_record, record_differences
from merge_tool.plan.overlap import lies_in
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.prepare import Prepared
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.stored import from_json, to_json

FORMAT = 1
_LARGEST = 100_000_000
_AGAIN = "Make it again: merge-tool plan"


@dataclass(frozen=True)
class PlanFile:
    """A merge that many workers share. `recipe` is the Recipe as JSON, `record` the first line of an unfinished merge's
    journal, `parts` the numbers of each part's pieces. `where` is the file, for messages."""

    out: str
    overwrite: bool
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    shards: tuple[tuple[str, int], ...]
    pieces: tuple[Piece, ...]
    parts: tuple[tuple[int, ...], ...]
    versions: Mapping[str, str]
    where: str = "the plan"

    @property
    def content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "versions": dict(self.versions),
            "out": self.out,
            "overwrite": self.overwrite,
            "recipe": dict(self.recipe),
            "merge": dict(self.record),
            "shards": [{"file": name, "size": size} for name, size in self.shards],
            "pieces": [asdict(piece) for piece in self.pieces],
            "parts": [list(part) for part in self.parts],
        }

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def recipe_again(self) -> Recipe:
        """The recipe, of models at absolute paths or at commits of the Hub. Raises RecipeError."""
        try:
            return from_json(self.recipe, METHODS)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise self._torn(reason(e)) from e

    def is_whole(self, piece: Piece) -> bool:
        """Whether a piece is the whole of its shard."""
        return sum(other.shard == piece.shard for other in self.pieces) == 1

    def check_versions(self) -> None:
        """Raise RecipeError if another version of the tool, or of a library that computes, would make this part."""
        for name, now in versions().items():
            if (then := self.versions.get(name)) != now:
                raise RecipeError(
                    f"{shown(self.where)}: was made by {name} {shown(then)}, this worker has {now}, and parts made by "
                    "two versions may differ. Install the same version on all hosts, or make the plan again."
                )

    def check(self, plan: MergePlan, samples: Sequence[str]) -> None:
        """Raise RecipeError unless the inputs that are seen here give the plan that this file has."""
        ours = plan_record(plan, samples, overwrite=self.overwrite, is_shared=True)
        if differences := record_differences(self.record, ours):
            raise RecipeError(
                f"{shown(self.where)}: the inputs here differ from the plan's: {differences}. Give every host the same "
                "files, or make the plan again."
            )
        if [(shard.file_name, shard.size) for shard in plan.shards] != list(self.shards):
            raise RecipeError(f"{shown(self.where)}: its shards differ from the shards planned here. {_AGAIN}.")

    def _torn(self, why: str) -> RecipeError:
        return RecipeError(f"{shown(self.where)}: is not a whole plan file ({shown(why)}). {_AGAIN}.")


def make_plan_file(prepared: Prepared, parts: int, *, overwrite: bool) -> PlanFile:
    """The plan of `prepared`, in this many parts. Raises RecipeError."""
    if parts < 1:
        raise RecipeError(f"The number of parts is {parts}, expected at least 1.")
    plan = prepared.plan
    pieces = cut(plan, parts)
    return PlanFile(
        out=str(prepared.target.path.absolute()),
        overwrite=overwrite,
        recipe=to_json(plan.recipe, prepared.pinned, _places(plan.recipe, prepared.pinned)),
        record=plan_record(plan, prepared.samples, overwrite=overwrite, is_shared=True),
        shards=tuple((shard.file_name, shard.size) for shard in plan.shards),
        pieces=pieces,
        parts=tuple(tuple(share) for share in share_out(pieces, parts)),
        versions=versions(),
    )


def _places(recipe: Recipe, pinned: Sequence[str]) -> list[str]:
    """The models that the recipe's text names, place by place, with absolute paths for local models and adapters."""
    pairs = [
        pair
        for ref, absolute in zip(recipe.models, pinned, strict=True)
        for pair in zip(paths_of(str(ref)), paths_of(absolute), strict=True)
    ]
    local = {path: absolute for path, absolute in pairs if is_there(path)}
    texts = [str(place.ref) for place in recipe.places]
    return ["+".join(local.get(path, path) for path in paths_of(text)) for text in texts]


def check_plan_path(path: Path, recipe: Recipe, out: Path) -> None:
    """Raise RecipeError if the plan would replace a file that is not a plan, or lie in an input or in OUT. (A merge
    copies the files of an input into OUT, and would copy the plan, too.)"""
    where = f"--plan-file {shown(path)}"
    try:
        inputs = [Path(part) for ref in recipe.models for part in paths_of(str(ref))]
        if any(lies_in(path, other) for other in (*inputs, out)):
            raise RecipeError(f"{where}: lies inside an input or the output. Choose a path beside them.")
        if path.is_dir() or not path.parent.is_dir():
            raise RecipeError(f"{where}: {'is a folder' if path.is_dir() else 'its folder is missing'}.")
        if path.exists() and not _is_plan(path):
            raise RecipeError(f"{where}: is a file, but not a plan. Choose another name.")
    except (OSError, RuntimeError, ValueError) as e:
        raise RecipeError(f"{where}: cannot be used ({reason(e)}).") from e


def _is_plan(path: Path) -> bool:
    """Whether a file is a plan, of any format."""
    if path.stat().st_size > _LARGEST:
        return False
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and {"format", "pieces", "parts", "sha256"} <= stored.keys()


def write_plan_file(plan: PlanFile, path: Path) -> None:
    """Write the plan with its digest; the file appears whole. Raises OutputError."""
    text = json.dumps({**plan.content, "sha256": plan.sha256}, indent=1, ensure_ascii=False)
    try:
        write_whole(path, [text.encode("utf-8", "surrogatepass"), b"\n"])
    except OSError as e:
        raise OutputError(f"{shown(path)}: the plan cannot be written ({reason(e)}).") from e


def read_plan_file(path: Path) -> PlanFile:
    """The plan in a file. Raises RecipeError for a file that is missing, torn, changed, or of another format."""
    torn = PlanFile("", False, {}, {}, (), (), (), {}, where=str(path))._torn
    try:
        if path.stat().st_size > _LARGEST:
            raise torn(f"it has more than {_LARGEST:,} bytes")
        stored = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except OSError as e:
        raise RecipeError(f"{shown(path)}: cannot be read ({reason(e)}). {_AGAIN} RECIPE OUT -o PLAN.json.") from e
    except (ValueError, RecursionError) as e:
        raise torn(reason(e)) from e
    try:
        if stored["format"] != FORMAT:
            raise torn(f"its format is {stored['format']}, expected {FORMAT}")
        plan = PlanFile(
            out=stored["out"],
            overwrite=stored["overwrite"],
            recipe=stored["recipe"],
            record=stored["merge"],
            shards=tuple((shard["file"], shard["size"]) for shard in stored["shards"]),
            pieces=tuple(Piece(**piece) for piece in stored["pieces"]),
            parts=tuple(map(tuple, stored["parts"])),
            versions=stored["versions"],
            where=str(path),
        )
        named = sorted(number for part in plan.parts for number in part)
        if plan.sha256 != stored["sha256"] or named != list(range(len(plan.pieces))):
            raise torn("its content does not match its SHA-256")
    except (KeyError, TypeError, AttributeError) as e:
        raise torn(reason(e)) from e
    return plan


def absent(plan: PlanFile, numbers: Sequence[int]) -> str:
    """Some pieces by file and part, for messages."""
    part_of = {number: part for part, share in enumerate(plan.parts) for number in share}
    return listed((f"{plan.shards[plan.pieces[n].shard][0]} (part {part_of[n]})" for n in numbers), 5)
