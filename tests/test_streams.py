"""Output never decides a merge: closed, full, broken, or of an encoding without our signs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import merge, streams
from merge_tool.apart import ask
from merge_tool.errors import MergeToolError

COMMAND = [sys.executable, "-m", "merge_tool"]
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
CLOSED = ["2>&-", "1>&-", "<&- >&- 2>&-", "0<&- 1>&-"]


def shell(command: list[str], redirection: str, **settings: str) -> subprocess.CompletedProcess[bytes]:
    """A command as a shell starts it, with its streams redirected."""
    words = ["sh", "-c", f'"$@" {redirection}', "sh", *command]
    return subprocess.run(words, capture_output=True, env={**os.environ, **settings})


@posix_only
@pytest.mark.parametrize("redirection", [*CLOSED, ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "2>&1 | true"])
def test_a_merge_whose_output_goes_nowhere_is_made(tmp_path: Path, pair: tuple[Path, Path], redirection: str) -> None:
    """And no file of it takes the number of a closed stream. Warnings are what is printed into it."""
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (pair[0] / "optimizer.pt").write_bytes(b"not copied, which is said")
    merge(*pair, tmp_path / "whole")
    for more in ([], ["--json"], ["--quiet"]):
        out = tmp_path / f"out{more}"
        done = shell([*COMMAND, "merge", *map(str, pair), str(out), *more], redirection)
        assert done.returncode == 0, done
        assert b"Traceback" not in done.stderr
        assert contents(out) == contents(tmp_path / "whole")


@posix_only
@pytest.mark.parametrize("redirection", CLOSED)
def test_an_error_is_an_error_wherever_it_is_printed(tmp_path: Path, redirection: str) -> None:
    assert shell([*COMMAND, "merge", str(tmp_path / "no"), str(tmp_path / "no"), "out"], redirection).returncode == 1
    assert shell([*COMMAND, "merge", "--no-such-option"], redirection).returncode == 2


@posix_only
def test_a_command_that_is_there_to_print_says_when_it_cannot(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A full disk is an error; a reader that has seen enough is none that is printed."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = shell([*COMMAND, "inspect", str(pair[0]), "--json"], ">/dev/full")
    assert full.returncode == 1
    assert full.stderr == b"Error: The output cannot be written (No space left on device). Give it another place.\n"
    assert shell([*COMMAND, "inspect", str(pair[0]), "--json"], "| true").stderr == b""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-16", "ascii:strict"])
def test_a_foreign_encoding_ends_nothing(tmp_path: Path, encoding: str) -> None:
    """Signs that it lacks are escaped; JSON is ASCII."""
    base = save_model(tmp_path / "mod\u00e8le-\u6a21\u578b", language_model(0))
    ft = save_model(tmp_path / "\u03c6-ft", language_model(1))
    out = tmp_path / "\u0440\u0443\u0441"
    settings = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    for words in (["merge", base, ft, out], ["diff", base, ft], ["verify", out], ["inspect", out, "--json"]):
        done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, env=settings)
        assert done.returncode == 0, (words, done)
        assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout.decode("utf-16" if encoding == "utf-16" else "ascii"))


def test_a_program_without_streams_merges(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: Any) -> None:
    """pythonw and some GUIs have None in their place; so it is for the commands and for Python users."""
    from merge_tool.cli import merge_tool

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    merge_tool(["merge", *map(str, pair), str(tmp_path / "out")], standalone_mode=False)
    assert sys.stdout is None
    merge(*pair, tmp_path / "again", on_warning=print)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_our_processes_speak_utf_8_whatever_the_terminal_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And find our modules in folders whose names have the sign that separates search paths."""
    odd = tmp_path / f"a{os.pathsep}b \u00e9" if os.name != "nt" else tmp_path / "a;b"
    odd.mkdir()
    (odd / "echo_module.py").write_text(
        "from merge_tool.apart import answer\n"
        "def main():\n    answer(lambda q: (q + chr(0x6a21), [b'x' + chr(0xe9).encode()]))\n"
    )
    monkeypatch.setattr(sys, "path", [str(odd), *sys.path])
    for encoding in ("ascii", "cp1252", "utf-16"):
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        found = ask("echo_module", "\u00e8\udc80", what="It", error=MergeToolError, hint="")
        assert found == ("\u00e8\udc80\u6a21", b"x\xc3\xa9")


@posix_only
def test_a_dry_run_whose_plan_cannot_be_written_says_so(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Its plan is all that it makes."""
    words = [*COMMAND, "merge", *map(str, pair), str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The output cannot be written")


@posix_only
def test_a_current_folder_that_is_gone_is_an_error_of_one_line(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Full paths need none; others are relative to it."""
    (tmp_path / "gone").mkdir()
    start = 'cd "$1" && rmdir "$1" && shift && "$@"'
    words = ["sh", "-c", start, "sh", str(tmp_path / "gone"), *COMMAND, "merge", "../base", "../ft", "../out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: The current folder is gone. Change to one that exists.\n")
    (tmp_path / "gone").mkdir()
    subprocess.run([*words[:-3], *map(str, pair), str(tmp_path / "out")], check=True, capture_output=True)


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    with streams.forgiving():
        print("text")
    assert mine.getvalue() == "text\n"


def test_the_commands_can_be_run_as_modules() -> None:
    for module in ("merge_tool", "merge_tool.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert done.stdout.startswith("merge-tool, version"), done


@posix_only
@pytest.mark.parametrize("redirection", [*CLOSED, "2>/dev/full", ">/dev/full 2>&1"])
def test_training_is_a_command_like_the_others(tmp_path: Path, redirection: str) -> None:
    """An error of its config ends it, not the terminal; and its help needs none."""
    (tmp_path / "c.yaml").write_text("no_such_key: 1\n")
    assert shell([sys.executable, "-m", "train", str(tmp_path / "c.yaml")], redirection).returncode == 1
    assert shell([sys.executable, "-m", "train", "--help"], redirection).returncode == 0
