"""Adapters: the model stays as it is, the folder is one that peft and slerp-merge read, and a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merge_tool import merge
from tests.train_fixtures import (
    config_values,
    copy_rows,
    make_config,
    make_model,
    read_metrics,
    run_two_ranks,
    save_model,
    write_config,
    write_jsonl,
)
from train.config import build_config
from train.errors import TrainError
from train.loop import finetune
from train.model import prepare_model
from train.preflight import preflight

peft = pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model", dtype=torch.bfloat16)
    write_jsonl(folder / "d.jsonl", copy_rows())
    return folder


def values(base: Path, output: Path, **change: Any) -> dict[str, Any]:
    settings = {"max_steps": 6, "lora": LORA, "dtype": "bfloat16", "lr": 1e-2, **change}
    return config_values(base / "model", base / "d.jsonl", output, **settings)


def run(base: Path, output: Path, **change: Any) -> Path:
    finetune(build_config(values(base, output, **change)))
    return output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20, 60)[None]).logits
    return found


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("trained") / "o", save_every=2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_the_result_is_an_adapter_that_peft_and_slerp_merge_read(base: Path, tmp_path: Path, trained: Path) -> None:
    """`slerp-merge BASE ADAPTER --t 1` is the model with the adapter; at t between, it is a merge."""
    tensors = load_file(trained / "final" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all("lora_" in name for name in tensors)
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    assert not (trained / "final" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, trained / "final").merge_and_unload()
    merge(base / "model", trained / "final", tmp_path / "one", t=1.0, dtype="float32")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    torch.testing.assert_close(logits(folded), logits(adapted), rtol=1e-4, atol=1e-4)
    merge(base / "model", trained / "final", tmp_path / "half", t=0.4)
    assert (tmp_path / "half" / "model.safetensors").exists()


def test_a_merged_result_is_a_model(base: Path, tmp_path: Path, trained: Path) -> None:
    """The same training: the model in `final` is the adapter's, added by slerp-merge; the adapter lies beside it."""
    output = run(base, tmp_path / "o", lora={**LORA, "output": "merged"})
    adapter, same = (load_file(f / "adapter_model.safetensors") for f in (output / "adapter", trained / "final"))
    assert all(torch.equal(t, same[name]) for name, t in adapter.items())
    merge(base / "model", trained / "final", tmp_path / "one", t=1.0)
    final, one = (load_file(f / "model.safetensors") for f in (output / "final", tmp_path / "one"))
    assert all(torch.equal(t, one[name]) for name, t in final.items())
    assert final["model.norm.weight"].dtype == torch.bfloat16
    finetune(build_config(values(base, output, lora={**LORA, "output": "merged"})))  # complete: says so


def test_a_resumed_adapter_is_the_uninterrupted_one(base: Path, tmp_path: Path, trained: Path) -> None:
    """Bit for bit, dropout included."""
    from train import loop

    step, calls = loop.train_step, []

    def until(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", until)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "o", save_every=2)
    run(base, tmp_path / "o", save_every=2)
    for name in ("final/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        if (trained / name).exists():
            assert (tmp_path / "o" / name).read_bytes() == (trained / name).read_bytes()
    assert [m["loss"] for m in read_metrics(tmp_path / "o")] == [m["loss"] for m in read_metrics(trained)]


def test_only_the_adapter_is_trained_and_it_learns(base: Path, tmp_path: Path) -> None:
    """The frozen model stays bfloat16; the loss falls; the distance is that of the model with its adapter."""
    model = make_model(dtype=torch.bfloat16)
    prepare_model(model, make_config(lora=LORA))
    kinds = {(p.requires_grad, p.dtype, ".lora_" in n) for n, p in model.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}
    output = run(base, tmp_path / "o", max_steps=60)
    losses = [m["loss"] for m in read_metrics(output)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    (line,) = read_metrics(output, "distance")
    assert line["norm"] > 0
    assert line["tensors"] == len(load_file(base / "model" / "model.safetensors"))


def test_the_preflight_counts_the_adapter() -> None:
    found = preflight(make_config(lora={"rank": 4}, optimizer="adamw"), make_model().config, torch.bfloat16, 1)
    model = make_model()
    prepare_model(model, make_config(lora={"rank": 4}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.trained, found.gradient_bytes, found.optimizer_bytes) == (trained, 4 * trained, 8 * trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["nothing"]}, r"lora\.targets is nothing: Target modules .* not found"),
        ({"targets": ["lm_head"]}, r"lora\.targets has the output head"),
    ],
)
def test_targets_that_cannot_be_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        prepare_model(make_model(), make_config(lora=change))


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(TrainError, match="rank and alpha of at least 1"):
        make_config(lora={"rank": 0})
    with pytest.raises(TrainError, match="An average is of whole models"):
        make_config(lora={}, final="average", save_every=1)


@pytest.mark.slow
def test_two_ranks_train_one_adapter(base: Path, tmp_path: Path) -> None:
    """The losses are those of one process, within float tolerance."""
    settings = {"dtype": "float32", "lora": {"rank": 4}, "micro_batch": 1, "lr": 1e-3}
    done = run_two_ranks(write_config(tmp_path / "c.yaml", values(base, tmp_path / "two", **settings)))
    assert done.returncode == 0, done.stderr[-3000:]
    run(base, tmp_path / "one", **settings)
    two, one = ([m["loss"] for m in read_metrics(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)
