"""config.json of stacked layers: transformers makes of the output what the live model computes with its layers
restacked. The oracle moves modules, not settings."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from merge_tool import merge_models
from merge_tool.models.layer_config import layer_doubts, restack
from merge_tool.models.layer_kinds import DERIVED

N = 8
STACKS = ((0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7), (0, 2, 3, 6, 7))
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
DEEPSEEK = MOE | {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
WINDOW = {"sliding_window": 2, "use_sliding_window": True}
MAMBA = {
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "use_mamba_kernels": False,
}  # fmt: skip
# class of the configuration -> settings, and the lists that its config.json does not have: they follow from numbers
LIVE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ("Qwen2Config", WINDOW | {"max_window_layers": 3}, ("layer_types",)),
    "qwen3": ("Qwen3Config", WINDOW | {"max_window_layers": 4}, ("layer_types",)),
    "gemma2": ("Gemma2Config", {"sliding_window": 2}, ("layer_types",)),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 2, "sliding_window_pattern": 3}, ("layer_types",)),
    "cohere2": ("Cohere2Config", {"sliding_window": 2, "sliding_window_pattern": 3}, ("layer_types",)),
    "exaone4": ("Exaone4Config", {"sliding_window": 2, "sliding_window_pattern": 3}, ("layer_types",)),
    "olmo3": ("Olmo3Config", {"sliding_window": 2}, ("layer_types",)),
    "gpt_oss": ("GptOssConfig", MOE | {"sliding_window": 2}, ("layer_types",)),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 3}, ("layer_types", "no_rope_layers")),
    "smollm3-list": ("SmolLM3Config", {"no_rope_layers": [1, 0, 0, 1, 1, 0, 1, 1]}, ()),
    "llama4": (
        "Llama4TextConfig",
        MOE | {"no_rope_layer_interval": 3, "interleave_moe_layer_step": 2, "attention_chunk_size": 2,
               "intermediate_size_mlp": 40, "use_qk_norm": False, "attn_temperature_tuning": False},
        ("layer_types", "no_rope_layers", "moe_layers"),
    ),
    "llama4-list": (
        "Llama4TextConfig",
        MOE | {"moe_layers": [1, 2, 5], "attention_chunk_size": 2, "intermediate_size_mlp": 40, "use_qk_norm": False,
               "attn_temperature_tuning": False},
        (),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig", MOE | {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 16}, ("layer_types",)
    ),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3, 4]}, ()),
    "qwen3_moe-step": ("Qwen3MoeConfig", MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [2]}, ()),
    "qwen3_next": (
        "Qwen3NextConfig",
        MOE | {"full_attention_interval": 3, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
               "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        ("layer_types",),
    ),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK | {"first_k_dense_replace": 2}, ()),
    "glm4_moe": (
        "Glm4MoeConfig",
        MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3},
        (),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 2,
         "moe_layer_end_index": 6},
        (),
    ),
    "exaone_moe": (
        "ExaoneMoeConfig",
        MOE | {"n_group": 1, "topk_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 3, "sliding_window": 2,
               "sliding_window_pattern": 3},
        ("layer_types", "mlp_layer_types"),
    ),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1, 4, 5]}, ()),
    "gpt_neo": (
        "GPTNeoConfig",
        {"num_layers": N, "num_heads": 4, "attention_types": [[["global", "local"], 4]], "window_size": 2},
        ("attention_layers",),
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 2}, ()),
    "lfm2": ("Lfm2Config", {"full_attn_idxs": [2, 5], "block_auto_adjust_ff_dim": False}, ("layer_types",)),
    "modernbert": (
        "ModernBertConfig", {"local_attention": 4, "global_attn_every_n_layers": 2}, ("layer_types",)
    ),
    "afmoe": (
        "AfmoeConfig",
        MOE | {"num_dense_layers": 3, "global_attn_every_n_layers": 3, "sliding_window": 2, "num_shared_experts": 1},
        ("layer_types",),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {"hybrid_override_pattern": "M*-M-*M-", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
         "n_groups": 1, "use_mamba_kernels": False, "chunk_size": 8},
        ("layers_block_type", "layer_types"),
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        DEEPSEEK | {"first_k_dense_replace": 2,
                    "linear_attn_config": {"full_attn_layers": [2, 5], "kda_layers": [1, 3, 4, 6, 7, 8], "head_dim": 8,
                                           "num_heads": 4, "short_conv_kernel_size": 4}},
        ("layer_types", "mlp_layer_types"),
    ),
    "dots1": (
        "Dots1Config",
        MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
               "sliding_window": 2, "max_window_layers": 4},
        ("layer_types",),
    ),
    "minicpm3": ("MiniCPM3Config", DEEPSEEK | {"scale_depth": 1.4}, ()),
}  # fmt: skip
# Lists that the live model's modules read while it runs, by key.
RUNNING = ("layer_types", "layers_block_type")


def live_model(case: str) -> tuple[Any, dict[str, Any]]:
    """A small model of a family, and its config.json with numbers instead of the lists that follow from them."""
    import torch
    import transformers

    name, settings, dropped = LIVE[case]
    raw = {**SMALL, **settings}
    config = getattr(transformers, name)(**copy.deepcopy(raw))
    torch.manual_seed(0)
    is_masked = case == "modernbert"
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    stored = json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": [type(model).__name__]}
    stored = {key: value for key, value in stored.items() if key not in dropped}
    return model, stored | {key: value for key, value in settings.items() if key not in dropped}


CASES = [  # each family's other stack is among the longer checks
    pytest.param(
        case, layers, id=f"{case}-{'-'.join(map(str, layers))}", marks=[pytest.mark.slow] * ((k + n) % len(STACKS) != 0)
    )
    for k, case in enumerate(LIVE)
    for n, layers in enumerate(STACKS)
]


def layers_of(model: Any) -> tuple[Any, str]:
    """The module that has the stack of layers, and the stack's name there."""
    import torch

    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == N:
                return module, name
    raise AssertionError("no stack of layers")


def logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(tokens, **({} if "Masked" in type(model).__name__ else {"use_cache": False})).logits


def restacked_logits(model: Any, layers: Sequence[int], tokens: Any) -> Any:
    """What the live model computes with copies of its layers in another order: each layer as it was built."""
    import torch

    model = copy.deepcopy(model)
    owner, name = layers_of(model)
    kept = getattr(owner, name)
    setattr(owner, name, torch.nn.ModuleList(copy.deepcopy(kept[k]) for k in layers))
    for part in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for key in RUNNING:
            entries = part.__dict__.get(key)
            if isinstance(entries, list) and len(entries) == N:
                setattr(part, key, [entries[k] for k in layers])
        if type(part).__name__ == "BambaConfig":
            part.attn_layer_indices = [place for place, k in enumerate(layers) if k in part.attn_layer_indices]
        if type(part).__name__ == "RecurrentGemmaConfig":
            part.block_types = [(part.block_types * N)[k] for k in layers]
        part.num_hidden_layers = len(layers)
    return logits(model, tokens)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "layers"), CASES)
def test_an_output_computes_what_the_live_model_does_with_its_layers_restacked(
    tmp_path: Path, case: str, layers: tuple[int, ...]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, config = live_model(case)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {tmp_path / 'm'}, layer_range: [{k}, {k + 1}]}}]\n" for k in layers
    )
    (tmp_path / "recipe.yaml").write_text(text)
    report = merge_models(tmp_path / "recipe.yaml", tmp_path / "out")
    assert not [text for text in report.warnings if "config.json" in text]
    tokens = torch.tensor([[5, 9, 33, 7, 21, 40, 8, 62, 17, 3, 11, 12]])
    loaded, problems = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not problems["missing_keys"] | problems["mismatched_keys"]
    if case != "nemotron_h":  # which counts its list
        assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == len(layers)
    expected = restacked_logits(model, layers, tokens)
    assert torch.equal(logits(loaded.eval(), tokens), expected)
    assert not torch.allclose(expected, logits(model, tokens), atol=1e-3)


# ------------------------------------------------------------------ every configuration of transformers

MANY = 13
ORDERS = ((0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (0, 0, 1, 2, 12, 5, 9))
# Settings that layers' kinds follow from, each tried with every class: those that do not read it ignore it.
NUMBERS: tuple[dict[str, Any], ...] = (
    {}, WINDOW | {"max_window_layers": 5}, {"sliding_window_pattern": 3}, {"no_rope_layer_interval": 3},
    {"first_k_dense_replace": 2}, {"global_attn_every_n_layers": 2}, {"full_attention_interval": 3},
    {"layer_group_size": 4}, {"index_topk_freq": 3}, {"moe_layer_freq": 2}, {"dense_mlp_idx": 4},
)  # fmt: skip
# Lists of layer numbers: with all layers in them they are as long as lists with one entry a layer.
NUMBERED = {"moe_layers", "full_attn_idxs", "rope_scaling_layers", "mlp_only_layers", "kv_source_layers"}
PROPERTIES = ("layer_types", "layers_block_type", "mlp_layer_types", "layers_num_experts")


def config_classes() -> Iterator[Any]:
    """The classes of configurations with a number of layers that language models have."""
    transformers = pytest.importorskip("transformers")
    for module in pkgutil.iter_modules(importlib.import_module("transformers.models").__path__):
        try:
            found = importlib.import_module(f"transformers.models.{module.name}.configuration_{module.name}")
        except ImportError:
            continue
        for name, one in vars(found).items():
            is_own = inspect.isclass(one) and issubclass(one, transformers.PreTrainedConfig)
            if is_own and one.__module__ == found.__name__ and not any(word in name for word in ("Vision", "Audio")):
                yield one


def per_layer(config: Any, count: int) -> dict[str, list[Any]]:
    """The lists of a configuration that have one entry for each layer."""
    found = {}
    for key in {*config.__dict__, *PROPERTIES}:
        value = getattr(config, key, None)
        if isinstance(value, (list, tuple)) and len(value) == count and key not in NUMBERED:
            found[key] = list(value)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_list_that_a_class_of_transformers_makes_of_numbers_is_restacked() -> None:
    """For each configuration with one entry a layer, written out or following from numbers: the output's
    configuration, read by the class, has the old layers' entries; or a doubt names a key. A class that is new in
    transformers, or makes other lists of its numbers, fails here: put it into the table."""
    wrong, kinds = set(), set[str]()
    for one in config_classes():
        for settings in NUMBERS:
            raw = {"model_type": one.model_type, "num_hidden_layers": MANY, **settings}
            try:
                config = one.from_dict(dict(raw))
                before = per_layer(config, MANY) if config.num_hidden_layers == MANY else {}
            except Exception:  # noqa: BLE001
                continue  # this class refuses such a setting
            if not before or one.__name__.startswith("SEW") or hasattr(config, "out_indices"):
                continue
            kinds.add(one.model_type)
            for layers in ORDERS:
                for content in (raw, json.loads(json.dumps(config.to_dict(), default=str))):
                    new, doubts = restack(content, layers)
                    if doubts:
                        continue
                    after = one.from_dict(json.loads(json.dumps(new)))
                    assert after.num_hidden_layers == len(layers)
                    wrong |= {
                        (one.__name__, key, str(settings))
                        for key, entries in before.items()
                        if list(getattr(after, key)) != [entries[k] for k in layers]
                    }
    assert not wrong
    assert {kind.removesuffix("_text") for kind in kinds} >= {"qwen2", "gemma3", "llama4", "kimi_linear", "jamba"}
    assert len(kinds & {*DERIVED, *(f"{kind}_text" for kind in DERIVED)}) > 40


# -------------------------------------------------------------------------------- one key at a time

LAYERS = (0, 1, 2, 1, 2, 3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"block_configs": [{"a": 0}, {"a": 1}, {"a": 2}, {"a": 3}]}, [{"a": k} for k in LAYERS]),
        ({"num_kv_heads": [1, 2, 3, 4]}, [k + 1 for k in LAYERS]),
        ({"ffn_multipliers": [0.5, 1.0, 1.5, 2.0]}, [0.5 + k / 2 for k in LAYERS]),
        ({"intermediate_size": [10, 11, 12, 13]}, [10 + k for k in LAYERS]),
        ({"hybrid_override_pattern": "M-*E"}, "M-*-*E"),
        ({"cross_attention_layers": [1, 3]}, [1, 3, 5]),
        ({"moe_layers": [0, 1, 2, 3]}, [0, 1, 2, 3, 4, 5]),
        ({"attn_layer_indices": [2]}, [2, 4]),
        ({"moe_layers_enum": "1,3"}, "1,3,5"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, {"1": {"head_dim": 8}, "3": {"head_dim": 8}}),
        ({"eos_token_id": [5, 6, 7, 8]}, [5, 6, 7, 8]),
        ({"architectures": ["A", "B", "C", "D"]}, ["A", "B", "C", "D"]),
        ({"moe_layer_freq": [0, 1, 1, 1]}, [0, 1, 1, 1, 1, 1]),
        ({"layer_types": ["a", "b", "c", "d", "mtp"], "num_nextn_predict_layers": 1}, [*"abcbcd", "mtp"]),
        ({"intermediate_size": 40}, 40),
        ({"first_k_dense_replace": 1}, 1),
        ({"attention_types": [[["a", "b"], 2]]}, [[["a", "b", "a", "b", "a", "b"], 1]]),
        ({"block_types": ["recurrent", "attention"]}, ["recurrent", "attention"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_each_list_follows_the_layers_without_a_doubt(before: dict[str, Any], after: Any) -> None:
    new, doubts = restack({"model_type": "x", "num_hidden_layers": 4, **before}, LAYERS)
    assert new["num_hidden_layers"] == 6
    assert new[next(iter(before))] == after
    assert doubts == []


@pytest.mark.parametrize(
    ("before", "key"),
    [
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),  # 0, 1 and 3 are dense: no number says so
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, "attn_layer_period"),
        ({"dense_attention_every_n_layers": 3}, "dense_attention_every_n_layers"),
        ({"some_new_list": [7, 7, 9, 9]}, "some_new_list"),
        ({"layer_types": ["a", "b", "c"]}, "layer_types"),
        ({"special_layers": [1, 3]}, "special_layers"),
        ({"layer_pattern": "LG"}, "layer_pattern"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"max_window_layers": 2, "use_sliding_window": True}, "max_window_layers"),
        ({"num_kv_shared_layers": 2, "layer_types": ["a"] * 4}, "num_kv_shared_layers"),
        ({"model_type": "diffllama"}, "model_type diffllama"),
        ({"kv_reuse_group": [[1, 2]]}, "kv_reuse_group"),
    ],
)
def test_a_key_that_cannot_say_it_is_named(before: dict[str, Any], key: str) -> None:
    (doubt,) = layer_doubts({"model_type": "x", "num_hidden_layers": 4, **before}, LAYERS)
    assert doubt.startswith(f"config.json, {key}")


def test_a_dense_beginning_keeps_its_number_where_one_says_it() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
    assert restack(config, (0, 0, 1, 2))[0]["first_k_dense_replace"] == 2
    assert restack(config, (1, 2, 3))[0]["first_k_dense_replace"] == 0
    assert restack(config, (1, 0))[1] != []


def test_a_pattern_that_fits_the_new_layers_stays_a_number() -> None:
    """Whole periods, repeated: the file changes in one number only."""
    config = {"model_type": "cohere2", "num_hidden_layers": 8, "sliding_window_pattern": 4}
    assert restack(config, (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)) == ({**config, "num_hidden_layers": 12}, [])


def test_layers_that_the_copied_configuration_does_not_have_are_counted_and_named() -> None:
    """A stack may have layers of a deeper model. A pattern goes on; of a list nobody knows how."""
    config = {"model_type": "cohere2", "num_hidden_layers": 4, "sliding_window_pattern": 2}
    new, doubts = restack(config, (0, 1, 5, 6))
    assert (new["num_hidden_layers"], doubts) == (4, [])
    assert new["layer_types"] == [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding")]
    config = {"model_type": "x", "num_hidden_layers": 4, "block_configs": [{}, {}, {}, {}]}
    new, (doubt,) = restack(config, (0, 1, 5, 6, 7))
    assert new == {**config, "num_hidden_layers": 5}
    assert doubt.startswith("block_configs has 4 entries")
