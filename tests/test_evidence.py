"""examples/mini/evidence.py: every arm chooses by one rule, on validation data alone; the tables are of the results."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import evidence
import evidence_arms
import evidence_report
import pytest
import torch
from evidence_arms import ARMS, LEAST_KEPT, MOST_CANDIDATES, choose, gained, value
from make_data import make_tokenizer, unique_problems, write_rows
from transformers import StableLmConfig, StableLmForCausalLM

pytest.importorskip("optuna", reason="needs Optuna: pip install '.[search]'")
ROOT = Path(__file__).parents[1]
MINI = ROOT / "examples/mini"
RESULTS = MINI / "evidence.json"
PARENT, FINETUNE = {"skill": 80.0, "prose_perplexity": 200.0}, {"skill": 20.0, "prose_perplexity": 50.0}


def scores(skill: float, prose: float) -> dict[str, float]:
    return {"skill": skill, "prose_perplexity": prose}


# ------------------------------------------------------------------------------------------- the rule


def test_the_rule_is_the_least_perplexity_of_those_that_keep_enough() -> None:
    """Against the rule in its own words, on 200 sets of candidates."""
    rng = random.Random(0)
    for _ in range(200):
        found = [(str(k), scores(rng.uniform(0, 90), rng.uniform(40, 210))) for k in range(rng.randrange(1, 8))]
        enough = [one for one in found if one[1]["skill"] >= LEAST_KEPT * PARENT["skill"]]
        by_prose = min(enough, key=lambda one: one[1]["prose_perplexity"], default=None)
        expected = by_prose or max(found, key=lambda one: one[1]["skill"])
        assert choose(found, PARENT, FINETUNE) == expected[0]


def test_the_value_of_what_keeps_enough_is_the_gain() -> None:
    assert value(scores(72, 100), PARENT, FINETUNE) == pytest.approx(0.5) == gained(scores(0, 100), PARENT, FINETUNE)
    assert value(FINETUNE, PARENT, FINETUNE) == pytest.approx(0.25 - 0.9 - 1)
    assert value(PARENT, PARENT, FINETUNE) == 0


def test_t_is_tried_in_finer_steps_around_the_best() -> None:
    """0.1 apart, then 0.02, nothing twice, never outside of 0 to 1."""
    first = {one.label: one for one in evidence_arms.along(lambda t: {"t": t})}
    assert [*first] == ["t = 0", *(f"t = 0.{k}" for k in range(1, 10)), "t = 1"]
    labels = {label: [(one.label, one.recipe) for one in one.finer()] for label, one in first.items() if one.finer}
    assert labels["t = 0.4"] == [
        (f"t = {t}", {"t": t}) for t in (0.32, 0.34, 0.36, 0.38, 0.42, 0.44, 0.46, 0.48)
    ]  # fmt: skip
    assert [label for label, _ in labels["t = 1"]] == ["t = 0.92", "t = 0.94", "t = 0.96", "t = 0.98"]
    assert not {label for found in labels.values() for label, _ in found} & {*first}


def test_lines_grow_and_are_tried_around_the_best(tmp_path: Path) -> None:
    """t never falls along the layers; the finer ones are 0.1 away, one t for all layers among them, nothing twice."""
    first = {one.label: one for one in evidence_arms.growing(tmp_path)}
    assert len(first) == 15
    finer = {label: [one.label for one in own.finer()] for label, own in first.items() if own.finer}
    assert len(finer["t = 0.2 to 0.6"]) == 8
    assert "t = 0.3 to 0.3" in finer["t = 0.2 to 0.4"]
    assert finer["t = 0.0 to 1.0"] == ["t = 0.0 to 0.9", "t = 0.1 to 0.9", "t = 0.1 to 1.0"]
    assert not {label for found in finer.values() for label in found} & {*first}


def test_the_label_of_a_search_has_each_group_along_the_layers() -> None:
    values = {"t.attention.1": 0.123, "t.attention.2": 1.0, "t.rest.1": 0.5, "t.rest.2": 0.0}
    assert evidence.in_words(values) == "attention 0.12 1.00; rest 0.50 0.00"


def test_an_arm_has_a_budget(tmp_path: Path) -> None:
    """At most 60 candidates, each with a label of its own."""
    for step in range(8, 80, 8):
        (tmp_path / f"ft/checkpoints/step-{step:08d}").mkdir(parents=True)
    for arm in ARMS:
        found = arm.candidates(tmp_path) if arm.candidates else []
        assert len({one.label for one in found}) == len(found)
        more = [len(one.finer()) for one in found if one.finer]
        assert len(found) + max(more, default=0) <= MOST_CANDIDATES
    labels = [one.label for one in evidence_arms.ARMS[2].candidates(tmp_path)]
    assert labels == [f"step {step}" for step in range(8, 80, 8)] + ["final"]


# ------------------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a seed as it is before the arms: models of random weights, no test data."""
    folder = tmp_path_factory.mktemp("evidence") / "seed-0"
    problems = list(unique_problems(random.Random(0), 2))
    texts = ["A name is bound to an object.", "Names refer to objects, and so on.", "The module has a name."]
    tokenizer = make_tokenizer([*texts, *(" ".join(row.values()) for row in problems), "### User: Rationale Answer"])
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, partial_rotary_factor=1.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = StableLmForCausalLM(config)
    for name in ("cot/final", "ft/final"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    (folder / "evidence").mkdir()
    write_rows(folder / "skill_validation.jsonl", problems)
    write_rows(folder / "prose_validation.jsonl", [{"text": text} for text in texts])
    judge = evidence.make_judge(folder, "validation")
    start = evidence.scores_of(judge(folder / "cot/final"))["prose_perplexity"]
    ends = [scores(0, start), scores(0, start / 2)]  # nothing is solved: what is kept is 0 of 0
    (folder / evidence.ENDS).write_text(json.dumps(ends))
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three values of t, and up to two more; three trials; and everything keeps enough, so prose alone decides."""
    monkeypatch.setattr(evidence_arms, "STEPS", 2)
    monkeypatch.setattr(evidence_arms, "FINER", (-0.1, 0.1))
    monkeypatch.setattr(evidence_arms, "LEAST_KEPT", 0.0)
    monkeypatch.setattr(evidence, "QUICK_TRIALS", 3)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["slerp", "linear", "search"])
def test_arms_choose_without_test_data(name: str, seed: Path) -> None:
    """There are none, and every arm chooses; what it chose is the best of its validation scores."""
    assert not list(seed.rglob("*_test.jsonl"))
    evidence.run_arm(seed, name, quick=True)
    place = seed / "evidence" / name
    chosen = read(place / "chosen.json")
    if name == "search":
        tried = [one["scores"] for one in read(place / "study/search.json")["candidates"]]
    else:
        tried = [json.loads(line)["scores"] for line in (place / "scores.jsonl").read_text().splitlines()]
    assert chosen["candidates"] == len(tried)
    assert len(tried) in ((3,) if name == "search" else (4, 5))
    assert chosen["validation"]["prose_perplexity"] == min(one["prose_perplexity"] for one in tried)
    assert not (place / "test.json").exists()


@pytest.mark.usefixtures("short")
def test_a_stopped_arm_goes_on(seed: Path) -> None:
    """What has been judged is not judged again; half a line does not count; what is chosen stays chosen."""
    place = seed / "evidence/slerp"
    evidence.run_arm(seed, "slerp")
    lines = (place / "scores.jsonl").read_text().splitlines()
    known = {"label": "t = 0.5", "scores": scores(50, 1.5)}
    (place / "scores.jsonl").write_text(json.dumps(known) + "\n" + lines[2][:-9])
    evidence.run_arm(seed, "slerp")
    assert len((place / "scores.jsonl").read_text().splitlines()) == 2
    (place / "chosen.json").unlink()
    evidence.run_arm(seed, "slerp")
    assert read(place / "chosen.json") == {"label": "t = 0.5", "candidates": 5, "validation": scores(50, 1.5)}
    labels = [json.loads(line)["label"] for line in (place / "scores.jsonl").read_text().splitlines()]
    assert labels == ["t = 0.5", "t = 0", "t = 1", "t = 0.4", "t = 0.6"]


@pytest.mark.usefixtures("short")
def test_what_is_tested_is_what_was_chosen(seed: Path) -> None:
    """Merged again, scored on test data, item by item."""
    for split in ("skill", "prose"):
        path = "evidence/skill_test.jsonl" if split == "skill" else "prose_test.jsonl"
        rows = (seed / f"{split}_validation.jsonl").read_text().splitlines(keepends=True)
        (seed / path).write_text("".join(rows if split == "skill" else rows[::2]))  # as many as validation takes
    judge = evidence.make_judge(seed, "test")
    for name in ("linear", "search"):
        evidence.run_arm(seed, name, quick=True)
        arm = next(one for one in ARMS if one.name == name)
        judged = judge(evidence.made(evidence.chosen_candidate(seed, arm), seed / "again"))
        chosen = read(seed / "evidence" / name / "chosen.json")
        assert evidence.scores_of(judged) == pytest.approx(chosen["validation"], rel=1e-6)
        assert len(judged["solved"]) == 2
        assert len(judged["text_losses"]) == 2


# ------------------------------------------------------------------------------------------ the tables


def test_gained_at_is_on_the_lines_between_the_points() -> None:
    curve = [(100.0, 0.0), (100.0, 20.0), (80.0, 50.0), (85.0, 60.0), (20.0, 100.0)]
    assert evidence_report.gained_at(curve, 90) == 35
    assert evidence_report.gained_at(curve, 100) == 20
    assert evidence_report.gained_at(curve, 85) == 60  # the largest of three
    assert evidence_report.gained_at(curve, 20) == 100
    assert evidence_report.gained_at(curve, 101) == 20
    assert evidence_report.gained_at(curve, 5) == 100


def test_the_table_is_of_the_results() -> None:
    """Means, spread, and what is beyond the merge with one t that keeps as much."""
    found = {arm.name: {"label": "", "candidates": 1, "validation": {}, "test": dict(PARENT)} for arm in ARMS}
    found["finetune"] = {**found["finetune"], "test": dict(FINETUNE)}
    found["lines"] = {**found["lines"], "candidates": 55, "test": scores(50, 50)}
    one = {"arms": found, "curve": {"t = 0.5": scores(60, 100)}}
    other = json.loads(json.dumps(one))
    other["arms"]["lines"]["test"] = scores(60, 50)
    rows = evidence_report.table({"seeds": [one]}).splitlines()
    assert "| SLERP, t grows along the layers (LiNeS) | 55 | 62.5 | 50.0 | 100.0 | +37.5 |" in rows
    rows = evidence_report.table({"seeds": [one, other]}).splitlines()
    assert (
        "| SLERP, t grows along the layers (LiNeS) | 55 | 68.8 ± 8.8 | 50.0 ± 0.0 | 100.0 ± 0.0 | +43.8 ± 8.8 |" in rows
    )
    assert "| finetune | 1 | 25.0 ± 0.0 | 50.0 ± 0.0 | 100.0 ± 0.0 |  |" in rows


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured")
def test_the_page_has_the_tables_of_the_stored_results(tmp_path: Path) -> None:
    results = read(RESULTS)
    page = (ROOT / "docs/evidence.md").read_text()
    for part in (evidence_report.table, evidence_report.chosen_table, evidence_report.comparison_table):
        assert part(results) in page
    assert evidence_report.side_by_side(results) in (MINI / "README.md").read_text()
    evidence_report.plot(results, tmp_path / "evidence.svg")
    stored = ROOT / "docs/images/evidence.svg"
    for picture in (tmp_path / "evidence.svg", stored):
        assert all(arm.title in picture.read_text() for arm in ARMS)
    assert stored.stat().st_size < 60_000


@pytest.mark.slow
def test_the_whole_comparison_runs_and_goes_on(tmp_path: Path) -> None:
    """Every arm for real, on trainings of a few steps; the same command then judges nothing again."""
    command = [sys.executable, MINI / "evidence.py", tmp_path, "--quick", "--seeds", "1", "--jobs", "1"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = evidence_report.table(read(tmp_path / "evidence.json"))
    assert table in first
    assert table in again
    assert "==" in first
    assert "==" not in again
