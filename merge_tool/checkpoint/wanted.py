"""Which files of a repository or a bucket's folder a merge reads or copies, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from merge_tool.checkpoint.folder import WEIGHT_SUFFIXES

# Never part of a merge, and often larger than the model: other formats, training checkpoints, original weights.
UNWANTED = [
    *(f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)),
    *("original/*", "*checkpoint-*/*", "*optimizer.*", "*scheduler.*", "*rng_state*", "*trainer_state.json"),
    *("*.bin.index.json", "*.tfevents.*", ".git*"),
]
_MODEL = frozenset({"model.safetensors", "model.safetensors.index.json"})


def is_small(name: str) -> bool:
    """Whether a file is fetched whole before anything else: it is wanted, and holds no weights."""
    return not any(fnmatchcase(name, pattern) for pattern in UNWANTED)


def can_wait(name: str) -> bool:
    """Whether a plan needs only the file's header. Pickles and files copied from sub-folders are needed whole."""
    return name.endswith(".safetensors") and "/" not in name


def is_adapter_listing(listing: Sequence[str]) -> bool:
    """Whether the files belong to an adapter."""
    return "adapter_config.json" in listing and not _MODEL & {*listing}


def module_weights(listing: Sequence[str]) -> list[str]:
    """The weights in sub-folders; pickles only from folders without safetensors."""
    safetensors = [name for name in listing if "/" in name and name.endswith(".safetensors")]
    have = {PurePosixPath(name).parent for name in safetensors}
    pickles = [name for name in listing if "/" in name and PurePosixPath(name).name == "pytorch_model.bin"]
    return safetensors + [name for name in pickles if PurePosixPath(name).parent not in have]
