"""Write two tiny checkpoints with random weights, a few degrees apart: FOLDER/base, FOLDER/ft. Needs no torch."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHAPES = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,), "lm_head.weight": (512, 64)}
for layer in range(4):
    SHAPES |= {f"model.layers.{layer}.self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
    SHAPES |= {f"model.layers.{layer}.mlp.up_proj.weight": (160, 64)}
CONFIG = {"architectures": ["TinyForCausalLM"], "hidden_size": 64, "torch_dtype": "float16"}

shared = np.random.default_rng(0)
base = {name: shared.standard_normal(shape) * 0.02 for name, shape in SHAPES.items()}
step = {name: shared.standard_normal(shape) * 0.001 for name, shape in SHAPES.items()}
for side, weights in (("base", base), ("ft", {name: base[name] + step[name] for name in base})):
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny") / side
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.astype(np.float16) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
