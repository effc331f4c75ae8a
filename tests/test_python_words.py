"""What the package's functions say to a Python program: keyword arguments, calls, the logger `merge_tool`."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merge_tool
from checkpoints import language_model, save_model
from merge_tool import MergeToolError, OutputError
from merge_tool.cli import merge_tool as commands
from merge_tool.python_words import in_python

PACKAGE = Path(merge_tool.__file__).parent
OURS = {o for c in commands.commands.values() for p in c.params for o in p.opts if o.startswith("--")}


def messages() -> Iterator[tuple[str, str]]:
    """Every text of the package outside cli that is no docstring, with its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "cli" in path.parts or path.name == "python_words.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value


def test_no_message_keeps_an_option_or_a_command() -> None:
    """An option that is new in a message must be known to the translation."""
    options = commands_named = 0
    for name, text in messages():
        found = {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)} & OURS
        options += len(found)
        commands_named += "same command" in text
        said = in_python(text)
        assert not {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", said)} & OURS, (name, said)
        assert "same command" not in said, (name, said)
        assert not re.search(r"merge-tool \w+ [A-Z]", said), (name, said)
    assert options > 50
    assert commands_named > 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Give --on-mismatch base to keep it.", 'Give on_mismatch="base" to keep it.'),
        ("--files-from ft: no", 'files_from="ft": no'),
        ("Give --exclude PATTERN.", "Give exclude=PATTERN."),
        ("Give a smaller --memory or fewer --jobs.", "Give a smaller memory_bytes or fewer jobs."),
        ("Give --memory 64MB or more.", "Give memory_bytes=64_000_000 or more."),
        ("Give --against FT BASE.", "Give against=(FT, BASE)."),
        ("--id x: no model", 'ids="x": no model'),
        ("--only and --exclude leave nothing", "only and exclude leave nothing"),
        ("hf download x --local-dir FOLDER", "hf download x --local-dir FOLDER"),
        ("merge-tool push OUT hub:ORG/NAME, then", 'merge_tool.push(OUT, "hub:ORG/NAME"), then'),
        ("run merge-tool run RECIPE.yaml OUT", 'run merge_tool.merge_models("RECIPE.yaml", OUT)'),
    ],
)
def test_options_become_keyword_arguments(text: str, said: str) -> None:
    assert in_python(text) == said
    assert in_python(said) == said


def test_errors_speak_python_and_keep_their_type(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_tool.merge(*pair, tmp_path / "out", t=0.3)
    with pytest.raises(OutputError, match=r"t was 0\.3, now 0\.4\. Choose another OUT, or overwrite=True\.$"):
        merge_tool.merge(*pair, tmp_path / "out", t=0.4)
    merge_tool.merge(*pair, tmp_path / "out", t=0.4, overwrite=True)  # what it says can be done
    with pytest.raises(MergeToolError, match=r"Give extrapolate=True if you mean it"):
        merge_tool.merge(*pair, tmp_path / "x", t=2)
    (found,) = merge_tool.verify(tmp_path / "out", (pair[1], pair[0]))
    assert "Give against=(FT, BASE)." in found.problems[0]
    from merge_tool.verification.verify import verify

    (found,) = verify(tmp_path / "out", (pair[1], pair[0]))
    assert "Give --against FT BASE." in found.problems[0]  # the command line's words below the top level


def test_warnings_go_to_the_logger_or_to_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    x, y = ({"a": random.standard_normal(500, dtype=np.float32)} for _ in range(2))
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    with caplog.at_level(logging.WARNING):
        report = merge_tool.merge(base, ft, tmp_path / "out")
    assert [(r.name, r.levelname) for r in caplog.records] == [("merge_tool", "WARNING")] * len(report.warnings)
    assert any("are these related models?" in record.message for record in caplog.records)
    caplog.clear()
    heard: list[str] = []
    merge_tool.merge(base, ft, tmp_path / "out", overwrite=True, on_warning=heard.append)
    assert heard == list(report.warnings)
    assert not caplog.records
    recipe = merge_tool.pair(base, ft)
    merge_tool.merge_recipe(recipe, tmp_path / "out2")
    assert caplog.records


def test_the_functions_stay_functions_whatever_is_imported_first() -> None:
    """`merge_tool.diff` and the others are never a module of that name."""
    code = """
import merge_tool.compare.diff, merge_tool.sweeps.sweep, merge_tool.verification.verify, merge_tool.cli
from merge_tool import answers, diff, inspect, search, sweep, sweep_recipe, verify
import merge_tool
for name in ("answers", "diff", "inspect", "search", "sweep", "sweep_recipe", "verify"):
    assert callable(getattr(merge_tool, name)), name
    assert getattr(merge_tool, name) is globals()[name]
assert "tqdm" not in __import__("sys").modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["report", "summary", "plan", "diff", "inspection", "verification"])
def test_a_result_fits_a_screen(tmp_path: Path, name: str) -> None:
    """However many layers and files there are."""
    x, y = (language_model(k, layers=60) for k in range(2))
    base, ft = save_model(tmp_path / "base", x, shards=90), save_model(tmp_path / "ft", y)
    report = merge_tool.merge(base, ft, tmp_path / "out", [k / 40 for k in range(41)])
    results: dict[str, Any] = {
        "report": lambda: report,
        "summary": lambda: report.summary,
        "plan": lambda: merge_tool.plan_recipe(merge_tool.pair(base, ft), tmp_path / "other"),
        "diff": lambda: merge_tool.diff(base, ft),
        "inspection": lambda: merge_tool.inspect(base),
        "verification": lambda: merge_tool.verify(tmp_path / "out/t-0.5", (ft, base))[0],
    }
    text = repr(results[name]())
    assert len(text.splitlines()) <= 20
    assert len(text) < 2500
