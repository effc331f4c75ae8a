"""Write two tiny Llama models that transformers loads: FOLDER/base, and FOLDER/ft, 3 degrees away from it.

Their weights are random numbers, so they speak no language; a tokenizer of bytes goes with them. Needs no torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, HEADS = 64, 160, 4, 4
SPECIAL = ["<s>", "</s>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256 + len(SPECIAL),
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float16",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a Llama."""
    rows = (CONFIG["vocab_size"], HIDDEN)
    found = {"model.embed_tokens.weight": rows, "model.norm.weight": (HIDDEN,), "lm_head.weight": rows}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        found |= {f"{start}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= {f"{start}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{start}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found |= {f"{start}.mlp.down_proj.weight": (HIDDEN, INNER)}
    return found


def base_weights() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    weights = {name: 0.02 * numbers.standard_normal(shape) for name, shape in shapes().items()}
    return {name: x + ("norm" in name) for name, x in weights.items()}  # norms are near 1


def finetuned(weights: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Each tensor with a random change of a twentieth of its length: 3 degrees away."""
    numbers = np.random.default_rng(seed)
    sizes = {name: np.sqrt(np.mean(np.square(x))) for name, x in weights.items()}
    return {name: x + 0.05 * sizes[name] * numbers.standard_normal(x.shape) for name, x in weights.items()}


def tokenizer(added: list[str]) -> dict:
    """tokenizer.json of a tokenizer whose tokens are bytes, and then those `added`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # a byte that is no sign gets one from 256 on
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256 + k, "content": token, **marks} for k, token in enumerate(added)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def write_model(folder: Path, weights: dict[str, np.ndarray], added: list[str] = SPECIAL) -> None:
    """A model folder as transformers has them; `added` are the tokens behind the 256 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.astype(np.float16) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": {**CONFIG, "vocab_size": 256 + len(added)},
        "tokenizer.json": tokenizer(added),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    base = base_weights()
    write_model(place / "base", base)
    write_model(place / "ft", finetuned(base, seed=1))
