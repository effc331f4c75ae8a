"""Laws of the contrastive stage: what is asked, sampled, judged and paired; and that any kill loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train.config import build_config
from train.contrast import average as average_module
from train.contrast import stage as stage_module
from train.contrast.average import average
from train.contrast.generate import Drawing, Response, Voice, blocks, seed_of
from train.contrast.options import ContrastConfig, QuestionsConfig, VerifyConfig
from train.contrast.pairs import BESIDE, CHOSEN, REJECTED, make_units, warnings, write_units
from train.contrast.questions import Question, read_lines, read_questions, response_segments, write_questions
from train.contrast.verify import verify
from train.errors import TrainError
from train.loop import finetune
from train.preflight import preflight
from train_fixtures import (
    REPO,
    config_values,
    copy_rows,
    environment,
    make_config,
    make_model,
    make_tokenizer,
    read_metrics,
    run_two_ranks,
    save_model,
    write_config,
    write_jsonl,
)

QUESTIONS = {"prompt": "{question}", "answer": "{answer}", "format": "memphis-chat"}
# Random models end a response at an "e"; what they say is right if it has an even number of characters.
EVEN = f"{sys.executable} -c 'import sys, json; [print(len(json.loads(l)[\"response\"]) % 2) for l in sys.stdin]'"
SMALL = {"cycles": 2, "samples": 4, "max_new_tokens": 12, "temperature": 1.5, "sample_batch": 16, "stop": "e"}


def stage_values(root: Path, output: str = "out", data: Path | None = None, **contrast: Any) -> dict[str, Any]:
    """A stage of two cycles on a tiny model, as plain values; `root` gets model and data if it has none."""
    if not (root / "model").exists():
        save_model(root / "model")
        write_jsonl(root / "d.jsonl", copy_rows(24))
    block = {
        "questions": {"path": str(root / "d.jsonl"), **QUESTIONS, "held_out": 4},
        "verify": {"compare": EVEN}, **SMALL, **contrast,
    }  # fmt: skip
    return config_values(
        root / "model", root / "d.jsonl", root / output, max_steps=4, save_every=2, mixing_ratio=1.0, contrast=block
    )


# ---- config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contrast", "problem"),
    [
        ({"samples": 0}, r"contrast\.samples is 0, expected at least 1"),
        ({"sample_batch": 3}, r"contrast\.sample_batch is 3, expected at least samples, 4"),
        ({"temperature": 0}, r"contrast\.temperature is 0\.0, expected above 0"),
        ({"top_p": 1.5}, r"contrast\.top_p is 1\.5, expected above 0, at most 1"),
        ({"merge_t": 0}, r"contrast\.merge_t is 0\.0, expected a share"),
        ({"stop": ""}, r"contrast\.stop is '', expected text"),
        (
            {"ce_on": "gold", "questions": {"path": "q", "prompt": "{a}", "answer": "{b}"}},
            r"needs contrast\.questions\.rat",
        ),
        ({"ce_on": "sources", "rank_weight": 0}, "no response is learned from"),
        ({"verify": {"compare": " "}}, r"compare is empty, expected exact, number"),
        ({"verify": {"extract": "("}}, r"extract is '\(', not a regular expression"),
        ({"questions": {**QUESTIONS, "path": "q", "held_out": 1.5}}, r"questions\.held_out is 1\.5, expected a share"),
        ({"cycle": 3}, r"'contrast\.cycle' is not a key\. Did you mean 'cycles'"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tmp_path: Path, contrast: dict[str, Any], problem: str) -> None:
    values = stage_values(tmp_path)
    with pytest.raises(TrainError, match=problem):
        build_config({**values, "contrast": {**values["contrast"], **contrast}})


def test_sources_are_needed_where_something_is_learned_from_them(tmp_path: Path) -> None:
    values = {**stage_values(tmp_path), "sources": []}
    build_config(values)
    for without in ({**values, "contrast": None}, {**values, "contrast": {**values["contrast"], "ce_on": "sources"}}):
        with pytest.raises(TrainError, match="sources is missing or empty"):
            build_config(without)


def test_sources_and_fused_backward_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="fused_backward cannot add up"):
        build_config({**stage_values(tmp_path, ce_on="sources"), "fused_backward": True, "micro_batch": 4})


def test_the_estimate_counts_all_rows_of_a_pair() -> None:
    """Memory is asked for all rows that are computed at once: a pair has two, or as many as there are samples."""
    options = {"questions": {"path": "q", "prompt": "{a}", "answer": "{b}"}, "verify": {}, "samples": 5}
    for more, rows in (({}, 2), ({"pairs": "all"}, 5), ({"ce_on": "right", "rank_weight": 0}, 1)):
        config = make_config(micro_batch=3, global_batch=3, sequence_length=64, contrast={**options, **more})
        assert config.rows_at_once == 3 * rows
        rows_alone = make_config(micro_batch=3 * rows, global_batch=3 * rows, sequence_length=64)
        found, expected = (preflight(c, make_model().config, torch.float32, 1) for c in (config, rows_alone))
        assert found == expected
        assert found.activation_bytes


def test_the_published_settings_are_the_defaults() -> None:
    contrast = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig())
    found = (contrast.samples, contrast.temperature, contrast.top_p, contrast.max_new_tokens, contrast.stop)
    assert found == (8, 0.5, 0.8, 512, "### User:")
    assert (contrast.cycles, contrast.pairs, contrast.ce_on, contrast.merge_t) == (3, "unique", "chosen", 0.99)


# ---- verdicts --------------------------------------------------------------------------------------------


def question(number: int = 0, answer: str = "42", prompt: str = "### User:\nq\n") -> Question:
    return Question(number, prompt, "q", "gold\n### User:\n", answer)


def told(compare: str, text: str, answer: str, extract: str | None = None, *, is_finished: bool = True) -> bool:
    (found,) = verify(VerifyConfig(extract, compare), [(question(answer=answer), Response(text, is_finished))])
    return found


@pytest.mark.parametrize(
    ("compare", "text", "answer", "is_right"),
    [
        ("number", "it is $1,234.50.", "1234.5", True), ("number", "7 or 8", "7", False), ("number", "-3", "3", False),
        ("number", "1/2", "0.5", True), ("number", "1/0", "5", False), ("number", "none", "4", False),
        ("number", "Yes.", "yes", True), ("number", "4 apples", "no", False),
        ("choice", "(b) 12", "B", True), ("choice", "The answer is b", "C", False), ("choice", "12", "B", False),
        ("choice", "12", "12", True), ("exact", " The  Cat. ", "the cat", True), ("exact", "a cat", "the cat", False),
    ],
)  # fmt: skip
def test_answers_are_compared(compare: str, text: str, answer: str, is_right: bool) -> None:
    assert told(compare, text, answer) == is_right


def test_the_answer_is_extracted_and_no_answer_is_wrong() -> None:
    extract = "### Answer:\n(.+?)\n"
    assert told("number", "1 + 1\n### Answer:\n42", "42", extract)
    assert told("number", "### Answer:\n1\n### Answer:\n42\n", "42", extract)
    assert not told("number", "42", "42", extract)
    assert not told("number", "### Answer:\n42\n and so on", "42", extract, is_finished=False)
    assert told("exact", "x 42", "x 42", "x .+")


def test_a_function_and_a_command_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text("def longer(found, answer): return len(found) > len(answer)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert told("my_judge:longer", "abc", "ab")
    assert not told("my_judge:longer", "a", "ab")
    with pytest.raises(TrainError, match=r"my_judge:none.*can be imported here"):
        told("my_judge:none", "a", "ab")
    (tmp_path / "judge.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n"
        "    print(int(row['found'] == row['answer'] and row['prompt'] == 'q'))\n"
    )
    command = f"{sys.executable} judge.py"
    assert told(command, "5", "5")
    assert not told(command, "5", "6")
    assert not told(command, "5", "5", is_finished=False)
    bad_ones = (
        ("false", "failed"),
        ("no-such-program", "nor a command"),
        ("a 'b", "be split"),
        ("echo yes no", "2 words"),
        ("echo 7", "'7'"),
    )
    for bad, problem in bad_ones:
        with pytest.raises(TrainError, match=problem):
            told(bad, "5", "5")


# ---- units -----------------------------------------------------------------------------------------------


def responses(*texts: str) -> list[Response]:
    return [Response(text, True) for text in texts]


def units_of(verdicts: str, texts: str, **contrast: Any) -> tuple[list[str], dict[str, int]]:
    """Units as `chosen>rejected+beside`, from texts and verdicts of one character each."""
    options = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig(), **contrast)
    judged = [(question(), responses(*texts), [v == "1" for v in verdicts])]
    units, counts = make_units(judged, options)
    signs = {CHOSEN: "", REJECTED: ">", BESIDE: "+"}
    return ["".join(signs[role] + (r.text if r else "gold") for role, _, r in unit) for unit in units], dict(counts)


def test_each_response_is_used_once_and_extras_are_discarded() -> None:
    found, counts = units_of("1100010", "abxyzax")
    assert found == ["a>x", "b>y"]
    assert {k: counts[k] for k in ("samples", "right", "unique", "pairs", "unused")} == {
        "samples": 7, "right": 3, "unique": 5, "pairs": 2, "unused": 1,
    }  # fmt: skip
    assert units_of("111", "abc")[0] == []
    assert units_of("000", "abc")[0] == []


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [
        ({"pairs": "all"}, ["a>x>y>z", "b>x>y>z"]),
        ({"ce_on": "right"}, ["a>x", "b>y"]),
        ({"ce_on": "right", "rank_weight": 0}, ["a", "b"]),
        ({"ce_on": "gold"}, ["a>x+gold", "b>y+gold"]),
        ({"ce_on": "gold", "rank_weight": 0}, ["+gold", "+gold"]),
    ],
)
def test_units_have_what_the_losses_need(contrast: dict[str, Any], expected: list[str]) -> None:
    assert units_of("11000", "abxyz", **contrast)[0] == expected


def test_right_responses_without_a_partner_are_learned_with_ce_on_right() -> None:
    assert units_of("1110", "abcx", ce_on="right")[0] == ["a>x", "+b", "+c"]
    assert units_of("111", "abc", ce_on="right")[0] == ["+a", "+b", "+c"]


def test_rows_are_the_prompt_and_the_learned_response_with_its_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    pair = [(CHOSEN, question(), Response("red", True)), (REJECTED, question(), Response("blue", False))]
    long = [(CHOSEN, question(), Response("red " * 99, True))]
    kept = write_units(tmp_path, [pair, long], "memphis-chat", tokenizer, 60)
    assert kept == [
        {"question": 0, "rows": [{"role": "chosen", "text": "red\n### User:\n"}, {"role": "rejected", "text": "blue"}]}
    ]
    ids, learned, offsets = (np.load(tmp_path / f"{name}.npy") for name in ("ids", "learned", "offsets"))
    for row, text in enumerate(("red\n### User:\n", "blue")):
        span = slice(offsets[row], offsets[row + 1])
        assert tokenizer.decode(ids[span][learned[span]]) == text
        assert tokenizer.decode(ids[span][~learned[span]]) == "### User:\nq\n"
    assert np.load(tmp_path / "units.npy").tolist() == [[0, 0], [0, 1]]


def test_a_chat_template_writes_the_end_of_its_turns() -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = make_tokenizer(chat_template=template)
    asked = question(prompt="<user>q</s><assistant>")
    assert [s.text for s in response_segments(asked, "red", True, "chat-template", tokenizer)] == [
        asked.prompt,
        "red</s>",
    ]
    assert response_segments(asked, "red", False, "chat-template", tokenizer)[1].text == "red"


@pytest.mark.parametrize(("right", "said"), [(97, ["above 95 %"]), (96, ["above 95 %"]), (50, []), (4, ["below 5 %"])])
def test_shares_that_teach_little_are_said(right: int, said: list[str]) -> None:
    options = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig())
    counts: Any = {"right": right, "samples": 100, "unfinished": 0, "units": 3, "pairs": 3}
    found = list(warnings(counts, options))
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))
    with pytest.raises(TrainError, match=r"no pairs to learn from: .* of 100 samples are right"):
        list(warnings({**counts, "pairs": 0, "units": 0}, options))  # type: ignore[arg-type]


# ---- questions -------------------------------------------------------------------------------------------


def test_questions_are_rows_as_sources_have_them(tmp_path: Path) -> None:
    """Chosen and held out as in sources; too long ones are left out; a row without an answer is named."""
    rows = [{"q": f"q{n}", "r": f"because {n}", "a": str(n)} for n in range(9)]
    path = str(write_jsonl(tmp_path / "q.jsonl", [*rows, {"q": "red " * 60, "r": "", "a": "9"}]))
    block = {"path": path, "prompt": "{q}", "rationale": "{r}", "answer": "{a}", "held_out": 2, "take": 4}
    where = [{"column": "a", "op": "!=", "value": "0"}]

    def written(**more: Any) -> tuple[list[Question], list[Question]]:
        contrast = {"questions": {**block, **more}, "verify": {}, "max_new_tokens": 20}
        config = make_config(sequence_length=60, contrast=contrast)
        assert config.contrast is not None
        write_questions(tmp_path, config, config.contrast, make_tokenizer())
        return read_questions(tmp_path, "train"), read_questions(tmp_path, "held_out")

    train, held_out = written(where=where)
    assert len(train) == 4
    assert not {q.number for q in train} & {q.number for q in held_out}
    assert 0 not in {q.number for q in (*train, *held_out)}
    n = train[0].number
    assert train[0] == Question(
        n, f"### User:\nq{n}\n### Rationale:\n", f"q{n}", f"because {n}\n### Answer:\n{n}\n### User:\n", str(n)
    )
    with pytest.raises(TrainError, match="none of 1 fits: sequence_length 60 - max_new_tokens 20 leaves 40 tokens"):
        written(where=[{"column": "a", "op": "==", "value": "9"}], held_out=0)
    write_jsonl(tmp_path / "q.jsonl", [{"q": "a", "r": "b", "a": "c"}, {"q": "a", "r": "b", "a": ""}])
    with pytest.raises(TrainError, match=r"Source questions, row 2: it has no answer"):
        written(held_out=0)


# ---- sampling --------------------------------------------------------------------------------------------


def test_drawn_tokens_have_the_softmax_shares_of_the_top_p() -> None:
    """100,000 draws against the exact shares at temperature 2, cut at 0.8; tokens outside are never drawn."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    options = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig(), temperature=2.0, top_p=0.8)
    count = 100_000
    scores = Drawing([5], count, options)(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1))
    drawn = torch.bincount(scores.argmax(1), minlength=5) / count
    shares = torch.softmax(logits / 2, 0)
    kept = torch.tensor([True, True, True, False, False])  # 0.42 + 0.25 < 0.8 <= 0.42 + 0.25 + 0.20
    assert shares[:2].sum() < 0.8 <= shares[:3].sum()
    torch.testing.assert_close(drawn, torch.where(kept, shares, 0) / shares[:3].sum(), atol=0.006, rtol=0)


def test_a_questions_responses_come_from_its_own_seed() -> None:
    """Other questions of the block, asked or not, change nothing; other seeds do."""
    options = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig(), **{**SMALL, "samples": 3})
    voice = Voice(make_model().eval(), make_tokenizer(), 0, options)
    asked = [question(n, prompt=f"### User:\n{'red ' * n}\n") for n in range(4)]
    seeds = [seed_of(0, 1, q) for q in asked]
    assert len({*seeds, *(seed_of(0, 2, q) for q in asked), *(seed_of(1, 1, q) for q in asked)}) == 12
    whole, tokens = voice.respond(asked, seeds)
    assert [len(found) for found in whole] == [3] * 4
    assert tokens > 12
    others, _ = voice.respond(asked, [7, *seeds[1:]])
    assert others[1:] == whole[1:]
    assert others[0] != whole[0]
    greedy, _ = voice.respond(asked, [])
    assert [len(found) for found in greedy] == [1] * 4


def test_a_response_ends_at_the_stop_text_or_the_end_token() -> None:
    tokenizer = make_tokenizer()
    options = ContrastConfig(QuestionsConfig("q", "{a}", "{b}"), VerifyConfig())
    voice = Voice(make_model(), tokenizer, 0, options)
    ids = tokenizer("red\n### User:\nblue", add_special_tokens=False)["input_ids"]
    assert voice._read(ids, [0]) == Response("red\n", True)
    assert voice._read([*ids[:2], 0, *ids], [0]) == Response(tokenizer.decode(ids[:2]), True)
    assert voice._read(ids[:2], [0]).is_finished is False


def test_blocks_are_of_similar_length_and_always_the_same() -> None:
    asked = [question(n, prompt="red " * (1 + n * 7 % 10)) for n in range(10)]
    found = blocks(asked, make_tokenizer(), 3)
    assert [len(q.prompt) for block in found for q in block] == sorted((len(q.prompt) for q in asked), reverse=True)
    assert found == blocks(asked[::-1], make_tokenizer(), 3)


# ---- the average -----------------------------------------------------------------------------------------


def test_the_average_is_slerp_rounded_once_and_says_what_bfloat16_loses(tmp_path: Path) -> None:
    """Against SLERP in float64; in bfloat16 a light finetune comes back unchanged, with a warning."""
    before = save_model(tmp_path / "before")
    after = make_model()
    with torch.no_grad():
        for p in after.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    after.save_pretrained(tmp_path / "after")
    make_tokenizer().save_pretrained(tmp_path / "after")
    for dtype, has_warning in (("float32", False), ("bfloat16", True)):
        said = list(average(str(before), tmp_path / "after", tmp_path / dtype, 0.99, dtype, 10**9))
        assert [line.startswith("Warning: the merge moves most weights by less") for line in said[1:]] == [
            True
        ] * has_warning
        a, b, found = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after", dtype))
        for name, value in found.items():
            x, y = a[name].double().flatten(), b[name].double().flatten()
            angle = torch.arccos((x @ y / x.norm() / y.norm()).clamp(-1, 1))
            wanted = (torch.sin(0.01 * angle) * x + torch.sin(0.99 * angle) * y) / torch.sin(angle)
            if angle > 1e-4:
                torch.testing.assert_close(
                    value.flatten(), wanted.to(value.dtype), rtol=2e-6 if dtype == "float32" else 2**-8, atol=1e-9
                )
    with pytest.raises(TrainError, match=r"The SLERP of .* failed"):
        list(average(str(before), tmp_path / "nothing", tmp_path / "x", 0.99, "float32", 10**9))


# ---- the stage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stage that nobody stopped; its output is `out`."""
    root = tmp_path_factory.mktemp("stage")
    finetune(build_config(stage_values(root)))
    return root


def contents(output: Path) -> dict[str, Any]:
    """All that a stage decides: questions, responses, units, counts, scores, weights."""
    names = ["questions/*.jsonl", "cycle-*/samples/*", "cycle-*/pairs/*", "cycle-*/eval/*", "*/model.safetensors"]
    names += ["cycle-*/model/model.safetensors"]
    return {str(p.relative_to(output)): p.read_bytes() for name in names for p in sorted(output.glob(name))}


def test_a_stage_leaves_its_phases_and_an_ordinary_model(whole: Path) -> None:
    out = whole / "out"
    for cycle in (1, 2):
        folder = out / f"cycle-{cycle}"
        assert {p.name for p in folder.iterdir()} == {"samples", "pairs", "train", "model", "eval"}
        lines = read_lines(folder / "samples/responses.jsonl")
        assert [len(line["responses"]) for line in lines] == [4] * 20
        counts = json.loads((folder / "pairs/report.json").read_text())
        assert counts["samples"] == 80
        assert counts["units"] == counts["pairs"] == len(read_lines(folder / "pairs/pairs.jsonl")) > 0
        assert len(read_metrics(folder / "train")) == 4
        assert not list((folder / "train").glob("*/*.safetensors"))
    scores = json.loads((out / "cycle-2/eval/report.json").read_text())
    assert 0 <= scores["accuracy"] <= 1
    assert scores["perplexity"]["d.jsonl"] == pytest.approx(np.exp(scores["nll"]["d.jsonl"]))
    first, last = (read_lines(out / f"cycle-{n}/samples/responses.jsonl") for n in (1, 2))
    assert first != last
    final = load_file(out / "final/model.safetensors")
    assert all(torch.equal(final[k], v) for k, v in load_file(out / "cycle-2/model/model.safetensors").items())
    AutoModelForCausalLM.from_pretrained(out / "final")
    assert "| 2 | " in (out / "final/README.md").read_text()
    assert not {"merge_report.json", "mergekit_config.yml", "SHA256SUMS"} & {p.name for p in (out / "final").iterdir()}
    assert not list(out.rglob(".partial-*"))


def test_other_settings_are_refused_and_a_complete_stage_is_left_alone(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole / "out")
    finetune(build_config(stage_values(whole)))
    assert contents(whole / "out") == before
    assert "this stage is complete already" in capsys.readouterr().err
    with pytest.raises(TrainError, match=r"contrast\.samples: 4 -> 5"):
        finetune(build_config(stage_values(whole, samples=5)))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def die(*_: Any, **__: Any) -> Any:
    raise Killed


def break_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Let the second call of a function that a phase makes end the process, or its first."""
    module, name, calls = {
        "questions": (stage_module, "write_questions", 0),
        "samples": (Voice, "respond", 5),  # after the evaluation's block, in the middle of the questions
        "pairs": (stage_module, "write_units", 0),
        "train": (stage_module, "run_training", 0),
        "model": (average_module, "taken_back", 0),
        "eval": (stage_module, "source_nll", 1),
        "final": (stage_module.shutil, "copy2", 1),
    }[place]
    real: Callable[..., Any] = getattr(module, name)
    left = [calls]

    def counting(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return die() if left[0] < 0 else real(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)


def test_the_same_command_goes_on_from_the_end_of_any_phase(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stage, broken in every phase in turn, then let go: the bytes of a stage that nobody stopped."""
    values = {**stage_values(whole), "output": str(tmp_path / "out")}
    for place in ("questions", "samples", "pairs", "train", "model", "eval", "final"):
        with monkeypatch.context() as broken:
            break_at(broken, place)
            with pytest.raises(Killed):
                finetune(build_config(values))
        if place == "samples":  # and the line under way is cut
            part = tmp_path / "out/cycle-1/.samples/0.jsonl"
            assert 0 < len(read_lines(part)) < 20
            part.write_bytes(part.read_bytes()[:-7])
    finetune(build_config(values))
    expected, found = contents(whole / "out"), contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_a_signal_in_training_saves_and_the_stage_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import loop

    values = {**stage_values(whole), "output": str(tmp_path / "out")}
    real = loop.train_step

    def stopping(*args: Any) -> Any:
        args[-1].requested = True
        return real(*args)

    with monkeypatch.context() as broken:
        broken.setattr(loop, "train_step", stopping)
        finetune(build_config(values))
    assert not (tmp_path / "out/cycle-1/model").exists()
    assert (tmp_path / "out/cycle-1/train/checkpoints").exists()
    finetune(build_config(values))
    assert contents(tmp_path / "out") == contents(whole / "out")


def test_no_pairs_are_an_error_that_says_why(whole: Path, tmp_path: Path) -> None:
    values = {**stage_values(whole, verify={"extract": "never", "compare": "exact"}), "output": str(tmp_path / "out")}
    with pytest.raises(TrainError, match=r"There are no pairs to learn from: 0 of 80 samples are right"):
        finetune(build_config(values))


def test_cross_entropy_on_the_sources_and_no_held_out_questions(whole: Path, tmp_path: Path) -> None:
    """`ce_on: sources`: the pairs are ranked, the sources are learned; a stage without any evaluation has none."""
    values = stage_values(whole, ce_on="sources", cycles=1)
    values |= {"output": str(tmp_path / "out"), "packing": False, "max_steps": 2}
    values["sources"][0]["held_out"] = 0
    values["contrast"]["questions"] = {**values["contrast"]["questions"], "held_out": 0}
    finetune(build_config(values))
    assert not (tmp_path / "out/cycle-1/eval").exists()
    assert len(read_metrics(tmp_path / "out/cycle-1/train")) == 2
    assert (tmp_path / "out/final/config.json").exists()


@pytest.mark.slow
def test_two_processes_give_the_stage_of_one(whole: Path, tmp_path: Path) -> None:
    """Responses, pairs and scores are equal; weights as near as sums in another order are."""
    values = {**stage_values(whole), "output": str(tmp_path / "out")}
    done = run_two_ranks(write_config(tmp_path / "c.yaml", values))
    assert done.returncode == 0, done.stderr
    one, two = contents(whole / "out"), contents(tmp_path / "out")
    assert one.keys() == two.keys()
    same = [name for name in one if name.startswith(("questions", "cycle-1/samples", "cycle-1/pairs"))]
    assert len(same) == 9
    assert all(one[name] == two[name] for name in same)
    a, b = (load_file(root / "cycle-1/model/model.safetensors") for root in (whole / "out", tmp_path / "out"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5)


# ---- slow ------------------------------------------------------------------------------------------------


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


@pytest.mark.slow
def test_kill_9_in_each_phase_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a phase has begun to write; the next session takes up what is there."""
    out = tmp_path / "out"
    config = write_config(tmp_path / "c.yaml", {**stage_values(whole), "output": str(out)})
    marks = [
        ".partial-questions", "cycle-0/.partial-eval", "cycle-1/.samples/0.jsonl", "cycle-1/.partial-pairs",
        "cycle-1/train/checkpoints/.partial-*", "cycle-1/train/.partial-final", "cycle-1/.model", "cycle-1/eval",
        "cycle-2/.samples/0.jsonl", "cycle-2/.model", ".partial-final",
    ]  # fmt: skip
    killed = 0
    for mark in marks:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", str(config)], stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment()
        )
        until(process, lambda mark=mark: any(p.stat().st_size for p in out.glob(mark)))  # type: ignore[misc]
        process.kill()
        said = process.communicate()[1]
        killed += process.returncode == -9
        assert process.returncode in (-9, 0), said
    assert killed >= 8
    done = subprocess.run([sys.executable, "-m", "train", str(config)], cwd=REPO, env=environment(), check=False)
    assert done.returncode == 0
    expected, found = contents(whole / "out"), contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.slow
def test_smollm2_goes_through_a_cycle(tmp_path: Path) -> None:
    """A real model, in bfloat16, by its chat template: it samples, ranks, averages and is evaluated."""
    from smollm2_model import convert_smollm2

    model = convert_smollm2(tmp_path / "smollm2", "bfloat16")
    rows = [
        {"q": f"What is {a} + {b}? Reply with the number only.", "a": str(a + b)}
        for a in range(1, 5)
        for b in range(1, 5)
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    questions = {
        "path": str(tmp_path / "q.jsonl"),
        "prompt": "{q}",
        "answer": "{a}",
        "format": "chat-template",
        "held_out": 4,
    }
    contrast = {
        "questions": questions, "verify": {"compare": "number"}, "cycles": 1, "samples": 4, "temperature": 1.2,
        "top_p": 1.0, "max_new_tokens": 24, "stop": None,
    }  # fmt: skip
    values = {
        "model": str(model), "output": str(tmp_path / "out"), "contrast": contrast, "mixing_ratio": 1.0,
        "dtype": "bfloat16", "sequence_length": 128, "global_batch": 4, "max_steps": 2, "lr": 1e-5,
    }  # fmt: skip
    finetune(build_config(values))
    counts = json.loads((tmp_path / "out/cycle-1/pairs/report.json").read_text())
    assert counts["samples"] == 48
    assert 0 < counts["right"] < 48
    assert counts["pairs"] > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out/final"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out/final").config.vocab_size
        == before["model.embed_tokens.weight"].shape[0]
    )
