"""Recipes over vocabularies that differ: our rows against mergekit 0.1.5's, token by token.

    python bench/vocab_parity.py --mergekit PATH/TO/python

Makes three tiny Llama-shaped models whose tokenizers share some tokens, under other ids, and have some of their own;
merges them by `tokenizer_source` and `tokenizer` both ways, and prints for each recipe the largest difference of an
embedding or head row, matched by the token that the output's own tokenizer gives it, and the number of rows of both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from parity import load, measure
from safetensors.numpy import save_file

HIDDEN = 32
WORDS = {
    "a": ["<s>", *(f"w{n}" for n in range(40)), "only a"],
    "b": ["<s>", *(f"w{n}" for n in reversed(range(36))), "both b and c", "only b", "<|im_start|>"],
    "c": ["both b and c", *(f"w{n}" for n in range(5, 45)), "<s>", "<|im_start|>"],
}
ROWS = {"a": 48, "b": 40, "c": 43}  # the first has padding


def make_models(folder: Path) -> list[Path]:
    found = []
    for k, (name, words) in enumerate(WORDS.items()):
        path, chance = folder / name, np.random.default_rng(k)
        path.mkdir(parents=True, exist_ok=True)
        rows = ROWS[name]
        shapes = {
            "model.embed_tokens.weight": (rows, HIDDEN), "lm_head.weight": (rows, HIDDEN),
            "model.norm.weight": (HIDDEN,), "model.layers.0.input_layernorm.weight": (HIDDEN,),
            "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
            "model.layers.0.mlp.gate_proj.weight": (64, HIDDEN), "model.layers.0.mlp.up_proj.weight": (64, HIDDEN),
            "model.layers.0.mlp.down_proj.weight": (HIDDEN, 64),
            **{f"model.layers.0.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"},
        }  # fmt: skip
        tensors = {n: chance.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": rows,
            "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "torch_dtype": "float32",
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
        settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": i, "content": w, **settings} for i, w in enumerate(words) if w.startswith("<")]
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": []},
        }  # fmt: skip
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        found.append(path)
    return found


def recipes(models: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    a, b, c = map(str, models)
    weighed = [{"model": m, "parameters": {"weight": w}} for m, w in ((a, 0.5), (b, 0.3), (c, 0.2))]
    linear = {"merge_method": "linear", "models": weighed, "dtype": "float32"}
    with_base = {**linear, "base_model": a}
    yield "linear, union", {**with_base, "tokenizer_source": "union"}
    yield "linear, union without base_model", {**linear, "tokenizer_source": "union"}
    yield "linear, base", {**with_base, "tokenizer_source": "base"}
    yield "linear, a model", {**with_base, "tokenizer_source": b}
    yield (
        "task_arithmetic, union",
        {**with_base, "merge_method": "task_arithmetic", "models": weighed[1:], "tokenizer_source": "union"},
    )
    yield (
        "ties, a model",
        {
            **with_base, "merge_method": "ties", "tokenizer_source": c,
            "models": [{"model": m, "parameters": {"weight": 1, "density": 1}} for m in (b, c)],
        },
    )  # fmt: skip
    yield (
        "slerp, union",
        {
            "merge_method": "slerp", "models": [{"model": a}, {"model": b}], "base_model": a, "dtype": "float32",
            "parameters": {"t": 0.4}, "tokenizer_source": "union",
        },
    )  # fmt: skip
    tokens = {
        "w9": {"source": c, "force": True},
        "only a": {"source": {"kind": "model_token", "model": b, "token": "w7"}},
        "only b": {"source": {"kind": "zero"}},
        "brand new": {"source": {"kind": "model_token", "model": c, "token_id": 2}},
    }
    yield "linear, tokens by name", {**with_base, "tokenizer": {"source": "union", "tokens": tokens}}
    yield "linear, padded", {**with_base, "tokenizer": {"source": "union", "pad_to_multiple_of": 16}}


def rows(folder: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Each tensor's rows by token."""
    text = json.loads((folder / "tokenizer.json").read_text())
    ids = {**text["model"]["vocab"], **{entry["content"]: entry["id"] for entry in text["added_tokens"]}}
    tensors = load(folder)
    found = {n: {token: tensors[n][k] for token, k in ids.items()} for n in tensors if "embed" in n or "head" in n}
    return found, len(tensors["lm_head.weight"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="the python of an environment that has mergekit 0.1.5")
    parser.add_argument("--folder", type=Path, default=Path("bench-data/vocab-parity"))
    args = parser.parse_args()
    folder = args.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    models = make_models(folder)
    print("| recipe | tokens | largest difference | at | rows: ours, mergekit |\n|---|---:|---:|---|---|")
    for number, (name, recipe) in enumerate(recipes(models)):
        path, outs = folder / f"{number}.yaml", (folder / f"ours-{number}", folder / f"theirs-{number}")
        path.write_text(json.dumps(recipe))
        runs = (
            measure([sys.executable, "-m", "merge_tool", "run", str(path), str(outs[0]), "--quiet"]),
            measure([str(Path(args.mergekit).with_name("mergekit-yaml")), str(path), str(outs[1])]),
        )
        if any(run.error for run in runs):
            print(f"| {name} | | {runs[0].error or 'ran'} / {runs[1].error or 'ran'} | | |")
            continue
        (ours, our_rows), (theirs, their_rows) = map(rows, outs)
        other = sorted(ours["lm_head.weight"].keys() ^ theirs["lm_head.weight"].keys())
        worst = max(
            (float(np.abs(ours[n][token] - theirs[n][token]).max()), token)
            for n in ours
            for token in ours[n].keys() & theirs[n].keys()
        )
        count = f"{len(ours['lm_head.weight'])}" + (f" (only one has {other})" if other else "")
        print(f"| {name} | {count} | {worst[0]:.3g} | {worst[1]} | {our_rows}, {their_rows} |", flush=True)


if __name__ == "__main__":
    main()
