"""Small boxes: few threads, no clock, interrupted runs. What can be done with less is done with less."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents
from merge_tool import MergeToolError, OutputError, merge
from merge_tool.compare.diff import diff
from merge_tool.run import buffers
from merge_tool.run.run import _Run

SMALL: dict[str, Any] = {"max_shard_bytes": 10_000}
COMMAND = [sys.executable, "-m", "merge_tool"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_merge_takes_the_threads_that_it_gets(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The bytes do not depend on it, and nobody needs to give fewer --jobs. Comparisons do the same."""
    merge(*pair, tmp_path / "whole", **SMALL)
    whole = diff(*pair)
    start, count = buffers._thread.start_new_thread, [0]

    def limited(*words: Any) -> int:
        count[0] += 1
        if count[0] > threads:
            raise RuntimeError("can't start new thread")
        return start(*words)

    with monkeypatch.context() as patch:
        patch.setattr(buffers._thread, "start_new_thread", limited)
        merge(*pair, tmp_path / "out", jobs=4, **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert count[0] == threads + 1
    pools = diff_module_threads(monkeypatch, threads)
    assert diff(*pair, jobs=4) == whole
    assert pools


def diff_module_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Pools of more threads than that fail as the system makes them fail."""
    from concurrent.futures import ThreadPoolExecutor

    made: list[int] = []

    class Limited(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            super().__init__(workers)
            made.append(workers)

        def map(self, *words: Any, **more: Any) -> Iterator[Any]:
            if made[-1] > most:
                raise RuntimeError("can't start new thread")
            return super().map(*words, **more)

    monkeypatch.setattr("merge_tool.compare.diff.ThreadPoolExecutor", Limited)
    return made


@pytest.fixture
def pids_limit() -> Iterator[Callable[[int], Callable[[], None]]]:
    """Puts the process that is started under a limit on its number of threads, as a container has it."""
    root = Path("/sys/fs/cgroup/pids")
    group = (root if root.is_dir() else Path("/sys/fs/cgroup")) / f"slerp-merge-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this user may not make a cgroup")
    if not (group / "pids.max").exists():
        group.rmdir()
        pytest.skip("this cgroup has no limit on threads")

    def limit(most: int) -> Callable[[], None]:
        (group / "pids.max").write_text(str(most))
        return lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None

    yield limit
    group.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="needs cgroups")
@pytest.mark.parametrize("most", [2, 3])
def test_a_limit_of_two_threads_is_enough(
    tmp_path: Path, pair: tuple[Path, Path], pids_limit: Callable[[int], Callable[[], None]], most: int
) -> None:
    """As the system enforces it; numpy's BLAS, which we do not use, starts none of its own."""
    merge(*pair, tmp_path / "whole")
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    for words in (["merge", *pair, tmp_path / "out", "--jobs", "4"], ["diff", *pair, "--jobs", "4"]):
        command = [*COMMAND, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pids_limit(most), env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_sweeps_command_has_the_environment_that_the_user_gave() -> None:
    """What keeps numpy's threads from us is not for the programs that we start."""
    code = "import os, merge_tool.cli; print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    for given, found in ((None, "None"), ("3", "3")):
        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
        environment |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == found


def test_a_clock_that_was_wrong_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Sizes and samples agree, only times do not: an output from a board without a clock, and interrupted work."""
    merge(*pair, tmp_path / "out")
    os.utime(tmp_path / "out/merge_report.json", (1, 1))
    with pytest.raises(OutputError, match=r"changed since, or the clocks differ: sizes and samples are the same"):
        merge(*pair, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_finish", stopping(_Run._finish))
        with pytest.raises(MergeToolError, match="stopped here"):
            merge(*pair, tmp_path / "half", **SMALL)
    os.utime(pair[1] / "model-00002-of-00003.safetensors", (1, 1))
    with pytest.raises(OutputError, match=r"changed since, or the clocks differ\. Finish that merge"):
        merge(*pair, tmp_path / "half", **SMALL)


def stopping(finish: Callable[[Any, Any], None], after: int = 3) -> Callable[[Any, Any], None]:
    """Stop a run after so many shards."""
    left = [after]

    def stop(run: Any, shard: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OutputError("stopped here")
        finish(run, shard)

    return stop


def test_a_resumed_run_counts_what_it_moved(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Its MB/s are not those of shards that an earlier run made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_finish", stopping(_Run._finish))
        with pytest.raises(MergeToolError, match="stopped here"):
            merge(*pair, tmp_path / "out", jobs=1, **SMALL)
    told: list[int] = []
    report = merge(*pair, tmp_path / "out", on_start=told.append, on_progress=lambda n, _: told.append(n), **SMALL)
    assert report.moved_bytes == told[0] == sum(told[1:])
    assert 0 < report.moved_bytes < report.input_bytes
    whole = merge(*pair, tmp_path / "whole", **SMALL)
    assert whole.moved_bytes > report.input_bytes
    from merge_tool.output.merge_report import summary_lines

    rate = re.search(r"([\d,]+) MB/s read and written", "\n".join(summary_lines(whole)))
    assert rate is not None
