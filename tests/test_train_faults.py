"""What an audit of the trainer found: each fault as a kind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from test_train_data import QA, TOKENIZER, prepared, source_of, texts
from train.config import load_config
from train.data import report_table
from train.errors import TrainError
from train.model import LossModel, check_model, load_model, notes
from train_fixtures import copy_rows, make_config, make_model, make_tokenizer

CPU = torch.device("cpu")


# ---- rows ------------------------------------------------------------------------------------------------


def test_lists_and_mappings_in_a_template_are_refused_and_can_be_indexed(tmp_path: Path) -> None:
    """Never Python's spelling of them; the row is named."""
    rows = [{"question": "Hi", "answers": {"text": [f"Paris {n}", "x"], "start": [5]}} for n in range(2)]
    for field, problem in (
        (
            "{answers}",
            r"row 1: \{answers\} is \{.*expected text or a number; write \{answers\[0\]\} or \{answers.KEY\}",
        ),
        ("{answers.text}", r"row 1: \{answers\.text\} is \['Paris 0', 'x'\], expected text or a number"),
        ("{answers.text[7]}", r"row 1: \{answers\.text\[7\]\}: column answers is .* which has no 7"),
    ):
        template = [{"prompt": "{question}", "response": field}]
        with pytest.raises(TrainError, match=problem):
            prepared(tmp_path, source_of(tmp_path, rows, templates=template))
    template = [{"prompt": "{question}", "response": "{answers.text[0]}"}]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, rows, templates=template))
    assert [text.split("\n")[3] for text in texts(found)] == ["Paris 0", "Paris 1"]


def test_a_row_that_is_odd_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    odd = [{"role": "tool", "content": "A"}, {"role": "assistant", "content": "B"}]
    rows = [{"m": good}, {"m": good}, {"m": odd}, {"m": [*good, *good[1:]]}]
    source = source_of(tmp_path, rows, messages="m", label="chats")
    with pytest.raises(TrainError, match=r"Source chats, row 3: a message has role 'tool', expected system, user"):
        prepared(tmp_path, source)
    _, (found,) = prepared(tmp_path, {**source, "on_bad_row": "skip"})
    assert (found.report.examples, found.report.dropped_bad) == (2, 2)
    assert "chats: 2 rows cannot become text and are skipped." in report_table([found.report])


def test_rows_that_say_what_a_held_out_row_says_are_not_learned(tmp_path: Path) -> None:
    """A duplicate on both sides would make the evaluation a memory test."""
    rows = [{"question": f"q{n % 4}", "answer": f"a{n % 4}", "id": n} for n in range(12)]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, rows, held_out=2, label="d"))
    held, learned = set(texts(found, "held_out")), set(texts(found))
    assert held
    assert learned
    assert held.isdisjoint(learned)
    report = found.report
    assert report.rows_held_out == 2
    assert report.examples + report.held_out_examples + report.repeated == report.rows == report.rows_kept == 12
    assert f"d: {report.repeated} rows are left out, as a held-out row says the same." in report_table([report])


def test_held_out_rows_that_give_no_example_are_an_error(tmp_path: Path) -> None:
    """Else a run has no evaluation, without a word."""
    rows = [{"question": "q", "answer": "a " * (300 if n % 2 else 1) + str(n)} for n in range(40)]
    problem = r"none of its 1 held-out rows gives an example \(1 longer than sequence_length 40"

    def prepare_all() -> None:
        for seed in range(20):
            prepared(tmp_path / str(seed), source_of(tmp_path, rows, held_out=1), sequence_length=40, seed=seed)

    with pytest.raises(TrainError, match=problem):  # of twenty seeds, one holds out a long row
        prepare_all()


@pytest.mark.parametrize("choice", ["token", "text"])
def test_special_tokens_in_the_data_are_counted_or_text(tmp_path: Path, choice: str) -> None:
    special = TOKENIZER.eos_token
    rows = [{"question": "a", "answer": f"b {special} c"}, {"question": "a", "answer": "b c"}]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, rows, special_tokens_in_data=choice, label="d"))
    assert (TOKENIZER.eos_token_id in found.train.ids) == (choice == "token")
    assert found.report.special_tokens == (1 if choice == "token" else 0)
    told = "d: 1 examples have text that spells a special token and is read as that token"
    assert (told in report_table([found.report])) == (choice == "token")


# ---- config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "ours"),
    [("learning_rate", "lr"), ("num_train_epochs", "epochs"), ("max_seq_length", "sequence_length"),
     ("optim", "optimizer"), ("per_device_train_batch_size", "micro_batch"), ("save_steps", "save_every"),
     ("output_dir", "output")],
)  # fmt: skip
def test_other_programs_names_of_keys_get_ours(key: str, ours: str) -> None:
    with pytest.raises(TrainError, match=f"'{key}' is not a key. Did you mean '{ours}'"):
        make_config(**{key: 1})


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    """Of two values, YAML would lose the first."""
    (tmp_path / "c.yaml").write_text("model: a\nlr: 1e-4\noutput: b\nlr: 1e-5\n")
    with pytest.raises(TrainError, match=r"Line 4: 'lr' is given twice, first in line 2"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_sample_prompt_is_refused_at_the_start(prompt: str) -> None:
    with pytest.raises(TrainError, match=r"sample_prompts is .* expected texts that are not empty"):
        make_config(sample_prompts=["Hi", prompt])


# ---- models ----------------------------------------------------------------------------------------------


def test_one_message_names_all_settings_that_a_model_needs() -> None:
    """A recurrent model with scaled logits needs two; each alone is named alone."""
    torch.manual_seed(0)
    values = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 8}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **values))
    with torch.no_grad():
        mamba.get_input_embeddings().weight.mul_(20)
    head = mamba.lm_head.forward
    mamba.lm_head.forward = lambda hidden: 3 * head(hidden)
    with pytest.raises(TrainError, match=r"Set fused_loss: false and packing: false\."):
        check_model(LossModel(mamba), make_config(), CPU)
    with pytest.raises(TrainError, match=r"lets packed examples see each other\. Set packing: false\."):
        check_model(LossModel(mamba, fused=False), make_config(fused_loss=False), CPU)


def test_a_leak_is_seen_in_bfloat16_too() -> None:
    """A GPU's default type, in which a leak is smaller than rounding."""
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, vocab_size=320))
    with pytest.raises(TrainError, match="lets packed examples see each other"):
        check_model(LossModel(bloom.to(torch.bfloat16)), make_config(), CPU)
    check_model(LossModel(make_model().to(torch.bfloat16)), make_config(), CPU)


def test_rows_behind_each_other_give_the_loss_of_rows_apart() -> None:
    """What flash attention gets: one row of all examples, whose positions begin anew."""
    from train.model import _tiny_batch

    model = make_model()
    batch = _tiny_batch(CPU, first=3)
    batch.labels.copy_(batch.ids)
    for fused in (True, False):
        apart, one = (LossModel(model, fused=fused, one_row=flag)(batch, 0.5) for flag in (False, True))
        assert torch.allclose(apart[0], one[0], rtol=1e-5)
        assert apart[1] == one[1]


def test_weights_that_are_not_numbers_are_named() -> None:
    model = make_model()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "mlp" in n)
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    with pytest.raises(TrainError, match=rf"1 tensors hold infinities or NaN \({name}\)"):
        check_model(LossModel(model), make_config(), CPU)


@pytest.mark.parametrize("kind", ["safetensors", "header", "pickle", "empty pickle"])
def test_damaged_weights_are_one_line(tmp_path: Path, kind: str) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    raw = weights.read_bytes()
    if kind == "safetensors":
        weights.write_bytes(raw[: len(raw) // 2])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + raw[8:100])
    else:
        weights.unlink()
        torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
        whole = (tmp_path / "m" / "pytorch_model.bin").read_bytes()
        (tmp_path / "m" / "pytorch_model.bin").write_bytes(whole[: 0 if kind == "empty pickle" else 500])
    config = make_config(model=str(tmp_path / "m"))
    with pytest.raises(TrainError, match="the model cannot be loaded"):
        load_model(str(tmp_path / "m"), config, model.config, torch.float32)


def test_what_a_user_may_not_expect_is_a_note() -> None:
    """Dropout, a mixture's auxiliary loss, a frozen bias of the head."""
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **small, num_local_experts=2))
    assert any("auxiliary loss" in note for note in notes(moe, make_config()))
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    (note,) = notes(gpt2, make_config())
    assert "dropout is on" in note
    assert "resid_pdrop 0.1" in note
    phi = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **small))
    assert any("freezes the bias of the output head" in note for note in notes(phi, make_config()))
    assert not any("bias" in note for note in notes(phi, make_config(freeze_embeddings=False)))
    assert list(notes(make_model(), make_config())) == []


def test_the_last_look_cannot_lose_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the last evaluation or sample: the same command goes on from the last step."""
    from test_train_loop import train, weights

    base = tmp_path / "base"
    make_model().save_pretrained(base / "model")
    make_tokenizer().save_pretrained(base / "model")
    (base / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in copy_rows(40)))
    whole = train(base, tmp_path / "whole", sample_prompts=["a b"], sample_tokens=2)
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise torch.OutOfMemoryError("no memory for a sample")

        patch.setattr("train.session.sample", fails)
        with pytest.raises(TrainError, match="out of memory"):
            train(base, tmp_path / "a", sample_prompts=["a b"], sample_tokens=2)
    assert not (tmp_path / "a" / "final").exists()
    steps: list[int] = []
    monkeypatch.setattr("train.loop.train_step", lambda *_: steps.append(1))
    train(base, tmp_path / "a", sample_prompts=["a b"], sample_tokens=2)
    assert steps == []
    first, second = weights(tmp_path / "whole", "final"), weights(tmp_path / "a", "final")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole is not None
    assert json.loads((tmp_path / "a" / "samples.jsonl").read_text().splitlines()[-1])["prompt"] == "a b"


def test_rows_of_the_fixture_are_all_different() -> None:
    """Else the tests above would mean less."""
    assert len({json.dumps(row, sort_keys=True) for row in copy_rows(20)}) == 20
    assert QA
