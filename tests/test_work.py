"""What workers share: in whatever order and from whatever threads chunks come, findings and bytes are the same."""

from __future__ import annotations

import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from checkpoints import BF16, Array, save_model
from merge_tool.api import plan_recipe
from merge_tool.arrays import STORED_DTYPES, as_bytes
from merge_tool.checkpoint.source import LocalFile
from merge_tool.methods.inner import PairSums, Scratch
from merge_tool.methods.registry import METHODS
from merge_tool.plan.plan import MergePlan, ShardPlan, TensorJob
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.recipe.pair import pair
from merge_tool.run import stepped, weighted, work
from merge_tool.run.findings import Finding, Findings
from merge_tool.run.run import ShardDone
from merge_tool.run.stepped import Stepped
from merge_tool.run.weighted import Scaled, Weighted
from merge_tool.run.work import Copied, Exact, start_work
from merge_tool.verification.bits import Comparison
from merge_tool.verification.checks import Checks
from test_fp8_output import config_of, packed
from test_models import EACH, recipe

THREADS = 8
SHAPE = (1100, 1000)  # nine tiles, the last one cut short
BLOCK = (300, 500)  # whose scales are of elements of several tiles


@pytest.fixture(autouse=True)
def busy_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(tasks: Sequence[Callable[[], None]]) -> None:
    """Do the tasks in a few threads, which all begin at once."""
    barrier, finished = threading.Barrier(THREADS), list[Any]()

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


# What a pair is asked, the models that it is asked of, and the work that comes of it.
PAIRS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "slerp": (Weighted, "float", {"t": (0.3, 0.6)}),
    "in another dtype": (Weighted, "float", {"t": (0.0,), "dtype": "float32"}),
    "not chosen": (Copied, "more", {"exclude": ["m.weight"]}),
    "in 8 bits": (Scaled, "codes", {"t": (0.3, 0.6), "dtype": "base"}),
    "integers": (Exact, "integers", {"on_mismatch": "base"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four models of each kind: of one tensor, of one more, in 8 bits, of integers; and four that are equal."""
    root, found = tmp_path_factory.mktemp("models"), dict[str, list[Path]]()
    for n in range(4):
        weights = {key: array.astype(BF16) for key, array in values(n).items()}
        integers = np.arange(SHAPE[0] * SHAPE[1], dtype=np.int32)
        integers[-1] += n
        found.setdefault("float", []).append(save_model(root / f"f{n}", weights))
        found.setdefault("equal", []).append(shutil.copytree(root / "f0", root / f"e{n}"))
        found.setdefault("more", []).append(save_model(root / f"m{n}", {**weights, "x": np.ones(3) + n}))
        found.setdefault("codes", []).append(
            save_model(root / f"c{n}", packed(values(n), BLOCK), config=config_of(BLOCK))
        )
        found.setdefault("integers", []).append(save_model(root / f"i{n}", {"m.weight": integers}))
    return found


def plan_of(kind: str, models: dict[str, list[Path]], *, equal: bool = False) -> MergePlan:
    out = models["float"][0].parent / "out"
    if kind in PAIRS:
        _, which, options = PAIRS[kind]
        base, ft, *_ = models[which]
        return plan_recipe(pair(base, base if equal else ft, **options), out).plan
    return plan_recipe(read_recipe(recipe(kind, models["equal" if equal else "float"]), METHODS), out).plan


def outcome(plan: MergePlan, job: TensorJob, chance: random.Random | None) -> tuple[Finding, list[bytes]]:
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
        for source, part in zip(job.sources, found, strict=True):
            source.read_into(start, part)
        return found

    chunks = {start: inputs(start) for start in range(0, job.numel, one.tile)}
    while one.needs_chunks:
        adds = [lambda start=k, x=x: one.add(start, x, scratch()) for k, x in chunks.items()]  # type: ignore[misc]
        carry_out(adds, in_order=one.in_order)
        one.settle(lambda: iter(chunks.items()), scratch())
    outputs = []
    for number in range(len(plan.labels)):
        parts: dict[int, bytes] = {}

        def merge(start: int, number: int = number, parts: dict[int, bytes] = parts) -> None:
            out: Array = np.empty(min(one.tile, job.out.numel - start), STORED_DTYPES[job.out.dtype])
            x = [] if job.is_scales else chunks[start]
            parts[start] = bytes(as_bytes(one.merge(number, start, x, out, scratch())))

        carry_out([lambda start=k: merge(start) for k in range(0, job.out.numel, one.tile)])  # type: ignore[misc]
        outputs.append(b"".join(parts[start] for start in sorted(parts)))
    return one.finding, outputs


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", [*PAIRS, *EACH])
def test_chunks_may_come_in_any_order_and_from_many_threads(
    models: dict[str, list[Path]], kind: str, equal: bool
) -> None:
    """The same is found out, and every output has the same bytes."""
    plan = plan_of(kind, models, equal=equal)
    for job in plan.jobs():
        expected = outcome(plan, job, None)
        for seed in range(2):
            assert outcome(plan, job, random.Random(seed)) == expected


# ---------------------------------------------------------------------------------------- turns that are forced


@pytest.mark.parametrize(
    ("kind", "module", "expected"),
    [
        ("integers", work, Exact),
        ("slerp", weighted, Weighted),
        ("in 8 bits", weighted, Scaled),
        ("multislerp", stepped, Stepped),
    ],
)
def test_a_difference_that_one_thread_sees_is_not_lost_by_another(
    models: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch, kind: str, module: ModuleType, expected: type
) -> None:
    """A comparison of equal chunks begins before that of unequal ones, and ends after it."""
    plan = plan_of(kind, models)
    job = next(plan.jobs())
    one, real = start_work(plan, job), module.same_values  # type: ignore[attr-defined]
    assert type(one) is expected
    begun, seen = threading.Event(), threading.Event()

    def slow_if_equal(a: Array, b: Array) -> bool:
        if equal := real(a, b):
            begun.set()
            seen.wait(60)
        return bool(equal)

    monkeypatch.setattr(module, "same_values", slow_if_equal)
    same = [np.zeros(one.tile, STORED_DTYPES[source.info.dtype]) for source in job.sources]
    other = [same[0], *map(np.ones_like, same[1:])]
    scratch = [Scratch(np.zeros(Scratch.NBYTES, np.uint8)) for _ in range(2)]
    first = threading.Thread(target=one.add, args=(0, same, scratch[0]))
    first.start()
    begun.wait(60)
    one.add(one.tile, other, scratch[1])
    seen.set()
    first.join()
    one.settle(lambda: iter([(0, same), (one.tile, other)]), scratch[0])
    assert not one.finding.equal


class SlowLook(dict[int, Array]):
    """A dictionary where who looks first for a key goes on when another has looked too, who then waits for the first;
    each for half a second at most."""

    def __init__(self) -> None:
        super().__init__()
        self.looked, self.done = [threading.Event(), threading.Event()], threading.Event()

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if not self.looked[0].is_set():
            self.looked[0].set()
            self.looked[1].wait(0.5)
        elif not self.looked[1].is_set():
            self.looked[1].set()
            self.done.wait(0.5)
        return found


def test_the_largest_value_that_one_thread_finds_is_not_lost_by_another(models: dict[str, list[Path]]) -> None:
    """Two threads are the first to find a value of a weight that is written in 8 bits."""
    plan = plan_of("in 8 bits", models)
    job = next(plan.jobs())
    one = start_work(plan, job)
    assert isinstance(one, Scaled)
    largest = SlowLook()
    one.largest = largest
    cut = slice(0, 1), slice(0, 1)

    def find(value: float) -> None:
        one._raise(0, [(cut, np.full((1, 1), value))])

    def find_first() -> None:
        find(5.0)
        largest.done.set()

    first = threading.Thread(target=find_first)
    first.start()
    largest.looked[0].wait(60)
    find(3.0)
    first.join()
    assert largest[0][0] == 5.0


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
    plan = plan_recipe(pair(model, model, max_shard_bytes=1), tmp_path / "out").plan
    assert len(plan.shards) == count
    (tmp_path / "stored").write_bytes(bytes(10_000))
    sink = Comparison(Checks(), {shard.number: LocalFile(tmp_path / "stored", "stored") for shard in plan.shards})

    def finish(shard: ShardPlan) -> None:
        (job,) = tuple.__iter__(shard.jobs)
        found = Findings()
        found.add(job.number, Finding(PairSums(job.number, 2.0 * job.number, 3.0)))
        done = ShardDone(shard, ("",), found)
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
