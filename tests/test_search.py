"""`merge-tool search`: what is tried, in which order, whatever stops it; the recipes of the front make it again."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from checkpoints import language_model, load_folder, save_model
from merge_tool import EvaluationError, OutputError, RecipeError, merge_models, search, sweep
from merge_tool.checkpoint.source import LocalFile
from merge_tool.cli import merge_tool
from merge_tool.sweeps.search_results import SearchReport

pytest.importorskip("optuna", reason="needs Optuna: pip install '.[search]'")

# Scores by the t of each tensor, which the model's report has: attention is best at 0.9, all others at 0.2. Without
# numpy, so that it starts at once. Every call leaves a line in calls.txt.
JUDGE = """
import hashlib, json, sys
from pathlib import Path
here, model = Path(__file__).parent, Path(sys.argv[1])
if (here / "broken").exists():
    sys.exit("the harness fell over")
tensors = json.loads((model / "merge_report.json").read_text())["tensors"]
ts = [(one["settings"]["t"], 0.9 if "attn" in one["name"] else 0.2) for one in tensors]
with (here / "calls.txt").open("a") as calls:
    digest = hashlib.sha256((model / "SHA256SUMS").read_bytes()).hexdigest()
    calls.write(json.dumps([digest, len(list(model.parent.iterdir()))]) + "\\n")
gaps = [-(t - best) ** 2 for t, best in ts]
if (here / "nan").exists():
    gaps[0] = float("nan")
print("skill", sum(gaps) / len(gaps))
print("ppl", sum(t for t, _ in ts) / len(ts))
print("items skill", *gaps)
"""
SPACE = {"parameters": {"t": {"attn": {"filter": "self_attn", "low": 0, "high": 1}, "rest": {"low": 0, "high": 1}}}}
Pair = tuple[Path, Path]


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    return tmp_path / "judge.py"


def words_of(pair: Pair, out: Path, judge: Path, *words: Any) -> list[str]:
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(judge))} {{out}}"
    options = ["--eval", command, "--maximize", "skill", "--space", judge.with_name("space.json"), *words]
    return ["search", *map(str, [*pair, out, *options])]


def run(pair: Pair, out: Path, judge: Path, *words: Any) -> Result:
    return CliRunner().invoke(merge_tool, words_of(pair, out, judge, *words))


def calls(judge: Path) -> list[tuple[str, int]]:
    path = judge.with_name("calls.txt")
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "search.csv").open() as file:
        return list(csv.DictReader(file))


def mean(tensors: Mapping[str, Any]) -> dict[str, float]:
    """A judge in this process: how far the first weights are from those at t = 0.6, roughly."""
    return {"loss": float(np.square(tensors["lm_head.weight"].astype(np.float64)).sum())}


# ---------------------------------------------------------------------------------- what comes out


def test_one_value_comes_first_and_the_front_can_be_made_again(pair: Pair, tmp_path: Path, judge: Path) -> None:
    """One model is on disk at a time; each recipe of the front makes byte for byte what the judge saw."""
    out = tmp_path / "out"
    done = run(pair, out, judge, "--minimize", "ppl", "--trials", "7", "--uniform", "0:1:0.25")
    assert done.exit_code == 0, done.output
    found = rows(out)
    assert [row["kind"] for row in found] == ["uniform"] * 5 + ["sampled"] * 2
    assert [row["t.attn"] for row in found[:5]] == ["0", "0.25", "0.5", "0.75", "1"]
    assert all(row["t.attn"] == row["t.rest"] for row in found[:5])
    assert [number for _, number in calls(judge)] == [1] * 7
    front = [int(row["number"]) for row in found if row["front"] == "1"]
    assert {path.name for path in (out / "front").iterdir()} == {f"candidate-{k}.yaml" for k in front}
    for number in front:
        merge_models(out / f"front/candidate-{number}.yaml", tmp_path / f"m{number}")
        digest = hashlib.sha256((tmp_path / f"m{number}/SHA256SUMS").read_bytes()).hexdigest()
        assert digest == calls(judge)[number][0]
    chosen = json.loads((out / "search.json").read_text())["chosen"]
    assert (out / "chosen.yaml").read_text() == (out / f"front/candidate-{chosen}.yaml").read_text()
    left = {path.name for path in out.iterdir() if not path.name.startswith("sums-")}
    assert left == {"chosen.yaml", "evaluation.log", "front", "owner.txt", "search.csv", "search.json", "study.db"}
    assert "differ in some score (paired permutation test, Holm, p < 0.05)" in done.stdout
    assert "candidate 1 (t = 0.25): skill" in done.stderr


@pytest.mark.slow
def test_tpe_finds_what_no_single_value_reaches(pair: Pair, tmp_path: Path) -> None:
    """On a score whose best point is known; in this process, where no model is on the disk."""
    base, ft = (load_folder(path) for path in pair)
    names = [f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj")]
    d = [(ft[name].astype(float) - base[name].astype(float)).ravel() for name in names]

    def closeness(tensors: Mapping[str, Any]) -> dict[str, Any]:
        assert not (tmp_path / "out/models").exists()
        gaps = [(tensors[name].astype(float) - base[name].astype(float)).ravel() for name in names]
        ts = [float(gap @ own / (own @ own)) for gap, own in zip(gaps, d, strict=True)]
        return {"skill": -((ts[0] - 0.9) ** 2) - (ts[1] - 0.2) ** 2}

    thirds = [0, 0.25, 0.5, 0.75, 1]
    report = search(pair, tmp_path / "out", judge=closeness, maximize=["skill"], trials=24, uniform=thirds, space=SPACE)
    assert report.chosen is not None
    assert report.uniform is not None
    best, uniform = report.point(report.chosen), report.point(report.uniform)
    assert best.scores is not None
    assert uniform.scores is not None
    assert uniform.t == 0.5
    assert best.scores["skill"] > 0.6 * uniform.scores["skill"]  # both are below 0
    assert best.kind == "sampled"
    assert len(repr(report).splitlines()) <= 20


def test_further_candidates_read_the_inputs_once(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in bytes, with models that do not fit the memory: two reads for the first candidate, then one each."""
    models = [save_model(tmp_path / f"m{k}", language_model(k, hidden=128)) for k in range(2)]
    size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    counted, read_into = [0], LocalFile.read_into

    def counting(self: LocalFile, offset: int, buffer: memoryview) -> None:
        counted[0] += buffer.nbytes
        read_into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counting)
    monkeypatch.setattr("merge_tool.plan.memory._arena_bytes", lambda plan, room: 0)
    seen = []

    def noting(tensors: Mapping[str, Any]) -> dict[str, float]:
        seen.append(counted[0] / size)
        counted[0] = 0
        return mean(tensors)

    words: dict[str, Any] = {"judge": noting, "minimize": ["loss"], "uniform": [0, 0.5]}
    search(models, tmp_path / "out", trials=4, **words)
    assert 2 < seen[0] < 2.2  # and a few bytes that identify the models
    assert all(1 <= one < 1.05 for one in seen[1:])
    (sums,) = (tmp_path / "out").glob("sums-*.json")
    sums.write_text(sums.read_text().replace('"xx": "0x1.', '"xx": "0x1.1'))  # damaged: made again, not believed
    search(models, tmp_path / "out", trials=6, **words)
    assert 2 < seen[4] < 2.2
    assert 1 <= seen[5] < 1.05


# ------------------------------------------------------------------------------------ what stops it


def test_what_was_interrupted_is_tried_again_and_nothing_else_changes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within one candidate after another, a search ends with the candidates of an undisturbed one; scores that
    were there, but not yet in the study, are not made again."""

    class Stopped(BaseException):
        pass

    begun: list[int] = []

    def stopping(tensors: Mapping[str, Any]) -> dict[str, float]:
        begun.append(len(begun))
        if begun[-1] in (1, 4, 6):
            raise Stopped
        return mean(tensors)

    words: dict[str, Any] = {"minimize": ["loss"], "trials": 6, "space": SPACE, "uniform": [0, 0.5, 1]}

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("optuna.study.Study.tell", stop)
        with pytest.raises(Stopped):
            search(pair, tmp_path / "out", judge=stopping, **words)
    for _ in range(3):
        with pytest.raises(Stopped):
            search(pair, tmp_path / "out", judge=stopping, **words)
    report = search(pair, tmp_path / "out", judge=stopping, **words)
    clean = search(pair, tmp_path / "clean", judge=mean, **words)
    assert len(begun) == 6 + 3

    def key(one: SearchReport) -> list[Any]:
        return sorted((tuple(p.values.values()), p.kind, dict(p.scores or {})["loss"]) for p in one.tried)

    assert key(report) == key(clean)
    assert (tmp_path / "out/chosen.yaml").read_text() == (tmp_path / "clean/chosen.yaml").read_text()
    assert search(pair, tmp_path / "out", judge=stopping, **words).as_json() == report.as_json()
    assert len(begun) == 6 + 3
    more = search(pair, tmp_path / "out", judge=stopping, **{**words, "trials": 7})
    assert len(more.tried) == 7


@pytest.mark.slow
def test_a_kill_at_any_point_costs_no_score(pair: Pair, tmp_path: Path, judge: Path) -> None:
    """Killed again and again while it merges, judges and writes: the front of an undisturbed search."""
    more = ["--minimize", "ppl", "--sampler", "tpe", "--trials", "8", "--uniform", "0:1:0.25"]
    words = [sys.executable, "-m", "merge_tool", *words_of(pair, tmp_path / "out", judge, *more)]
    for delay in itertools.chain((2.0, 2.3, 2.6, 2.9, 3.2, 3.5), itertools.repeat(600)):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert run(pair, tmp_path / "clean", judge, *more).exit_code == 0
    made, clean = (sorted(tuple(row.values())[1:] for row in rows(tmp_path / name)) for name in ("out", "clean"))
    assert made == clean
    assert (tmp_path / "out/chosen.yaml").read_text() == (tmp_path / "clean/chosen.yaml").read_text()


def test_the_judge_is_wrong_if_it_fails_at_once_and_the_candidate_if_later(
    pair: Pair, tmp_path: Path, judge: Path
) -> None:
    """The first failure stops the search with the judge's words; later ones are recorded, but not many in a row."""
    out, words = tmp_path / "out", ("--trials", "9", "--uniform", "0:1:0.5", "--sampler", "random")
    judge.with_name("broken").touch()
    done = run(pair, out, judge, *words)
    assert done.exit_code == 1
    assert "Error: The judge ended with exit code 1. Its last lines:" in done.stderr
    assert "the harness fell over" in done.stderr
    assert "Correct it, then run the same command: it continues." in done.stderr
    judge.with_name("broken").unlink()
    assert run(pair, out, judge, *words[2:], "--trials", "2").exit_code == 0
    judge.with_name("nan").touch()
    done = run(pair, out, judge, *words)
    assert done.exit_code == 1
    assert "Error: The judge failed for 5 candidates in a row. The last one:" in done.stderr
    assert "skill is nan" in done.stderr
    assert "Warning: Candidate 3 has no scores: The judge's output cannot be read: skill is nan." in done.stderr
    judge.with_name("nan").unlink()
    done = run(pair, out, judge, *words)
    assert done.exit_code == 0, done.output
    states = [row["state"] for row in rows(out)]
    assert states == ["scored"] * 2 + ["failed"] * 5 + ["scored"] * 2
    assert "9 candidates (5 failed)" in done.stdout
    assert [rows(out)[k]["t.attn"] for k in (2, 7)] == ["0", "0"]  # a first point that has failed is tried again


def test_scores_of_other_names_are_said(pair: Pair, tmp_path: Path) -> None:
    answers = iter([{"loss": 1.0}, {"los": 1.0}, {"loss": 2.0}])
    words: dict[str, Any] = {"minimize": ["loss"], "trials": 3, "uniform": [0, 1], "space": SPACE}
    with pytest.raises(EvaluationError, match="there is no score loss; found: ppl"):
        search(pair, tmp_path / "out", judge=lambda tensors: {"ppl": 1}, **words)
    heard: list[str] = []
    report = search(pair, tmp_path / "out", judge=lambda x: next(answers), on_warning=heard.append, **words)
    assert ["the scores are los, expected loss" in one for one in heard] == [True]
    assert [one.error == "" for one in report.tried] == [True, False, True]


def test_a_locked_storage_is_one_message_and_the_study_goes_on(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"judge": mean, "minimize": ["loss"], "uniform": [0, 1], "space": SPACE}
    monkeypatch.setattr("merge_tool.sweeps.study._LOCK_SECONDS", 0.2)
    search(pair, tmp_path / "out", trials=2, **words)
    with sqlite3.connect(tmp_path / "out/study.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OutputError, match=r"out/study\.db: the storage is locked by another program"):
            search(pair, tmp_path / "out", trials=3, **words)
        other.execute("ROLLBACK")
    other.close()
    assert len(search(pair, tmp_path / "out", trials=3, **words).tried) == 3
    (tmp_path / "out/study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(OutputError, match="the storage cannot be used"):
        search(pair, tmp_path / "out", trials=3, **words)


def test_another_search_in_the_folder_is_refused(pair: Pair, tmp_path: Path) -> None:
    words: dict[str, Any] = {"judge": mean, "trials": 1, "uniform": [0], "space": SPACE}
    search(pair, tmp_path / "out", minimize=["loss"], **words)
    with pytest.raises(OutputError, match="holds another search: objectives differ"):
        search(pair, tmp_path / "out", maximize=["loss"], **words)
    with pytest.raises(OutputError, match="holds another search: dtype differ"):
        search(pair, tmp_path / "out", minimize=["loss"], dtype="float32", **words)
    search(pair, tmp_path / "out", maximize=["loss"], overwrite=True, **words)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(OutputError, match=r"is not empty \(thesis.txt\) and holds no search"):
        search(pair, tmp_path / "mine", minimize=["loss"], **words)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------- where it begins


def test_a_sweep_in_the_folder_gives_its_scores(pair: Pair, tmp_path: Path, judge: Path) -> None:
    """Nothing is merged for them; a sweep of something else is said and not used."""
    command = [sys.executable, str(judge)]
    sweep(*pair, tmp_path / "out", [0, 0.3, 1], command)
    before = calls(judge)
    words = ("--trials", "5", "--uniform", "0,0.5,1", "--minimize", "ppl")
    done = run(pair, tmp_path / "out", judge, *words)
    assert done.exit_code == 0, done.output
    assert [(row["kind"], row["t.attn"]) for row in rows(tmp_path / "out")[:4]] == [
        ("sweep", "0"), ("sweep", "0.3"), ("sweep", "1"), ("uniform", "0.5"),
    ]  # fmt: skip
    assert len(calls(judge)) == len(before) + 2
    assert {row["state"] for row in rows(tmp_path / "out")} == {"scored"}
    sweep(*pair, tmp_path / "other", [0], command, dtype="float32")
    done = run(pair, tmp_path / "other", judge, "--trials", "1", *words[2:])
    assert "sweep.jsonl: is of another sweep (dtype differ); its scores are not used." in done.stderr
    assert [row["kind"] for row in rows(tmp_path / "other")] == ["uniform"]


def test_hosts_share_one_study(pair: Pair, tmp_path: Path) -> None:
    """Two folders, one database: the second host goes on where the first one is, with numbers of its own."""
    words: dict[str, Any] = {"judge": mean, "minimize": ["loss"], "space": SPACE, "uniform": [0, 1]}
    words["storage"] = f"sqlite:///{tmp_path}/shared.db"
    first = search(pair, tmp_path / "one", trials=3, **words)
    second = search(pair, tmp_path / "two", trials=5, **words)
    assert [one.number for one in second.tried] == [0, 1, 2, 3, 4]
    assert second.tried[:3] == first.tried
    assert not (tmp_path / "one/study.db").exists()
    with pytest.raises(RecipeError, match="overwrite=True is for the study in OUT"):
        search(pair, tmp_path / "two", trials=5, overwrite=True, **words)
    with pytest.raises(RecipeError, match=r"postgresql://me@host/db\W+a package for this database is missing"):
        search(pair, tmp_path / "three", trials=5, **{**words, "storage": "postgresql://me:secret@host/db"})


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "names"), [("cmaes", ["loss"]), ("nsga2", ["loss", "bias"])])
def test_every_sampler_goes_on_after_its_first_points(
    pair: Pair, tmp_path: Path, sampler: str, names: list[str]
) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")

    def two(tensors: Mapping[str, Any]) -> dict[str, float]:
        return {**mean(tensors), "bias": abs(float(tensors["model.norm.bias"].astype(np.float64).sum()))}

    words: dict[str, Any] = {"judge": two, "minimize": names, "sampler": sampler, "uniform": [0, 1], "space": SPACE}
    search(pair, tmp_path / "out", trials=3, **words)
    report = search(pair, tmp_path / "out", trials=10, **words)
    assert [one.kind for one in report.tried] == ["uniform"] * 2 + ["sampled"] * 8
    assert len({tuple(one.values.values()) for one in report.tried}) == 10


def test_what_makes_no_sense_is_refused(pair: Pair, tmp_path: Path) -> None:
    words: dict[str, Any] = {"judge": mean, "minimize": ["loss"]}
    for wrong, message in (
        ({"sampler": "cmaes", "minimize": ["a", "b"]}, "is for one objective"),
        ({"sampler": "grid"}, "'grid' is not one of auto, tpe, cmaes, nsga2, random"),
        ({"minimize": []}, "Give maximize=NAME or minimize=NAME"),
        ({"maximize": ["loss"]}, "A score is named twice"),
        ({"trials": 0}, "trials is 0, expected at least 1"),
        ({"choose": "skill"}, 'choose="skill": is not searched for'),
        ({"judge": None}, "A search needs one judge"),
    ):
        with pytest.raises(RecipeError, match=message):
            search(pair, tmp_path / "out", **{**words, **wrong})
    with pytest.raises(RecipeError, match="space is missing"):
        search({"merge_method": "linear", "models": []}, tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()


def test_any_parameter_of_a_recipe_is_searched(pair: Pair, tmp_path: Path) -> None:
    """Numbers, words and switches; by groups of tensors and for one model; with points to begin with."""
    third = save_model(tmp_path / "third", language_model(2))
    recipe = {
        "merge_method": "ties",
        "base_model": str(pair[0]),
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in (pair[1], third)],
    }
    space = {
        "parameters": {
            "density": {"mlp": {"filter": "mlp", "low": 0.1, "high": 0.9}, "rest": {"low": 0.1, "high": 1, "bands": 2}},
            "models.1.parameters.weight": {"low": 0.01, "high": 1, "log": True},
            "normalize": {"choices": [True, False]},
        },
        "points": [{"density": 0.5, "models.1.parameters.weight": 0.1, "normalize": False}],
    }
    report = search(recipe, tmp_path / "out", judge=mean, minimize=["loss"], trials=4, space=space)
    assert report.tried[0].kind == "start"
    assert report.recipe is not None
    for one in report.tried:
        assert 0.01 <= one.values["models.1.parameters.weight"] <= 1
    merge_models(report.recipe, tmp_path / "made")
    assert report.chosen is not None
    assert mean(load_folder(tmp_path / "made")) == dict(report.point(report.chosen).scores or {})


# ------------------------------------------------------------------------------ pruning, test data


def test_hopeless_candidates_are_stopped_early(pair: Pair, tmp_path: Path) -> None:
    """Only the first steps of a candidate that is worse than the median of the others at that step."""
    steps = []

    def slowly(tensors: Mapping[str, Any]) -> Any:
        own = len([step for step in steps if step == 0])
        for step in range(4):
            steps.append(step)
            yield {"loss": 1.0 if own < 6 else 2.0}

    words: dict[str, Any] = {"minimize": ["loss"], "trials": 8, "uniform": [0], "space": SPACE}
    report = search(pair, tmp_path / "out", judge=slowly, **words)
    assert [one.is_pruned for one in report.tried] == [False] * 6 + [True] * 2
    assert len(steps) == 6 * 4 + 2 * 2
    assert "8 candidates (2 pruned)" in repr(report)


def test_the_chosen_one_is_tested_once(pair: Pair, tmp_path: Path, judge: Path) -> None:
    """The same command does not look at the test data again; another chosen one is tested with a warning."""
    test = tmp_path / "test.py"
    test.write_text("import sys; open(sys.argv[0] + '.log', 'a').write('x'); print('skill', 0.25); print('n', 3)")
    words = ("--uniform", "0.6,0.7", "--test", f"{shlex.quote(sys.executable)} {test}")
    for _ in range(2):
        done = run(pair, tmp_path / "out", judge, "--trials", "2", *words)
        assert done.exit_code == 0, done.output
        assert "On test data: skill 0.25, n 3" in done.stdout
    assert Path(f"{test}.log").read_text() == "x"
    done = run(pair, tmp_path / "out", judge, "--trials", "3", "--uniform", "0.6,0.7,0.5", *words[2:])
    assert "Nothing beat one value for all layers: the chosen one is t = 0.5 everywhere." in done.stdout
    assert "The test data have already scored 1 other candidate(s)" in done.stderr
    assert Path(f"{test}.log").read_text() == "xx"
    assert not (tmp_path / "out/models").exists()


# ------------------------------------------------------------------------------------ the command


def test_the_command_takes_a_function_and_shows_its_plan(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(tensors):\n    return {'n': len(tensors)}\nx = 3\n")
    base = ["search", *map(str, pair), str(tmp_path / "out"), "--maximize", "n", "--trials", "2"]

    def own(*words: str) -> Result:
        return CliRunner().invoke(merge_tool, [*base, *words])

    dry = own("--in-process", f"{tmp_path}/own.py:judge", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "Search: 2 candidates, one on disk at a time; the first 11 are given, 12 numbers are searched" in dry.stdout
    assert "t of self_attn: 0 to 1, 4 bands of layers" in dry.stdout
    assert not (tmp_path / "out").exists()
    assert json.loads(own("--in-process", f"{tmp_path}/own.py:judge", "--dry-run", "--json").stdout)["trials"] == 2
    done = own("--in-process", f"{tmp_path}/own.py:judge", "--json")
    assert json.loads(done.stdout)["candidates"][1]["scores"] == {"n": len(language_model(0))}
    for words, message in (
        ([], "A search needs one judge: --eval COMMAND, or --in-process FILE.py:FUNCTION."),
        (["--in-process", "own.py"], "is not FILE.py:FUNCTION"),
        (["--in-process", "none.py:judge"], "none.py: no such Python file"),
        (["--in-process", f"{tmp_path}/own.py:x"], "has no function x"),
        (["--eval", "'"], "cannot be split into words"),
    ):
        assert message in own(*words).stderr.replace("\n", " ")


def test_without_optuna_the_extra_is_named(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"A search needs Optuna: pip install '\.\[search\]'"):
        search(pair, tmp_path / "out", judge=mean, minimize=["loss"], trials=1)
    assert not (tmp_path / "out").exists()
