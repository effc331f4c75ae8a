"""Mixtures of experts in two layouts: one tensor an expert, or all experts of a layer in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import Array, load_folder, save_model
from merge_tool import MismatchError, merge, merge_models
from merge_tool.cli import merge_tool
from merge_tool.models.lora import open_model

EXPERTS, INNER, HIDDEN = 3, 4, 6
QWEN = ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
MIXTRAL = ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})


def single(seed: int, module: str, parts: dict[str, str], prefix: str = "model.") -> dict[str, Array]:
    shared, own = (np.random.default_rng(s) for s in (0, seed))

    def values(*shape: int) -> Array:
        return (shared.standard_normal(shape) + 0.1 * own.standard_normal(shape)).astype(np.float32)

    tensors = {f"{prefix}embed_tokens.weight": values(9, HIDDEN)}
    for layer in range(2):
        tensors[f"{prefix}layers.{layer}.{module}.gate.weight"] = values(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{prefix}layers.{layer}.{module}.experts.{expert}.{parts[part]}.weight"] = values(*shape)
    return tensors


def fused(tensors: dict[str, Array], module: str, parts: dict[str, str], prefix: str = "model.") -> dict[str, Array]:
    """As transformers 5 has it in memory, by numpy."""
    out = {name: array for name, array in tensors.items() if ".experts." not in name and ".gate." not in name}
    for layer in range(2):
        start = f"{prefix}layers.{layer}."
        own = f"{start}{module}.experts."
        stack = {p: np.stack([tensors[f"{own}{e}.{parts[p]}.weight"] for e in range(EXPERTS)]) for p in parts}
        out[f"{start}mlp.experts.gate_up_proj"] = np.concatenate([stack["gate"], stack["up"]], axis=1)
        out[f"{start}mlp.experts.down_proj"] = stack["down"]
        out[f"{start}mlp.gate.weight"] = tensors[f"{start}{module}.gate.weight"]
    return out


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("kind", [QWEN, MIXTRAL], ids=["qwen", "mixtral"])
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_the_other_layout_gives_the_bytes_of_the_same_layout(
    tmp_path: Path, kind: tuple[str, dict[str, str]], is_fused: bool, prefix: str
) -> None:
    """BASE's layout and names in the output, whichever FT has."""
    x, y = single(1, *kind), single(2, *kind, prefix=prefix)
    here, same_kind = (fused(x, *kind), fused(y, *kind, prefix=prefix)) if is_fused else (x, y)
    other = y if is_fused else fused(y, *kind, prefix=prefix)
    named = (("b", here), ("ft", other), ("t", same_kind))
    base, ft, twin = (save_model(tmp_path / name, tensors, shards=2) for name, tensors in named)
    report = merge(base, ft, tmp_path / "out", 0.3)
    merge(base, twin, tmp_path / "expected", 0.3)
    assert same(load_folder(tmp_path / "out"), load_folder(tmp_path / "expected"))
    layout = "one by one" if is_fused else "all in one tensor"
    assert any(f"Experts are stored {layout} in ft" in warning for warning in report.warnings)
    found = CliRunner().invoke(merge_tool, ["verify", str(tmp_path / "out"), "--against", str(base), str(ft), "--full"])
    assert found.exit_code == 0, found.output
    for out, model in (("ties", ft), ("ties-expected", twin)):
        models = [{"model": str(base)}, {"model": str(model), "parameters": {"weight": 0.5}}]
        merge_models({"merge_method": "ties", "base_model": str(base), "models": models}, tmp_path / out)
    assert same(load_folder(tmp_path / "ties"), load_folder(tmp_path / "ties-expected"))


def test_reads_by_range_are_those_of_the_whole(tmp_path: Path) -> None:
    from merge_tool.models.experts import in_layout_of

    x = single(1, *QWEN)
    base, ft = save_model(tmp_path / "b", fused(x, *QWEN)), save_model(tmp_path / "f", x)
    model, expected = in_layout_of(open_model(base), open_model(ft)), fused(x, *QWEN)
    rng = np.random.default_rng(0)
    for name, array in expected.items():
        for _ in range(20):
            start, stop = sorted(rng.integers(0, array.size + 1, 2))
            assert np.array_equal(model.read_new(name, int(start), int(stop)), array.ravel()[start:stop])


@pytest.mark.parametrize("how", ["transposed", "an expert missing", "another width"])
def test_experts_that_do_not_fit_stay_a_mismatch(tmp_path: Path, how: str) -> None:
    x, y = single(1, *QWEN), single(2, *QWEN)
    here = fused(x, *QWEN)
    if how == "transposed":
        here = {n: np.ascontiguousarray(a.swapaxes(1, 2)) if ".experts." in n else a for n, a in here.items()}
    elif how == "an expert missing":
        y = {name: array for name, array in y.items() if ".experts.1.up" not in name}
    else:
        y = {n: a[: INNER - 1] if "experts.0.gate" in n else a for n, a in y.items()}
    base, ft = save_model(tmp_path / "b", here), save_model(tmp_path / "ft", y)
    with pytest.raises(MismatchError, match="do not have the same tensors"):
        merge(base, ft, tmp_path / "out")


def test_transformers_loads_both_outputs_as_one_model(tmp_path: Path) -> None:
    """A Qwen3 mixture as transformers saves it, and its weights fused by hand: the same logits."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config: Any = hf.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    for seed, name in enumerate(("base", "ft")):
        torch.manual_seed(seed)
        hf.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / name)
    stored = load_folder(tmp_path / "ft")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in stored
    state = hf.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ft").state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    settings = json.loads((tmp_path / "ft/config.json").read_text())
    save_model(tmp_path / "fused", {n: t.numpy().copy() for n, t in state.items()}, config=settings)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "a", 0.4)
    merge(tmp_path / "base", tmp_path / "fused", tmp_path / "b", 0.4)
    assert same(load_folder(tmp_path / "a"), load_folder(tmp_path / "b"))
    ids = torch.arange(9)[None]
    logits = [hf.Qwen3MoeForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("a", "b")]
    assert torch.equal(*logits)
