"""Kinds of tensors, by their names: embeddings, heads, copies of these, tensors after the layers. Each table once.

Names only; callers check shapes if they must be sure. The words are those of the libraries that write checkpoints; a
name in no table is an ordinary tensor.
"""

from __future__ import annotations

import re

# Modules whose weight has a row for each token, to turn tokens into vectors.
EMBEDDINGS = (
    "embed_tokens",  # Llama, and most since
    "wte",  # GPT-2, MPT, DBRX
    "word_embeddings",  # BERT, BLOOM, Falcon, ChatGLM
    "word_embedding",  # XLNet
    "embed_in",  # GPT-NeoX
    "tok_embeddings",  # Llama as Meta wrote it, InternLM2, ModernBERT
    "tokens_embed",  # GPT
    "token_embedding",  # CLIP
    "shared",  # T5, BART
    "embeddings",  # Mamba
    "embedding",  # Mamba as its authors wrote it
    "emb",  # RWKV
)
# Modules whose weight has a row for each token, to turn vectors into logits; often the embedding's weight.
HEADS = (
    "lm_head",  # most
    "lm_head.decoder",  # RoBERTa
    "embed_out",  # GPT-NeoX
    "output",  # Llama as Meta wrote it, InternLM2
    "output_layer",  # ChatGLM
    "head",  # RWKV
    "output_projection",  # fairseq
    "proj_out",  # Whisper
    "lm_loss",  # XLNet
    "cls.predictions.decoder",  # BERT
    "predictions.decoder",  # ALBERT
    "vocab_projector",  # DistilBERT
    "generator_lm_head",  # ELECTRA
)
# Classes whose head is not called lm_head, by the beginning of their name; None where its name is not known here.
_HEAD_OF_CLASS = {
    "Whisper": "proj_out", "Moonshine": "proj_out", "Canary": "proj_out", "CohereAsr": "proj_out", "Rwkv": "head",
    "BioGpt": "output_projection", "TrOCR": "output_projection", "GPTNeoXJapanese": "embed_out", "XLNet": "lm_loss",
    "Git": "output", "XLMWith": None, "Flaubert": None, "T5Gemma": None, "ModernBert": None, "SpeechT5": None,
}  # fmt: skip
# Classes that have a head for each token, by the end of their name.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSpeechToText", "ForTextToText")
_PREDICTS = re.compile(r"LM|ForPreTraining|MTModel|ForConditionalGeneration|Text2Text|(?:Speech|Text)To(?:Speech|Text)")
# Biases with an element for each token, beside those of heads.
_BIASES = ("cls.predictions.bias", "predictions.bias", "final_logits_bias")
# The same as ends of names, which one call compares: most tensors of a model are none of these.
_HEAD_WEIGHTS = tuple(f"{head}.weight" for head in HEADS)
_HEAD_ENDS, _BIAS_ENDS = tuple(f".{head}" for head in HEADS), tuple(f".{bias}" for bias in _BIASES)
# Tensors that some checkpoints store although they are copies of another tensor.
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.decoder.bias": "lm_head.bias", "cls.predictions.decoder.bias": "cls.predictions.bias",
    "predictions.decoder.bias": "predictions.bias",
}  # fmt: skip
# Modules after the layers that are not output heads: other heads, and final norms.
_AFTER = re.compile(
    r"(?:.*_)?head|project_out|score|(?:pre_)?classifier|qa_outputs|cls|predictions|pooler|(?:text|visual)_projection"
    r"|vocab_(?:transform|layer_norm)|final_logits_bias"
)
_NORM = re.compile(r"(?!pre).*norm(?:_f|_out)?|ln(?:_f|_out|_post)?")
_INPUT = re.compile(r"embed|conv|proj")  # a norm beside one of these is not the final one
# Tensors that may be as long as an embedding and have no tokens: positions, segments.
_POSITIONS = re.compile(
    r"(?:^|\.)(?:wpe|inv_freq|\w*(?:pos(?:ition(?:al|s)?)?_?emb|positions?|rotary|relative|token_type|segment)\w*)(?:\.|$)"
)
# Buffers computed from the configuration: only some versions of a library store them.
_DERIVED = re.compile(
    r"(?:^|\.)(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|embeddings\.token_type_ids"
    r"|[0-9]+\.(?:attn|attention|attn\.attention)\.(?:bias|masked_bias))$"
)
# Prefixes that model classes and training wrappers put before a tensor's own name, one or several.
_WRAPPERS = frozenset({
    "model", "transformer", "language_model", "text_model", "base_model", "module", "backbone", "gpt_neox", "bert",
    "roberta", "distilbert", "deberta", "electra", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
})  # fmt: skip
_MOST_WRAPPERS = 8
# Other names for the same tensor: from TensorFlow checkpoints, and from torch's older weight norm.
_ALIASES = {
    "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias",
    "weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1",
}  # fmt: skip
_ALIAS = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(map(re.escape, _ALIASES))})$")
_ALIAS_ENDS = tuple(_ALIASES)
_NUMBERED = re.compile(r"(?:^|\.)[0-9]+\.")


def own_name(name: str) -> str:
    """A tensor's own name, without wrappers, as libraries have it now.

    >>> own_name("base_model.model.model.layers.0.mlp.up_proj.weight"), own_name("model")
    ('layers.0.mlp.up_proj.weight', 'model')
    """
    for _ in range(_MOST_WRAPPERS):
        first, dot, rest = name.partition(".")
        if not dot or first not in _WRAPPERS:
            break
        name = rest
    return _ALIAS.sub(lambda match: _ALIASES[match[0]], name) if name.endswith(_ALIAS_ENDS) else name


def is_in_layer(name: str) -> bool:
    """Whether a tensor lies in one of several numbered modules."""
    return _NUMBERED.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor is the weight of the output head: its own name, without wrappers, is a head's.

    >>> [is_head(name) for name in ("model.lm_head.weight", "output.weight", "layers.0.output.weight", "v_head.weight")]
    [True, True, False, False]
    """
    if not name.endswith(_HEAD_WEIGHTS):  # most tensors of a model
        return False
    return own_name(name).removesuffix(".weight") in HEADS


def head_of(embedding: str, architecture: str) -> str | None:
    """The name of the output head of a model with this input embedding, by the class that config.json names, if any;
    None where the class has no head, or one that is not known here.

    >>> head_of("language_model.model.embed_tokens.weight", "LlavaForConditionalGeneration")
    'language_model.lm_head.weight'
    """
    for start, head in _HEAD_OF_CLASS.items():
        if architecture.startswith(start):
            return head and f"{head}.weight"
    if ".word_embeddings." in embedding and ".embeddings." in embedding:  # BERT and its kin
        return None
    if architecture and not architecture.endswith(_GENERATES):
        return None
    prefix = re.match(r"(?:text_model|language_model)\.(?=model\.|transformer\.)", embedding)
    return f"{prefix[0] if prefix else ''}lm_head.weight"


def predicts_tokens(architecture: str) -> bool:
    """Whether a class, as config.json names it, has a head for each token; true where none is named."""
    return not architecture or _PREDICTS.search(architecture) is not None


def is_embedding(name: str) -> bool:
    """Whether a tensor is the weight of the input embedding, anywhere in the model outside the layers."""
    return embeds_tokens(name) and not is_in_layer(name)


def embeds_tokens(name: str) -> bool:
    """Whether a tensor has the name of an embedding of tokens: the model's, one layer's, one for all layers.

    >>> [embeds_tokens(f"{name}.weight") for name in ("layers.9.embed_tokens", "embed_tokens_per_layer", "wpe")]
    [True, True, False]
    """
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    return leaf == "weight" and (last in EMBEDDINGS or last.startswith("embed_tokens"))


def has_token_rows(name: str) -> bool:
    """Whether a tensor's name is that of an embedding, a head or its bias: one row or element for each token."""
    module, _, leaf = name.rpartition(".")
    is_of_head = leaf in ("weight", "bias") and f".{module}".endswith(_HEAD_ENDS)
    return embeds_tokens(name) or is_of_head or f".{name}".endswith(_BIAS_ENDS)


def is_of_positions(name: str) -> bool:
    """Whether a tensor has a row for each position or segment, even if there are as many rows as tokens."""
    return _POSITIONS.search(name) is not None


def is_derived(name: str) -> bool:
    """Whether a tensor is a buffer that a model computes when it is loaded: frequencies, positions, masks.

    >>> [is_derived(f"h.0.attn.{name}") for name in ("rotary_emb.inv_freq", "bias", "c_attn.bias")]
    [True, True, False]
    """
    return _DERIVED.search(name) is not None


def comes_last(name: str) -> bool:
    """Whether a tensor outside the layers comes after them (a final norm, a head) or before them (all others).

    >>> [comes_last(f"{name}.weight") for name in ("model.embed_tokens", "model.norm", "lm_head", "embeddings.norm")]
    [False, True, True, False]
    """
    parts = name.lower().split(".")
    if any(part in _FIRST_OF_HEADS or _AFTER.fullmatch(part) for part in parts):
        return True
    return any(map(_NORM.fullmatch, parts)) and not any(map(_INPUT.search, parts))


_FIRST_OF_HEADS = frozenset(head.partition(".")[0] for head in HEADS)
