"""Adapters of mlx-lm: every weight is what its `fuse` computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import Array, load_file, load_folder, save_file, save_model
from merge_tool import MergeToolError, merge

RNG = np.random.default_rng(8)
MODEL = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def adapted(folder: Path, *, is_dora: bool = False, **changed: Any) -> tuple[Path, Path, dict[str, Array]]:
    """A base, an adapter, and the weights after `fuse`: of linear layers (scale * lora_b.T) @ lora_a.T is added, of
    embeddings scale * lora_a @ lora_b."""
    weights = {name: normal(*shape) for name, shape in MODEL.items()}
    expected, tensors = dict(weights), dict[str, Array]()
    for name in ("model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        w = weights[f"{name}.weight"].astype(np.float64)
        is_embedding = "embed" in name
        a, b = normal(w.shape[0 if is_embedding else 1], 2), normal(2, w.shape[1 if is_embedding else 0])
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        w = w + 1.5 * (a @ b if is_embedding else (a @ b).T)
        if is_dora:
            tensors[f"{name}.m"] = np.abs(normal(w.shape[0]))
            w *= (tensors[f"{name}.m"] / np.linalg.norm(w, axis=1))[:, None]
        expected[f"{name}.weight"] = w
    (folder / "lora").mkdir(parents=True)
    save_file(tensors, folder / "lora/adapters.safetensors")
    save_file(tensors, folder / "lora/0000100_adapters.safetensors")
    parameters = {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    settings = {"fine_tune_type": "dora" if is_dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "lora/adapter_config.json").write_text(json.dumps({**settings, "model": "org/base", **changed}))
    return save_model(folder / "base", weights, config=CONFIG), folder / "lora", expected


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("is_dora", [False, True])
def test_the_weights_are_those_of_fuse(tmp_path: Path, is_dora: bool, alone: bool) -> None:
    """The embedding is the head, too, in MLX as here."""
    base, adapter, expected = adapted(tmp_path, is_dora=is_dora)
    merge(base, adapter if alone else f"{base}+{adapter}", tmp_path / "out", 1)
    found = load_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < 1e-5, name


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"fine_tune_type": "full"},
            "fine_tune_type is 'full'; only lora and dora are read. Make a model",
        ),
        ({"fine_tune_type": "dora"}, "has lora_a, lora_b, expected lora_a, lora_b, m"),
        (
            {"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}},
            "settings of an older mlx-lm, whose scale",
        ),
        ({"lora_parameters": {"rank": 2}}, "scale is 'None', expected a number"),
    ],
)
def test_what_is_trained_otherwise_is_refused(tmp_path: Path, changed: dict[str, Any], problem: str) -> None:
    base, adapter, _ = adapted(tmp_path, **changed)
    with pytest.raises(MergeToolError) as caught:
        merge(base, adapter, tmp_path / "out", 1)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("model.layers.9.mlp.up_proj.lora_a", normal(8, 2), "model.layers.9.mlp.up_proj: no place there"),
        ("model.layers.1.mlp.up_proj.lora_b", normal(2, 13), r"\[\[8, 2\], \[2, 13\]\] do not fit model.layers.1.mlp"),
        (
            "model.layers.1.mlp.up_proj.scales",
            normal(12),
            "1 tensor of another kind: model.layers.1.mlp.up_proj.s",
        ),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, name: str, array: Array, problem: str) -> None:
    base, adapter, _ = adapted(tmp_path)
    save_file({**load_file(adapter / "adapters.safetensors"), name: array}, adapter / "adapters.safetensors")
    with pytest.raises(MergeToolError, match=problem):
        merge(base, adapter, tmp_path / "out", 1)
