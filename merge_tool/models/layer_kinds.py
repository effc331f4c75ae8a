"""Lists with one entry for each layer that a model's class makes of numbers, where config.json does not have them: each
layer's kind of attention, whether it has experts. The table `DERIVED` follows transformers 5.23, and
tests/test_layer_config.py compares it with all of its configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from merge_tool.models.layer_counts import Config

Kinds = Callable[[Config, int], list[Any]]  # a configuration and its number of layers -> one entry for each layer

FULL, _SLIDING, _LINEAR, _INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"


def _every(key: str, default: int, *, offset: int = 1, kinds: tuple[str, str] = (_SLIDING, FULL)) -> Kinds:
    """Each n-th layer is of the second kind; `key` is n."""

    def of(config: Config, n: int) -> list[Any]:
        step = config.get(key, default)
        if type(step) is not int or step < 1:
            return []
        return [kinds[(i + offset) % step == 0] for i in range(n)]

    return of


def _from_window(config: Config, n: int) -> list[Any]:
    """The first `max_window_layers` layers attend to everything, the others to a window."""
    has_window = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    return [_SLIDING if has_window and i >= config.get("max_window_layers", 28) else FULL for i in range(n)]


def _dots1_window(config: Config, n: int) -> list[Any]:
    return _from_window({"max_window_layers": 62, **config, "use_sliding_window": True}, n)


def _qwen2_moe_window(config: Config, n: int) -> list[Any]:
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else 0
    return [FULL if i % 2 or i >= first else _SLIDING for i in range(n)]


def until(key: str, default: int, kinds: tuple[Any, Any] = ("dense", "sparse")) -> Kinds:
    """The first layers are of the first kind; `key` is their number."""
    return lambda config, n: [kinds[i >= as_int(config.get(key), default)] for i in range(n)]


def _first(count: int, kinds: tuple[Any, Any] = ("dense", "sparse")) -> Kinds:
    return lambda config, n: [kinds[i >= count] for i in range(n)]


def as_int(value: Any, default: int) -> int:
    return value if type(value) is int else default


def _dense_then_each(config: Config, n: int) -> list[Any]:
    """Dense up to a layer, then each n-th layer has experts, or those that a list says."""
    first, freq = as_int(config.get("first_k_dense_replace"), 1), config.get("moe_layer_freq", 1)
    if isinstance(freq, list):
        return ["sparse" if i >= first and freq[i] else "dense" for i in range(n)] if len(freq) >= n else []
    return ["sparse" if i >= first and i % max(as_int(freq, 1), 1) == 0 else "dense" for i in range(n)]


def _of(items: str, kinds: Mapping[Any, Any]) -> Kinds:
    """Another name of the list, with other names of the kinds."""

    def of(config: Config, n: int) -> list[Any]:
        listed = config.get(items)
        return [kinds.get(item, kinds.get("")) for item in listed] if isinstance(listed, list) else []

    return of


def _rope_interval(config: Config, n: int) -> list[Any]:
    step = as_int(config.get("no_rope_layer_interval"), 4)
    return [int((i + 1) % step != 0) for i in range(n)] if step else []


def _smollm3_window(config: Config, n: int) -> list[Any]:
    has_window = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    ropes = config.get("no_rope_layers") or _rope_interval(config, n)
    return [_SLIDING if has_window and not rope else FULL for rope in ropes]


def _llama4_chunks(config: Config, n: int) -> list[Any]:
    return ["chunked_attention" if rope else FULL for rope in config.get("no_rope_layers") or _rope_interval(config, n)]


def llama4_experts(config: Config, n: int) -> list[Any]:
    step = as_int(config.get("interleave_moe_layer_step"), 1)
    return [(i + 1) % step == 0 for i in range(n)] if step > 0 else []


def _last_is_full(kinds: Kinds) -> Kinds:
    return lambda config, n: [*kinds(config, n)[: n - 1], FULL][:n]


def _cohere2_moe(config: Config, n: int) -> list[Any]:
    first = as_int(config.get("first_k_dense_replace"), 0)
    prefix = _every("prefix_dense_sliding_window_pattern", 1)(config, first)
    return prefix + _every("sliding_window_pattern", 4)(config, n - first)


def _from_sets(config: Config, n: int) -> list[Any]:
    """Kimi Linear numbers its layers from 1."""
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and {"full_attn_layers", "kda_layers"} <= linear.keys():
        return [FULL if i + 1 in linear["full_attn_layers"] else _LINEAR for i in range(n)]
    return [FULL if i and i % 4 == 0 else _LINEAR for i in range(n)]


def _indexers(config: Config, n: int) -> list[Any]:
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, (str, list)):
        return [{"F": "full", "S": "shared"}.get(c, c) for c in pattern]
    step, offset = max(as_int(config.get("index_topk_freq"), 1), 1), as_int(config.get("index_skip_topk_offset"), 2)
    return ["full" if max(i - offset + 1, 0) % step == 0 else "shared" for i in range(n)]


def _step3_experts(config: Config, n: int) -> list[Any]:
    listed = config.get("moe_layers_enum")
    if listed is None:
        return _first(3)(config, n)
    numbers = {int(item) for item in (listed.split(",") if isinstance(listed, str) else listed) if str(item).strip()}
    return ["sparse" if i in numbers else "dense" for i in range(n)]


def _zamba(config: Config, n: int) -> list[Any]:
    period, offset = as_int(config.get("attn_layer_period"), 6), as_int(config.get("attn_layer_offset"), 4)
    rest = ["hybrid" if i % period == offset else _LINEAR for i in range(n - 3)]
    return [_LINEAR, _LINEAR, "hybrid", *rest][:n]


def _muse_thetas(config: Config, n: int) -> list[Any]:
    rope = config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else config.get("rope_theta")
    if theta is None:
        theta = 500_000.0 if "spark" in str(config.get("model_type")) else 10_000.0
    return [0 if (n - 1 - i) % 4 == 0 else theta for i in range(n)]


def _by_number(rule: Callable[[int, int], Any]) -> Kinds:
    """Kinds that follow from a layer's number and the number of layers alone."""
    return lambda config, n: [rule(i, n) for i in range(n)]


def _pick(is_full: Callable[[int, int], bool], other: str = _SLIDING, full: str = FULL) -> Kinds:
    return _by_number(lambda i, n: full if is_full(i, n) else other)


def _olmo_hybrid(config: Config, n: int) -> list[Any]:
    kinds = [FULL if i % 4 == 3 else _LINEAR for i in range(n)]
    return kinds if FULL in kinds else [*kinds[:-1], FULL][:n]


def _deepseek_v4(config: Config, n: int) -> list[Any]:
    ratios = config.get("compress_ratios")
    heavy, light = "heavily_compressed_attention", "compressed_sparse_attention"
    if isinstance(ratios, list):
        return [{0: _SLIDING, 4: light, 128: heavy}.get(ratio) for ratio in ratios[:n]]
    return [light if i > 1 and i % 2 else heavy for i in range(n)]


def _inkling(config: Config, n: int) -> list[Any]:
    local = config.get("local_layer_ids")
    local = {i for i in range(n) if (i + 1) % 6} if local is None else set(local)
    return ["hybrid_sliding" if i in local else "hybrid" for i in range(n)]


def _lfm2(config: Config, n: int) -> list[Any]:
    full = config.get("full_attn_idxs")
    return [FULL if full is None or i in full else "conv" for i in range(n)]


def _dots3(config: Config, n: int) -> list[Any]:
    full = FULL if config.get("use_dsa") is False else _INDEXED
    windows = config.get("use_sliding_window", True)
    return [full if not windows or i < 2 or i % 4 == 1 else _SLIDING for i in range(n)]


def _sparsities(config: Config, n: int) -> list[Any]:
    return [0.95 if i < 10 < n else 0.0 for i in range(n)]


def _minimax_m3(config: Config, n: int) -> list[Any]:
    sparse = config.get("sparse_attention_config")
    return _of("sparse_attention_freq", {0: FULL, "": "minimax_m3_sparse"})(sparse or {}, n)


_WINDOWS = {"layer_types": _from_window}
_HALF = {"layer_types": _every("", 2)}
_SIX = {"layer_types": _every("sliding_window_pattern", 6)}
_SIX_AND_LAST = {"layer_types": _last_is_full(_every("", 6))}
_GRANITE = {"layer_types": _pick(lambda i, n: i % 4 == 0)}
_THIRDS = {"layer_types": _every("global_attn_every_n_layers", 3, offset=0)}
_INTERVAL = {"layer_types": _every("full_attention_interval", 4, kinds=(_LINEAR, FULL))}
_DENSE_ONE = {"mlp_layer_types": _first(1)}
_DENSE_EACH = {"mlp_layer_types": _dense_then_each}
_MUSE = {"layer_types": _pick(lambda i, n: (n - 1 - i) % 4 == 0), "layer_rope_theta": _muse_thetas}
# model_type (without `_text`) -> the lists that its class reads, and what it makes of numbers where they are absent.
DERIVED: Mapping[str, Mapping[str, Kinds]] = {
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_talker",
                     "qwen3_omni_moe_talker_code_predictor"), _WINDOWS),
    **dict.fromkeys(("gemma2", "vaultgemma", "gpt_oss", "t5_gemma_module"), _HALF),
    **dict.fromkeys(("gemma3", "t5gemma2", "t5gemma2_decoder"), _SIX),
    **dict.fromkeys(("gemma4", "gemma4_unified", "diffusion_gemma"), _SIX_AND_LAST),
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "cwm"), _GRANITE),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), _THIRDS),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _INTERVAL),
    **dict.fromkeys(("glm4_moe_lite", "hy_v3", "laguna", "ernie4_5_vl_moe", "ernie4_5_vl"), _DENSE_ONE),
    **dict.fromkeys(("axk1", "axk2"), _DENSE_EACH),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), _MUSE),
    "afmoe": {"layer_types": _every("global_attn_every_n_layers", 4)},
    "bailing_hybrid": {"layer_types": _every("layer_group_size", 6, kinds=(_LINEAR, FULL)),
                       "mlp_layer_types": until("first_k_dense_replace", 2)},
    "beam": {**_SIX_AND_LAST, "mlp_layer_types": _first(3)},
    "cohere2": {"layer_types": _every("sliding_window_pattern", 4)},
    "cohere2_moe": {"layer_types": _cohere2_moe, "mlp_layer_types": until("first_k_dense_replace", 0)},
    "deepseek_v32": {"mlp_layer_types": until("first_k_dense_replace", 3)},
    "deepseek_v4": {"layer_types": _deepseek_v4, "mlp_layer_types": until("num_hash_layers", 3, ("hash_moe", "moe"))},
    "dots1": {"layer_types": _dots1_window},
    "dots3_note": {"layer_types": _dots3, "mlp_layer_types": _dense_then_each},
    "embedding_gemma2": {"layer_types": _last_is_full(_every("sliding_window_pattern", 6))},
    "exaone4": {"layer_types": _every("sliding_window_pattern", 4)},
    "exaone_moe": {"layer_types": _every("sliding_window_pattern", 4),
                   "mlp_layer_types": until("first_k_dense_replace", 1)},
    "flint": {"layer_types": _pick(lambda i, n: i < 2 or i % 4 == 1 or i == n - 1)},
    "gemma3n": {"layer_types": _every("", 5), "activation_sparsity_pattern": _sparsities},
    "glm5_next": {"layer_types": _pick(lambda i, n: i % 4 == 3, _LINEAR, _INDEXED), "mlp_layer_types": _first(3),
                  "indexer_types": _indexers},
    "glm_moe_dsa": {"mlp_layer_types": until("first_k_dense_replace", 3), "indexer_types": _indexers},
    "hy_v4": {"mlp_layer_types": _first(1),
              "indexer_types": _pick(lambda i, n: i == 0 or (i - 1) % 4 == 0, "shared", "full")},
    "inkling": {"layer_types": _inkling, "mlp_layer_types": until("dense_mlp_idx", 0)},
    "inkling2": {"layer_types": _pick(lambda i, n: (i + 1) % 6 == 0, "hybrid_sliding", "hybrid")},
    "kimi_linear": {"layer_types": _from_sets, "mlp_layer_types": until("first_k_dense_replace", 1)},
    "kolibri1": {"layer_types": _every("", 5)},
    "lfm2": {"layer_types": _lfm2},
    "lfm3": {"layer_types": _by_number(lambda i, n: FULL if i % 4 == 2 else _SLIDING if i and i % 4 == 0 else "conv")},
    "llama4": {"no_rope_layers": _rope_interval, "layer_types": _llama4_chunks},
    "mimo_v2_flash": {"layer_types": _pick(lambda i, n: i == 0 or (i + 1) % 6 == 0), "mlp_layer_types": _first(1)},
    "minimax": {"layer_types": _every("", 2, kinds=(FULL, _LINEAR))},
    "minimax_m3_vl": {"layer_types": _minimax_m3,
                      "mlp_layer_types": _of("moe_layer_freq", {0: "dense", "": "sparse"})},
    "mistral_large4": {"no_rope_layers": _rope_interval, "indexer_types": _indexers,
                       "mlp_layer_types": until("first_k_dense_replace", 1)},
    "neomme": {"layer_types": _pick(lambda i, n: (i + 1) % 6 == 0 or i == n - 1)},
    "olmo3": {"layer_types": _every("", 4)},
    "olmo_hybrid": {"layer_types": _olmo_hybrid},
    "qwen2_moe": {"layer_types": _qwen2_moe_window},
    "qwen4_exp": {"layer_types": _every("full_attention_interval", 4, kinds=(_LINEAR, _INDEXED))},
    "smollm3": {"no_rope_layers": _rope_interval, "layer_types": _smollm3_window},
    "step3p5": {"mlp_layer_types": _step3_experts},
    "unlimited_ocr": {"mlp_layer_types": until("first_k_dense_replace", 1)},
    "ultrabert": {"layer_types": _every("", 3)},
    "zamba": {"layers_block_type": _zamba},
}  # fmt: skip
# Lists that a class reads under another key, too: a configuration with one of them has the list.
ALIASES = {"layer_types": ("layers_block_type",), "layers_block_type": ("layer_types",)}
# Their class sets the last layer to full attention, whatever the list says.
ENDS_FULL = frozenset({"gemma4", "gemma4_unified", "diffusion_gemma", "embedding_gemma2"})
