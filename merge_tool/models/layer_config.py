"""What config.json says layer by layer, for a model whose layers are stacked anew: lists with one entry for each layer,
lists of layer numbers, and numbers that a layer's kind follows from (a pattern, an interval, a first layer).

Tables at the top, each with its reason; they follow transformers 5.23, as layer_kinds.py does. A kind that follows from
a number is written as a list where the model's class reads one. Otherwise the number is solved for: the one that gives
the new layers their old kinds. What cannot be said is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from merge_tool.checkpoint.sub_configs import is_of_text, sub_configs
from merge_tool.models.layer_counts import COUNTS, PREDICTED, Config, count_of
from merge_tool.models.layer_kinds import ALIASES, DERIVED, ENDS_FULL, FULL, Kinds, as_int, llama4_experts, until

# --------------------------------------------------------------------------------- numbers to solve for


@dataclass(frozen=True, slots=True)
class _Solved:
    """Numbers that layers' kinds follow from where no list can say them. `kinds` are the kinds by the numbers,
    `ranges` the candidates for each number, given the number of layers. `defaults` are the values of absent numbers."""

    keys: tuple[str, ...]
    kinds: Kinds
    ranges: Callable[[int], tuple[Sequence[int], ...]]
    defaults: Mapping[str, int]


def _ernie(config: Config, n: int) -> list[Any]:
    end, step = as_int(config.get("moe_layer_end_index"), -1), max(as_int(config.get("moe_layer_interval"), 1), 1)
    end = n - 1 if end == -1 else end
    return [(i + 1) % step == 0 and as_int(config.get("moe_layer_start_index"), 1) <= i <= end for i in range(n)]


def _period(name: str) -> _Solved:
    """Jamba: the layers i with i % period == offset."""
    period, offset = f"{name}_layer_period", f"{name}_layer_offset"
    defaults = {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1}

    def kinds(config: Config, n: int) -> list[Any]:
        step, first = (as_int(config.get(key), defaults[key]) for key in (period, offset))
        return [i % step == first for i in range(n)] if first < step else []  # the class refuses others

    return _Solved((period, offset), kinds, lambda n: (range(1, n + 2), range(n + 1)), defaults)


def _sharing(config: Config, n: int) -> list[Any]:
    """Which layers take the keys and values of an earlier layer (Gemma 3n and 4), and which layer's those are."""
    first, kinds = n - as_int(config.get("num_kv_shared_layers"), 0), config.get("layer_types")
    return [i >= first for i in range(n)] if isinstance(kinds, list) else []


_DENSE_COUNTS = ("first_k_dense_replace", "num_dense_layers")
_SOLVED: tuple[_Solved, ...] = (
    *(_Solved((key,), until(key, 0, (True, False)), lambda n: (range(n + 1),), {}) for key in _DENSE_COUNTS),
    _Solved(
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        _ernie,
        lambda n: (range(n + 1), range(-1, n), range(1, n + 1)),
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    ),
    _period("attn"),
    _period("expert"),
)
# model_type -> the first of the keys that its class reads, where config.json may leave them out
_IMPLIED: Mapping[str, tuple[str, ...]] = {
    "ernie4_5_moe": ("moe_layer_start_index",), "jamba": ("attn_layer_period", "expert_layer_period"),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4v_moe"), ("first_k_dense_replace",)),
    **dict.fromkeys(("afmoe", "lfm2_moe"), ("num_dense_layers",)),
}  # fmt: skip
_IMPLIED_COUNTS = {"deepseek_v3": 3, "glm4_moe": 1, "glm4v_moe": 1, "afmoe": 1, "lfm2_moe": 2}

# ------------------------------------------------------------------------------ lists, strings, dicts

# Lists of layer numbers, with the number of the first layer.
NUMBERS: Mapping[str, int] = {
    **dict.fromkeys(("cross_attention_layers", "moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs",
                     "hybrid_layer_ids", "rope_scaling_layers", "local_layer_ids", "global_attn_idx",
                     "moe_layer_indices", "dense_layers", "moe_layers_enum", "attn_layer_idx", "global_layers",
                     "sliding_window_layers", "global_attention_layers", "full_attention_layers",
                     "swa_layers", "skip_layers", "sparse_layers"), 0),
    **dict.fromkeys(("full_attn_layers", "kda_layers", "ple_layer_ids"), 1),  # Kimi Linear, Qwen4: counted from 1
}  # fmt: skip
_NUMBERED = re.compile(r"(?:layer|attn|attention|block|moe|expert)\w*_(?:idxs?|ids|indices|indexes|numbers)$")
# Lists of other things, however long they are. A list of as many entries as layers is otherwise taken for one entry
# a layer.
OTHER_LISTS = frozenset({
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "forced_eos_token_id", "mrope_section",
    "short_factor", "long_factor", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "block_types",
    "time_step_limit", "ssm_multipliers", "mlp_multipliers", "target_layer_ids", "deepstack_visual_indexes",
    "vision_feature_layer", "vision_feature_layers", "supported_aspect_ratios", "intermediate_layers_indices",
    "image_grid_pinpoints", "keys_to_ignore_at_inference", "langs", "languages", "summary_idxs",
    "mtp_layer_types", "mtp_mlp_layer_types", "mtp_layers_block_type", "mtp_local_layer_ids", "stop_token_ids",
    "axial_pos_shape", "axial_pos_embds_dim", "attention_types", "pos_att_type",
    "image_token_id", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names",
    "modules_to_not_convert", "time_step_scale", "conv_dim", "conv_stride", "conv_kernel", "depths", "extract_layers",
    "look_backward_layers", "look_ahead_layers", "feature_layers", "num_buckets", "query_stride",
    "encoder_hidden_sizes",
}) | {f"{word}_token_ids" for word in ("image", "video", "audio", "stop", "eos")}  # fmt: skip
# Lists with one entry for each layer under names that do not say so.
LAYER_LISTS = frozenset({
    "block_configs", "num_kv_heads", "num_query_heads", "ffn_multipliers", "qkv_multipliers", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "num_experts", "moe_topk", "moe_intermediate_size",
    "num_shared_expert", "attention_window", "activation_sparsity_pattern", "indexer_types", "sliding_windows",
    "swiglu_limits", "swiglu_limits_shared", "rope_theta", "partial_rotary_factors", "attn_type_list",
    "compress_ratios", "hybrid_layer_pattern", "moe_layer_freq", "sparse_attention_freq", "attention_windows",
    "kv_source_layers", "sliding_window", "head_dim", "attn_layers", "index_topk_pattern", "hybrid_override_pattern",
    "hidden_sizes", "num_key_value_heads_per_layer", "num_attention_heads_per_layer",
})  # fmt: skip
# Numbers that a layer's kind may follow from in a model whose code is not known here.
_NUMBER = re.compile(
    r"every_n|_interval$|(?:layer|attn|attention|expert|moe|window|sparse|dense|global)\w*_(?:period|offset|freq|step)$"
    r"|(?:window|attention|layer)_pattern$|^max_window_layers$|^first_k_|_group_size$|layer_(?:start|end)|num_dense_layers"
    r"|shared_layers$|^num_(?:first|last)_\w+_layers$"
)
_HARMLESS = re.compile(r"^(?:output|eval|save|logging|log)_|router|_init|quant|frame|^index_|^num_mem|^pos_emb")
_KIND_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
# Models whose layers compute with their own number: no setting says which number that was.
_BY_NUMBER = {
    "diffllama": "the scale of each layer's attention (lambda_init) follows from the layer's number",
    "zamba": "its attention blocks are shared between layers",
    "zamba2": "its attention blocks are shared between layers",
    "albert": "its layers are shared in groups",
}


@dataclass(slots=True)
class _Part:
    """One configuration of the language model, before and after; its `count` layers become those in `layers`, which
    may be another model's: with more layers, the kinds that follow from numbers are taken to go on."""

    kind: str
    old: Config
    new: dict[str, Any]
    count: int
    layers: Sequence[int]
    doubts: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        return max(self.count, *(layer + 1 for layer in self.layers))

    def pick(self, entries: Sequence[Any]) -> list[Any]:
        """The entries of the new layers, and behind them those of layers outside the stack."""
        return [*(entries[k] for k in self.layers), *entries[self.n :]]

    @property
    def read(self) -> Mapping[str, Kinds]:
        return DERIVED.get(self.kind, {})


def restack(config: Config, layers: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """config.json for a language model whose layer k was layer `layers[k]`, and what it cannot say, in words that each
    begin with the key."""
    new, doubts = _copied(config), list[str]()
    counts: dict[tuple[str, ...], tuple[int, str]] = {}
    for keys, part in list(sub_configs(config)):
        if not is_of_text(keys):
            continue
        outer = next((counts[keys[:k]] for k in range(len(keys), -1, -1) if keys[:k] in counts), None)
        kind = part.get("model_type")
        kind = kind if isinstance(kind, str) else outer[1] if outer else ""
        count = count_of(part)
        if count is None and outer is None:
            counts[keys] = 0, kind
            continue
        count = count if count is not None else outer[0] if outer else 0
        counts[keys] = count, kind
        if count == 0:
            continue
        target = new
        for key in keys:
            target = target[key]
        own = kind.removesuffix("_text") if count_of(part) is not None else ""
        one = _Part(kind=own, old=part, new=target, count=count, layers=layers)
        _edit(one)
        doubts += [f"{'.'.join((*keys, doubt))}" for doubt in one.doubts]
    return new, doubts


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _edit(part: _Part) -> None:
    for key, value in part.old.items():
        if (key in COUNTS or (part.kind == "xlstm" and key == "num_blocks")) and value == part.count:
            part.new[key] = len(part.layers)
        elif isinstance(value, list):
            part.new[key] = _list(part, key, value)
        elif isinstance(value, str):
            part.new[key] = _text(part, key, value)
        elif isinstance(value, Mapping) and value and all(str(k).isdigit() for k in value):
            part.new[key] = _by_layer(part, key, value)
    _gpt_neo(part)
    _block_types(part)
    _experts(part)
    _solve(part)
    _derive(part)
    _neomme(part)
    _shared(part)
    _doubt(part)


# ---------------------------------------------------------------------------------- one key at a time


def _list(part: _Part, key: str, value: list[Any]) -> list[Any]:
    n = part.n
    if key == "kv_source_layers":
        return _sources(part, value)
    if key in NUMBERS or _NUMBERED.search(key):
        return _renumbered(part, value, NUMBERS.get(key, 0))
    if key in OTHER_LISTS or not value:
        return value
    if key == "kv_reuse_group":  # Hymba: groups of layer numbers
        part.doubts.append(f"{key} names layers that share keys and values by their old numbers")
        return value
    tail = len(value) - n
    announced = next((part.old[k] for k in PREDICTED if type(part.old.get(k)) is int), 0)
    is_known = key in LAYER_LISTS or key in part.read or "layer" in key or "layer" in str(value[0])
    numbers = [item for item in value if type(item) is int]
    looks_numbered = len(numbers) == len(value) and sorted({*numbers}) == numbers and 0 <= numbers[0] < numbers[-1] < n
    if "layer" in key and key not in LAYER_LISTS and looks_numbered and set(numbers) != {0, 1}:
        part.doubts.append(f"{key} is taken for a list of layer numbers, counted from 0")
        return _renumbered(part, value, 0)
    if tail == 0 or (is_known and 0 < tail <= max(announced, 0)):
        if not is_known:
            part.doubts.append(f"{key} has as many entries as there were layers, and is taken for one entry a layer")
        return part.pick(value)
    if is_known and len(value) == part.count and part.count < n:
        part.doubts.append(f"{key} has {len(value):,} entries, and the output has layer {n - 1} of another model")
        return value
    if is_known and (key in part.read or ("layer" in key and tail > 0) or key in ("layer_types", "layers_block_type")):
        part.doubts.append(f"{key} has {len(value):,} entries for {n:,} layers, and is left as it was")
    return value


def _renumbered(part: _Part, numbers: list[Any], first: int) -> list[Any]:
    chosen = {number - first for number in numbers if type(number) is int}
    return [place + first for place, layer in enumerate(part.layers) if layer in chosen]


def _sources(part: _Part, value: list[Any]) -> list[Any]:
    """Mistral Large 4: for each layer the layer whose keys and values it takes."""
    if len(value) != part.n:
        part.doubts.append(f"kv_source_layers has {len(value):,} entries for {part.n:,} layers, and is left as it was")
        return value
    sources = list[Any]()
    for place, layer in enumerate(part.layers):
        before = [k for k in range(place) if part.layers[k] == value[layer]]
        own = value[layer] == layer
        if not own and not before:
            part.doubts.append(f"kv_source_layers: layer {place} took its keys from a layer that is not before it now")
        sources.append(place if own or not before else before[-1])
    return sources


def _text(part: _Part, key: str, value: str) -> str:
    if key == "moe_layers_enum":
        numbers = [int(item) for item in value.split(",") if item.strip().isdigit()]
        return ",".join(map(str, _renumbered(part, numbers, 0)))
    if "pattern" not in key or key.startswith("mtp_"):
        return value
    if len(value) == part.n:
        return "".join(part.pick(value))
    if not any(isinstance(part.old.get(name), list) for name in ("layer_types", "layers_block_type")):
        part.doubts.append(f"{key} is a text of {len(value):,} letters for {part.n:,} layers, and is left as it was")
    return value


def _by_layer(part: _Part, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """An object whose keys are layer numbers."""
    if "layer" not in key and "block" not in key:
        if len(value) == part.n and {int(k) for k in value} == set(range(part.n)) and not key.startswith("id2"):
            part.doubts.append(f"{key} has a key for each layer's number, and is taken for one entry a layer")
        else:
            return dict(value)
    # numbers may be written with zeros before them (block_007)
    entries = {int(k): entry for k, entry in value.items()}
    places = [*part.layers, *range(part.n, max(entries) + 1)]
    return {str(place): entries[layer] for place, layer in enumerate(places) if layer in entries}


def _gpt_neo(part: _Part) -> None:
    types = part.old.get("attention_types")
    if not isinstance(types, list):
        if part.kind == "gpt_neo":
            types = [[["global", "local"], 12]]
        else:
            return
    expanded = [kind for kinds, times in types for _ in range(times) for kind in kinds]
    if len(expanded) == part.n:
        part.new["attention_types"] = [[part.pick(expanded), 1]]


def _block_types(part: _Part) -> None:
    """RecurrentGemma repeats a list of kinds; written out, if the new layers have other kinds."""
    block = part.old.get("block_types")
    if part.kind != "recurrent_gemma" and not isinstance(block, list):
        return
    block = block if isinstance(block, list) and block else ["recurrent", "recurrent", "attention"]
    kinds = part.pick([block[i % len(block)] for i in range(part.n)])
    if kinds != [block[i % len(block)] for i in range(len(kinds))]:
        part.new["block_types"] = kinds


def _derive(part: _Part) -> None:
    """Write the lists that were absent and followed from numbers, where the numbers no longer give them."""
    before, after = dict(part.old), part.new
    if part.kind == "llama4" and part.old.get("moe_layers") is None:
        kinds = llama4_experts(part.old, part.n)
        if kinds and (wanted := part.pick(kinds)) != llama4_experts(part.new, len(part.layers)):
            part.new["moe_layers"] = [k for k, has_experts in enumerate(wanted) if has_experts]
    for key, kinds_of in part.read.items():
        if any(part.old.get(name) for name in (key, *ALIASES.get(key, ()))):
            continue
        kinds = kinds_of(before, part.n)
        if len(kinds) < part.n:
            continue
        before[key] = kinds[: part.n]
        wanted = [kinds[k] for k in part.layers]
        if wanted != kinds_of(after, len(wanted)):
            part.new[key] = wanted
    last = part.new.get("layer_types")
    if part.kind in ENDS_FULL and isinstance(last, list) and last and last[-1] != FULL:
        part.doubts.append(f"layer_types: the last layer was no layer of {FULL}, but {part.kind} loads it as one")
    if part.kind == "olmo_hybrid" and isinstance(last, list) and len({*last}) < 2:
        part.doubts.append("layer_types: all layers are of one kind, but olmo_hybrid loads only models of both kinds")


def _experts(part: _Part) -> None:
    """decoder_sparse_step and mlp_only_layers: each n-th layer has experts, but for the listed ones."""
    step = part.old.get("decoder_sparse_step")
    if type(step) is not int or step <= 1:
        return
    apart = {k for k in part.old.get("mlp_only_layers") or () if type(k) is int}
    dense = [k in apart or (k + 1) % step != 0 for k in range(part.n)]
    wanted = [dense[k] for k in part.layers]
    listed = set(part.new.get("mlp_only_layers") or ())
    if wanted != [k in listed or (k + 1) % step != 0 for k in range(len(wanted))]:
        part.new["decoder_sparse_step"] = 1
        part.new["mlp_only_layers"] = [k for k, is_dense in enumerate(wanted) if is_dense]


def _solve(part: _Part) -> None:
    for solved in _SOLVED:
        first = solved.keys[0]
        is_there = any(type(part.old.get(key)) is int for key in solved.keys)
        if part.kind == "zamba" or not (is_there or first in _IMPLIED.get(part.kind, ())):
            continue  # (Zamba's list says it)
        defaults = {**solved.defaults, **({first: _IMPLIED_COUNTS[part.kind]} if part.kind in _IMPLIED_COUNTS else {})}
        before = {**{key: value for key, value in defaults.items() if key in solved.keys}, **_ints(part.old)}
        kinds = solved.kinds(before, part.n)
        if len(kinds) < part.n:
            continue
        wanted = [kinds[k] for k in part.layers]
        if wanted == solved.kinds({**before, **_ints(part.new)}, len(wanted)):
            continue
        for numbers in product(*solved.ranges(len(wanted))):
            candidate = {**before, **dict(zip(solved.keys, numbers, strict=True))}
            if solved.kinds(candidate, len(wanted)) == wanted:
                part.new.update(zip(solved.keys, numbers, strict=True))
                break
        else:
            if first in _DENSE_COUNTS and ("mlp_layer_types" in part.read or part.old.get("mlp_layer_types")):
                continue  # a list says it
            names = " and ".join(solved.keys)
            marked = ", ".join(str(k) for k, is_one in enumerate(wanted) if is_one)
            part.doubts.append(f"{names}: no value says that it is layers {marked or 'none'} now")


def _ints(config: Config) -> dict[str, int]:
    return {key: value for key, value in config.items() if type(value) is int}


def _shared(part: _Part) -> None:
    """num_kv_shared_layers (Gemma 3n and 4): the last layers take keys and values of the last ones before them."""
    shared = part.old.get("num_kv_shared_layers", 15 if part.kind == "gemma3n" else 0)
    if type(shared) is not int or shared <= 0:
        return
    first = part.n - shared
    takes = [layer >= first for layer in part.layers]
    count = sum(takes)
    kinds = part.new.get("layer_types") or (part.read["layer_types"](part.new, len(takes)) if part.read else [])
    old_kinds = part.old.get("layer_types") or (part.read["layer_types"](part.old, part.n) if part.read else [])
    if takes != sorted(takes) or len(kinds) < len(takes) or len(old_kinds) < part.n:
        part.doubts.append("num_kv_shared_layers: the layers that share keys and values are not the last ones now")
        return
    part.new["num_kv_shared_layers"] = count
    for kind in dict.fromkeys(kinds[len(takes) - count : len(takes)]):
        giver = max((k for k in range(first) if old_kinds[k] == kind), default=None)
        now = max((k for k in range(len(takes) - count) if kinds[k] == kind), default=None)
        if now is None or part.layers[now] != giver:
            part.doubts.append(f"num_kv_shared_layers: the layers of {kind} took keys and values from another layer")


# ------------------------------------------------------------------------------------------- doubts


def _doubt(part: _Part) -> None:
    """Name the numbers that nothing here understands, and what follows from a layer's number alone."""
    moved = list(part.layers) != list(range(part.n))
    if part.old.get("scale_attn_by_inverse_layer_idx") is True and moved:
        part.doubts.append("scale_attn_by_inverse_layer_idx: each layer's scale follows from its number, so it changes")
    if part.kind in _BY_NUMBER and moved:
        part.doubts.append(f"model_type {part.kind}: {_BY_NUMBER[part.kind]}, so the layers compute something else")
    _residuals(part)
    understood = {key for solved in _SOLVED for key in solved.keys}
    understood |= {"decoder_sparse_step", "mlp_only_layers", "num_kv_shared_layers"}
    if part.read or any(isinstance(part.old.get(key), list) for key in _KIND_LISTS):
        return  # a list says it
    for key, value in part.old.items():
        is_number = type(value) is int and value > 1 and _NUMBER.search(key) and not _HARMLESS.search(key)
        if not is_number or key in understood:
            continue
        if key == "max_window_layers" and not part.old.get("use_sliding_window"):
            continue
        if key == "max_window_layers" or key.startswith("first_k"):
            changes = any(min(old, value) != min(now, value) for now, old in enumerate(part.layers))
        else:  # a pattern of that length
            changes = any(old % value != now % value for now, old in enumerate(part.layers))
        if changes:
            part.doubts.append(f"{key} is {value:,} as before: if layers differ by their number, they are others now")


def _neomme(part: _Part) -> None:
    """NeoMME: every other layer with a window has a long one, unless config.json says more."""
    if part.kind != "neomme" or "per_layer_config" in part.old:
        return

    def windows(config: Config, n: int) -> dict[str, Any]:
        kinds, count, entries = config.get("layer_types") or part.read["layer_types"](config, n), 0, dict[str, Any]()
        for k, kind in enumerate(kinds):
            if kind == FULL:
                entries[str(k)] = {"sliding_window": None}
            elif (count := count + 1) % 2 == 0:
                entries[str(k)] = {"sliding_window": 1024}
        return entries

    wanted = _by_layer(part, "per_layer_config", windows(part.old, part.n))
    if wanted != windows(part.new, len(part.layers)):
        part.new["per_layer_config"] = wanted


def _residuals(part: _Part) -> None:
    """Numbers that are divided by the root of the number of layers."""
    ratio = math.sqrt(len(part.layers) / part.n)
    scale = part.old.get("scale_depth")  # MiniCPM: scale_depth / sqrt(num_hidden_layers)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and ratio != 1:
        part.new["scale_depth"] = scale * ratio
    if part.kind == "neomme" and part.old.get("residual_multiplier") is None:
        part.new["residual_multiplier"] = (2 * part.n) ** -0.5


def layer_doubts(config: Config | None, layers: Sequence[int]) -> Iterator[str]:
    """Warnings about what config.json cannot say of the stacked layers, by key."""
    for doubt in restack(config or {}, layers)[1]:
        yield f"config.json, {doubt}. Compare it with the layers that were stacked."
