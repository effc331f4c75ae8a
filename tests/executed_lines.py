"""Which test executes which line of merge_tool, its child processes too: each test file is run once under coverage.

That is kept in runs/mutants, and made again for a test file that changed, or for all when merge_tool did. As a plugin
of pytest this file names the test to coverage, and runs chosen tests alone, in the order of the choice.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]  # of a test file: "seconds" {test: seconds}, "lines" {module: {line: [numbers of tests]}}
_OURS = ("executed_lines.py", "mutants.py")


def run_pytest(tree: Path, words: Sequence[str], seconds: float, **environment: str) -> int | None:
    """The exit status of pytest in the copy; None if it took too long."""
    path = os.pathsep.join([str(tree), str(tree / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "executed_lines", "-p", "no:cacheprovider", "-m", "not slow"]
    child = subprocess.Popen(
        [*command, "--basetemp", str(tree.parent / "tmp"), *words], cwd=tree, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def recorded(tree: Path, kept: Path, jobs: int) -> list[Record]:
    """The record of every test file of merge_tool, from the folder `kept` where nothing changed since."""
    kept.mkdir(parents=True, exist_ok=True)
    tests = sorted(p for p in (tree / "tests").glob("test_*.py") if not p.name.startswith("test_train"))
    sources = sorted([*(tree / "merge_tool").rglob("*.py"), *(tree / "tests").glob("*.py")])
    shared = [path for path in sources if not path.name.startswith("test_") and path.name not in _OURS]
    state = b"".join(path.read_bytes() for path in shared)
    records = []
    for test in tests:
        key = hashlib.sha256(state + test.read_bytes()).hexdigest()
        place = kept / f"{test.stem}.json"
        if not place.exists() or json.loads(place.read_text())["key"] != key:
            print(f"recording which lines {test.name} executes", flush=True)
            place.write_text(json.dumps({"key": key, **record(tree, test, jobs)}))
        records.append(json.loads(place.read_text()))
    return records


def record(tree: Path, test: Path, jobs: int) -> Record:
    import coverage

    folder = tree.parent / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = folder / "rc"
    settings.write_text(
        f"[run]\nsource = {tree / 'merge_tool'}\ndata_file = {folder / 'data'}\nparallel = true\n"
        "disable_warnings = no-data-collected, module-not-imported, module-not-measured\n"
        "context = ${PYTEST_CURRENT_TEST-}\n"  # a child's, from its environment
    )
    outcome = folder / "outcome"
    words = [f"tests/{test.name}", *(["-n", str(jobs)] if jobs > 1 else [])]
    run_pytest(tree, words, 3600, COVERAGE_PROCESS_START=str(settings), MUTANTS_OUTCOME=str(outcome))
    seconds = json.loads(outcome.read_text()) if outcome.exists() else {}
    numbers = {name: number for number, name in enumerate(seconds)}
    lines: dict[str, dict[int, list[int]]] = {}
    every = coverage.Coverage(data_file=str(folder / "data"), config_file=str(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process that a test killed leaves half a file
        every.combine()
    for file in every.get_data().measured_files():
        found = lines.setdefault(Path(file).relative_to(tree).as_posix(), {})
        for line, contexts in every.get_data().contexts_by_lineno(file).items():
            which: set[int] = set()
            for context in contexts:
                name, _, phase = context.strip("|").rpartition(" (")
                # What a fixture executes may be shared by all tests of the file.
                if phase == "setup)":
                    which |= {*numbers.values()}
                elif name in numbers:
                    which.add(numbers[name])
            found[line] = sorted(which)
    return {"seconds": seconds, "lines": lines}


def tests_of(module: str, first: int, last: int, records: Sequence[Record]) -> dict[str, float]:
    """The tests that execute any of these lines: fastest first, with their seconds."""
    found: dict[str, float] = {}
    for one in records:
        lines, names = one["lines"].get(module, {}), list(one["seconds"])
        numbers = {number for n in range(first, last + 1) for number in lines.get(str(n), [])}
        found |= {names[number]: one["seconds"][names[number]] for number in numbers}
    return dict(sorted(found.items(), key=lambda item: item[1]))


# ---- as a plugin of pytest


def _trace_all_threads() -> None:
    """Those of merge_tool/run as well, which threading does not know."""
    start = _thread.start_new_thread

    def traced(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
        def run(*args: Any) -> None:
            sys.settrace(threading.gettrace())
            function(*args)

        return start(run, args)

    _thread.start_new_thread = traced


if "COVERAGE_PROCESS_START" in os.environ:
    _trace_all_threads()

_seconds: dict[str, float] = {}
_failed: set[str] = set()


def _context(name: str) -> None:
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        if current := coverage.Coverage.current():
            current.switch_context(name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    _context(f"{item.nodeid} (setup)")
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    _context(f"{item.nodeid} (call)")
    try:
        yield
    finally:
        _context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (place := os.environ.get("MUTANTS_OUTCOME")) and not hasattr(session.config, "workerinput"):
        passed = {name: seconds for name, seconds in _seconds.items() if name not in _failed}
        Path(place).write_text(json.dumps(passed))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if place := os.environ.get("MUTANTS_CHOSEN"):
        rank = {name: number for number, name in enumerate(json.loads(Path(place).read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])
