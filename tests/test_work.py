"""What workers share: in whatever order and from whatever threads chunks come, findings and bytes are the same."""

from __future__ import annotations

import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import BF16, Array, save_model
from merge_tool import work
from merge_tool.checkpoint.reader import STORED_DTYPES
from merge_tool.checkpoint.source import LocalFile
from merge_tool.checks import Checks
from merge_tool.methods import PairSums, Scratch, as_bytes
from merge_tool.methods.many import STEPS_METHODS
from merge_tool.models import prepare_models
from merge_tool.plan import MergePlan, ShardPlan, TensorJob
from merge_tool.prepare import prepare
from merge_tool.recipe import Recipe
from merge_tool.remerge import _Comparison
from merge_tool.run import ShardDone
from merge_tool.work import TensorDone, start_work
from test_fp8_output import config_of, packed
from test_models import recipe

THREADS = 8
SHAPE = (1100, 1000)  # nine tiles, the last one cut short


@pytest.fixture(autouse=True)
def busy_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(tasks: Sequence[Callable[[], None]]) -> None:
    """Do the tasks in a few threads, which all begin at once."""
    barrier, finished = threading.Barrier(THREADS), []

    def run(some: Sequence[Callable[[], None]]) -> None:
        barrier.wait()
        for task in some:
            task()
            finished.append(task)

    threads = [threading.Thread(target=run, args=(tasks[k::THREADS],)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == len(tasks)


def values(seed: int) -> dict[str, Array]:
    shared, own = (np.random.default_rng(s).standard_normal(SHAPE, np.float32) for s in (99, seed))
    return {"m.weight": 0.02 * (shared + 0.1 * own)}


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "a pair": ("float", {"ts": (0.3, 0.6)}),
    "a copy": ("float", {"ts": (0.0,), "dtype": "float32"}),
    "8 bits": ("codes", {"ts": (0.3, 0.6), "dtype": "base"}),
    "integers": ("integers", {"on_mismatch": "base"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four models of one tensor, of each kind; and four that are equal."""
    root, found = tmp_path_factory.mktemp("models"), {"float": [], "codes": [], "integers": [], "equal": []}  # type: ignore[var-annotated]
    for n in range(4):
        weights = {key: array.astype(BF16) for key, array in values(n).items()}
        found["float"].append(save_model(root / f"f{n}", weights))
        found["equal"].append(shutil.copytree(root / "f0", root / f"e{n}"))
        codes = packed(values(n), (128, 128))
        found["codes"].append(save_model(root / f"c{n}", codes, config=config_of((128, 128))))
        integers = np.arange(SHAPE[0] * SHAPE[1], dtype=np.int32)
        integers[-1] += n
        found["integers"].append(save_model(root / f"i{n}", {"i": integers}))
    return found


def plan_of(kind: str, models: dict[str, list[Path]], *, equal: bool) -> MergePlan:
    if kind not in PAIRS:
        asked = recipe(kind, models["equal" if equal else "float"])
        return prepare_models(asked, models["float"][0].parent / "out", Recipe()).plan
    what, options = PAIRS[kind]
    base, ft, *_ = models[what]
    return prepare(base, base if equal else ft, base.parent / "out", Recipe(**options)).plan


def outcome(plan: MergePlan, job: TensorJob, chance: random.Random | None) -> tuple[TensorDone, list[bytes]]:
    """What is found out about a tensor, and its bytes in each output: tile by tile, or by threads in any order."""
    one, local = start_work(plan, job), threading.local()

    def scratch() -> Scratch:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch(np.zeros(Scratch.NBYTES, np.uint8))
        return local.scratch  # type: ignore[no-any-return]

    def carry_out(tasks: list[Callable[[], None]], *, in_order: bool = False) -> None:
        if chance is not None and not in_order:
            together(chance.sample(tasks, len(tasks)))
            return
        for task in tasks:
            task()

    def inputs(start: int) -> list[Array]:
        stop = min(start + one.tile, job.numel)
        found = [np.empty(stop - start, STORED_DTYPES[source.info.dtype]) for source in job.sources]
        for source, values in zip(job.sources, found, strict=True):
            source.read_into(start, values)
        return found

    chunks = {start: inputs(start) for start in range(0, job.numel, one.tile)}
    while one.needs_chunks:
        adds = [lambda start=k, x=x: one.add(start, x, scratch()) for k, x in chunks.items()]  # type: ignore[misc]
        carry_out(adds, in_order=one.in_order)
        one.settle(lambda: iter(chunks.items()), scratch())
    outputs = []
    for number in range(len(plan.ts)):
        parts: dict[int, bytes] = {}

        def merge(start: int, number: int = number, parts: dict[int, bytes] = parts) -> None:
            out = np.empty(min(one.tile, job.out.numel - start), STORED_DTYPES[job.out.dtype])
            x = [] if job.is_scales else chunks[start]
            parts[start] = bytes(as_bytes(one.merge(number, start, x, out, scratch())))

        carry_out([lambda start=k: merge(start) for k in range(0, job.out.numel, one.tile)])  # type: ignore[misc]
        outputs.append(b"".join(parts[start] for start in sorted(parts)))
    return one.done, outputs


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", [*PAIRS, *STEPS_METHODS])
def test_chunks_may_come_in_any_order_and_from_many_threads(
    models: dict[str, list[Path]], kind: str, equal: bool
) -> None:
    """The same is found out, and every output has the same bytes."""
    plan = plan_of(kind, models, equal=equal)
    for job in plan.jobs():
        expected = outcome(plan, job, None)
        for seed in range(3):
            assert outcome(plan, job, random.Random(seed)) == expected


def test_a_difference_that_one_thread_sees_is_not_lost_by_another(
    models: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of equal chunks begins before that of unequal ones, and ends after it."""
    plan = plan_of("integers", models, equal=False)
    (job,) = plan.jobs()
    one, real = start_work(plan, job), work.same_values
    scratch = Scratch(np.zeros(Scratch.NBYTES, np.uint8))
    begun, seen = threading.Event(), threading.Event()

    def slow_if_equal(a: Array, b: Array) -> bool:
        if equal := real(a, b):
            begun.set()
            seen.wait(60)
        return equal

    monkeypatch.setattr(work, "same_values", slow_if_equal)
    first = threading.Thread(target=one.add, args=(0, [np.zeros(5, np.int32)] * 2, scratch))
    first.start()
    begun.wait(60)
    one.add(5, [np.zeros(5, np.int32), np.ones(5, np.int32)], scratch)
    seen.set()
    first.join()
    one.settle(lambda: iter(()), scratch)
    assert not one.done.equal
    assert one.done.kept_base


class SlowJobs(tuple[TensorJob, ...]):
    """Jobs whose first reader is held up while they are counted, until `go_on`, or for half a second."""

    begun, go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[TensorJob]:
        if not self.begun.is_set():
            self.begun.set()
            self.go_on.wait(0.5)
        return super().__iter__()


def test_a_verification_counts_every_shard_however_many_end_at_once(tmp_path: Path) -> None:
    """Sums, elements and problems of shards that several threads finish."""
    count = 50
    tensors = {f"m.{n}.weight": np.full(n + 1, n, np.float32) for n in range(count)}
    model = save_model(tmp_path / "m", tensors, shards=2)
    plan = prepare(model, model, tmp_path / "out", Recipe((0.5,), max_shard_bytes=1)).plan
    assert len(plan.shards) == count
    (tmp_path / "stored").write_bytes(bytes(10_000))
    sink = _Comparison(Checks(), {shard.number: LocalFile(tmp_path / "stored", "stored") for shard in plan.shards})

    def finish(shard: ShardPlan) -> None:
        (job,) = tuple.__iter__(shard.jobs)
        sums = PairSums(job.number, 2.0 * job.number, 3.0)
        done = ShardDone(shard, ("",), (TensorDone(job.number, sums, False),))
        sink.finish_shard(done, sink.open_shard(shard, plan.shards[shard.number].header()))

    first = threading.Thread(target=finish, args=(replace(plan.shards[0], jobs=SlowJobs(plan.shards[0].jobs)),))
    first.start()
    SlowJobs.begun.wait(60)
    together([lambda shard=shard: finish(shard) for shard in plan.shards[1:]])  # type: ignore[misc]
    SlowJobs.go_on.set()
    first.join()
    assert sink.checks.num_compared == sum(array.size for array in tensors.values())
    assert len(sink.checks.problems) + sink.checks.more == count
    assert all(sink.findings[k].sums == PairSums(k, 2.0 * k, 3.0) for k in range(count))
