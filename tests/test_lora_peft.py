"""Adapters against peft itself: what merge_and_unload makes of a model is what we read, element by element."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import load_folder, save_model
from merge_tool import CheckpointError, merge, merge_models
from merge_tool.models.lora import open_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama(**settings: Any) -> Any:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, **settings))


def gpt2() -> Any:
    """Its layers are Conv1D, whose weights are [in, out]; its head is tied."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, **ends)
    )


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 8},
    "alpha_pattern": {"v_proj": 5, r".*\.1\.self_attn\.q_proj": 3},
}
ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": [*ATTENTION, "up_proj", "down_proj"]}),
    "rank-stabilised": (llama, {"target_modules": "all-linear", "use_rslora": True, "r": 6}),
    "patterns": (llama, {"target_modules": ATTENTION, **PATTERNS}),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "fan in, fan out": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "all biases": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of layers": (llama, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "LoRA's own biases": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "eva": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "eva"}),
    "DoRA": (llama, {"target_modules": [*ATTENTION, "up_proj", "down_proj"], "use_dora": True}),
    "DoRA, rank-stabilised": (llama, {"target_modules": "all-linear", "use_rslora": True, "r": 6, "use_dora": True}),
    "DoRA, patterns": (llama, {"target_modules": ATTENTION, **PATTERNS, "use_dora": True}),
    "DoRA, fan in": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "DoRA, embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}),
    "trainable tokens": (llama, {"target_modules": ATTENTION, "trainable_token_indices": [3, 90, 7]}),
    "trainable tokens of the head": (
        llama,
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [0, 95], "lm_head": [5, 4, 3]}},
    ),
    "trainable tokens, tied": (
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [0, 8, 95]},
    ),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, Path, Path]]:
    """The folders of a model, of an adapter with random weights, and of what peft merges them to."""

    def make(model: Callable[[], Any], settings: dict[str, Any]) -> tuple[Path, Path, Path]:
        torch.manual_seed(0)
        folders = tmp_path / "base", tmp_path / "lora", tmp_path / "merged"
        plain = model()
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plain.save_pretrained(folders[0])
        load = type(plain).from_pretrained
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of what we ask it to do on purpose
            asked = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 16, **settings})
            adapted = peft.get_peft_model(load(folders[0]), asked)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.05)
            adapted.save_pretrained(folders[1])
            peft.PeftModel.from_pretrained(load(folders[0]), folders[1]).merge_and_unload().save_pretrained(folders[2])
        return folders

    return make


@pytest.mark.parametrize("case", CASES)
def test_elements_are_those_of_merge_and_unload(case: str, made: Callable[..., tuple[Path, Path, Path]]) -> None:
    """Within what float32 rounds: peft sums the product in float32, in an order of its own, for DoRA norms as well."""
    base, adapter, merged = made(*CASES[case])
    ulps = 8 if "DoRA" in case else 1
    model, expected, before = open_model(f"{base}+{adapter}"), load_folder(merged), load_folder(base)
    assert model.tensors.keys() == expected.keys()
    changed = 0
    for name, info in model.tensors.items():
        found = model.read_new(name, 0, info.numel).reshape(info.shape)
        assert np.abs(found - expected[name]).max() <= ulps * np.spacing(np.abs(expected[name]).max()), name
        changed += found.tobytes() != before[name].tobytes()
    assert changed >= 2


def test_a_pickled_adapter_is_what_peft_reads_from_it(made: Callable[..., tuple[Path, Path, Path]]) -> None:
    """adapter_model.bin of peft's own: the same elements as its adapter_model.safetensors."""
    base, adapter, _ = made(llama, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]})
    expected = open_model(f"{base}+{adapter}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.LlamaForCausalLM.from_pretrained(base)
        peft.PeftModel.from_pretrained(plain, adapter).save_pretrained(
            adapter.with_name("old"), safe_serialization=False
        )
    assert not list(adapter.with_name("old").glob("*.safetensors"))
    model = open_model(f"{base}+{adapter.with_name('old')}")
    for name, info in model.tensors.items():
        assert model.read_new(name, 0, info.numel).tobytes() == expected.read_new(name, 0, info.numel).tobytes(), name


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_what_peft_merges_otherwise_is_refused(
    settings: dict[str, Any], made: Callable[..., tuple[Path, Path, Path]]
) -> None:
    base, adapter, _ = made(llama, {"target_modules": ["q_proj"], **settings})
    with pytest.raises(Exception, match="lora: was initialised by"):
        open_model(f"{base}+{adapter}")


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_are_those_of_merge_and_unload(tmp_path: Path, use_dora: bool) -> None:
    """Of one and two dimensions, 1x1 and larger, with strides and paddings of their own."""
    torch.manual_seed(0)
    nn = torch.nn
    layers = {
        "one": nn.Conv2d(6, 10, 1), "three": nn.Conv2d(6, 10, 3, stride=2, padding=1), "line": nn.Conv1d(6, 10, 5),
        "linear": nn.Linear(6, 6), "cube": nn.Conv3d(4, 7, 2),
    }  # fmt: skip
    model = nn.ModuleDict(layers)
    save_model(tmp_path / "base", {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(layers), use_dora=use_dora)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(tmp_path / "lora")
        expected = {name: tensor.numpy() for name, tensor in adapted.merge_and_unload().state_dict().items()}
    found = open_model(f"{tmp_path}/base+{tmp_path}/lora")
    assert found.tensors.keys() == expected.keys()
    for name, info in found.tensors.items():
        values = found.read_new(name, 0, info.numel).reshape(info.shape)
        ulps = 8 if use_dora else 1
        assert np.abs(values - expected[name]).max() <= ulps * np.spacing(np.abs(expected[name]).max()), name


def test_a_converted_pissa_adapter_is_plain_lora(tmp_path: Path) -> None:
    """What peft saves with path_initial_model_for_weight_conversion belongs to the untouched base."""
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="pissa")
        adapted = peft.get_peft_model(type(base).from_pretrained(tmp_path / "base"), asked)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        adapted.peft_config["default"].init_lora_weights = "pissa"
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    model, expected = open_model(f"{tmp_path}/base+{tmp_path}/lora"), load_folder(tmp_path / "merged")
    for name, info in model.tensors.items():
        np.testing.assert_allclose(model.read_new(name, 0, info.numel).reshape(info.shape), expected[name], atol=1e-6)


def test_replicated_layers_are_the_stack_that_the_refusal_describes(tmp_path: Path) -> None:
    """The steps of the message, followed to the letter, give the live model's logits."""
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "lora"
    llama().save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranges = [[0, 2], [1, 2], [0, 1]]
        asked = peft.LoraConfig(r=4, target_modules=[*ATTENTION, "up_proj"], layer_replication=ranges)
        live = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), asked)
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        live.save_pretrained(adapter)
        expected = live(torch.arange(1, 20)[None]).logits
    with pytest.raises(CheckpointError) as caught:
        merge(base, adapter, tmp_path / "out")
    lines = str(caught.value).splitlines()
    recipe = lines[lines.index("  1. Write stack.yaml, with the adapter's model as MODEL:") + 1 :][:5]
    (tmp_path / "stack.yaml").write_text("\n".join(line[5:] for line in recipe).replace("MODEL", str(base)))
    merge_models(tmp_path / "stack.yaml", tmp_path / "stack")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings.pop("layer_replication") == ranges
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merge(tmp_path / "stack", adapter, tmp_path / "out", 1)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(1, 20)[None]).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("value", [3, [3], [[0, 1], [2]], [[1, 0]], "all"])
def test_ranges_of_layers_that_are_none_are_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "layer_replication": value}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "lora/adapter_model.safetensors").touch()
    save_model(tmp_path / "base", {"q": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"its value '.*' is no list of ranges such as"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
