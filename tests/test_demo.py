"""`make demo` in short: every step runs for real, on trainings of a few steps; the report says what the results say."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from demo import STORY
from make_data import SPLITS, rationale, split_prose, unique_problems
from story import choose, parse
from story_report import finding_lines, gain, rows

from test_train_docs import load_script

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, EXAMPLES / "mini/demo.py", folder, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, done.stdout


def test_the_demo_runs_and_reports_its_results(demo: tuple[Path, str]) -> None:
    """All models are judged, and the table shows the results' numbers."""
    folder, printed = demo
    (result,) = json.loads((folder / "results.json").read_text())
    assert len(result["test"]) == 2 + 2 * 9 + 2
    assert len(result["validation"]) == 11
    for name in ("cot/final", "ft/final", "replay/final", "replay-merged"):
        score = result["test"][name]["prose_perplexity"]
        assert f"| {score:.1f} |" in printed
    assert (folder / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert all(row[0] in page for row in rows(STORY, [result]))


def test_held_out_problems_and_topics_are_held_out() -> None:
    """No problem is there twice, not even swapped; no paragraph of prose is in two splits, or twice in one."""
    problems = [re.findall(r"\d+", row["prompt"]) for row in unique_problems(random.Random(0), sum(SPLITS.values()))]
    assert len({frozenset(pair) for pair in problems}) == len(problems)
    assert SPLITS["test"] >= 200
    texts = split_prose(topics).values()
    paragraphs = [p.strip() for split in texts for text in split for p in text.split("\n\n") if p.strip()]
    assert len(set(paragraphs)) == len(paragraphs) > 1500
    assert {p.strip() for text in topics.values() for p in text.split("\n\n") if p.strip()} == set(paragraphs)


def test_rationales_add_up() -> None:
    """Every step of a rationale is right, and its digits are the sum's."""
    for problem in unique_problems(random.Random(3), 200):
        steps = re.findall(r"(\d)\+(\d)\+(\d)=(\d+)", problem["rationale"])
        assert all(int(a) + int(b) + int(c) == int(total) for a, b, c, total in steps)
        digits = [*(total[-1] for *_, total in steps[:-1]), steps[-1][-1][::-1]]
        assert "".join(digits)[::-1] == problem["target"]
    assert rationale(57, 48) == "7+8+0=15, 5+4+1=10"


def test_t_is_the_largest_that_keeps_enough() -> None:
    scores = {t / 10: {"skill": 100.0 - 5 * t} for t in range(11)}
    assert choose(STORY, scores) == 0.2
    assert choose(STORY, {t: {"skill": 100.0 * (t == 0)} for t in scores}) == 0


def test_findings_follow_the_numbers() -> None:
    """Kept and gained shares are of the parents' scores; a difference between the methods is told."""
    cot, ft = {"skill": 80.0, "prose_perplexity": 200.0}, {"skill": 20.0, "prose_perplexity": 50.0}
    middle = {"skill": 60.0, "prose_perplexity": 100.0}
    test = {"cot/final": cot, "ft/final": ft}
    test |= {f"{method}/t-{t / 10}": dict(middle) for method in ("slerp", "linear") for t in range(1, 10)}
    test["linear/t-0.7"]["skill"] = 52.5
    result = {"seed": 0, "chosen_t": 0.3, "test": test, "angles": [4.0, 6.0]}
    assert gain(STORY, test, middle) == pytest.approx(0.5)
    text = " ".join(finding_lines(STORY, [result]))
    assert "keeps 25.0 % of the CoT model's skill" in text
    assert "keeps 75.0 % of it, and has 50.0 %" in text
    assert "differ by at most 7.5 in sums" in text


LARGER = load_script(EXAMPLES / "smollm2/make_data.py")


def test_the_larger_demo_holds_out_problems_and_templates() -> None:
    """Of the trained templates some problems, of others all; no problem is in two splits."""
    found = {(f"x{k}",): [{"question": f"{k}: {n}", "answer": ""} for n in range(40)] for k in range(85)}
    splits = LARGER.divide(found, seed=1)
    templates = {name: {row["question"].split(":")[0] for row in rows} for name, rows in splits.items()}
    every = [row["question"] for rows in splits.values() for row in rows]
    assert len(every) == len({*every}) == 85 * 40
    assert len(templates["skill_train"]) == 65
    assert templates["skill_test"] | templates["skill_validation"] <= templates["skill_train"]
    assert not templates["skill_train"] & (templates["new_skill_test"] | templates["new_skill_validation"])
    assert not templates["new_skill_test"] & templates["new_skill_validation"]
    assert len(splits["skill_test"]) == len(splits["skill_validation"]) == LARGER.COUNTS["test"]
    assert splits != LARGER.divide(found, seed=2)


def test_the_larger_demo_reports_both_measures() -> None:
    """Answers to problems of trained templates choose t; those of new templates have a column of their own."""
    larger = load_script(EXAMPLES / "smollm2/demo.py").STORY
    score = lambda known, new: {"answer_perplexity": known, "prose_perplexity": 40.0, "new_template_perplexity": new}  # noqa: E731
    test = {"cot/final": score(1.25, 5.5), "ft/final": score(1.75, 3.5)}
    test |= {f"{method}/t-{t / 10}": score(1.5, 4.5) for method in ("slerp", "linear") for t in range(1, 10)}
    test["slerp/t-0.4"] = score(1.375, 4.125)
    result = {"seed": 0, "chosen_t": 0.4, "test": test, "angles": [0.5]}
    table = list(rows(larger, [result]))
    assert [*map(len, table)] == [7] * 11
    assert table[4] == ["merge, t = 0.4 ← chosen", "1.375", "4.125", "40.0", "1.500", "4.500", "40.0"]
    text = " ".join(finding_lines(larger, [result]))
    assert "answer perplexity, new templates: the CoT model 5.500, that merge 4.125, the finetune 3.500." in text
    printed = "answer_perplexity 1.5\nprose_perplexity 40\nnew_template_perplexity 4.5\n"
    assert parse(printed * 2, 3) == [score(1.5, 4.5)] * 2


@pytest.mark.slow
def test_the_larger_demo_runs_and_reports(tmp_path: Path) -> None:
    """SmolLM2 out of its package, word problems by template, prose: a few steps of each, every merge judged."""
    pytest.importorskip("reasoning_gym", reason="make test-slow installs it")
    command = [sys.executable, EXAMPLES / "smollm2/demo.py", tmp_path, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert len(result["test"]) == 2 + 2 * 9
    for name in ("answer_perplexity", "new_template_perplexity"):
        assert all(scores[name] > 1 for scores in result["test"].values())
    assert f"| {result['test']['cot/final']['prose_perplexity']:.1f} |" in done.stdout
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "seed-0/slerp").exists()
