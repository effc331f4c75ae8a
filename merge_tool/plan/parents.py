"""Differences between the configurations and tokenizers of the models to be merged, for warnings; if the models do not
fit, for the error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import KeyPath, is_of_text, sub_configs
from merge_tool.errors import CheckpointError, MismatchError, listed, shown
from merge_tool.recipe.recipe import Recipe
from merge_tool.vocabulary.align import Alignment, explain
from merge_tool.vocabulary.differences import Ways, end_warnings, same_bytes, tokenizer_warnings
from merge_tool.vocabulary.join import compare_tokenizers
from merge_tool.vocabulary.row_tensors import rows_of
from merge_tool.vocabulary.tokenizer_json import TOKENIZER

_KIND = "are these related models?"
_POSITIONS = "the two see positions differently"
_SCALES = "the same values have another effect in each"
_REACH = "the two attend to other tokens"
_EXPERTS = "the two choose and weigh experts differently"
# Settings that change the meaning of weights, in all spellings of libraries, and the reason.
_SETTINGS: Mapping[str, str] = {
    **dict.fromkeys(("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"), _KIND),
    **dict.fromkeys(("num_key_value_heads", "num_heads", "tie_word_embeddings", "head_dim", "position_embedding_type"),
                    _KIND),
    **dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim", "alibi", "rope_interleave",
                     "no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq",
                     "original_max_position_embeddings"), _POSITIONS),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "hidden_activation_function"),
                    "the weights were trained for another activation"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
                     "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
                     "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
                     "logit_scale", "scale_emb", "scale_depth", "dim_model_base", "clip_qkv", "attn_scale",
                     "scale_attn_weights", "use_parallel_residual", "parallel_attn", "scale_decoder_outputs"), _SCALES),
    **dict.fromkeys(("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern",
                     "layer_types", "attention_chunk_size", "is_causal"), _REACH),
    **dict.fromkeys(("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group",
                     "topk_group", "topk_method", "moe_top_k"), _EXPERTS),
}  # fmt: skip
_SAME_ROPE = {  # older names
    "rotary_emb_base": "rope_theta", "global_rope_theta": "rope_theta", "local_rope_theta": "rope_local_base_freq",
    "rotary_pct": "partial_rotary_factor",
}  # fmt: skip
_USUAL_BASE = 10_000.0  # the base of rotary positions that transformers uses for these if config.json has none
_OF_USUAL_BASE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "stablelm", "gpt_neox", "falcon", "olmo"}
    | {"olmo2", "starcoder2", "granite"}
)
# Settings that are worth a warning even if only one config.json has them.
_ONE_SIDED = frozenset({"num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling"})


def parent_warnings(recipe: Recipe, models: Sequence[Checkpoint], alignment: Alignment | None) -> Iterable[str]:
    """The models' notices, and the differences of each model from the model whose files the output has. With an
    `alignment`, rows are matched by token, and the tokenizer may be another model's."""
    for model in models:
        yield from model.notices
    donor = models[recipe.donor]
    owners = [m for m in models if alignment is not None and m.tokenizer_folder is alignment.tokenizer]
    for number, other in enumerate(models):
        name = recipe.names[number] if recipe.is_strict else str(recipe.models[number])
        ways = _ways(recipe, name, alignment is not None)
        if other is not donor:
            yield from _differences(donor, other)
            yield from end_warnings(donor, other, ways)
        if other is not (owner := owners[0] if owners else donor):
            yield from tokenizer_warnings(owner, other, ways)


def _ways(recipe: Recipe, name: str, has_own_rows: bool) -> Ways:
    chooses = recipe.options.chat_template or recipe.chat_template
    return Ways(
        rows="" if has_own_rows else recipe.rows_option,
        files=f"--files-from {shown(name)}",
        template="" if chooses else f"--chat-template {shown(name)}",
    )


def check_vocabularies(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if a row means different tokens in two models. If the recipe is strict, any difference
    between tokenizers counts; otherwise only a token with different ids."""
    base, *others = models
    for other in others:
        here, there = base.tokenizer_folder, other.tokenizer_folder
        if here is None or there is None or not (here.has(TOKENIZER) and there.has(TOKENIZER)):
            continue
        if rows_of(base) is None or same_bytes(here, there, TOKENIZER):
            continue
        try:
            comparison = compare_tokenizers(here, there)
        except CheckpointError:
            continue  # a warning covers it
        if comparison.num_moved or (recipe.is_strict and any(comparison.num_alone)):
            raise MismatchError(
                f"{base.name} and {other.name} have different vocabularies, so rows of one number mean other tokens. "
                f"{explain(base, other)}.\nWith {recipe.rows_option} rows are matched by token; --exclude PATTERN "
                "keeps the base's tensors that it matches (embeddings, heads)."
            )


def explain_rows(models: Sequence[Checkpoint]) -> str:
    """How far vocabularies agree, for models whose embeddings have different numbers of rows; empty if there are
    none."""
    base, *others = models
    lines = [f"\n{text}." for other in others if _has_other_rows(base, other) and (text := _compared(base, other))]
    return "".join(lines)


def _has_other_rows(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether the embeddings differ in their number of rows."""
    rows = rows_of(base), rows_of(other)
    return None not in rows and rows[0] != rows[1]


def _compared(base: Checkpoint, ft: Checkpoint) -> str:
    try:
        return explain(base, ft)
    except CheckpointError as e:
        return f"The vocabularies cannot be compared: {str(e).rstrip('.')}"


def _differences(base: Checkpoint, ft: Checkpoint) -> Iterator[str]:
    if base.config is None or ft.config is None:
        return
    a, b = _settings(base.config), _settings(ft.config)
    nested = len(_language(base.config)) != len(_language(ft.config))  # a language model, and the same in another one
    for key in sorted(a.keys() | b.keys()):
        own, theirs, last = a.get(key), b.get(key), key.split(".")[-1]
        if own == theirs or (last == "tie_word_embeddings" and base.tensors.keys() != ft.tensors.keys()):
            continue  # heads have a warning of their own
        is_one_sided = key not in a or key not in b
        if last == "rope_theta" and is_one_sided and _is_usual_base(*((a, theirs) if key in b else (b, own))):
            continue
        if (nested and last == "model_type") or (is_one_sided and (last not in _ONE_SIDED or (nested and key != last))):
            continue
        here, there = (_in_words(side.get(key, "nothing")) for side in (a, b))
        why = _SETTINGS[last] if _SETTINGS[last].endswith("?") else f"{_SETTINGS[last]}."
        yield f"{key} differs: {here} in {base.name}, {there} in {ft.name}: {why}"


def _is_usual_base(silent: Mapping[str, Any], value: Any) -> bool:
    """Whether a model whose configuration has no rotary base uses this base."""
    return value == _USUAL_BASE and silent.get("model_type") in _OF_USUAL_BASE


def _in_words(value: Any) -> str:
    return listed(value) if isinstance(value, list) else shown(value)


def _language(config: Mapping[str, Any]) -> list[KeyPath]:
    return [keys for keys, _ in sub_configs(config) if is_of_text(keys)]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter: of the language model by their names, of another part as `vision_config.head_dim`.

    A setting that is off (null, or no scaling of positions) is None.
    """
    settings: dict[str, Any] = {"rope_scaling": None}
    for keys, part in sub_configs(config):
        prefix = "" if is_of_text(keys) else ".".join((*keys, ""))
        for key, value in _with_rope(part).items():
            if key in _SETTINGS and not (
                prefix == "" and key in ("architectures", "model_type") and keys and key in settings
            ):
                settings[prefix + key] = value
    return settings


def _with_rope(part: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its rotary positions as `rope_theta` and `rope_scaling`, whatever version wrote it."""
    settings = {_SAME_ROPE.get(key, key): value for key, value in part.items()}
    rope = part.get("rope_parameters") or part.get("rope_scaling")
    if not isinstance(rope, dict):
        return settings
    if not any(isinstance(value, dict) for value in rope.values()):
        return settings | _of_rope(rope)
    full, window = rope.get("full_attention"), rope.get("sliding_attention")  # one for each kind of layers
    if isinstance(full, dict) and isinstance(window, dict) and len(rope) == 2:
        there = _of_rope(window)
        if there.pop("rope_scaling") is None and there.keys() <= {"rope_theta"}:
            return settings | _of_rope(full) | {"rope_local_base_freq": there.get("rope_theta")}
    return {**settings, "rope_scaling": rope}


def _of_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor, if they are there; rope_scaling, which is None where it scales nothing."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    known = ("rope_theta", "partial_rotary_factor")
    rest = {k: v for k, v in rope.items() if k not in (*known, "rope_type", "type") and v is not None}
    scaling = None if kind == "default" and not rest else {"rope_type": kind, **dict(sorted(rest.items()))}
    return {**{key: rope[key] for key in known if key in rope}, "rope_scaling": scaling}
