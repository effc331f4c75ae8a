"""Small outputs of every kind of merge, and the SHA-256 of their files: what a rebuilding must leave as it is.

`python tests/corpus.py` makes all of them and prints what differs from corpus.json; `--record` writes that anew. Only
what a user has is used: the installed commands, and inputs of corpus_inputs.py. The weights, index, configuration
and tokenizer files count byte by byte; of files that tell of the run (card, report, checksums, recipe) only that
they are there. Digests are of x86-64 Linux: elsewhere the last bits of float64 (sines, sums) may be others.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest.mock import patch

from click.testing import CliRunner

from corpus_cases import CASES, TWINS, Case

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "corpus.json"
TELLING = frozenset({"README.md", "merge_report.json", "report.json", "mergekit_config.yml", "SHA256SUMS"})
Files = Mapping[str, str]  # by path: the first digits of the SHA-256, or "there"


def make(case: Case, folder: Path, *, more: Sequence[str] = (), apart: bool = False) -> Files:
    """The files that a case's command writes into `folder`, where its inputs are. AssertionError where it fails."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        case.make()
        if case.recipe:
            Path("recipe.yaml").write_text(case.recipe, encoding="utf-8")
        inputs = set(Path().rglob("*"))
        name, *words = case.command.split()
        run = _run_apart if apart or case.apart else _run_here
        exit_code, output = run(name, [*words, *more])
        assert exit_code == 0, f"{' '.join([case.command, *more])}: exit code {exit_code}\n{output}"
        written = sorted(path for path in Path().rglob("*") if path not in inputs and path.is_file())
        return {path.as_posix(): _digest(path) for path in written}


def _run_here(name: str, words: Sequence[str]) -> tuple[int, str]:
    with patch("merge_tool.cli.options.LEAST_SHARD_BYTES", 1):
        result = CliRunner().invoke(_entry_point(name).load(), list(words))
    return result.exit_code, f"{result.output}{result.exception or ''}"


def _run_apart(name: str, words: Sequence[str]) -> tuple[int, str]:
    """In a process of its own, as the installed script does."""
    entry = _entry_point(name)
    code = f"import small_shards; from {entry.module} import {entry.attr}; {entry.attr}()"
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    return done.returncode, done.stdout + done.stderr


def _entry_point(name: str) -> EntryPoint:
    """The installed command of this name: pyproject.toml says what it calls."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return EntryPoint(name, scripts[name], "console_scripts")


def _digest(path: Path) -> str:
    return "there" if path.name in TELLING else hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def recorded() -> dict[str, Files]:
    found: dict[str, Files] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def differences(expected: Files, found: Files) -> Iterator[str]:
    """A line for each file that differs."""
    for path in sorted({*expected, *found}):
        if (before := expected.get(path)) != (now := found.get(path)):
            yield f"{path}: was {before or 'not there'}, is {now or 'not there'}"


def twin_differences(record: Mapping[str, Files]) -> Iterator[str]:
    """Which of the merges that can be asked for in two ways have other bytes by the recipe."""
    for name in TWINS:
        both = [record.get(f"{name}-{way}", {}) for way in ("pair", "yaml")]
        sides = [{path: digest for path, digest in files.items() if digest != "there"} for files in both]
        if all(both) and (paths := sorted({path for path, _ in sides[0].items() ^ sides[1].items()})):
            yield f"{name}: {', '.join(paths)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write tests/corpus.json anew")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose names match this glob")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep inputs and outputs here, a folder for each case")
    parser.add_argument("--apart", action="store_true", help="every command in a process of its own")
    parser.add_argument("--memory", metavar="SIZE", help="passed on to every command; the bytes must not depend on it")
    parser.add_argument("--jobs", metavar="N", help="passed on as well")
    parser.add_argument("--times", action="store_true", help="print how long each case took")
    asked = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if fnmatch.fnmatch(name, asked.only)}
    if not chosen:
        parser.error(f"--only {asked.only}: no case has such a name.")
    if asked.keep and asked.keep.exists() and any(asked.keep.iterdir()):
        parser.error(f"--keep {asked.keep}: is not empty. Choose another folder.")
    before = recorded()
    with tempfile.TemporaryDirectory() as place:
        found, failed = _make_all(chosen, (asked.keep or Path(place)).resolve(), {} if asked.record else before, asked)
    lost = sorted(before.keys() - CASES.keys())
    if asked.record:
        kept = {name: files for name, files in {**before, **found}.items() if name in CASES}
        RECORD.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    elif lost:
        print(f"{RECORD.name} has cases that are no more: {', '.join(lost)}")
    for line in twin_differences(found):
        print(f"two ways of asking, two results: {line}")
    print(f"{len(chosen)} cases, {sum(map(len, found.values()))} files; {failed} cases differ or failed")
    sys.exit(1 if failed or (lost and not asked.record) else 0)


def _make_all(
    chosen: Mapping[str, Case], place: Path, before: Mapping[str, Files], asked: argparse.Namespace
) -> tuple[dict[str, Files], int]:
    """The files of every case, and how many cases failed or differ from those `before`; which, is printed."""
    machine = {"--memory": asked.memory, "--jobs": asked.jobs}
    more = [word for option, value in machine.items() if value for word in (option, value)]
    found, failed = {}, 0
    for name, case in chosen.items():
        begun, lines = time.perf_counter(), []
        try:
            found[name] = make(case, place / name, more=more, apart=asked.apart)
            lines = [] if asked.record else list(differences(before.get(name, {}), found[name]))
        except Exception as e:  # noqa: BLE001 - one case that fails must not hide the others
            lines = [f"failed: {e}"]
        failed += bool(lines)
        took = f"  {time.perf_counter() - begun:.2f} s" if asked.times else ""
        if lines or took:
            print("\n  ".join([f"{name}{took}", *lines]), flush=True)
    return found, failed


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this checkout's merge_tool, whatever is installed
    main()
