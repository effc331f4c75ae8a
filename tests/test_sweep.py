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

from checkpoints import contents
from merge_tool import RecipeError, merge
from merge_tool.cli import merge_tool
from merge_tool.errors import EvaluationError
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
    assert left == ["evaluation.log", "sweep.csv", "sweep.jsonl", "sweep.png"]
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
