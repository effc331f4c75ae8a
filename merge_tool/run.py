"""The streaming loop: read chunks, sum, combine, write; in bounded memory, over a few threads.

Sees a plan and never the recipe; parses nothing, prints nothing. The calling thread walks through the plan and
queues tasks in file order; workers take them in that order, so whoever waits, waits for a task that has begun:

    tensor k+1: sum its chunks        (a tensor that fits the arena is read here once, and kept)
    tensor k:   combine its chunks    (a larger one is read again)

A chunk is a whole number of tiles, so nothing in the output depends on how memory is shared out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from merge_tool.buffers import Arena, WorkerMemory
from merge_tool.checkpoint.reader import NUMPY_DTYPES
from merge_tool.errors import DataError, shown
from merge_tool.memory import Layout, aligned, region_bytes
from merge_tool.methods import (
    METHODS,
    TILE,
    Array,
    PairSums,
    Scratch,
    Weights,
    as_bytes,
    combine,
    convert,
    first_nonfinite,
    is_finite,
    same_values,
    sharpen,
    sum_tile,
    total,
)
from merge_tool.plan import MergePlan, ShardPlan, Source, TensorJob

Progress = Callable[[int, str], None]
_PATIENCE = 1.0  # seconds that a signal waits for the disk
_QUEUED_CHUNKS = 4  # for each worker: what is prefetched ahead of it


@dataclass(frozen=True, slots=True)
class TensorDone:
    """What was found out about one tensor: its sums (None if it was only compared) and whether bytes were equal."""

    number: int
    sums: PairSums | None
    equal: bool
    kept_base: bool = False


@dataclass(frozen=True, slots=True)
class ShardDone:
    """One finished shard of all outputs: SHA-256 in hex, one per output, and its tensors."""

    shard: ShardPlan
    sha256: tuple[str, ...]
    tensors: tuple[TensorDone, ...]


class Writer(Protocol):
    """What takes one output file's bytes: a ShardWriter, or whoever compares them with a file that is there."""

    def write(self, offset: int, data: memoryview) -> None: ...

    def hash_next(self, data: memoryview) -> None: ...

    def sync(self) -> str: ...

    def abandon(self) -> None: ...


class Sink(Protocol):
    """Where shards go. Both are called from worker threads, each shard once."""

    def open_shard(self, shard: ShardPlan, header: bytearray) -> Sequence[Writer]:
        """One writer per output, with the header written."""

    def finish_shard(self, done: ShardDone, writers: Any) -> None:
        """All bytes are written and synced: record the shard and give its files their names. `writers` are its own."""


def run_plan(
    plan: MergePlan,
    sink: Sink,
    layout: Layout,
    *,
    skip: frozenset[int] = frozenset(),
    rank: int = 0,
    world_size: int = 1,
    on_progress: Progress | None = None,
) -> Iterator[ShardDone]:
    """Merge all shards of `plan` that are not in `skip`, and yield each as it is finished.

    `rank` of `world_size` processes takes every `world_size`-th shard. `on_progress(nbytes, tensor_name)` is
    called from worker threads with the input bytes summed and the output bytes written. `layout` comes from
    `plan_layout(plan, memory_bytes, jobs)`, `sink` is where shards go (`merge` uses a resumable folder).

    Raises DataError for values that cannot be merged, CheckpointError and OutputError where reading or writing fails.
    """
    shards = [s for s in plan.shards[rank::world_size] if s.number not in skip]
    run = _Run(plan, sink, layout, on_progress or (lambda nbytes, name: None))
    try:
        yield from run.walk(shards)
    except (Exception, GeneratorExit):
        run.close()
        raise
    except BaseException:  # a signal: whoever sent it does not wait for a slow disk
        run.close(patience=_PATIENCE)
        raise
    run.close()


def progress_bytes(plan: MergePlan, skip: frozenset[int] = frozenset()) -> int:
    """The sum of all bytes that `on_progress` will be told."""
    jobs = (job for shard in plan.shards if shard.number not in skip for job in shard.jobs)
    return sum(job.input_nbytes + len(plan.ts) * job.out.nbytes for job in jobs)


# ---------------------------------------------------------------------------------- what is in flight


class _Stopped(Exception):
    """Another thread failed, or the run was given up; that is what the user sees."""


@dataclass(slots=True, eq=False)
class _OpenShard:
    """A shard being written: one writer and one turn (the next chunk to be hashed) per output."""

    plan: ShardPlan
    tensors_left: int
    writers: Sequence[Writer] = ()
    turns: list[int] = field(default_factory=list)
    queued: int = 0
    done: list[TensorDone] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _OpenTensor:
    """A tensor between its first read and its last write."""

    job: TensorJob
    numel: int
    shard: _OpenShard
    kept: tuple[Array, Array] | None  # both inputs whole, if they fit the arena
    region: int | None  # where in the arena
    tile_sums: Array  # float64 [num_tiles, 3]
    sums_left: int
    writes_left: int
    equal: bool = True
    weights: tuple[Weights, ...] = ()
    done: TensorDone | None = None  # set when the weights are known


_Task = Callable[[WorkerMemory], None]


class _Run:
    """The calling thread's walk through the plan, and the workers that do what it queues."""

    def __init__(self, plan: MergePlan, sink: Sink, layout: Layout, on_progress: Progress) -> None:
        self.plan, self.sink, self.layout, self.on_progress = plan, sink, layout, on_progress
        self.changed = threading.Condition()  # guards all that follows
        self.tasks: deque[_Task] = deque()
        self.finished: deque[ShardDone] = deque()
        self.open_shards: list[_OpenShard] = []
        self.open_tensors: list[_OpenTensor] = []
        self.arena = Arena(layout.arena_bytes)
        self.failure: BaseException | None = None
        self.closing = self.abandoned = False
        self.threads: list[threading.Thread] = []
        for _ in range(layout.jobs):
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError as e:  # how Python says that the system has no memory for its stack
                self.close()
                raise MemoryError("no thread can be started") from e
            self.threads.append(thread)

    # ------------------------------------------------------------------------- the calling thread

    def walk(self, shards: list[ShardPlan]) -> Iterator[ShardDone]:
        waiting: _OpenTensor | None = None  # its sums are queued, its combine is not
        for shard_plan in shards:
            shard = self._open_shard(shard_plan)
            for job in shard_plan.jobs:
                region = self._take_region(job)
                if region is None and self._fits_arena(job):
                    if waiting is not None:
                        self._queue_combine(waiting)
                        waiting = None
                    region = self._await_region(job)
                tensor = self._open_tensor(job, shard, region)
                self._queue_sums(tensor)
                if waiting is not None:
                    self._queue_combine(waiting)
                waiting = tensor
                yield from self._take_finished()
        if waiting is not None:
            self._queue_combine(waiting)
        self._await(lambda: not self.open_shards)
        yield from self._take_finished()

    def _take_finished(self) -> list[ShardDone]:
        with self.changed:
            found = list(self.finished)
            self.finished.clear()
        return found

    def close(self, *, patience: float | None = None) -> None:
        """Stop the workers, and close what they left open.

        With `patience` (seconds), workers that the disk holds up longer are left to the end of the process.
        """
        with self.changed:
            self.closing, self.abandoned = True, patience is not None
            self.tasks.clear()
            self.changed.notify_all()
        deadline = None if patience is None else time.monotonic() + patience
        for thread in self.threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            return  # they still use what is open
        for source in (source for tensor in self.open_tensors for source in tensor.job.sources):
            source.file.release()
        for writer in (writer for shard in self.open_shards for writer in shard.writers):
            writer.abandon()

    def _open_shard(self, plan: ShardPlan) -> _OpenShard:
        shard = _OpenShard(plan, tensors_left=len(plan.jobs))
        shard.writers = self.sink.open_shard(plan, plan.header())
        shard.turns = [0] * len(shard.writers)
        with self.changed:
            self.open_shards.append(shard)
        return shard

    def _chunks(self, numel: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of a tensor's chunks; an empty tensor has one empty chunk."""
        for start in range(0, max(numel, 1), self.layout.chunk_elements):
            yield start, min(start + self.layout.chunk_elements, numel)

    def _fits_arena(self, job: TensorJob) -> bool:
        return 0 < region_bytes(job) <= self.arena.nbytes

    def _take_region(self, job: TensorJob) -> int | None:
        with self.changed:
            return self.arena.take(region_bytes(job)) if self._fits_arena(job) else None

    def _await_region(self, job: TensorJob) -> int:
        taken: list[int] = []

        def try_again() -> bool:
            if (region := self.arena.take(region_bytes(job))) is not None:
                taken.append(region)
            return bool(taken)

        self._await(try_again)
        return taken[0]

    def _open_tensor(self, job: TensorJob, shard: _OpenShard, region: int | None) -> _OpenTensor:
        kept = None
        if region is not None and job.ft is not None:
            middle = region + aligned(job.base.info.nbytes)
            x = self.arena.memory[region : region + job.base.info.nbytes]
            y = self.arena.memory[middle : middle + job.ft.info.nbytes]
            kept = x.view(NUMPY_DTYPES[job.base.info.dtype]), y.view(NUMPY_DTYPES[job.ft.info.dtype])
        numel = job.out.numel
        chunks = -(-numel // self.layout.chunk_elements) or 1
        tile_sums = np.zeros((-(-numel // TILE), 3))
        tensor = _OpenTensor(job, numel, shard, kept, region, tile_sums, chunks, chunks)
        job.base.file.acquire()
        try:
            if job.ft is not None:
                job.ft.file.acquire()
        except BaseException:
            job.base.file.release()
            raise
        with self.changed:
            self.open_tensors.append(tensor)
        return tensor

    def _queue_sums(self, tensor: _OpenTensor) -> None:
        if tensor.job.ft is None:
            tensor.weights = (Weights(1.0, 0.0),) * len(tensor.job.ts)
            self._set_done(tensor, TensorDone(tensor.job.number, None, equal=False))
            return
        for start, stop in self._chunks(tensor.numel):
            self._prefetch(tensor.job, start, stop)
            self._queue(partial(self._sum, tensor, start, stop))

    def _queue_combine(self, tensor: _OpenTensor) -> None:
        for start, stop in self._chunks(tensor.numel):
            if tensor.kept is None:
                self._prefetch(tensor.job, start, stop)
            turn, tensor.shard.queued = tensor.shard.queued, tensor.shard.queued + 1
            self._queue(partial(self._write, tensor, turn, start, stop))

    def _prefetch(self, job: TensorJob, start: int, stop: int) -> None:
        for source in job.sources:
            source.file.prefetch(*_byte_range(source, start, stop))

    def _queue(self, task: _Task) -> None:
        self._await(lambda: len(self.tasks) < _QUEUED_CHUNKS * self.layout.jobs)
        with self.changed:
            self.tasks.append(task)
            self.changed.notify_all()

    def _await(self, condition: Callable[[], bool]) -> None:
        """Block the calling thread; with a time limit a turn, so that a signal is seen on every system."""
        with self.changed:
            while not self.changed.wait_for(lambda: self.failure is not None or condition(), timeout=1.0):
                pass
            if self.failure is not None:
                raise self.failure

    # ----------------------------------------------------------------------------------- workers

    def _work(self) -> None:
        try:
            worker = WorkerMemory(self.layout)
            with np.errstate(all="ignore"):  # what is not finite is looked for, not warned of
                while (task := self._next_task()) is not None:
                    task(worker)
                    del task  # it refers to a tensor's memory
        except _Stopped:
            pass
        except BaseException as e:  # noqa: BLE001 - shown by the calling thread
            with self.changed:
                self.failure = self.failure or e
                self.changed.notify_all()

    def _next_task(self) -> _Task | None:
        with self.changed:
            self.changed.wait_for(lambda: self.tasks or self.closing or self.failure)
            if self.closing or self.failure or not self.tasks:
                return None
            task = self.tasks.popleft()
            self.changed.notify_all()
            return task

    def _block(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.failure is not None or condition())
            if self.closing or self.failure is not None:
                raise _Stopped

    def _read(self, worker: WorkerMemory, tensor: _OpenTensor, start: int, stop: int) -> tuple[Array, Array]:
        """Both inputs' elements [start, stop), read into the worker's slot."""
        x, y, _ = worker.arrays(tensor.job, stop - start)
        for source, values in zip(tensor.job.sources, (x, y), strict=False):
            _fill(source, start, values)
        return x, y

    def _sum(self, tensor: _OpenTensor, start: int, stop: int, worker: WorkerMemory) -> None:
        job = tensor.job
        if tensor.kept is None:
            x, y = self._read(worker, tensor, start, stop)
        else:
            x, y = (values[start:stop] for values in tensor.kept)
            for source, values in zip(job.sources, (x, y), strict=True):
                _fill(source, start, values)
                source.file.forget(*_byte_range(source, start, stop))
        for begin in range(0, stop - start, TILE):
            cut = slice(begin, begin + TILE)
            if tensor.equal and not same_values(x[cut], y[cut]):
                tensor.equal = False
            if not job.exact:
                tensor.tile_sums[(start + begin) // TILE] = sum_tile(x[cut], y[cut], 1.0, worker.scratch)
        self.on_progress((stop - start) * (x.itemsize + y.itemsize), job.out.name)
        with self.changed:
            tensor.sums_left -= 1
            last = tensor.sums_left == 0
        if last:
            self._settle(worker, tensor)

    def _settle(self, worker: WorkerMemory, tensor: _OpenTensor) -> None:
        """All sums are there: decide how the tensor is combined."""
        job, kept_base, sums = tensor.job, False, None
        if job.exact:
            kept_base = not tensor.equal
            if kept_base and not self.plan.keeps_base_on_mismatch:
                raise DataError(_unequal_message(self.plan, job))
        else:
            xx, xd, dd = (total(column) for column in tensor.tile_sums.T)
            sums = PairSums(xx, xd, dd)
            if not tensor.equal:
                sums = self._sharpen(worker, tensor, sums)
                method = METHODS[self.plan.method]
                tensor.weights = tuple(method.weights(sums, t) for t in job.ts)
        self._set_done(tensor, TensorDone(job.number, sums, tensor.equal, kept_base))

    def _set_done(self, tensor: _OpenTensor, done: TensorDone) -> None:
        with self.changed:
            tensor.done = done
            tensor.shard.done.append(done)
            self.changed.notify_all()

    def _sharpen(self, worker: WorkerMemory, tensor: _OpenTensor, sums: PairSums) -> PairSums:
        if not is_finite(sums):
            self._refuse_nonfinite(worker, tensor)
        return sharpen(
            sums,
            lambda: ((x, y) for _, x, y in self._tiles(worker, tensor)),
            has_float64="F64" in {source.info.dtype for source in tensor.job.sources},
            scratch=worker.scratch,
        )

    def _refuse_nonfinite(self, worker: WorkerMemory, tensor: _OpenTensor) -> None:
        for start, *sides in self._tiles(worker, tensor):
            for source, values in zip(tensor.job.sources, sides, strict=True):
                if (place := first_nonfinite(values)) is not None:
                    raise DataError(
                        f"{shown(source.info.name)} in {shown(source.file.name)}: element {start + place:,} is "
                        f"{float(values[place])}. A merge would spread it; repair or leave out that model."
                    )

    def _tiles(self, worker: WorkerMemory, tensor: _OpenTensor) -> Iterator[tuple[int, Array, Array]]:
        """(first element, x, y) of every tile once more."""
        for start, stop in self._chunks(tensor.numel):
            if tensor.kept is None:
                x, y = self._read(worker, tensor, start, stop)
            else:
                x, y = (values[start:stop] for values in tensor.kept)
            for begin in range(0, stop - start, TILE):
                yield start + begin, x[begin : begin + TILE], y[begin : begin + TILE]

    def _write(self, tensor: _OpenTensor, turn: int, start: int, stop: int, worker: WorkerMemory) -> None:
        job, shard = tensor.job, tensor.shard
        self._block(lambda: tensor.done is not None)
        if tensor.kept is None:
            x, y = self._read(worker, tensor, start, stop)
            for source in job.sources:
                source.file.forget(*_byte_range(source, start, stop))
            if job.ft is None:  # read here for the first time
                self.on_progress(x.nbytes, job.out.name)
        else:
            x, y = (values[start:stop] for values in tensor.kept)
        out = worker.arrays(job, stop - start)[2]
        for number, writer in enumerate(shard.writers):
            merged = self._merge(worker, tensor, number, start, (x, y, out))
            data = as_bytes(merged)
            writer.write(job.out.offset + start * out.itemsize, data)
            self._block(lambda number=number: shard.turns[number] == turn)  # type: ignore[misc]
            writer.hash_next(data)
            with self.changed:
                shard.turns[number] += 1
                self.changed.notify_all()
        self.on_progress((stop - start) * out.itemsize * len(shard.writers), job.out.name)
        self._wrote(tensor)

    def _merge(
        self,
        worker: WorkerMemory,
        tensor: _OpenTensor,
        number: int,
        start: int,
        arrays: tuple[Array, Array, Array],
    ) -> Array:
        copied = tensor.equal or (tensor.done is not None and tensor.done.kept_base)
        weights = None if copied else tensor.weights[number]
        return merge_chunk(tensor.job, tensor.job.ts[number], weights, start, arrays, worker.scratch)

    def _wrote(self, tensor: _OpenTensor) -> None:
        shard, job = tensor.shard, tensor.job
        with self.changed:
            tensor.writes_left -= 1
            if tensor.writes_left:
                return
            self.open_tensors.remove(tensor)
            if tensor.region is not None:
                self.arena.give_back(tensor.region)
            shard.tensors_left -= 1
            shard_done = shard.tensors_left == 0
            self.changed.notify_all()
        for source in job.sources:
            source.file.release()
        if shard_done:
            self._finish(shard)

    def _finish(self, shard: _OpenShard) -> None:
        digests = tuple(writer.sync() for writer in shard.writers)
        if self.abandoned:  # the process is ending, and the work folder is no longer ours
            raise _Stopped
        tensors = tuple(sorted(shard.done, key=lambda tensor: tensor.number))
        done = ShardDone(shard.plan, digests, tensors)
        self.sink.finish_shard(done, shard.writers)
        with self.changed:
            self.open_shards.remove(shard)
            self.finished.append(done)
            self.changed.notify_all()


def merge_chunk(
    job: TensorJob, t: float, weights: Weights | None, start: int, arrays: tuple[Array, Array, Array], scratch: Scratch
) -> Array:
    """The output's elements from `start` on: an input as it is, an input converted, or both combined.

    `arrays` are those elements of base and finetune, and room for the output's; `start` is a multiple of TILE, for
    a tile is combined as one. Without `weights` (equal tensors, integers) the base is kept.
    """
    x, y, out = arrays
    if weights is None or t in (0, 1):
        chosen = y if t == 1 and weights is not None else x
        if chosen.dtype == out.dtype:
            return chosen
        fits = convert(chosen, out)
    else:
        fits = combine(x, y, weights, out, scratch)
    if not fits:
        raise DataError(_overflow_message(job, start + (first_nonfinite(out) or 0)))
    return out


def _byte_range(source: Source, start: int, stop: int) -> tuple[int, int]:
    """Offset and length in bytes of elements [start, stop)."""
    itemsize = NUMPY_DTYPES[source.info.dtype].itemsize
    return source.info.offset + start * itemsize, (stop - start) * itemsize


def _fill(source: Source, start: int, values: Array) -> None:
    source.file.read_into(source.info.offset + start * values.itemsize, as_bytes(values))


def _unequal_message(plan: MergePlan, job: TensorJob) -> str:
    return (
        f"{shown(job.out.name)}: the {job.out.dtype} values differ between {plan.names[0]} and {plan.names[1]}, and "
        "integers have nothing between them. Give --on-mismatch base to keep the base's."
    )


def _overflow_message(job: TensorJob, place: int) -> str:
    wider = "--dtype float32" if job.out.dtype == "BF16" else "--dtype base, bfloat16 or float32"
    return f"{shown(job.out.name)}: element {place:,} is finite but too large for {job.out.dtype}. Choose {wider}."
