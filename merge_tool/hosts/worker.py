"""A worker: makes pieces of a plan, and writes a receipt for each. Workers do not communicate."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from merge_tool.checkpoint.writer import RegionWriter, ShardWriter
from merge_tool.errors import OutputError, output_failed
from merge_tool.hosts.pieces import Piece, shard_of
from merge_tool.hosts.plan_file import PlanFile, read_plan_file, write_plan_file
from merge_tool.hosts.receipts import PLAN, PartsFolder
from merge_tool.models.inputs import Inputs
from merge_tool.plan.memory import machine
from merge_tool.plan.plan import ShardPlan
from merge_tool.plan.prepare import Prepared, prepare
from merge_tool.plan.system_memory import under_pressure
from merge_tool.plan.target import Target
from merge_tool.run.run import ShardDone, progress_bytes, run_plan

_FLUSH_BYTES = 8_000_000

Progress = Callable[[int, str], None]


class Worker:
    """A process that makes pieces. It plans the merge again from the inputs on this host, and compares the two plans.

    Raises RecipeError if versions or inputs differ from the plan's, OutputError if OUT is not the folder of this plan.
    """

    def __init__(self, plan_file: PlanFile, *, memory_bytes: int | None = None, jobs: int | None = None) -> None:
        self.plan_file, self.target = plan_file, Target(Path(plan_file.out))
        self.run = secrets.token_hex(8)
        plan_file.check_versions()
        self.prepared = self._prepared(memory_bytes, jobs)
        self.parts = PartsFolder(self.target.work, plan_file, self.prepared.plan.labels)
        self.check_folder()

    def _prepared(self, memory_bytes: int | None, jobs: int | None) -> Prepared:
        recipe, limits = self.plan_file.recipe_again(), machine(memory_bytes, jobs)
        with Inputs(map(str, recipe.models), variant=recipe.options.variant) as inputs:
            inputs.fetch()
            prepared = prepare(recipe, inputs, self.target, limits, read_samples=True)
        self.plan_file.check(prepared.plan, prepared.samples)
        return prepared

    def check_folder(self) -> None:
        """Raise OutputError if OUT is no longer the folder of this plan."""
        if not self.parts.is_planned():
            raise self.parts.not_planned(self.target.path)

    def progress_bytes(self, pieces: Iterable[int]) -> int:
        """The sum of all bytes that `on_progress` will get for these pieces."""
        plan = self.prepared.plan
        return progress_bytes(replace(plan, shards=tuple(shard_of(plan, self.plan_file.pieces[k]) for k in pieces)))

    def make(self, pieces: Sequence[int], on_progress: Progress | None = None) -> None:
        """Make pieces, each with its receipt once its data is synced. Raises a MergeToolError."""
        prepared = self.prepared
        shards = {number: shard_of(prepared.plan, self.plan_file.pieces[number]) for number in pieces}
        sink = _Pieces(
            parts=self.parts,
            numbers={id(shard): number for number, shard in shards.items()},
            whole=prepared.plan.shards,
            run=self.run,
            flush_bytes=_FLUSH_BYTES if under_pressure(prepared.budget) else None,
        )
        plan = replace(prepared.plan, shards=tuple(shards.values()))
        try:
            for _ in run_plan(plan, sink, prepared.layout, on_progress=on_progress):
                pass
        except OutputError:
            self.check_folder()  # perhaps the merge is finished, or planned anew
            raise


@dataclass
class _Pieces:
    """The sink of a worker's run: pieces into the parts' folder."""

    parts: PartsFolder
    numbers: dict[int, int]  # id of a piece's ShardPlan -> the piece's number
    whole: Sequence[ShardPlan]
    run: str
    flush_bytes: int | None

    def open_shard(self, shard: ShardPlan, header: bytearray) -> list[ShardWriter]:
        number = self.numbers[id(shard)]
        piece = self.parts.plan.pieces[number]
        if not self.parts.plan.is_whole(piece):
            header = self.whole[piece.shard].header() if piece.start == 0 else bytearray()
        return [self._open(self.parts.file(k, number), shard, piece, header) for k in range(len(self.parts.labels))]

    def _open(self, path: Path, shard: ShardPlan, piece: Piece, header: bytearray) -> ShardWriter:
        if self.parts.plan.is_whole(piece):
            return ShardWriter(path, header, run=self.run, flush_bytes=self.flush_bytes)
        return RegionWriter(path, shard.size, header, flush_bytes=self.flush_bytes)

    def finish_shard(self, done: ShardDone, writers: list[ShardWriter]) -> None:
        for writer in writers:
            writer.publish()
        self.parts.write(self.numbers[id(done.shard)], done.sha256, done.findings, self.run)


def share_plan(plan_file: PlanFile, work: Path, labels: Sequence[str]) -> tuple[PartsFolder, Path]:
    """Put the plan into the work folder, where workers look for it. Raises OutputError."""
    parts = PartsFolder(work, plan_file, labels)
    try:
        for output in range(len(labels)):
            (parts.path / str(output)).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise output_failed(parts.path, e) from e
    path = (parts.path / PLAN).absolute()  # an engine's processes have other working folders
    write_plan_file(plan_file, path)
    return parts, path


def make_parts(path: str, pieces: Sequence[int], memory_bytes: int | None = None, jobs: int | None = None) -> list[int]:
    """The function that an engine calls in its processes: make the unfinished ones of these pieces. Returns them."""
    plan_file = read_plan_file(Path(path))
    worker = _worker(path, plan_file.sha256, memory_bytes, jobs)
    missing = worker.parts.missing(pieces)
    if missing:
        worker.make(missing)
    return missing


@lru_cache(maxsize=1)
def _worker(path: str, sha256: str, memory_bytes: int | None, jobs: int | None) -> Worker:
    """The worker of this process, kept for the next part of the same plan."""
    return Worker(read_plan_file(Path(path)), memory_bytes=memory_bytes, jobs=jobs)
