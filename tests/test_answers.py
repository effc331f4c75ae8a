"""`--try` and `answers`: what the parents and the merge write, each loaded by transformers in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from merge_tool import RecipeError, answers
from merge_tool.cli import merge_tool

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, ROOT / "examples/make_tiny_pair.py", folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own
def test_the_parents_and_the_merge_answer_side_by_side(tiny: Path, tmp_path: Path) -> None:
    """The text is what greedy decoding of transformers gives, here in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["merge", str(tiny / "base"), str(tiny / "ft"), str(tmp_path / "out"), "--try", "Hello there", "--json"]
    done = CliRunner().invoke(merge_tool, words)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["answers"]
    assert [one["model"] for one in said] == [str(tiny / "base"), str(tiny / "ft"), str(tmp_path / "out")]
    assert not any(one["problem"] for one in said)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    assert said[2]["text"] == tokenizer.decode(expected[0][ids.shape[1] :], skip_special_tokens=True)


def test_what_cannot_be_tried_says_why_and_stops_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model_type": "no-such-model"}')
    monkeypatch.setattr("merge_tool.compare.prompting.available_bytes", lambda: 100)
    models = [tiny / "base", adapter, tiny / "base/model.safetensors", tmp_path / "none", damaged]
    problems = ("of memory are free", "an adapter", "no folder with a config.json", "no such file", "cannot run it")
    for one, problem in zip(answers(models, "x"), problems, strict=True):
        assert problem in one.problem, one
        assert str(one).startswith("(")


def test_the_question_is_checked_before_the_merge(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["merge", str(tiny / "base"), str(tiny / "ft"), str(tmp_path / "out"), "--try"]
    assert "The prompt is empty" in CliRunner().invoke(merge_tool, [*words, " "]).stderr
    with pytest.raises(RecipeError, match="prompt='Once upon a time'"):
        answers([tiny / "base"], "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = CliRunner().invoke(merge_tool, [*words, "x"])
    assert refused.exit_code == 1
    assert "--try needs torch and transformers: pip install '.[train]'" in refused.stderr
    assert not (tmp_path / "out").exists()
