"""The streaming loop: read chunks, sum, combine, write; in bounded memory, over a few threads.

Sees a plan and never the recipe; parses nothing, prints nothing. The calling thread walks through the plan and
queues tasks in file order; workers take them in that order, so a worker only ever waits for a task that is already
running (no deadlock):

    tensor k+1: sum its chunks        (a tensor that fits the arena is read here once, and kept)
    tensor k:   combine its chunks    (a larger one is read again; some take more passes first)

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

from merge_tool.arrays import NUMPY_DTYPES, STORED_DTYPES, Array, as_bytes
from merge_tool.checkpoint.alike import to_hold
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import WorkerError
from merge_tool.plan.memory import Layout, aligned, region_bytes
from merge_tool.plan.plan import MergePlan, ShardPlan, TensorJob
from merge_tool.run.buffers import Arena, Worker, WorkerMemory, ended, keep_freed_tiles
from merge_tool.run.findings import Finding, Findings
from merge_tool.run.summed import Summed
from merge_tool.run.weighted import ScalesStore
from merge_tool.run.work import Work, start_work

Progress = Callable[[int, str], None]
Known = Callable[[TensorJob], "Finding | None"]
_PATIENCE = 1.0  # seconds that a signal waits for the disk
_QUEUED_CHUNKS = 4  # for each worker: what is prefetched ahead of it


@dataclass(frozen=True, slots=True)
class ShardDone:
    """One finished shard of all outputs: SHA-256 in hex, one per output, and what was found out of its tensors."""

    shard: ShardPlan
    sha256: tuple[str, ...]
    findings: Findings


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
    known: Known | None = None,
) -> Iterator[ShardDone]:
    """Merge all shards of `plan` that are not in `skip`, and yield each as it is finished.

    `rank` of `world_size` processes takes every `world_size`-th shard. `on_progress(nbytes, tensor_name)` is
    called from worker threads with the input bytes summed and the output bytes written. `layout` comes from
    `plan_layout(plan, memory_bytes, jobs)`, `sink` is where shards go (`merge` uses a resumable folder). `known` gives
    the finding of a tensor where an earlier merge of the same inputs has made it: its passes are then left out, and
    its inputs are read once, to be merged.

    Raises DataError for values that cannot be merged, CheckpointError and OutputError where reading or writing fails.
    """
    shards = [s for s in plan.shards[rank::world_size] if s.number not in skip]
    run = _Run(plan, sink, layout, on_progress or (lambda nbytes, name: None), known or (lambda job: None))
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
    return sum(job.input_nbytes + len(plan.labels) * job.out.nbytes for job in jobs)


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
    findings: Findings = field(default_factory=Findings)


@dataclass(slots=True, eq=False)
class _OpenTensor:
    """A tensor between its first read and its last write."""

    job: TensorJob
    work: Work
    shard: _OpenShard
    chunk_elements: int
    kept: tuple[Array, ...] | None  # all inputs whole, if they fit the arena
    region: int | None  # where in the arena
    writes_left: int
    held: Sequence[TensorSource]  # open until the last write
    adds_left: int = 0
    adds_turn: int = 0  # the next chunk to be added, where the order counts
    is_read: bool = False  # whether all of it was read once
    is_ready: bool = False  # whether it can be merged

    def chunks(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of its inputs' chunks; an empty tensor has one empty chunk."""
        return _cut(self.job.numel, self.chunk_elements)

    def out_chunks(self) -> Iterator[tuple[int, int]]:
        """The same of its output: other ones, where that has the scales of what the inputs hold."""
        return _cut(self.job.out.numel, self.chunk_elements)


def _cut(numel: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(numel, 1), size):
        yield start, min(start + size, numel)


_Task = Callable[[WorkerMemory], None]


class _Run:
    """The calling thread's walk through the plan, and the workers that do what it queues."""

    def __init__(self, plan: MergePlan, sink: Sink, layout: Layout, on_progress: Progress, known: Known) -> None:
        self.plan, self.sink, self.layout, self.on_progress, self.known = plan, sink, layout, on_progress, known
        self.changed = threading.Condition()  # guards all that follows
        self.tasks: deque[_Task] = deque()
        self.finished: deque[ShardDone] = deque()
        self.open_shards: list[_OpenShard] = []
        self.open_tensors: list[_OpenTensor] = []
        self.arena = Arena(layout.arena_bytes)
        keep_freed_tiles()
        self.scales = ScalesStore(layout.scales_bytes)
        self.failure: BaseException | None = None
        self.closing = self.abandoned = False
        self.workers: list[Worker] = []
        try:
            for _ in range(layout.jobs):
                self.workers.append(Worker(self._work))
        except (MemoryError, WorkerError) as e:
            if self.workers and isinstance(e.__cause__, RuntimeError):
                return  # the number of threads is limited: those that there are do it all
            self.close()
            raise

    # ------------------------------------------------------------------------- the calling thread

    def walk(self, shards: list[ShardPlan]) -> Iterator[ShardDone]:
        waiting: _OpenTensor | None = None  # its chunks are queued to be added, its merge is not
        for shard_plan in shards:
            shard = self._open_shard(shard_plan)
            for job in shard_plan.jobs:
                if waiting is not None and job.scaling is not None and job.scaling is waiting.job.scaling:
                    self._queue_merge(waiting)  # this job begins with what the passes of the other find
                    waiting = None
                work = self._begin_work(job)
                fits = work.needs_chunks and 0 < region_bytes(self.plan, job) <= self.arena.nbytes
                region = self._take_region(job) if fits else None
                if region is None and fits:
                    if waiting is not None:
                        self._queue_merge(waiting)
                        waiting = None
                    region = self._await_region(job)
                tensor = self._open_tensor(job, work, shard, region)
                self._queue_pass(tensor)
                if waiting is not None:
                    self._queue_merge(waiting)
                waiting = tensor
                yield from self._take_finished()
        if waiting is not None:
            self._queue_merge(waiting)
        self._await(lambda: not self.open_shards)
        yield from self._take_finished()

    def _take_finished(self) -> list[ShardDone]:
        with self.changed:
            done = list(self.finished)
            self.finished.clear()
        return done

    def close(self, *, patience: float | None = None) -> None:
        """Stop the workers, and close what they left open.

        With `patience` (seconds), workers that the disk holds up longer are left to the end of the process.
        """
        with self.changed:
            self.closing, self.abandoned = True, patience is not None
            self.tasks.clear()
            self.changed.notify_all()
        deadline = None if patience is None else time.monotonic() + patience
        for worker in self.workers:
            worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if any(worker.is_alive for worker in self.workers):
            return  # they still use what is open
        for source in (source for tensor in self.open_tensors for source in tensor.held):
            source.release()
        for writer in (writer for shard in self.open_shards for writer in shard.writers):
            writer.abandon()

    def _open_shard(self, plan: ShardPlan) -> _OpenShard:
        shard = _OpenShard(plan, tensors_left=len(plan.jobs))
        shard.writers = self.sink.open_shard(plan, plan.header())
        shard.turns = [0] * len(shard.writers)
        with self.changed:
            self.open_shards.append(shard)
        return shard

    def _begin_work(self, job: TensorJob) -> Work:
        """The work of a job; after its passes, if what they find is known and is enough."""
        work = start_work(self.plan, job, self.scales)
        if work.needs_chunks and (finding := self.known(job)) is not None and not work.resume(finding):
            return start_work(self.plan, job, self.scales)
        return work

    def _take_region(self, job: TensorJob) -> int | None:
        with self.changed:
            return self.arena.take(region_bytes(self.plan, job))

    def _await_region(self, job: TensorJob) -> int:
        taken: list[int] = []

        def try_again() -> bool:
            if (region := self.arena.take(region_bytes(self.plan, job))) is not None:
                taken.append(region)
            return bool(taken)

        self._await(try_again)
        return taken[0]

    def _open_tensor(self, job: TensorJob, work: Work, shard: _OpenShard, region: int | None) -> _OpenTensor:
        kept = None
        if region is not None:
            kept = self._kept(job, region)
        chunk = max(1, self.layout.chunk_elements // work.tile) * work.tile
        chunks = -(-job.out.numel // chunk) or 1
        tensor = _OpenTensor(
            job=job,
            work=work,
            shard=shard,
            chunk_elements=chunk,
            kept=kept,
            region=region,
            writes_left=chunks,
            is_ready=not work.needs_chunks,
            held=to_hold(job.sources),
        )
        opened: list[TensorSource] = []
        try:
            for source in tensor.held:
                source.acquire()
                opened.append(source)
        except BaseException:
            for source in opened:
                source.release()
            raise
        with self.changed:
            self.open_tensors.append(tensor)
        return tensor

    def _kept(self, job: TensorJob, region: int) -> tuple[Array, ...]:
        """Room for all inputs whole."""
        inputs = []
        for source in job.sources:
            raw = self.arena.memory[region : region + source.info.nbytes]
            inputs.append(raw.view(NUMPY_DTYPES[source.info.dtype]))
            region += aligned(source.info.nbytes)
        return tuple(inputs)

    def _queue_pass(self, tensor: _OpenTensor) -> None:
        """Queue its chunks to be added, if its work wants them."""
        if not tensor.work.needs_chunks:
            return
        with self.changed:
            tensor.adds_left, tensor.adds_turn = sum(1 for _ in tensor.chunks()), 0
        for number, (start, stop) in enumerate(tensor.chunks()):
            if tensor.kept is None or not tensor.is_read:
                self._prefetch(tensor.job, start, stop)
            self._queue(partial(self._add, tensor, number, start, stop))

    def _queue_merge(self, tensor: _OpenTensor) -> None:
        """Queue its chunks to be merged; first, where one pass was not enough, the others."""
        while not tensor.is_ready and self.plan.may_take_passes(tensor.job):
            self._await(lambda: tensor.adds_left == 0)
            self._queue_pass(tensor)
        for start, stop in tensor.out_chunks():
            if tensor.kept is None and not tensor.job.is_scales:
                self._prefetch(tensor.job, start, stop)
            turn, tensor.shard.queued = tensor.shard.queued, tensor.shard.queued + 1
            self._queue(partial(self._write, tensor, turn, start, stop))

    def _prefetch(self, job: TensorJob, start: int, stop: int) -> None:
        for source in job.sources:
            source.prefetch(start, stop)

    def _queue(self, task: _Task) -> None:
        self._await(lambda: len(self.tasks) < _QUEUED_CHUNKS * self.layout.jobs)
        with self.changed:
            self.tasks.append(task)
            self.changed.notify_all()

    def _await(self, condition: Callable[[], bool]) -> None:
        """Block the calling thread; with a time limit a turn, so that a signal is seen on every system."""
        with self.changed:
            while not self.changed.wait_for(lambda: self.failure is not None or condition(), timeout=1.0):
                dead = next((worker for worker in self.workers if not worker.is_alive), None)
                if dead is not None and isinstance(dead.error, MemoryError):
                    raise dead.error
                if dead is not None:
                    raise ended(dead.error) from dead.error
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

    def _inputs(self, worker: WorkerMemory, tensor: _OpenTensor, start: int, stop: int) -> list[Array]:
        """All inputs' elements [start, stop): what is kept of them, or read into the worker's slot."""
        if tensor.kept is not None:
            inputs = [values[start:stop] for values in tensor.kept]
            if tensor.is_read:
                return inputs
        else:
            inputs = worker.arrays(tensor.job, stop - start)[0]
        for source, values in zip(tensor.job.sources, inputs, strict=True):
            source.read_into(start, values)
        return inputs

    def _add(self, tensor: _OpenTensor, number: int, start: int, stop: int, worker: WorkerMemory) -> None:
        inputs = self._inputs(worker, tensor, start, stop)
        if tensor.kept is not None and not tensor.is_read:
            for source in tensor.job.sources:
                source.forget(start, stop)
        if tensor.work.in_order:
            self._block(lambda: tensor.adds_turn == number)
        tensor.work.add(start, inputs, worker.scratch)
        if not tensor.is_read:
            self.on_progress(sum(values.nbytes for values in inputs), tensor.job.out.name)
        with self.changed:
            tensor.adds_turn = number + 1
            last = tensor.adds_left == 1
            if not last:
                tensor.adds_left -= 1
            self.changed.notify_all()
        if last:
            self._settle(worker, tensor)

    def _settle(self, worker: WorkerMemory, tensor: _OpenTensor) -> None:
        """All chunks were added: decide how the tensor is merged, or that it takes another pass."""
        tensor.is_read = True

        def chunks() -> Iterator[tuple[int, list[Array]]]:
            for start, stop in tensor.chunks():
                yield start, self._inputs(worker, tensor, start, stop)

        tensor.work.settle(chunks, worker.scratch)
        with self.changed:
            tensor.adds_left = 0
            tensor.is_ready = not tensor.work.needs_chunks
            self.changed.notify_all()

    def _write(self, tensor: _OpenTensor, turn: int, start: int, stop: int, worker: WorkerMemory) -> None:
        job, shard = tensor.job, tensor.shard
        self._block(lambda: tensor.is_ready)
        merge, itemsize = self._merging(worker, tensor, start, stop), STORED_DTYPES[job.out.dtype].itemsize
        for number, writer in enumerate(shard.writers):
            merged = merge(number)
            data = as_bytes(merged)
            writer.write(job.out.offset + start * itemsize, data)
            self._block(lambda number=number: shard.turns[number] == turn)  # type: ignore[misc]
            writer.hash_next(data)
            with self.changed:
                shard.turns[number] += 1
                self.changed.notify_all()
        self.on_progress((stop - start) * itemsize * len(shard.writers), job.out.name)
        self._wrote(tensor)

    def _merging(self, worker: WorkerMemory, tensor: _OpenTensor, start: int, stop: int) -> Callable[[int], Array]:
        """A function of an output's number: its elements [start, stop). The inputs are read here, once."""
        job, work = tensor.job, tensor.work
        if isinstance(work, Summed):
            sums, out = work.add_up(start, stop, worker)
            nbytes = sum((stop - start) * STORED_DTYPES[source.info.dtype].itemsize for source in job.sources)
            self.on_progress(nbytes, job.out.name)
            return lambda number: work.merged(number, start, sums, out)
        inputs = [] if job.is_scales else self._inputs(worker, tensor, start, stop)
        if not job.is_scales and (tensor.kept is None or not tensor.is_read):
            for source in job.sources:
                source.forget(start, stop)
        if not tensor.is_read:  # by a pass: here for the first time
            self.on_progress(sum(values.nbytes for values in inputs), job.out.name)
        out = worker.arrays(job, stop - start)[1]
        return lambda number: work.merge(number, start, inputs, out, worker.scratch)

    def _wrote(self, tensor: _OpenTensor) -> None:
        shard, job = tensor.shard, tensor.job
        with self.changed:
            tensor.writes_left -= 1
            if tensor.writes_left:
                return
            self.open_tensors.remove(tensor)
            shard.findings.add(job.number, tensor.work.finding)
            if tensor.region is not None:
                self.arena.give_back(tensor.region)
            shard.tensors_left -= 1
            shard_done = shard.tensors_left == 0
            self.changed.notify_all()
        for source in tensor.held:
            source.release()
        if shard_done:
            self._finish(shard)

    def _finish(self, shard: _OpenShard) -> None:
        digests = tuple(writer.sync() for writer in shard.writers)
        if self.abandoned:  # the process is ending, and the work folder is no longer ours
            raise _Stopped
        done = ShardDone(shard.plan, digests, shard.findings)
        self.sink.finish_shard(done, shard.writers)
        with self.changed:
            self.open_shards.remove(shard)
            self.finished.append(done)
            self.changed.notify_all()
