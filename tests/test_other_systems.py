"""Windows and macOS by injected systems: what those systems answer is played here, so that these run anywhere."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoints import contents
from merge_tool import OutputError, files, merge
from merge_tool.output.marks import check_names
from merge_tool.plan import disk, system_memory
from merge_tool.plan.limits import LEAST_BYTES
from merge_tool.plan.memory import default_budget

ROOT = Path(__file__).parents[1]


# -------------------------------------------------------------------------------------------- memory


class Kernel32:
    """The calls of Windows about memory; they fail if `fails`."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.GetCurrentProcess = lambda: 2**64 - 1

    def K32GetProcessMemoryInfo(self, process: Any, found: Any, size: int) -> int:  # noqa: N802
        assert process.value == 2**64 - 1
        assert size == found._obj.cb == 72
        found._obj.WorkingSetSize, found._obj.PeakWorkingSetSize = 40_000_000, 5_000_000_000
        return not self.fails

    def GlobalMemoryStatusEx(self, found: Any) -> int:  # noqa: N802
        assert found._obj.dwLength == 64
        found._obj.ullAvailPhys = 6_000_000_000
        return not self.fails


class Libc:
    """The calls of macOS about memory."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def mach_task_self(self) -> int:
        return 7

    def mach_host_self(self) -> int:
        return 8

    def getpagesize(self) -> int:
        return 16_384

    def task_info(self, task: int, flavor: int, found: Any, count: Any) -> int:
        assert (task, flavor, count._obj.value) == (7, 20, 12)
        found._obj.resident_size = 41_000_000
        return 4 if self.fails else 0

    def host_statistics64(self, host: int, flavor: int, found: Any, count: Any) -> int:
        assert (host, flavor) == (8, 4)
        found._obj.free_count, found._obj.inactive_count = 10_000, 20_000
        return 4 if self.fails else 0


def test_resident_and_free_memory_are_known_on_windows_and_macos() -> None:
    """Else --memory could not be kept there, and the default would be the same on every machine."""
    assert system_memory.windows_process(Kernel32()) == (40_000_000, 5_000_000_000)
    assert system_memory.windows_process(Kernel32(fails=True)) == (0, 0)
    assert system_memory.windows_available(Kernel32()) == 6_000_000_000
    assert system_memory.windows_available(Kernel32(fails=True)) is None
    assert system_memory.mac_resident(Libc()) == 41_000_000
    assert system_memory.mac_resident(Libc(fails=True)) == 0
    assert system_memory.mac_available(Libc()) == 30_000 * 16_384
    assert system_memory.mac_available(Libc(fails=True)) is None


@pytest.mark.parametrize("name", ["win32", "darwin"])
def test_the_default_budget_follows_what_those_systems_have_left(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(system_memory, "_status_field", lambda field: 0)
    monkeypatch.setattr(system_memory, "_kernel32", Kernel32)
    monkeypatch.setattr(system_memory.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(system_memory.sys, "platform", name)
    assert system_memory.resident_bytes() == (40_000_000 if name == "win32" else 41_000_000)
    if name == "win32":
        assert system_memory.peak_bytes() == 5_000_000_000
    assert default_budget(0) == (256_000_000 if name == "win32" else 122_880_000)
    monkeypatch.setattr(Libc, "getpagesize", lambda self: 1024)
    monkeypatch.setattr(system_memory, "windows_available", lambda kernel32: 1)
    assert default_budget(0) == LEAST_BYTES


# -------------------------------------------------------------------------------------- files and paths


@pytest.mark.parametrize("call", ["replace", "unlink", "rmdir"])
def test_a_scanner_that_holds_a_file_for_a_moment_stops_no_merge(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Windows refuses to rename or remove a file that another program has open. Each such call fails twice."""
    merge(*pair, tmp_path / "whole")
    merge(*pair, tmp_path / "out", 0.7)
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0, 0.0))
    real, refused = getattr(Path, call), dict[str, int]()

    def held(path: Path, *words: Any, **more: Any) -> Any:
        if (
            "out" in path.parts
            and not path.name.startswith(".slerp-merge-mark")
            and path.name != "owner"
            and path.exists()
        ):
            refused[str(path)] = refused.get(str(path), 0) + 1
            if refused[str(path)] <= 2 and (call != "unlink" or "journal" not in path.name):
                raise PermissionError(errno.EACCES, "The process cannot access the file")
        return real(path, *words, **more)

    monkeypatch.setattr(Path, call, held)
    merge(*pair, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert max(refused.values()) > 2


def test_a_file_that_stays_held_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0))
    calls: list[bool] = []

    def refused() -> None:
        calls.append(True)
        raise PermissionError(errno.EACCES, "Access is denied")

    with pytest.raises(PermissionError):
        files.patiently(refused)
    assert len(calls) == 3


def test_paths_that_are_too_long_are_found_before_the_work(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows says of a path of 260 characters that it does not exist. The longest is that of an unfinished shard."""
    real = Path.open
    out = tmp_path / ("x" * 200) / "out"
    longest = len(str(out / ".slerp-merge/files/model.safetensors.0123456789abcdef.part"))

    def windows(path: Path, *words: Any, **more: Any) -> Any:
        if len(str(path)) >= longest:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return real(path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", windows)
        with pytest.raises(OutputError, match=rf"Its path has {longest} characters: a shorter OUT may help"):
            merge(*pair, out)
        assert not out.exists()
        merge(*pair, tmp_path / ("x" * 199) / "out")
    with pytest.raises(OutputError, match="this is the name of another file"):
        check_names(tmp_path / "names", [""], ["a", "a"])


def test_no_file_of_ours_gets_the_line_ends_of_windows() -> None:
    """Files are written as bytes, or with newline given: reports and digests are the same on every system."""
    for path in (ROOT / "merge_tool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            given = {word.arg for word in node.keywords}
            assert name != "write_text" or "newline" in given, f"{path}:{node.lineno}"
            modes = [set(word) for word in words if set(word) <= set("rwxabt+")]
            if name in ("open", "fdopen") and any(mode & set("wxa") for mode in modes):
                assert any("b" in mode for mode in modes) or "newline" in given, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("kind", "largest"), [("vfat", 2**32 - 1), ("FAT32", 2**32 - 1), ("NTFS", None), ("exfat", None), ("", None)]
)
def test_the_largest_file_of_a_disk_is_known_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, largest: int | None
) -> None:
    """On Linux and Windows by the file system's name, on macOS by pathconf."""
    monkeypatch.setattr(disk, "_linux_kind", lambda folder: kind)
    monkeypatch.setattr(disk, "_windows_kind", lambda folder: kind)
    for system in ("linux", "win32"):
        monkeypatch.setattr(disk.sys, "platform", system)
        assert disk.largest_file(tmp_path) == largest
    monkeypatch.setattr(disk.sys, "platform", "darwin")
    bits = 33 if largest else 64
    monkeypatch.setattr(os, "pathconf", lambda folder, name: bits, raising=False)
    assert disk.largest_file(tmp_path) == largest
    monkeypatch.setattr(os, "pathconf", lambda folder, name: (_ for _ in ()).throw(OSError(errno.EINVAL, "")))
    assert disk.largest_file(tmp_path) is None


def test_the_workflow_tests_windows_and_macos() -> None:
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    systems = yaml.safe_load(text)["jobs"]["tests"]["strategy"]["matrix"]["system"]
    assert systems == ["ubuntu-latest", "macos-latest", "windows-latest"]
