"""What several threads change together loses nothing, whenever the other thread comes in between.

Nothing is left to chance: one thread is stopped at a chosen step, another does the same work until it has finished or
waits at a lock, then the first goes on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from merge_tool.checkpoint import source, writer
from merge_tool.checkpoint.grid import Grid
from merge_tool.methods import passes
from merge_tool.methods.steps import MergeSpec, OrderStatistics, Tile
from merge_tool.output.journal import Journal
from merge_tool.output.work_folder import WorkFolder
from merge_tool.run import weighted
from merge_tool.run.findings import Finding, Findings
from merge_tool.run.run import ShardDone
from merge_tool.verification import bits
from merge_tool.verification.checks import Checks

STUCK = threading.Event()  # the other thread has finished, or waits at a lock


Case = tuple[Callable[[], None], Callable[[], None]]  # some work, and a check of what was made of it twice


class Lock:
    """A lock that says when somebody waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            STUCK.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.fixture(autouse=True)
def _locks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (passes, source, writer, weighted, bits):
        monkeypatch.setattr(module, "threading", SimpleNamespace(Lock=Lock))


def come_between(work: Callable[[], None]) -> threading.Thread:
    """Another thread, which works until it has finished or waits at a lock."""

    def run() -> None:
        try:
            work()
        finally:
            STUCK.set()

    STUCK.clear()
    thread = threading.Thread(target=run)
    thread.start()
    assert STUCK.wait(60)
    return thread


def interrupted(work: Callable[[], None], step: int, module: Any) -> threading.Thread | None:
    """The thread that did the same before this instruction of the module; None if the work has fewer."""
    passed = 0
    other: threading.Thread | None = None

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed, other
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if passed == step:
                other = come_between(work)
            passed += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return other


def at_every_step(case: Callable[[], Case], module: Any) -> None:
    """Each time from the start, the second thread comes before another instruction of the first in that module."""
    for step in range(1000):
        work, check = case()
        other = interrupted(work, step, module)
        if other is None:
            assert step > 10
            return
        other.join(60)
        check()


class Counts:
    """Counts whose addition is slow: the first reads, lets the other thread come, then writes."""

    def __init__(self, values: Any, work: Callable[[], None]) -> None:
        self.values, self.work = values, work
        self.other: threading.Thread | None = None
        self.begun = False

    def __iadd__(self, more: Any) -> Counts:
        read = self.values.copy()
        if not self.begun:
            self.begun = True
            self.other = come_between(self.work)
        self.values = read + more
        return self

    def done(self) -> Any:
        assert self.other is not None
        self.other.join(60)
        return self.values


def test_order_statistics_count_every_value_of_two_threads() -> None:
    """In both passes: over the upper halves of the bits, and over the lower halves."""
    values = 1 + np.arange(5000) * 2.0**-23  # of one upper half
    asked = OrderStatistics(lambda tile: [tile.inputs[0]], [[0, 4999, 5000, 9999]])
    running = passes.start_pass(asked, MergeSpec((10_000,), 1, False), 2)
    assert isinstance(running, passes._RunningOrder)

    def add() -> None:
        running.add(0, Tile(0, None, [values]))

    upper: Any = Counts(running.upper[0], add)
    running.upper = [upper]  # type: ignore[assignment]
    add()
    running.upper = upper.done()[None]
    assert running.settle()
    ((bucket, counts),) = running.lower.items()
    lower: Any = Counts(counts, add)
    running.lower[bucket] = lower
    add()
    running.lower[bucket] = lower.done()
    assert not running.settle()
    assert running.result == [[values[0], values[2499], values[2500], values[4999]]]


class Held:
    """A lock that says whether it is held."""

    is_held = False

    def __enter__(self) -> None:
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.is_held = False


def test_a_few_values_are_counted_under_the_same_lock() -> None:
    values = 1 + np.arange(100) * 2.0**-23
    asked = OrderStatistics(lambda tile: [tile.inputs[0]], [[0]])
    running = passes.start_pass(asked, MergeSpec((200,), 1, False), 2)
    assert isinstance(running, passes._RunningOrder)
    lock, held = Held(), []

    class Watched(dict[Any, Any]):
        def __getitem__(self, key: Any) -> Any:
            held.append(lock.is_held)
            return super().__getitem__(key)

    running.lock = lock  # type: ignore[assignment]
    running.upper = Watched({0: running.upper[0]})  # type: ignore[assignment]
    running.add(0, Tile(0, None, [values]))
    assert held == [True]
    assert running.upper[0].sum() == 100


def test_a_file_is_opened_once_for_all_who_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And closed once, by the last."""
    (tmp_path / "x").write_bytes(bytes(range(8)))
    opened: list[int] = []
    really = os.open

    def counted(*words: Any) -> int:
        opened.append(really(*words))
        return opened[-1]

    monkeypatch.setattr(os, "open", counted)

    def case() -> Case:
        opened.clear()
        file = source.LocalFile(tmp_path / "x", "x")
        found: list[bytes] = []

        def work() -> None:
            buffer = bytearray(8)
            file.read_into(0, memoryview(buffer))
            found.append(bytes(buffer))

        def check() -> None:
            assert found == [bytes(range(8))] * 2
            assert file._users == 0
            for fd in opened:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)

        return work, check

    at_every_step(case, source)


def test_the_largest_magnitude_is_the_largest_of_both_threads() -> None:
    def case() -> Case:
        made = weighted.Scaled.__new__(weighted.Scaled)
        made.lock, made.largest = Lock(), {}  # type: ignore[assignment]
        made.scaling = SimpleNamespace(num_scales=2, like=SimpleNamespace(grid=Grid(2, 4, (1, 4))))  # type: ignore[assignment]
        rows = iter((0, 1))

        def work() -> None:
            row = next(rows)
            made._raise(0, [((slice(row, row + 1), slice(0, 1)), np.array([[3.0 + row]]))])

        return work, lambda: np.testing.assert_array_equal(made.largest[0], [3, 4])

    at_every_step(case, weighted)


def test_the_first_difference_is_the_first_of_both_threads(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(8))

    def case() -> Case:
        comparer = bits._Comparer(source.LocalFile(tmp_path / "x", "x"))
        places = iter((5, 2))

        def work() -> None:
            comparer.write(next(places), memoryview(b"\1"))

        def check() -> None:
            assert comparer.first == 2

        return work, check

    at_every_step(case, bits)


def test_a_comparison_counts_the_shards_of_both_threads() -> None:
    def case() -> Case:
        comparison = bits.Comparison(Checks(), {})
        numbers = iter((0, 1))

        def work() -> None:
            number = next(numbers)
            findings = Findings()
            findings.add(number, Finding(equal=number == 0))
            jobs = [SimpleNamespace(out=SimpleNamespace(numel=5 + number))]
            done: Any = SimpleNamespace(shard=SimpleNamespace(jobs=jobs), findings=findings)
            comparison.finish_shard(done, [SimpleNamespace(first=-1)])  # type: ignore[list-item]

        def check() -> None:
            assert comparison.checks.num_compared == 11
            assert [comparison.findings[number].equal for number in (0, 1)] == [True, False]

        return work, check

    at_every_step(case, bits)


class Interrupted(Findings):
    """Findings of which the last is given when another thread did its work."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self.work = work
        self.other: threading.Thread | None = None

    def __getitem__(self, number: int) -> Finding:
        if self.other is None and number == len(list(self)) - 1:
            self.other = come_between(self.work)
        return super().__getitem__(number)


def test_the_journal_has_each_shard_in_one_piece(tmp_path: Path) -> None:
    """Of more bytes than a file's buffer, so that a line would be torn where the other thread's begin."""
    folder = WorkFolder.__new__(WorkFolder)
    folder.journal, folder._finishing = Journal(tmp_path / "journal.jsonl"), Lock()  # type: ignore[assignment]

    folder._owner = SimpleNamespace(run="", confirm=lambda: None)  # type: ignore[assignment]

    def finish(number: int, findings: Findings) -> None:
        for tensor in range(300):
            findings.add(tensor, Finding(equal=True))
        folder.finish_shard(ShardDone(SimpleNamespace(number=number), ("",), findings), [])  # type: ignore[arg-type]

    first = Interrupted(lambda: finish(1, Findings()))
    finish(0, first)
    assert first.other is not None
    first.other.join(60)
    found = [(record["record"], record["number"]) for record in folder.journal.records()]
    tensors = [("tensor", n) for n in range(300)]
    assert found == [*tensors, ("shard", 0), *tensors, ("shard", 1)]


def test_a_writer_counts_what_two_threads_wrote(tmp_path: Path) -> None:
    """Both writes together are enough to flush, in any order."""

    def case() -> Case:
        made = writer.ShardWriter(tmp_path / "x", b"", flush_bytes=8)
        places = iter((0, 4))

        def work() -> None:
            place = next(places)
            made.write(place, memoryview(b"abcd"))

        def check() -> None:
            assert made._unflushed == 0
            made.abandon()

        return work, check

    at_every_step(case, writer)
