"""`merge-tool sweep`: every t is merged and scored once, whatever stops it; the scores are read and ranked right."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import contents, language_model, save_model
from merge_tool import RecipeError, merge, merge_models, sweep_recipe, verify
from merge_tool.cli import merge_tool
from merge_tool.errors import EvaluationError
from merge_tool.recipe.recipe import label_t
from merge_tool.sweeps.lm_eval import _arguments, scores
from merge_tool.sweeps.results import pareto
from merge_tool.sweeps.scores import parse_scores
from merge_tool.sweeps.sweep import sweep

# Scores: how far a model's first weights are from t = 0.3's, and the mean; every call leaves a line in calls.txt.
JUDGE = """
import sys, ml_dtypes
from pathlib import Path
from safetensors.numpy import load_file
here = Path(__file__).parent
with (here / "calls.txt").open("a") as calls:
    calls.write(" ".join(Path(p).name for p in sys.argv[1:]) + "\\n")
if (here / "broken").exists():
    print("looking at", *sys.argv[1:], file=sys.stderr)
    sys.exit("the harness fell over")
print("loading...")
for folder in sys.argv[1:]:
    weights = load_file(next(Path(folder).glob("*.safetensors")))
    value = float(weights["lm_head.weight"].astype("f4").sum())
    print("total", value)
    print(f"loss: {abs(value - 1):.6f}")
"""


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path / "judge.py"


def command(judge: Path) -> list[str]:
    return [sys.executable, str(judge)]


def run(pair: tuple[Path, Path], out: Path, judge: Path, *words: Any) -> Any:
    arguments = [*pair, out, "--eval", shlex.join(command(judge)), *words]
    return CliRunner().invoke(merge_tool, ["sweep", *map(str, arguments)])


def calls(judge: Path) -> list[str]:
    path = judge.with_name("calls.txt")
    return path.read_text().splitlines() if path.exists() else []


def test_every_t_is_merged_scored_and_deleted(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    found = run(pair, tmp_path / "out", judge, "--t", "0:1:0.25")
    assert found.exit_code == 0, found.output
    assert calls(judge) == ["t-0", "t-0.25", "t-0.5", "t-0.75", "t-1"]
    with (tmp_path / "out/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["t"] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"]
    assert list(rows[0]) == ["t", "total", "loss", "pareto"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(abs(float(row["total"]) - 1), abs=1e-6)
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == ["evaluation.log", "sweep.csv", "sweep.html", "sweep.jsonl", "sweep.png"]
    assert "Pareto-optimal (*): t = " in found.stdout
    assert "Less is better for loss" in found.stdout


def test_kept_models_are_those_of_slerp_merge(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    """In batches or one by one, what the sweep keeps is byte for byte the merge at that t."""
    for batch in (1, 2, 3):
        out = tmp_path / f"out{batch}"
        report = sweep(*pair, out, [0.2, 0.5, 0.8], command(judge), batch=batch, keep=True, dtype="float32")
        for point in report.points:
            direct = tmp_path / f"direct{batch}-{point.t}"
            merge(*pair, direct, point.t, dtype="float32")
            assert contents(out / f"t-{point.t}") == contents(direct)
    assert calls(judge)[3:] == ["t-0.2 t-0.5", "t-0.8", "t-0.2 t-0.5 t-0.8"]


def test_it_resumes_where_it_stopped(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    """A command that fails shows its last lines; the next run scores only what is left."""
    judge.with_name("broken").touch()
    found = run(pair, tmp_path / "out", judge, "--t", "0.2,0.4")
    assert found.exit_code == 1
    assert "exit code 1" in found.stderr
    assert "the harness fell over" in found.stderr
    judge.with_name("broken").unlink()
    assert run(pair, tmp_path / "out", judge, "--t", "0.2,0.4").exit_code == 0
    assert run(pair, tmp_path / "out", judge, "--t", "0.2,0.4,0.6").exit_code == 0
    assert calls(judge) == ["t-0.2", "t-0.2", "t-0.4", "t-0.6"]
    clean = run(pair, tmp_path / "clean", judge, "--t", "0.2,0.4,0.6")
    assert clean.exit_code == 0
    tables = [(tmp_path / name / "sweep.csv").read_text() for name in ("out", "clean")]
    assert tables[0] == tables[1]


def test_a_kill_at_any_point_costs_no_score_and_doubles_none(
    pair: tuple[Path, Path], tmp_path: Path, judge: Path
) -> None:
    """Killed again and again, the sweep ends with the table of an undisturbed one."""
    words = [sys.executable, "-m", "merge_tool", "sweep", *map(str, pair)]
    options = ["--t", "0:1:0.25", "--batch", "2", "--keep", "--eval", shlex.join(command(judge))]
    for delay in itertools.chain((0.3, 0.5, 0.7, 0.9, 1.1), itertools.repeat(600)):
        process = subprocess.Popen([*words, str(tmp_path / "out"), *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() == 0:
            break
        assert process.poll() is None
        process.kill()
        process.wait()
    clean = sweep(*pair, tmp_path / "clean", [0, 0.25, 0.5, 0.75, 1], command(judge), batch=2, keep=True)
    assert (tmp_path / "out/sweep.csv").read_text() == clean.as_csv()
    for t in ("0", "0.25", "0.5", "0.75", "1"):
        assert contents(tmp_path / f"out/t-{t}") == contents(tmp_path / f"clean/t-{t}")
    assert not (tmp_path / "out/models").exists()


def test_a_kill_before_the_first_line_leaves_a_folder_to_begin_in(
    pair: tuple[Path, Path], tmp_path: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between writing the journal and giving it its name, the same command begins."""

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr("merge_tool.output.lock.FolderLock.remove_with", lambda lock, folder: lock.release())
        with pytest.raises(Killed):
            sweep(*pair, tmp_path / "out", [0.5], command(judge))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".sweep"]
    assert [point.t for point in sweep(*pair, tmp_path / "out", [0.5], command(judge)).points] == [0.5]


def test_another_sweep_in_the_folder_is_refused_by_what_differs(
    pair: tuple[Path, Path], tmp_path: Path, judge: Path
) -> None:
    assert run(pair, tmp_path / "out", judge, "--t", "0.5").exit_code == 0
    refused = run(pair, tmp_path / "out", judge, "--t", "0.5", "--method", "linear")
    assert refused.exit_code == 1
    assert "method" in refused.stderr
    assert "method" in run(pair, tmp_path / "out", judge, "--t", "0.5", "--method", "linear").stderr
    assert run(pair, tmp_path / "out", judge, "--t", "0.5", "--method", "linear", "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    assert "thesis.txt" in run(pair, tmp_path / "mine", judge).stderr


def test_a_sweep_has_its_schedule_and_no_other_continues_it(
    pair: tuple[Path, Path], tmp_path: Path, judge: Path
) -> None:
    rules = ["--t-for", "lm_head=0.3"]
    assert run(pair, tmp_path / "out", judge, "--t", "0.5", "--keep", *rules).exit_code == 0
    merge(*pair, tmp_path / "one", 0.5, t_for=rules[1])
    assert contents(tmp_path / "out/t-0.5") == contents(tmp_path / "one")
    for other in ([], ["--t-for", "lm_head=0.4"], [*rules, "--only", "lm_head"]):
        assert run(pair, tmp_path / "out", judge, "--t", "0.5,0.6", *other).exit_code == 1
    assert run(pair, tmp_path / "out", judge, "--t", "0.5,0.6", *rules).exit_code == 0


def test_no_shell_sees_the_command(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    """`;`, `$(...)` and `*` are plain words; `{}` stands for the folders."""
    echo = f"{shlex.quote(sys.executable)} -c 'import sys; print(\"words\", len(sys.argv))' ; touch $(pwd)/x {{}} last"
    found = CliRunner().invoke(
        merge_tool, ["sweep", *map(str, pair), str(tmp_path / "out"), "--t", "0.5", "--eval", echo]
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "out/sweep.jsonl").read_text().splitlines()[-1])["scores"] == {"words": 6}


def test_a_command_that_cannot_run_is_a_clear_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no-such-program"):
        sweep(*pair, tmp_path / "out", [0.5], ["no-such-program"])
    with pytest.raises(RecipeError, match="empty"):
        sweep(*pair, tmp_path / "out", [0.5], [])


def test_minimize_names_a_score(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    """An unknown name is refused before the score is lost; a known one turns the ranking round."""
    refused = run(pair, tmp_path / "out", judge, "--t", "0.3,0.6", "--minimize", "totl")
    assert "totl" in refused.stderr
    assert "total" in refused.stderr
    report = sweep(*pair, tmp_path / "out", [0.3, 0.6], command(judge), minimize=["total"])
    assert report.less_is_better == {"total", "loss"}


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("acc 0.5", 1, [{"acc": 0.5}]),
        ("acc = 50%\nppl: 1.5e2\n", 1, [{"acc": 50, "ppl": 150}]),
        ("loading 3 shards\nacc 1\nppl 2\nacc 3\nppl 4\n", 2, [{"acc": 1, "ppl": 2}, {"acc": 3, "ppl": 4}]),
        ('noise\n{"acc": 0.5, "n": 3}', 1, [{"acc": 0.5, "n": 3}]),
        ('[{"acc": 1}, {"acc": 2}]', 2, [{"acc": 1}, {"acc": 2}]),
        ('[\n {"acc": 1}\n]\n', 1, [{"acc": 1}]),
    ],
)
def test_scores_are_read_from_lines_or_json(text: str, count: int, expected: Any) -> None:
    assert parse_scores(text, count) == expected


@pytest.mark.parametrize(
    ("text", "count", "reason"),
    [
        ("", 1, "no score"),
        ("done.", 1, "no score"),
        ("acc 1", 2, "printed 1 times for 2 models"),
        ("acc 1\nacc 2\nppl 3", 2, "ppl was printed 1 times"),
        ('{"acc": NaN}', 1, "acc is nan"),
        ('[{"acc": 1}]', 2, "scores for 1 models, expected 2"),
        ('[{"acc": 1}, {"ppl": 1}]', 2, "the scores are ppl, expected acc"),
        ('{"acc": true}', 1, "no score"),
    ],
)
def test_scores_that_cannot_be_told_are_refused(text: str, count: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_scores(text, count)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_pareto_marks_what_nothing_beats(rows: list[tuple[int, int]]) -> None:
    """Marked if and only if no other is as good in both scores and better in one."""
    for mark, (x, y) in zip(pareto(rows), rows, strict=True):
        assert mark == (not any(a >= x and b >= y and (a > x or b > y) for a, b in rows))


# ------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def ties(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    path, third = tmp_path / "ties.yaml", save_model(tmp_path / "third", language_model(2))
    entries = [f"  - model: {model}\n    parameters: {{weight: 0.5, density: 0.5}}\n" for model in (pair[1], third)]
    path.write_text(f"merge_method: ties\nbase_model: {pair[0]}\nmodels:\n{''.join(entries)}dtype: float32\n")
    return path


def sweep_words(recipe: Path, out: Path, judge: Path, *words: Any) -> Any:
    arguments = ["sweep", recipe, out, "--eval", shlex.join(command(judge)), *words]
    return CliRunner().invoke(merge_tool, list(map(str, arguments)))


def test_any_parameter_of_a_recipe_is_varied(ties: Path, tmp_path: Path, judge: Path) -> None:
    """For all models or for one; every combination is byte for byte the recipe with these values in it."""
    vary = ["--vary", "parameters.lambda=0.5,1", "--vary", "models.1.parameters.density=0.2:0.6:0.4", "--batch", 3]
    done = sweep_words(ties, tmp_path / "out", judge, *vary, "--keep", "--json")
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    values = [(p["lambda"], p["models.1.parameters.density"]) for p in points]
    assert values == [(0.5, 0.2), (0.5, 0.6), (1, 0.2), (1, 0.6)]
    for scale, density in values:
        text = ties.read_text()
        at = text.rindex("density: 0.5")
        text = f"{text[:at]}density: {density}{text[at + 12 :]}parameters: {{lambda: {scale}}}\n"
        (tmp_path / "one.yaml").write_text(text)
        merge_models(tmp_path / "one.yaml", tmp_path / "one", overwrite=True)
        name = f"lambda-{label_t(scale)}-models.1.parameters.density-{density}"
        kept = tmp_path / "out" / name
        assert contents(kept)["model.safetensors"] == contents(tmp_path / "one")["model.safetensors"]
        # what is kept says how it was made, and can be made and checked again
        assert not verify(kept, recipe=ties)[0].problems
        merge_models(kept / "mergekit_config.yml", tmp_path / "again", models_dir=tmp_path, overwrite=True)
        assert contents(kept)["model.safetensors"] == contents(tmp_path / "again")["model.safetensors"]
    assert calls(judge)[0].count("lambda") == 3
    with (tmp_path / "out/sweep.csv").open() as table:
        assert next(csv.reader(table)) == ["lambda", "models.1.parameters.density", "total", "loss", "pareto"]


def test_a_sweep_of_a_recipe_continues_and_grows(ties: Path, tmp_path: Path, judge: Path) -> None:
    assert sweep_words(ties, tmp_path / "out", judge, "--vary", "weight=0.2,0.4").exit_code == 0
    before = len(calls(judge))
    dry = sweep_words(ties, tmp_path / "out", judge, "--vary", "weight=0.2,0.4,0.6", "--dry-run")
    assert "Sweep: 3 merges, 1 at a time; 2 have their scores already: weight = 0.2; weight = 0.4" in dry.stdout
    assert len(calls(judge)) == before
    grown = sweep_words(ties, tmp_path / "out", judge, "--vary", "weight=0.2,0.4,0.6", "-q")
    assert grown.output == ""
    assert calls(judge)[before:] == ["weight-0.6"]
    other = sweep_words(ties, tmp_path / "out", judge, "--vary", "density=0.2,0.4")
    assert "is of another sweep" in other.stderr
    report = sweep_recipe(ties, tmp_path / "out", {"weight": [0.2, 0.4, 0.6]}, command(judge))
    assert [point.values for point in report.points] == [{"weight": w} for w in (0.2, 0.4, 0.6)]
    assert {*report.models} == {"base", "ft", "third"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "lamda=1,2"], "ties has no parameter 'lamda' (did you mean 'lambda'?)"),
        (["--vary", "models.7.parameters.weight=1"], "the recipe has 2 entries in models, the first is models.0"),
        (["--vary", "models.0.parameters.lambda=1"], "ties has one lambda for all models: write lambda"),
        (["--vary", "weight"], "is not NAME=VALUES"),
        (["--vary", "t=1:0:0.1"], "is empty"),
        (["--vary", "weight=1", "--vary", "parameters.weight=2"], "'weight' is given twice"),
        (["--vary", "density=2,3"], "a number from 0 to 1"),
        ([], "--vary is missing"),
        (["--vary", "weight=1", "--t", "0.5"], "--t goes with BASE and FT"),
        (["--vary", "weight=1", "--method", "linear"], "--method goes with BASE and FT"),
    ],
)
def test_what_cannot_be_varied_is_said(ties: Path, tmp_path: Path, judge: Path, words: list[str], message: str) -> None:
    done = sweep_words(ties, tmp_path / "out", judge, *words)
    assert done.exit_code in (1, 2)
    assert message in done.stderr.replace("\n", " "), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_pair_is_no_recipe(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    assert "--vary goes with a recipe" in run(pair, tmp_path / "out", judge, "--vary", "t=0,1").stderr


def test_a_dry_run_of_a_pair_writes_and_scores_nothing(pair: tuple[Path, Path], tmp_path: Path, judge: Path) -> None:
    done = run(pair, tmp_path / "out", judge, "--t", "0:1:0.5", "--dry-run")
    assert "Sweep: 3 merges, 1 at a time: t = 0; t = 0.5; t = 1" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "calls.txt").exists()


def test_progress_names_the_setting_and_how_many_there_are(
    pair: tuple[Path, Path], tmp_path: Path, judge: Path
) -> None:
    done = run(pair, tmp_path / "out", judge, "--t", "0.25,0.5,0.75", "--batch", "2", "--progress", "bar")
    assert "t = 0.25; t = 0.5 (1 to 2 of 3):" in done.stderr
    assert "t = 0.75 (3 of 3):" in done.stderr


# ----------------------------------------------------------------------------- lm-evaluation-harness

FAKE_LM_EVAL = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
assert words[0] == "run", words
options = dict(zip(words[1::2], words[2::2]))
Path("asked.jsonl").open("a").write(json.dumps(options) + "\\n")
out = Path(options["--output_path"]) / "model"
out.mkdir(parents=True)
scores = {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}
results = {"results": {"gsm8k": scores, "arc_easy": {"acc,none": 0.25, "acc_stderr,none": "N/A"}}}
(out / "results_2026.json").write_text(json.dumps(results))
print("a table for people")
"""


def test_lm_eval_is_a_ready_judge_and_gets_its_limits(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks, limits and further model arguments arrive; its results are the scores."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/lm_eval.py").write_text(FAKE_LM_EVAL)
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(tmp_path / "path")  # for this process, which looks whether it is installed
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}:{root}")  # for the judge, a process of its own
    monkeypatch.chdir(tmp_path)
    told = "lm-eval:gsm8k,arc_easy --limit 7 --model_args dtype=float32"
    words = ["sweep", *map(str, pair), str(tmp_path / "out"), "--t", "0,1", "--batch", "2", "--eval", told, "--json"]
    done = CliRunner().invoke(merge_tool, words)
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    assert [p["scores"] for p in points] == [{"gsm8k/exact_match,strict-match": 0.5, "arc_easy/acc": 0.25}] * 2
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [one["--tasks"] for one in asked] == ["gsm8k,arc_easy"] * 2
    assert [one["--limit"] for one in asked] == ["7", "7"]
    assert [one["--model"] for one in asked] == ["hf", "hf"]
    for one, name in zip(asked, ("t-0", "t-1"), strict=True):
        assert one["--model_args"] == f"pretrained={tmp_path}/out/models/{name},dtype=float32"
    other = CliRunner().invoke(merge_tool, [*words[:-2], told.replace("7", "8")])
    assert "is of another sweep" in other.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--model_args=dtype=float32,x=1"],
        ["-a", "dtype=float32", "x=1"],
        ["--model_args", "dtype=float32", "-a", "x=1"],
    ],
)
def test_every_spelling_of_model_arguments_keeps_the_merge_as_the_model(words: list[str]) -> None:
    asked = _arguments("gsm8k", [*words, "--limit", "5"], "OUT/t-0")
    assert asked == [
        "--model", "hf", "--model_args", "pretrained=OUT/t-0,dtype=float32,x=1", "--tasks", "gsm8k", "--limit", "5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [["--model_args", "dtype=auto,pretrained=a/b"], ["--model_args=pretrained=a/b"], ["-a", '{"pretrained": "a/b"}']],
)
def test_lm_eval_never_scores_another_model(pair: tuple[Path, Path], tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(RecipeError, match="pretrained= in its model arguments: the models are the merges"):
        sweep(*pair, tmp_path / "out", [0.5], ["lm-eval:gsm8k", *words])
    assert not (tmp_path / "out").exists()


def test_results_that_lm_eval_wrote_are_read() -> None:
    recorded = next((Path(__file__).parent / "lm_eval_results").glob("results_*.json"))
    found = dict(scores(json.loads(recorded.read_text())))
    assert found["gsm8k/exact_match,flexible-extract"] >= 0
    assert any(name.startswith("agieval_nous/acc") for name in found)
    assert not any("stderr" in name or "alias" in name for name in found)


def test_lm_eval_that_is_not_there_or_has_no_task_is_said(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="names no tasks"):
        sweep(*pair, tmp_path / "out", [0.5], ["lm-eval:"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs lm-evaluation-harness: pip install '\.\[eval\]'"):
        sweep(*pair, tmp_path / "out", [0.5], ["lm-eval:gsm8k"])
    assert not (tmp_path / "out").exists()
