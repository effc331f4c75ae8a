"""mergekit's recipes: what each rule of the format makes of a text, and what is refused, with its line."""

from __future__ import annotations

PARTS = ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")


def llama(layers: int = 5, *, head: bool = True) -> list[str]:
    inside = [f"model.layers.{k}.{part}.weight" for k in range(layers) for part in PARTS]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", *(["lm_head.weight"] if head else [])]
