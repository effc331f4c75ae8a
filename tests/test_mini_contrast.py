"""`make demo-contrast` in short: every step runs for real, on a few problems; the table says what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from test_train_docs import load_script
from train.config import build_config

HERE = Path(__file__).parents[1] / "examples" / "mini_contrast"


def test_the_table_is_of_the_results() -> None:
    """Means and spread of each cycle; the base before all; perplexity of the last cycle."""
    demo = load_script(HERE / "run.py")
    score = lambda skill: {"skill": skill, "prose_perplexity": 200 + skill}  # noqa: E731
    test = {"base": [score(80)], "arm": [score(81), score(85)], demo.CONTROL: [score(90), score(95)]}
    assert demo.table([{"test": test}]).splitlines()[2:] == [
        "| base | 80.0 (start) |  | 280.0 |",
        "| arm | 81.0 | 85.0 | 285.0 |",
        f"| {demo.CONTROL} | 90.0 | 95.0 | 295.0 |",
    ]  # fmt: skip
    other = {**test, "arm": [score(83), score(85)]}
    assert "| arm | 82.0 ± 1.4 | 85.0 ± 0.0 | 285.0 ± 0.0 |" in demo.table([{"test": test}, {"test": other}])


def test_the_readme_has_the_table_of_the_stored_results() -> None:
    demo = load_script(HERE / "run.py")
    assert demo.table(json.loads((HERE / "results.json").read_text())) in (HERE / "README.md").read_text()


def test_the_arms_are_configs() -> None:
    demo = load_script(HERE / "run.py")
    stage = yaml.safe_load((HERE / "stage.yaml").read_text())
    for changes in demo.ARMS.values():
        build_config({**stage, "contrast": {**stage["contrast"], **changes}})


@pytest.mark.slow
def test_the_demo_runs_and_reports_its_results(tmp_path: Path) -> None:
    command = [sys.executable, HERE / "run.py", tmp_path, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    demo = load_script(HERE / "run.py")
    assert list(result["test"]) == ["base", *demo.ARMS, demo.CONTROL]
    assert f"| {result['test']['base'][0]['prose_perplexity']:.1f} |" in done.stdout
