"""Things that break on purpose: power, disks, system calls, inputs. Nothing is lost, nothing wrong is kept."""

from __future__ import annotations

import _thread
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import CheckpointError, MergeToolError, OutputError, merge
from merge_tool.checkpoint.source import LocalFile
from merge_tool.diff import diff_checkpoints
from merge_tool.errors import WorkerError
from merge_tool.plan.system_memory import resident_bytes
from merge_tool.run.run import _Run
from power import Tree, lay_out, watched

resource = pytest.importorskip("resource", reason="needs POSIX limits")
SMALL = {"max_shard_bytes": 20_000, "jobs": 2}
COMMAND = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def assert_never_half(out: dict[str, bytes], whole: dict[str, bytes], folder: str = "") -> None:
    """Whatever a loader would find first in `folder` (weights by their one name, or an index) is there whole."""
    for first in ("model.safetensors", "model.safetensors.index.json"):
        if f"{folder}{first}" in out:
            for name, content in whole.items():
                assert out.get(f"{folder}{name}") == content, f"{folder}{first} is there, {name} is not as it will be"


# ----------------------------------------------------------------------------------------------- power


def cuts(tmp_path: Path, pair: tuple[Path, Path], before: Any, options: Any, every: int) -> int:
    """Cut the power at every moment of a merge, and after every `every`th continue with what is left."""
    merge(*pair, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    if before is not None:
        merge(*pair, disk / "out", **before)
        for path in [disk, *disk.rglob("*")]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    states: dict[frozenset[tuple[str, bytes]], Tree] = {}
    lock = threading.Lock()

    def keep(early: Tree, late: Tree) -> None:
        with lock:
            for tree in (early, late):
                states.setdefault(frozenset(tree.items()), tree)

    with watched(disk, keep):
        if before is not None:
            for path in [disk, *disk.rglob("*")]:
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            states.clear()
        merge(*pair, disk / "out", overwrite=before is not None, **options)
    assert contents(disk / "out") == whole
    labels = sorted({name.split("/")[0] for name in whole if name.startswith("t-")}) or [""]
    old = {} if before is None else contents(tmp_path / "old") if (tmp_path / "old").exists() else {}
    for number, tree in enumerate(states.values()):
        out = {name.removeprefix("out/"): data for name, data in tree.items() if not name.endswith("/")}
        if not any(out.get(n) == data for n, data in old.items() if n.startswith("model")):
            for label in labels:
                part = {n.removeprefix(f"{label}/"): d for n, d in whole.items() if n.startswith(label)}
                assert_never_half(out, part, f"{label}/" if label else "")
        if number % every == 0:
            again = tmp_path / "again"
            lay_out(tree, again)
            merge(*pair, again / "out", overwrite=before is not None, **options)
            if contents(again / "out") != whole:
                print("LEFT", {n: len(d) for n, d in tree.items()}, "FOUND", sorted(contents(again / "out")))
            assert contents(again / "out") == whole
            assert [p.name for p in again.iterdir()] == ["out"]
            shutil.rmtree(again)
    return len(states)


@linux_only
@pytest.mark.parametrize("options", [SMALL, {"t": [0.3, 0.5], **SMALL}, {"jobs": 1}])
def test_a_power_cut_at_any_moment_loses_nothing(tmp_path: Path, pair: tuple[Path, Path], options: Any) -> None:
    """On a disk that forgets all that was not synced, and on one that keeps only the names of it."""
    assert cuts(tmp_path, pair, None, options, every=7) > 20


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("options", [SMALL, {"t": [0.3, 0.5], **SMALL}, {"jobs": 1}])
def test_every_power_cut_is_continued_from(tmp_path: Path, pair: tuple[Path, Path], options: Any) -> None:
    print("cuts:", cuts(tmp_path, pair, None, options, every=1))


@linux_only
@pytest.mark.parametrize("before", [{"t": 0.9}, {"t": 0.9, "max_shard_bytes": 15_000}])
def test_a_power_cut_while_an_older_model_is_replaced(tmp_path: Path, pair: tuple[Path, Path], before: Any) -> None:
    """The folder holds the older model whole, or the new one whole, or what no loader takes for a model."""
    merge(*pair, tmp_path / "old", **before)
    print("cuts:", cuts(tmp_path, pair, before, {"t": 0.5, **SMALL}, every=9))


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("before", [{"t": 0.9}, {"t": 0.9, "max_shard_bytes": 15_000}])
def test_every_power_cut_of_a_replacement_is_continued_from(
    tmp_path: Path, pair: tuple[Path, Path], before: Any
) -> None:
    merge(*pair, tmp_path / "old", **before)
    print("cuts:", cuts(tmp_path, pair, before, {"t": 0.5, **SMALL}, every=1))


# -------------------------------------------------------------------------------- every call in turn

CALLS = ["open", "preadv", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir", "close"]


@contextmanager
def failing(name: str, turn: int, number: int) -> Iterator[list[int]]:
    """The `turn`th call of os.`name` from now on fails with this errno; the count of calls is yielded."""
    real, count, lock = getattr(os, name), [0], threading.Lock()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with lock:
            count[0] += 1
            mine = count[0] == turn
        if mine:
            if name == "close":
                real(*args, **kwargs)  # as Linux does: the descriptor is gone all the same
            raise OSError(number, os.strerror(number), *(a for a in args[:1] if isinstance(a, (str, os.PathLike))))
        return real(*args, **kwargs)

    setattr(os, name, wrapped)
    try:
        yield count
    finally:
        setattr(os, name, real)


def survive(
    tmp_path: Path, pair: tuple[Path, Path], whole: dict[str, bytes], fault: Callable[[], Any], options: Any
) -> bool:
    """Merge under a fault, then without: an error that says so or success, and the same bytes in the end."""
    out = tmp_path / "out"
    failed = False
    try:
        with fault():
            merge(*pair, out, **options)
    except MergeToolError as e:
        failed = len(str(e)) > 0
    found = contents(out) if out.exists() else {}
    for label in sorted({n.split("/")[0] + "/" for n in whole if n.startswith("t-")}) or [""]:
        assert_never_half(found, {n.removeprefix(label): d for n, d in whole.items() if n.startswith(label)}, label)
    merge(*pair, out, **options)
    assert contents(out) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft", "out", "whole"}
    shutil.rmtree(out)
    return failed


def faults(tmp_path: Path, pair: tuple[Path, Path], name: str, number: int, options: Any, step: int) -> tuple[int, int]:
    """Every `step`th call of os.`name` fails in turn; returns how many did, and how many of them were fatal."""
    merge(*pair, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    with failing(name, 0, number) as count:
        merge(*pair, tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out")
    turns = range(1, count[0] + 1, step)
    fatal = sum(survive(tmp_path, pair, whole, lambda t=turn: failing(name, t, number), options) for turn in turns)
    return len(turns), fatal


@linux_only
@pytest.mark.parametrize("name", CALLS)
def test_a_failing_call_is_an_error_and_the_next_run_continues(
    tmp_path: Path, pair: tuple[Path, Path], name: str
) -> None:
    """EIO at every seventh call, of each kind."""
    tried, _ = faults(tmp_path, pair, name, errno.EIO, {**SMALL, "jobs": 1}, 7)
    assert tried


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("options", [SMALL, {"t": [0.3, 0.5], **SMALL}])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_fails_in_turn(
    tmp_path: Path, pair: tuple[Path, Path], name: str, number: int, options: Any
) -> None:
    tried, fatal = faults(tmp_path, pair, name, number, options, 1)
    print(f"faults: os.{name} {errno.errorcode[number]}: {tried} tried, {fatal} were errors, all survived")


@linux_only
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_and_writes_are_gone_on_with(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """At most so many bytes at every call."""
    merge(*pair, tmp_path / "whole", **SMALL)
    if most == 1:  # every call in turn is short, but not all of them: a byte at a time takes a minute
        chance = random.Random(0)
        limit = lambda: chance.choice([1, 10_000])  # noqa: E731
    else:
        limit = lambda: most  # noqa: E731
    preadv, pwrite = os.preadv, os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][: limit()]], offset))
        patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: limit()], offset))
        merge(*pair, tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------ full disks


@linux_only
def test_a_limit_on_file_size_is_an_error_and_the_next_run_continues(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Asked beforehand (RLIMIT_FSIZE), in a process of its own: no tensor of the model fits."""
    merge(*pair, tmp_path / "whole", **SMALL)
    for most in (0, 1_000, 5_000):
        limit = lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
        command = [*COMMAND, *map(str, pair), str(tmp_path / "out"), "--max-shard-size", "20kB"]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == 1, (most, done.stderr)
        assert "Error: " in done.stderr
        assert f"ulimit -f allows files of at most {most:,} bytes" in done.stderr
        assert not list((tmp_path / "out").glob("model*"))
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB in memory."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@linux_only
def test_a_disk_that_fills_up_is_an_error_and_room_continues(
    tmp_path: Path, pair: tuple[Path, Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check beforehand passed over, as when another program takes the space meanwhile."""
    from merge_tool import api

    monkeypatch.setattr(api, "check_room", lambda *args, **options: None)
    merge(*pair, tmp_path / "whole", **SMALL)
    whole = contents(tmp_path / "whole")
    ballast = small_disk / "ballast"
    told: set[bool] = set()
    for free in range(0, 300_000, 24_000):
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - free)))
        try:
            merge(*pair, small_disk / "out", **SMALL)
        except OutputError as e:
            told.add("No space left on device" in str(e))
        found = contents(small_disk / "out") if (small_disk / "out").exists() else {}
        assert_never_half(found, whole)
        ballast.unlink()
    assert told == {True}
    merge(*pair, small_disk / "out", **SMALL)
    assert contents(small_disk / "out") == whole


# ---------------------------------------------------------------------------------- little memory


# The command, which says on a pipe that all its imports are done: what fails before that fails in the interpreter.
BEGIN = """
import os, sys
import numpy  # its OpenBLAS ends the process by itself where memory is short
from merge_tool.cli import merge_tool, options
options.LEAST_SHARD_BYTES = 1
os.write(int(sys.argv.pop(1)), b"begun")
merge_tool(prog_name="merge-tool")
"""


def limited(tmp_path: Path, pair: tuple[Path, Path], whole: dict[str, bytes], kind: str, megabytes: int) -> bool:
    """Merge under a limit on memory; whether it finished. If not it says so, and OUT is no model and continues.

    Under the smallest limits the interpreter itself fails, in ways of its own, before our code is loaded.
    """
    limit = lambda: resource.setrlimit(getattr(resource, kind), (megabytes * 10**6,) * 2)  # noqa: E731
    words = ["merge", *map(str, pair), str(tmp_path / "out"), "--max-shard-size", "20kB", "--jobs", "4"]
    reading, writing = os.pipe()
    command = [sys.executable, "-c", BEGIN, str(writing), *words]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, pass_fds=[writing])
    os.close(writing)
    has_begun = os.read(reading, 5) == b"begun"
    os.close(reading)
    out = contents(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert_never_half(out, whole)
    if done.returncode == 0:
        assert out == whole
    elif has_begun:
        assert done.returncode == 1, done
        assert done.stderr.startswith("Error: "), done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    else:
        assert out == {}
    subprocess.run([*COMMAND, *words[1:], "--quiet"], check=True)
    assert contents(tmp_path / "out") == whole
    shutil.rmtree(tmp_path / "out")
    return done.returncode == 0


@linux_only
@pytest.mark.parametrize(("kind", "sizes"), [("RLIMIT_AS", [90, 250, 1500]), ("RLIMIT_DATA", [60, 90, 100, 300])])
def test_under_a_limit_on_memory_a_merge_finishes_or_says_so(
    tmp_path: Path, pair: tuple[Path, Path], kind: str, sizes: list[int]
) -> None:
    merge(*pair, tmp_path / "whole", **SMALL)
    finished = [limited(tmp_path, pair, contents(tmp_path / "whole"), kind, size) for size in sizes]
    assert finished[-1]


@pytest.mark.parametrize("which", ["never begins", "ends without a word"])
def test_a_thread_that_the_system_has_no_memory_for_hangs_nothing(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A thread may die before it has said that it runs, or before it can say what is wrong with it."""
    start, count = _thread.start_new_thread, [0]

    def starved(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
        count[0] += 1
        if count[0] != 1:
            return start(function, args)
        return 0 if which == "never begins" else start(function, (lambda: None,))

    with monkeypatch.context() as patch:
        patch.setattr("merge_tool.run.buffers._START_SECONDS", 0.2)
        patch.setattr("merge_tool.run.buffers._thread.start_new_thread", starved)
        said = "did not begin within 0.2 s" if which == "never begins" else r"ended unexpectedly \(it left no message\)"
        with pytest.raises(WorkerError, match=f"A worker thread {said}.* it continues"):
            merge(*pair, tmp_path / "out", jobs=1, memory_bytes=10**9)
    merge(*pair, tmp_path / "out", jobs=1, memory_bytes=10**9)


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError("2 bytes")])
def test_a_thread_that_ends_unexpectedly_names_its_cause(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A fault of ours is not the user's lack of memory; where memory was the cause, that is said."""

    def fail(run: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_work", fail)
        with pytest.raises(MergeToolError) as caught:
            merge(*pair, tmp_path / "out", jobs=2)
    assert caught.value.__cause__ is error
    is_memory = isinstance(error, MemoryError)
    assert ("less memory left than" in str(caught.value)) == is_memory
    assert ("ended unexpectedly (ZeroDivisionError: by zero)" in str(caught.value)) != is_memory
    merge(*pair, tmp_path / "out")


@pytest.mark.parametrize("number", [0, 1])
def test_no_merge_waits_for_a_thread_that_has_ended(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whichever of two it is that takes a task and is never heard of again."""
    real, count, told = _Run._work, iter(range(2)), list[MergeToolError]()

    def lost(run: Any) -> None:
        if next(count) == number:
            run._next_task()
        else:
            real(run)

    def attempt() -> None:
        try:
            merge(*pair, tmp_path / "out", jobs=2)
        except MergeToolError as e:
            told.append(e)

    monkeypatch.setattr(_Run, "_work", lost)
    thread = threading.Thread(target=attempt, daemon=True)  # a merge that does wait must not keep the tests from ending
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(e) for e in told] == [WorkerError]


def test_a_system_that_starts_no_thread_is_not_said_to_lack_memory_alone(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a merge, and for a comparison."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("merge_tool.run.buffers._thread.start_new_thread", refuse)
        patch.setattr(threading.Thread, "start", refuse)
        for work in (lambda: merge(*pair, tmp_path / "out"), lambda: diff_checkpoints(*pair)):
            with pytest.raises(WorkerError, match=r"memory, or the number of threads, is limited\. Give fewer --jobs"):
                work()
    merge(*pair, tmp_path / "out")


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_every_limit_on_memory(tmp_path: Path, pair: tuple[Path, Path], kind: str) -> None:
    merge(*pair, tmp_path / "whole", **SMALL)
    whole = contents(tmp_path / "whole")
    finished = {size: limited(tmp_path, pair, whole, kind, size) for size in range(30, 260, 5)}
    print(kind, finished)


# ------------------------------------------------------------------------------- inputs that change


@contextmanager
def meanwhile(moment: int, change: Callable[[], None]) -> Iterator[Callable[[int], None]]:
    """Do `change` before the `moment`th piece of input is read; pieces are counted once what is yielded was called."""
    real, count, lock, begun = LocalFile._fill, [0], threading.Lock(), threading.Event()

    def wrapped(self: LocalFile, offset: int, buffer: memoryview) -> None:
        with lock:
            count[0] += begun.is_set()
            if count[0] == moment:
                change()
        real(self, offset, buffer)

    LocalFile._fill = wrapped  # type: ignore[method-assign]
    try:
        yield lambda total: begun.set()
    finally:
        LocalFile._fill = real  # type: ignore[method-assign]


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x" * 100)


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": lambda path: os.utime(path, (1, 1)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "written in place": rewritten,
    "grown": lambda path: os.truncate(path, path.stat().st_size + 10),
}


@linux_only
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, pair: tuple[Path, Path], change: str
) -> None:
    """Wherever in the merge: an error, or the bytes of the input as it was planned; never a mixture."""
    merge(*pair, tmp_path / "whole", **SMALL)
    victim = pair[1] / "model-00002-of-00003.safetensors"
    original, status = victim.read_bytes(), victim.stat()
    noticed = 0
    for moment in range(1, 60, 3):
        found = ""
        try:
            with meanwhile(moment, lambda: CHANGES[change](victim)) as begin:
                merge(*pair, tmp_path / "out", overwrite=True, on_start=begin, **SMALL)
        except CheckpointError as e:
            found = str(e)
            noticed += 1
        if found:
            assert "model-00002-of-00003.safetensors: the file changed while it was being merged" in found
        else:
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        victim.write_bytes(original)
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert noticed > 3


@linux_only
def test_an_input_that_is_replaced_between_plan_and_read_is_noticed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = save_model(tmp_path / "other", language_model(5), shards=3)
    victim = "model-00002-of-00003.safetensors"
    (other / victim).replace(other / "new")

    def replace() -> None:
        (other / "new").replace(pair[1] / victim)

    with pytest.raises(CheckpointError, match="changed while it was being merged"):  # noqa: SIM117
        with meanwhile(2, replace) as begin:
            merge(*pair, tmp_path / "out", on_start=begin, **SMALL)


# --------------------------------------------------------------------------------------------- signals

SLOW_DISK = """
import os, sys, time
real = os.fsync
def slow(fd):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
        print("syncing", flush=True)
        time.sleep(60)
    real(fd)
os.fsync = slow
sys.argv[0] = "slerp-merge"
from merge_tool.cli import options, slerp_merge
options.LEAST_SHARD_BYTES = 1
slerp_merge()
"""


@linux_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_does_not_wait_for_a_slow_disk(
    tmp_path: Path, pair: tuple[Path, Path], number: int, code: int
) -> None:
    """A sync that takes a minute; the process is gone long before, and the work continues."""
    words = [*map(str, pair), str(tmp_path / "out"), "--max-shard-size", "20kB"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"syncing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Run the same command to continue." in said
    assert b"Traceback" not in said
    subprocess.run([*COMMAND, *words], check=True, capture_output=True)
    merge(*pair, tmp_path / "whole", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------- resuming


@linux_only
def test_a_resumed_run_reads_no_more_than_the_shards_that_are_left(tmp_path: Path) -> None:
    """After k of n equal shards at most (n - k + 1)/n of the inputs' bytes, as the system counts them."""
    count = 8
    tensors = [
        {f"w{k}": v for k in range(count) for v in [language_model(s + k, vocab=2048)["lm_head.weight"]]}
        for s in (0, 100)
    ]
    base, ft = (save_model(tmp_path / n, t, shards=2) for n, t in zip(("base", "ft"), tensors, strict=True))
    options = {"max_shard_bytes": tensors[0]["w0"].nbytes, "jobs": 1}
    merge(base, ft, tmp_path / "whole", **options)
    size = sum(p.stat().st_size for folder in (base, ft) for p in folder.glob("*.safetensors"))
    for done in (1, 4, 7):
        out = tmp_path / f"out-{done}"
        left = [done]
        real = _Run._finish

        def stop(self: Any, shard: Any, left: list[int] = left, real: Any = real) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OutputError("stopped here")
            real(self, shard)

        _Run._finish = stop  # type: ignore[method-assign]
        try:
            with pytest.raises(OutputError, match="stopped here"):
                merge(base, ft, out, **options)
        finally:
            _Run._finish = real  # type: ignore[method-assign]
        read = [0]
        fill = LocalFile._read_some

        def counted(self: Any, offset: int, buffer: memoryview, read: list[int] = read, fill: Any = fill) -> int:
            nbytes = fill(self, offset, buffer)
            read[0] += nbytes
            return int(nbytes)

        LocalFile._read_some = counted  # type: ignore[method-assign]
        try:
            merge(base, ft, out, **options)
        finally:
            LocalFile._read_some = fill  # type: ignore[method-assign]
        assert contents(out) == contents(tmp_path / "whole")
        assert (count - done) / count * 0.99 < read[0] / size <= (count - done + 1) / count, (done, read[0] / size)


def unfinished(tmp_path: Path, pair: tuple[Path, Path], calls: int = 2) -> Path:
    """Work in which some shards are done."""
    with pytest.raises(MergeToolError), failing("pwrite", calls * 4, errno.EIO):
        merge(*pair, tmp_path / "out", max_shard_bytes=10_000, jobs=1)
    return tmp_path / "out"


@linux_only
def test_a_damaged_finished_shard_is_made_again_where_that_is_checked(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Its size is right, its bytes are not: `check_resumed` hashes it, the usual run trusts the journal."""
    options: dict[str, Any] = {"max_shard_bytes": 10_000, "jobs": 1}
    merge(*pair, tmp_path / "whole", **options)
    for check in (True, False):
        out = unfinished(tmp_path, pair)
        done = sorted((out / ".slerp-merge/files").glob("*.safetensors"))
        assert done
        whole = bytearray(done[0].read_bytes())
        whole[-1] ^= 1
        done[0].write_bytes(whole)
        merge(*pair, out, check_resumed=check, **options)
        assert (contents(out) == contents(tmp_path / "whole")) is check
        shutil.rmtree(out)


@linux_only
def test_resuming_may_change_memory_and_jobs_and_nothing_else(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A changed input is named as well, be it only its time."""
    options: dict[str, Any] = {"max_shard_bytes": 10_000}
    merge(*pair, tmp_path / "whole", **options)
    out = unfinished(tmp_path, pair)
    for other, told in [
        ({"t": 0.7}, "t was"), ({"dtype": "float32"}, "dtype was none, now float32"),
        ({"method": "linear"}, "method was slerp, now linear"), ({"max_shard_bytes": 9_000}, "max_shard_bytes was"),
        ({"files_from": "ft"}, "files_from was base, now ft"), ({"on_mismatch": "base"}, "on_mismatch was"),
    ]:  # fmt: skip
        with pytest.raises(OutputError, match=told):
            merge(*pair, out, **{**options, **other})
    merge(*pair, out, jobs=3, memory_bytes=resident_bytes() + 100_000_000, **options)
    assert contents(out) == contents(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- locks

HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
def refuse(*args):
    raise OSError(errno.ENOLCK, "No locks available")
for name in sys.argv[2:]:
    setattr(fcntl, name, refuse)
from merge_tool.output.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@linux_only
@pytest.mark.parametrize("missing", [["flock"], ["flock", "lockf"]])
def test_file_systems_without_locks_have_one_all_the_same(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    """The second process is refused; when the first is killed its lock is gone."""
    import fcntl

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    work = tmp_path / "out/.slerp-merge"
    work.mkdir(parents=True)
    for name in missing:
        monkeypatch.setattr(fcntl, name, refuse)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(work), *missing], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another merge is writing here"):
            merge(*pair, tmp_path / "out")
        process.kill()
    merge(*pair, tmp_path / "out")


# ------------------------------------------------------------------------------------- a one-file output


@linux_only
@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "unlink", "open"])
def test_a_one_file_output_survives_failing_calls(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    """The file has its name only when it is whole; beside it lies at most its work folder, and in the end nothing."""
    merge(*pair, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    out = tmp_path / "sub/x.safetensors"
    out.parent.mkdir()
    with failing(name, 0, errno.EIO) as count:
        merge(*pair, out)
    out.unlink()
    for turn in range(1, count[0] + 1, 2 if name == "open" else 1):
        try:
            with failing(name, turn, errno.EIO):
                merge(*pair, out)
        except MergeToolError:
            assert not out.exists() or out.read_bytes() == whole
        assert {p.name for p in out.parent.iterdir()} <= {out.name, f"{out.name}.partial"}
        if not out.exists() or out.with_name(f"{out.name}.partial").exists():
            try:
                merge(*pair, out)
            except OutputError as e:  # whole, and stopped while its work folder was removed: see the README's limits
                assert "exists already" in str(e)  # noqa: PT017
        assert out.read_bytes() == whole
        assert [p.name for p in out.parent.iterdir()] == [out.name]
        out.unlink()


# -------------------------------------------------------------------------------- by the system itself


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["write", "pwrite64", "fsync", "rename", "openat", "read", "preadv,preadv2", "unlink"])
def test_every_system_call_fails_in_turn(tmp_path: Path, pair: tuple[Path, Path], call: str, error: str) -> None:
    """Below Python: the kernel's answer to each call on a file of the inputs or of OUT is replaced by strace."""
    merge(*pair, tmp_path / "whole", **SMALL)
    whole = contents(tmp_path / "whole")
    out, work = tmp_path / "out", tmp_path / "out/.slerp-merge"
    paths = [out, work, work / "journal.jsonl", work / "lock", work / "files", *pair]
    for name in whole:
        paths += [out / name, work / "files" / name, work / f"files/{name}.part"]
    paths += [p for folder in pair for p in folder.iterdir() if p.is_file()]
    only = [word for path in paths for word in ("-P", str(path))]
    command = [*COMMAND, *map(str, pair), str(out), "--max-shard-size", "20kB", "--jobs", "1", "--quiet"]
    tried = fatal = 0
    for turn in range(1, 400):
        trace = tmp_path / "trace"
        inject = f"inject={call}:error={error}:when={turn}"
        words = ["strace", "-f", "-qq", "-o", str(trace), *only, "-e", f"trace={call}", "-e", inject]
        done = subprocess.run([*words, *command], capture_output=True, text=True)
        injected = "INJECTED" in trace.read_text()
        trace.unlink()
        assert done.returncode == 0 or done.stderr.startswith("Error: "), (turn, done.stderr)
        found = contents(out) if out.exists() else {}
        assert_never_half(found, whole)
        merge(*pair, out, **SMALL)
        assert contents(out) == whole
        shutil.rmtree(out)
        if not injected:
            break
        tried, fatal = tried + 1, fatal + (done.returncode != 0)
    print(f"faults: {call} {error}: {tried} tried, {fatal} were errors, all survived")
    assert tried
