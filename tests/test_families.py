"""Families of models by their keys alone: tiny ones of transformers, merged, loaded again, compared tensor by tensor.

Nothing in merge_tool knows an architecture, so one law holds for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from checkpoints import Array, load_file, load_folder, save_file
from merge_tool import merge
from oracle import float64_merge

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE: dict[str, Any] = {**SMALL, "vocab_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 32}
VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}


def mixtral() -> Any:
    config = transformers.MixtralConfig(**LANGUAGE, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen_moe() -> Any:
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LANGUAGE, **sizes))


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16)
    text = transformers.LlamaConfig(**LANGUAGE)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return transformers.LlavaForConditionalGeneration(config)


def clip() -> Any:
    text = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=16))


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def whisper() -> Any:
    both = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_mel_bins": 8}
    sizes = {"vocab_size": 64, "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**both, **heads, **sizes, **tokens)
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> Any:
    """Its convolution has a weight norm: two tensors with names of torch's own."""
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 16}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL, **convolutions, **positions))


def mamba() -> Any:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    return transformers.MambaForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "mixture of experts (Mixtral)": mixtral,
    "mixture of experts (Qwen3)": qwen_moe,
    "multimodal (LLaVA)": llava,
    "two towers (CLIP)": clip,
    "encoder (BERT)": bert,
    "encoder and decoder (T5)": t5,
    "audio (Whisper)": whisper,
    "audio (wav2vec 2)": wav2vec2,
    "state space (Mamba)": mamba,
}


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def check_is_merge(merged: dict[str, Array], base: dict[str, Array], ft: dict[str, Array], t: float) -> None:
    """Exactly BASE's tensors, each the merge of both by another route."""
    assert merged.keys() == base.keys()
    for name, x in base.items():
        if not np.issubdtype(x.dtype, np.floating):
            assert np.array_equal(merged[name], x)
            continue
        expected = float64_merge(x, ft[name], t)
        assert merged[name].shape == x.shape
        assert np.linalg.norm(merged[name] - expected) <= 2e-7 * np.linalg.norm(expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_loaded_by_transformers_and_is_right(tmp_path: Path, family: str) -> None:
    """No key is missing, unexpected or of another shape, and what is loaded is saved again bit for bit."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    perturbed(model).save_pretrained(tmp_path / "ft")
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", t=0.3)
    merged = load_folder(tmp_path / "out")
    check_is_merge(merged, load_folder(tmp_path / "base"), load_folder(tmp_path / "ft"), 0.3)
    loaded, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    loaded.save_pretrained(tmp_path / "again")
    again = load_folder(tmp_path / "again")
    assert again.keys() == merged.keys()
    assert all(again[name].tobytes() == merged[name].tobytes() for name in merged)


def unet(seed: int) -> dict[str, Array]:
    """The names of a small diffusion UNet, as one file of a training tool has them: convolutions, norms, attention."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "conv_in.weight": (8, 4, 3, 3),
        "time_embedding.linear_1.weight": (16, 8),
        "down_blocks.0.resnets.0.norm1.weight": (8,),
        "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 12),
        "mid_block.attentions.0.proj_in.weight": (8, 8, 1, 1),
        "up_blocks.1.upsamplers.0.conv.weight": (8, 8, 3, 3),
        "conv_out.bias": (4,),
        "model.diffusion_model.label_emb.0.0.weight": (6, 5),
        "alphas_cumprod": (10,),
    }
    found = {name: shared.standard_normal(shape) + 0.1 * own.standard_normal(shape) for name, shape in shapes.items()}
    steps = {"num_batches_tracked": np.array(7, np.int64), "logit_scale": np.array(4.6, np.float32)}
    return {name: array.astype(np.float32) for name, array in found.items()} | steps


def test_a_diffusion_checkpoint_of_one_file_without_config(tmp_path: Path) -> None:
    """Four dimensions, scalars, counters: nothing but names and shapes is known of it."""
    base, ft = unet(1), unet(2)
    save_file(base, tmp_path / "base.safetensors")
    save_file(ft, tmp_path / "ft.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "ft.safetensors", tmp_path / "out.safetensors", t=0.3)
    check_is_merge(load_file(tmp_path / "out.safetensors"), base, ft, 0.3)


def test_a_diffusers_folder_keeps_its_names(tmp_path: Path) -> None:
    """Its config.json and the name of its weights file, by which it is loaded."""
    for name, seed in (("base", 1), ("ft", 2)):
        (tmp_path / name).mkdir()
        save_file(unet(seed), tmp_path / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", t=0.3)
    check_is_merge(load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), unet(1), unet(2), 0.3)
