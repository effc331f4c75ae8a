"""Write more tiny models into FOLDER, for the commands in docs/. All come from the base of make_tiny_pair.py:

code, math   two more finetunes of it
chat         a finetune with two more tokens
adapter      a PEFT LoRA adapter for it
base-fp8     the base in 8-bit floats, with a scale for each block of 32 by 32 weights
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from make_tiny_pair import CONFIG, HIDDEN, LAYERS, SPECIAL, base_weights, finetuned, write_model
from safetensors.numpy import save_file

RANK, BLOCK = 4, 32


def write_chat(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Two rows more in the embedding and the head, at random."""
    numbers = np.random.default_rng(5)
    wider = {
        name: np.concatenate([x, 0.02 * numbers.standard_normal((2, HIDDEN))]) if len(x) == CONFIG["vocab_size"] else x
        for name, x in weights.items()
    }
    write_model(folder, wider, [*SPECIAL, "<|im_start|>", "<|im_end|>"])


def write_adapter(folder: Path) -> None:
    """A LoRA of the attention: W + alpha / r * B A."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, tensors = np.random.default_rng(6), {}
    for name in (f"layers.{layer}.self_attn.{part}_proj" for layer in range(LAYERS) for part in "qv"):
        for side, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (HIDDEN, RANK))):
            factor = (0.03 * numbers.standard_normal(shape)).astype(np.float32)
            tensors[f"base_model.model.model.{name}.{side}.weight"] = factor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))


def write_fp8(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """The layers' matrices as DeepSeek-V3 has them: codes, and `weight_scale_inv` for each block."""
    write_model(folder, weights)
    tensors = {}
    for name, x in weights.items():
        if x.ndim == 1 or "layers" not in name:
            tensors[name] = x.astype(ml_dtypes.bfloat16)
            continue
        rows, columns = (n // BLOCK for n in x.shape)
        scales = np.abs(x.reshape(rows, BLOCK, columns, BLOCK)).max(axis=(1, 3)).astype(np.float32) / 448
        codes = x / scales.repeat(BLOCK, 0).repeat(BLOCK, 1)
        tensors[name] = codes.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    config = {**CONFIG, "torch_dtype": "bfloat16", "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


place, base = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"), base_weights()
write_model(place / "code", finetuned(base, seed=2))
write_model(place / "math", finetuned(base, seed=3))
write_chat(place / "chat", finetuned(base, seed=4))
write_adapter(place / "adapter")
write_fp8(place / "base-fp8", base)
