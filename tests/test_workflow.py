"""The workflow where the project is hosted runs what `make test` runs, on the Pythons that pyproject.toml names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_it_runs_every_python_that_is_named() -> None:
    named = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert WORKFLOW["strategy"]["matrix"]["python"] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == named[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{named[0].replace('.', '')}"


# What the two say in other words.
SAME = {
    r"\$\(PYTHON\)": "python", r"\$\((CORE_)?BIN\)/|\.venv(-core)?/Scripts/": "", r"\$\(VENV\)": ".venv",
    r"\$\(CORE_VENV\)": ".venv-core", "python -m pip": "pip", r"\$\(PIP_FLAGS\)": "--quiet", r"-n \S+": "-n 2",
}  # fmt: skip


def plain(line: str) -> str:
    for pattern, word in SAME.items():
        line = re.sub(pattern, word, line)
    return line.strip().lstrip("@")


def test_where_there_is_no_make_it_runs_the_commands_of_the_makefile() -> None:
    by_hand = [plain(line) for line in WORKFLOW["steps"][-1]["run"].splitlines()]
    lines = [plain(line) for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    assert [line for line in by_hand if line not in lines] == []
    for needed in ("ruff check .", "mypy", "python tests/core_install.py", "python -m pytest -n 2 -m 'not slow'"):
        assert needed in by_hand
