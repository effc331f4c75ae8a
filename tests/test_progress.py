"""Progress: a bar on a terminal and in notebooks, else a line every half minute; what an earlier run has finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import merge_tool
from merge_tool import RecipeError
from merge_tool.checkpoint import writer as writer_module
from merge_tool.cli import merge_tool as commands
from merge_tool.progress import KINDS, Progress

SMALL: dict[str, Any] = {"max_shard_bytes": 20_000}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_has_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """With share, speed, time left and the tensor; nothing in between, and nothing for short jobs."""
    clock = Clock()
    with Progress("log", clock=clock) as progress:
        progress.begin("t = 0.3 (2 of 5)")
        progress.start(1_000_000_000)
        for second in range(1, 100):
            clock.now = second
            progress.advance(5_000_000, "model.norm.weight")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"t = 0.3 (2 of 5): {15 * k} % of 1 GB, 5 MB/s, {left} left (model.norm.weight)"
        for k, left in ((1, "3 min"), (2, "2 min"), (3, "2 min"))
    ]


def test_a_part_without_bytes_is_logged_too(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("log", clock=clock)
    progress.begin("t = 0 (1 of 2), scoring")
    clock.now = 29
    progress.beat()
    clock.now = 61
    progress.beat()
    assert capsys.readouterr().err == "t = 0 (1 of 2), scoring: 61 s so far\n"


def test_auto_is_a_bar_only_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))  # imported, no more
    assert Progress("auto").kind == "none"
    assert Progress("auto", otherwise="log").kind == "log"
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))  # a notebook
    assert Progress("auto", otherwise="log").kind == "bar"
    monkeypatch.delitem(sys.modules, "IPython")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert Progress("auto").kind == "bar"
    with pytest.raises(RecipeError, match="progress is 'loud', expected one of: auto, bar, log, none"):
        Progress("loud")


def test_a_notebook_has_its_bar_without_wiring(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """`merge` alone draws it, by tqdm.auto; a caller who draws one keeps it alone."""
    code = """
import sys, types
kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: kernel)
import merge_tool
merge_tool.merge(*sys.argv[1:3], sys.argv[3] + "/a")
assert "tqdm.auto" in sys.modules
merge_tool.merge(*sys.argv[1:3], sys.argv[3] + "/b", progress="none")
print("quiet from here", file=sys.stderr)
merge_tool.merge(*sys.argv[1:3], sys.argv[3] + "/c", on_progress=lambda nbytes, name: None)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, pair), str(tmp_path)], capture_output=True, text=True, check=True
    )
    bar, quiet = done.stderr.split("quiet from here")
    assert "B/s" in bar
    assert quiet.strip() == ""


@pytest.mark.skipif(os.name == "nt", reason="a terminal of POSIX")
@pytest.mark.parametrize(("options", "drawn"), [((), True), (("--progress", "none"), False), (("-q",), False)])
def test_the_command_draws_on_a_terminal(
    pair: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], drawn: bool
) -> None:
    import pty
    import termios

    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    command = [sys.executable, "-m", "merge_tool", "merge", *map(str, pair), str(tmp_path / "out"), *options]
    subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, check=True)
    os.close(follower)
    said = b""
    try:
        while piece := os.read(leader, 65_536):
            said += piece
    except OSError:  # the end of a terminal
        pass
    os.close(leader)
    assert (b"B/s" in said) == drawn


def test_every_kind_is_an_option_of_every_long_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for k, kind in enumerate(KINDS):
        out = tmp_path / f"out{k}"
        for words in (("merge", *pair, out), ("verify", out), ("diff", *pair)):
            done = CliRunner().invoke(commands, [*map(str, words), "--progress", kind])
            assert done.exit_code == 0
            assert ("B/s" in done.stderr) == (kind == "bar"), done.stderr


def test_a_resumed_merge_says_what_was_done(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First on standard error, then in the summary, the JSON and the report."""

    class Stop(Exception):
        pass

    original, left = writer_module.ShardWriter.sync, [2]

    def stopping(self: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.ShardWriter, "sync", stopping)
        with pytest.raises(Stop):
            merge_tool.merge(*pair, tmp_path / "out", jobs=1, **SMALL)
    words = ["merge", *map(str, pair), str(tmp_path / "out"), "--max-shard-size", "20000"]
    done = CliRunner().invoke(commands, [*words, "--json"])
    found = json.loads(done.stdout)
    assert found["num_resumed"] == 2
    assert found["num_shards"] > 2
    assert f"Continuing: an earlier run finished 2 of {found['num_shards']} shards (" in done.stderr
    report = merge_tool.merge(*pair, tmp_path / "new", **SMALL)
    assert (report.num_resumed, report.num_shards) == (0, found["num_shards"])
    assert "earlier run" not in repr(report)
