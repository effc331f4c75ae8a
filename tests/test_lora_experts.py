"""LoRA on the parameters of experts (target_parameters): the result is what the live model computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from checkpoints import load_file, load_folder, save_file, save_model
from merge_tool import MismatchError, merge
from merge_tool.models.lora import open_model
from test_lora import normal
from test_lora_tied import IDS, logits, same
from test_memory import linux_only, measured, write_model

SIZES = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(width: int) -> Any:
    """Stored as a weight for each expert, under other names than in the model."""
    return transformers.MixtralConfig(**SIZES, **EXPERTS, hidden_size=16, intermediate_size=width)


def qwen(width: int) -> Any:
    """Stored as a weight for each expert."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 24}
    return transformers.Qwen3MoeConfig(**SIZES, **more, hidden_size=16, moe_intermediate_size=width)


def gpt_oss(width: int) -> Any:
    """Stored as one tensor of all experts, [experts, in, out]."""
    return transformers.GptOssConfig(**SIZES, **EXPERTS, hidden_size=16, intermediate_size=width, head_dim=8)


def llama4(width: int) -> Any:
    """Stored as one tensor, which peft takes for [experts, out, in]."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 24}
    return transformers.Llama4TextConfig(**SIZES, **more, hidden_size=16, intermediate_size=width)


FAMILIES: dict[str, Callable[[int], Any]] = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss, "llama4": llama4}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "one": {"target_parameters": ["experts.down_proj"]},
    "the other": {"target_parameters": ["experts.gate_up_proj"]},
    "rank-stabilised": {"target_parameters": BOTH, "use_rslora": True, "r": 3},
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.gate_up_proj": 4},
        "alpha_pattern": {r".*\.1\..*experts\.down_proj": 5},
    },
    "beside other layers": {"target_parameters": BOTH, "target_modules": ["q_proj", "lm_head"]},
}


def adapted(folder: Path, family: str, width: int, **settings: Any) -> tuple[Path, Path, Any]:
    """A base, an adapter of it, and the live model's logits."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](width))
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plain.save_pretrained(folder / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        asked = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"], **settings})
        live = peft.get_peft_model(model, asked)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(folder / "adapter")
        expected = live(IDS).logits.detach()
        live.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [12, 16], ids=["", "square"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_at_t_1_is_the_live_model(tmp_path: Path, family: str, width: int, case: str) -> None:
    """Element by element as peft's merge, and in logits; where `down_proj` is square, too."""
    base, adapter, live = adapted(tmp_path, family, width, **CASES[case])
    if (family, width, case) == ("llama4", 16, "one"):
        with pytest.raises(MismatchError, match="experts: is square, and whether its class has it transposed is not"):
            merge(base, adapter, tmp_path / "out", 1)
        return
    merge(base, adapter, tmp_path / "out", 1, dtype="float32")
    found, expected, before = (load_folder(tmp_path / name) for name in ("out", "merged", "base"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= 2 * np.spacing(np.abs(array).max()), name
    assert sum(found[name].tobytes() != before[name].tobytes() for name in before) >= 4
    assert same(logits(tmp_path / "out"), live)


def deepseek(width: int) -> Any:
    """Dense layers and shared experts have modules of the same names as the experts' parameters."""
    more = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 8}
    more |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1}
    sizes = SIZES | {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": width}
    return transformers.DeepseekV3Config(**sizes, **more, first_k_dense_replace=1)


def granite(width: int) -> Any:
    """Its checkpoints call the experts input_linear and output_linear."""
    return transformers.GraniteMoeConfig(**SIZES, **EXPERTS, hidden_size=16, intermediate_size=width)


ALL = ["q_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"target_parameters": ["down_proj"]}),
        ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj"], "r": 3}),
        ("mixtral", {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}),
        ("mixtral", {"target_modules": "all-linear"}),
        ("deepseek", {"target_modules": ALL}),
        ("deepseek", {"target_modules": ALL, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_proj": 3}}),
        ("granite", {"target_parameters": ["down_proj"]}),
        ("granite", {"target_parameters": ["gate_up_proj", "down_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_targets_by_their_last_word_are_those_of_the_live_model(
    tmp_path: Path, family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As peft itself writes them, where it is given the names of the experts' layers."""
    for name, make in (("deepseek", deepseek), ("granite", granite)):
        monkeypatch.setitem(FAMILIES, name, make)
    base, adapter, live = adapted(tmp_path, family, 12, **settings)
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


@pytest.mark.parametrize("family", ["qwen", "gpt-oss"])
def test_an_element_of_an_expert_has_the_same_bits_in_whatever_range_it_is_read(tmp_path: Path, family: str) -> None:
    base, adapter, _ = adapted(tmp_path, family, 12, **CASES["both"])
    model = open_model(f"{base}+{adapter}")
    for name, info in model.tensors.items():
        if "experts" in name:
            everything = model.read_new(name, 0, info.numel)
            for cut in (1, 7, info.numel // 3, info.numel - 5):
                pieces = [model.read_new(name, 0, cut), model.read_new(name, cut, info.numel)]
                assert np.concatenate(pieces).tobytes() == everything.tobytes()


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "qwen", 12, **CASES["both"])

    def refusal(**settings: Any) -> str:
        found = json.loads((adapter / "adapter_config.json").read_text()) | settings
        (adapter / "adapter_config.json").write_text(json.dumps(found))
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the message is looked at below
            open_model(f"{base}+{adapter}")
        return str(caught.value)

    assert "do not fit [[4, 24, 16], [4, 16, 12]] of rank [3, 3]" in refusal(r=3)
    assert "has other factors than A and B for gate_up_proj" in refusal(r=2, target_parameters=BOTH[:1])
    assert "names experts.other; only gate_up_proj and down_proj" in refusal(target_parameters=["experts.other"])
    tensors = load_folder(base)
    for name in ("0.mlp.experts.3.up_proj", "1.mlp.experts.2.down_proj"):
        del tensors[f"model.layers.{name}.weight"]
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    assert "layers.1.mlp.experts: factors" in (message := refusal(target_parameters=BOTH))
    assert "layers.0.mlp.experts: factors" in message
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    assert "no place there for gate_up_proj: neither one tensor of all experts nor one for each" in refusal()
    factors = load_file(adapter / "adapter_model.safetensors")
    factors.pop(next(name for name in factors if "experts.lora_B" in name))
    save_file(factors, adapter / "adapter_model.safetensors")
    assert "has other factors than A and B" in refusal()


@linux_only
@pytest.mark.parametrize("is_fused", [False, True])
def test_the_budget_holds_with_experts(tmp_path: Path, is_fused: bool) -> None:
    experts, rows, columns, rank = 64, 1_000, 700, 32
    shapes: dict[str, tuple[int, ...]] = {"norm": (512,)}
    if is_fused:
        shapes["model.layers.0.mlp.experts.down_proj"] = (experts, rows, columns)
    else:
        for expert in range(experts):
            shapes[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = (rows, columns)
    base = save_model(tmp_path / "base", {})
    write_model(base / "model.safetensors", shapes, 1)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    start = "base_model.model.model.layers.0.mlp.experts"
    factors = {f"{start}.lora_A.weight": normal(rank * experts, columns)}
    factors[f"{start}.lora_B.weight"] = normal(rows, rank * experts)
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    peak, expected = measured("merge", base, adapter, tmp_path / "out", "--memory", "64MB")
    assert peak < 64_000_000
    assert abs(expected - peak) < 0.2 * peak
