"""Everything in a model folder that is not merged: what is copied with the output, what is not, and why.

Configuration, tokenizer, templates and code are copied byte for byte, sub-folders included. Weights are not
(they would be the unmerged ones), but for those in sub-folders that the model's own index of modules names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from merge_tool.checkpoint.folder import Folder, is_weight_file

CARD, REPORT, SUMS = "README.md", "merge_report.json", "SHA256SUMS"
BASE_CARD = "README.base.md"
WORK = ".slerp-merge"

_SKIPPED_FOLDERS = re.compile(r"original|checkpoint-[^/]*|\.git|\.cache|\.ipynb_checkpoints|__pycache__")
_SKIPPED_FILES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state)[^/]*\.[^/]+|training_args\.bin|trainer_state\.json"
    r"|[^/]*\.(safetensors|bin)\.index\.json|\.DS_Store"
)
_CONFIG_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*")(torch\.)?([a-z0-9_]+)(")')
_CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: where it is in the folder, what it is called in the output, and its size in bytes."""

    source: str
    target: str
    size: int


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What is copied, what is skipped (folders end in '/'), and which of the copied files are unmerged weights."""

    folder: Folder | None
    copied: tuple[SideFile, ...]
    skipped: tuple[str, ...]
    unmerged: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.copied)


def plan_side_files(folder: Folder | None, merged: frozenset[str] = frozenset()) -> SideFiles:
    """Decide about every file of `folder` but the `merged` ones; raises CheckpointError for links that lead out."""
    if folder is None:
        return SideFiles(None, (), (), ())
    modules = _module_folders(folder)
    skipped: list[str] = []

    def skip(relative: str) -> bool:
        path = PurePosixPath(relative)
        is_folder = (folder.root / relative).is_dir()
        if is_folder:
            unwanted = _SKIPPED_FOLDERS.fullmatch(path.name) is not None or relative == WORK
        else:
            in_module = len(path.parts) > 1 and path.parts[0] in modules
            unwanted = _SKIPPED_FILES.fullmatch(path.name) is not None and not in_module
            unwanted |= is_weight_file(relative) and not in_module
            unwanted |= relative in {REPORT, SUMS} or (relative == BASE_CARD and folder.has(CARD))
        if unwanted and relative not in merged:
            skipped.append(f"{relative}/" if is_folder else relative)
        return unwanted or relative in merged

    copied = []
    for relative in folder.walk(skip):
        target = BASE_CARD if relative == CARD else relative
        copied.append(SideFile(relative, target, folder.path(relative).stat().st_size))
    unmerged = tuple(file.source for file in copied if is_weight_file(file.source))
    return SideFiles(folder, tuple(copied), tuple(skipped), unmerged)


def _module_folders(folder: Folder) -> frozenset[str]:
    """Sub-folders that modules.json (sentence-transformers) or model_index.json (diffusers) names as parts."""
    found: set[str] = set()
    if folder.has("model_index.json"):
        index = folder.load_json("model_index.json")
        found.update(key for key, value in index.items() if isinstance(value, list))
    if folder.has("modules.json"):
        for module in _load_modules(folder):
            if isinstance(module, dict) and isinstance(module.get("path"), str):
                found.add(module["path"].split("/")[0])
    return frozenset(found - {""})


def _load_modules(folder: Folder) -> Iterable[Any]:
    path = folder.path("modules.json")
    if path.stat().st_size > 1_000_000:
        return []
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def edit_config_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with every `dtype` and `torch_dtype` that names a float type set to `dtype` (a code such as BF16).

    Only those words change: spaces, order and line ends stay as they are.
    """
    name = _CONFIG_NAMES[dtype].encode()

    def replace(match: re.Match[bytes]) -> bytes:
        before, prefix, old, quote = match.groups()
        is_float = old.startswith((b"float", b"bfloat"))
        return before + (prefix or b"") + (name if is_float else old) + quote

    return _CONFIG_DTYPE.sub(replace, config)
