"""What a finetune forgets is seen and fought: sources that are only evaluated, answers that are judged, distances, and
which weights become the result."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from test_train_data import texts
from tests.train_fixtures import (
    config_values,
    copy_rows,
    make_config,
    make_tokenizer,
    read_metrics,
    run_two_ranks,
    save_model,
    write_config,
    write_jsonl,
)
from train.batches import Mixture, plan_rows
from train.compare import COMPARISONS
from train.config import build_config
from train.data import open_sources, prepare_sources
from train.errors import TrainError
from train.judge import answer
from train.loop import finetune
from train.retention import list_checkpoints


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    write_jsonl(folder / "d.jsonl", copy_rows())
    write_jsonl(folder / "old.jsonl", copy_rows(12, seed=9))
    return folder


TEMPLATE = [{"prompt": "{question}", "response": "{answer}"}]


def run(base: Path, output: Path, old: dict[str, Any] | None = None, **change: Any) -> Path:
    values = config_values(base / "model", base / "d.jsonl", output, **{"max_steps": 6, **change})
    if old is not None:
        source = {"path": str(base / "old.jsonl"), "label": "old", "weight": 0, "templates": TEMPLATE, **old}
        values["sources"] = [*values["sources"], source]
    finetune(build_config(values))
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- evaluation-only sources -----------------------------------------------------------------------------


def test_a_source_without_weight_is_evaluated_and_never_learned(tmp_path: Path) -> None:
    """All its rows are held out, or as many as `take` says, in the order of `shuffle` and `sort`."""
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(10)]
    path = str(write_jsonl(tmp_path / "w.jsonl", rows))
    learned = {"path": str(write_jsonl(tmp_path / "x.jsonl", rows[:4])), "templates": TEMPLATE}
    by_answer = {"column": "answer", "descending": True}
    watched = {"path": path, "templates": TEMPLATE, "weight": 0, "take": 3, "sort": by_answer}
    config = make_config(sources=[learned, watched], sequence_length=96)
    names = prepare_sources(config, make_tokenizer(), tmp_path / "cache")
    sources = open_sources(config, tmp_path / "cache", names)
    assert len(sources[1].train) == 0
    assert [text.split("\n")[3] for text in texts(sources[1], "held_out")] == ["a9", "a8", "a7"]
    assert {source for row in plan_rows(sources, config, 0) for source, _ in row} == {0}
    assert Mixture(sources, config, 0, 1).steps > 0


def test_watching_changes_no_weight(base: Path, tmp_path: Path) -> None:
    """The old skill's loss and answers are in metrics.jsonl; the run is the same run without it, bit for bit."""
    alone = run(base, tmp_path / "alone")
    watched = run(base, tmp_path / "watched", old={"judge": "exact"}, eval_every=2)
    assert all(torch.equal(t, weights(watched / "final")[n]) for n, t in weights(alone / "final").items())
    lines = read_metrics(watched, "eval")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({"d.jsonl", "old"} == {*line["nll"]} and {*line["accuracy"]} == {"old"} for line in lines)


def test_something_must_be_learned() -> None:
    source = {"path": "d.jsonl", "templates": TEMPLATE, "weight": 0}
    with pytest.raises(TrainError, match="Every source has weight 0, so nothing would be learned"):
        make_config(sources=[source])


# ---- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "written", "expected", "right"),
    [
        ("number", "so it is 1,234.", "1234", True),
        ("number", "12 and then 13", "12", False),
        ("number", "nothing", "nothing", True),
        ("number", "nothing", "1", False),
        ("choice", "A train is late, so I say B", "B", True),
        ("choice", "B, I think", "B", True),
        ("choice", "**(b)** for a reason", "B", True),
        ("choice", "I'd say it's d", "D", True),
        ("choice", "I think (B).", "B", True),
        ("choice", "A, no: C", "A", False),
        ("exact", "red  cat\n", "red cat", True),
        ("exact", "red cats", "red cat", False),
    ],
)
def test_judges(judge: str, written: str, expected: str, right: bool) -> None:
    assert COMPARISONS[judge](written, expected) is right


def test_what_is_judged_is_the_answer() -> None:
    """Behind the rationale, before the next turn; a rationale without an answer has none."""
    expected = "2+2=4\n### Answer:\n4\n### User:\n"
    assert answer(expected, expected) == "4\n"
    assert answer("2+2=5\n### Answer:\n4\n### User:\nWhat is 7?", expected) == "4\n"
    assert answer("it is 4", expected) == ""
    assert answer("red\n### User:\nblue", "red\n### User:\n") == "red\n"


def test_accuracy_is_what_generation_by_hand_gives(base: Path, tmp_path: Path) -> None:
    """Trained to copy, the model solves a share of the held-out prompts: the same share, one prompt at a time."""
    output = run(base, tmp_path / "o", old={"judge": "exact"}, max_steps=90, lr=1e-2)
    (line,) = read_metrics(output, "eval")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output / "final"), make_tokenizer()
    right = 0
    for row in copy_rows(12, seed=9):
        prompt = [f"### User:\n{row['question']}\n### Assistant:\n"]
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(written[0, ids.shape[1] :]).split("### User:")[0]
        right += text.split() == row["answer"].split()
    assert line["accuracy"]["old"] == right / 12
    assert right > 0


def test_a_function_of_your_own_judges(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text("def longer(written, expected): return len(expected) > 0\n")
    output = run(base, tmp_path / "o", old={"judge": "my_judge:longer"}, max_steps=1)
    assert read_metrics(output, "eval")[-1]["accuracy"] == {"old": 1.0}
    with pytest.raises(TrainError, match=r"judge is 'my_judge:nothing', expected exact, number, choice or MODULE:FUN"):
        run(base, tmp_path / "p", old={"judge": "my_judge:nothing"})
    assert not (tmp_path / "p" / "data").exists()


@pytest.mark.slow
def test_two_ranks_judge_and_sample_as_one(base: Path, tmp_path: Path) -> None:
    """A sharded model generates, too: the answers and samples are those of one process."""
    source = {"path": str(base / "old.jsonl"), "label": "old", "weight": 0, "judge": "exact", "templates": TEMPLATE}
    lines = []
    for name in ("one", "two"):
        values = config_values(
            base / "model", base / "d.jsonl", tmp_path / name, max_steps=3, micro_batch=1, sample_prompts=["red cat"],
            sample_tokens=5,
        )  # fmt: skip
        values["sources"] = [*values["sources"], source]
        if name == "one":
            finetune(build_config(values))
        else:
            done = run_two_ranks(write_config(tmp_path / "c.yaml", values))
            assert done.returncode == 0, done.stderr[-3000:]
        (line,) = read_metrics(tmp_path / name, "eval")
        lines.append((line["accuracy"], (tmp_path / name / "samples.jsonl").read_text()))
        (moved,) = read_metrics(tmp_path / name, "distance")
        assert moved["norm"] > 0
    assert lines[0] == lines[1]


def test_a_judge_needs_prompts() -> None:
    for change in ({"weight": 1}, {"weight": 0, "format": "text", "templates": [{"text": "{a}"}]}):
        source = {"path": "e.jsonl", "templates": TEMPLATE, "judge": "exact", **change}
        with pytest.raises(TrainError, match=r"sources\[1\]\.judge needs held-out prompts"):
            make_config(sources=[{"path": "d.jsonl", "templates": TEMPLATE}, source])


# ---- distance ----------------------------------------------------------------------------------------------


def test_the_distance_is_what_diff_measures(base: Path, tmp_path: Path) -> None:
    """At every evaluation; the last is that of the result, as `merge-tool diff` sees it."""
    from merge_tool.compare.diff import diff

    output = run(base, tmp_path / "o", eval_every=3)
    lines = read_metrics(output, "distance")
    assert [line["step"] for line in lines] == [3, 6]
    assert 0 < lines[0]["norm"] < lines[1]["norm"]
    then, now = weights(base / "model"), weights(output / "final")
    apart = sum(float((now[n].double() - then[n].double()).square().sum()) for n in then) ** 0.5
    assert lines[1]["norm"] == pytest.approx(apart, rel=1e-9)
    assert lines[1]["tensors"] == len(then)
    found = diff(base / "model", output / "final")
    angles = sorted(t.angle_degrees for t in found.tensors if t.angle_degrees is not None)
    middle = (angles[(len(angles) - 1) // 2] + angles[len(angles) // 2]) / 2
    assert lines[1]["median_angle_degrees"] == pytest.approx(middle, rel=1e-5)


def test_a_model_at_its_start_has_moved_by_nothing(base: Path, tmp_path: Path) -> None:
    """In bfloat16, too: the start is rounded as the run rounded it (which alone is a distance of 1e-2)."""
    output = run(base, tmp_path / "o", dtype="bfloat16", lr=1e-9, stochastic_rounding=False)
    (line,) = read_metrics(output, "distance")
    assert line["norm"] < 1e-6
    assert line["median_angle_degrees"] < 1e-5


# ---- the result ------------------------------------------------------------------------------------------


def test_the_best_evaluation_becomes_the_result(base: Path, tmp_path: Path) -> None:
    """At a rate that ruins the model after its best step: the result is that step's weights."""
    output = run(base, tmp_path / "o", final="best", eval_every=1, max_steps=8, lr=0.05, schedule="constant")
    losses = {line["step"]: line["nll"]["d.jsonl"] for line in read_metrics(output, "eval")}
    best = min(losses, key=losses.__getitem__)
    saved = weights(output / "checkpoints" / f"step-{best:08d}")
    final = weights(output / "final")
    assert all(torch.equal(t, final[name]) for name, t in saved.items())
    assert not {p.name for p in (output / "final").iterdir()} & {"state.json", "optimizer.safetensors"}
    assert (output / "final" / "README.md").exists()


def test_the_best_may_be_that_of_another_source_or_of_answers(base: Path, tmp_path: Path) -> None:
    """`best_by` names the metric; more right answers are better."""
    for metric, sign in (("nll/old", 1), ("accuracy/old", -1)):
        output = run(
            base, tmp_path / metric, old={"judge": "exact"}, final="best", best_by=metric, eval_every=2, max_steps=6,
            lr=0.02,
        )  # fmt: skip
        kind = metric.split("/")[0]
        scores = {line["step"]: sign * line[kind]["old"] for line in read_metrics(output, "eval")}
        best = min(scores, key=scores.__getitem__)
        saved = weights(output / "checkpoints" / f"step-{best:08d}")
        assert all(torch.equal(t, weights(output / "final")[name]) for name, t in saved.items())


def test_the_average_of_the_last_checkpoints_becomes_the_result(base: Path, tmp_path: Path) -> None:
    """The mean of what three steps saved, within rounding; `keep_last` of 1 keeps what the average needs."""
    output = run(base, tmp_path / "o", final="average", average_of=3, save_every=1, keep_last=1)
    folders = list_checkpoints(output)
    assert [folder.name[-1] for folder in folders[-3:]] == ["4", "5", "6"]
    final = weights(output / "final")
    for name, tensor in final.items():
        mean = torch.stack([weights(folder)[name].double() for folder in folders[-3:]]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
    AutoModelForCausalLM.from_pretrained(output / "final")
    assert "mixce" in (output / "final" / "README.md").read_text()


def test_a_run_stops_when_it_gets_no_better(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After two evaluations that are not better; the result is the best one's."""
    output = run(
        base, tmp_path / "o", final="best", stop_after=2, eval_every=1, max_steps=40, lr=0.5, schedule="constant"
    )
    losses = [line["nll"]["d.jsonl"] for line in read_metrics(output, "eval")]
    assert len(losses) < 40
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert "Stopped early: 2 evaluations were not better in nll." in capsys.readouterr().err
    saved = weights(output / "checkpoints" / f"step-{best + 1:08d}")
    assert all(torch.equal(t, weights(output / "final")[name]) for name, t in saved.items())


def test_a_resumed_run_stops_where_it_would_have(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two evaluations, and after the last one before the result: the same end."""
    settings = {"final": "best", "stop_after": 2, "eval_every": 1, "max_steps": 40, "lr": 0.5, "save_every": 1,
                "schedule": "constant"}  # fmt: skip
    whole = run(base, tmp_path / "whole", **settings)
    from train import loop

    class Killed(Exception):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "publish_folder", kill)
        with pytest.raises(Killed):
            run(base, tmp_path / "late", **settings)
    run(base, tmp_path / "late", **settings)
    step = loop.train_step
    calls: list[int] = []

    def until(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", until)
        with pytest.raises(Killed):
            run(base, tmp_path / "early", **settings)
    run(base, tmp_path / "early", **settings)
    for other in ("late", "early"):
        assert read_metrics(tmp_path / other, "eval") == read_metrics(whole, "eval")
        final = weights(tmp_path / other / "final")
        assert all(torch.equal(t, final[name]) for name, t in weights(whole / "final").items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final": "best"}, "best_by is 'nll', expected a source with held_out"),
        ({"stop_after": 3}, "best_by is 'nll', expected a source with held_out"),
        ({"final": "best", "held": 1, "best_by": "accuracy/d.jsonl"}, "expected nll, nll/d.jsonl"),
        ({"stop_after": 3, "held": 1}, "stop_after needs eval_every"),
        ({"final": "average"}, "final: average needs save_every"),
    ],
)
def test_what_a_choice_needs_is_said(change: dict[str, Any], message: str) -> None:
    source = {"path": "d.jsonl", "templates": TEMPLATE, "held_out": change.pop("held", 0)}
    with pytest.raises(TrainError, match=message):
        make_config(sources=[source], **change)


# ---- where numbers go --------------------------------------------------------------------------------------


def test_reports_go_where_the_config_says(base: Path, tmp_path: Path) -> None:
    """A library that is not installed is named before the work; metrics.jsonl is written in any case."""
    missing = [name for name in ("wandb", "trackio") if find_spec(name) is None]
    for name in missing:
        with pytest.raises(TrainError, match=f"report_to needs {name}, not installed here"):
            run(base, tmp_path / name, report_to=[name])
        assert not (tmp_path / name / "data").exists()
    output = run(base, tmp_path / "o", report_to=[], max_steps=1)
    assert not (output / "tensorboard").exists()
    assert read_metrics(output)
    if find_spec("tensorboard"):
        run(base, tmp_path / "t", report_to=["tensorboard"], max_steps=1)
        assert list((tmp_path / "t" / "tensorboard").iterdir())
