"""What differs between the configurations and the tokenizers of two models: key by key, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import CheckpointError, listed
from merge_tool.vocabulary.align import TOKENIZER_FILES, explain
from merge_tool.vocabulary.chat_template import template_of
from merge_tool.vocabulary.differences import same_bytes, unlike_parts
from merge_tool.vocabulary.join import compare_tokenizers
from merge_tool.vocabulary.tokenizer_json import TOKENIZER

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_NO_SETTINGS = frozenset({"_name_or_path", "name_or_path", "transformers_version", "tokenizer_file", "is_local"})
_APART = frozenset({"chat_template", "added_tokens_decoder"})  # of tokenizer_config.json; compared with the tokenizer
ABSENT = "not there"


@dataclass(frozen=True, slots=True)
class SettingDiff:
    """A key of a configuration file whose values differ; nested keys have dots. `ABSENT` stands for a key, or for a
    whole file (then `key` is empty), that one model does not have."""

    file: str
    key: str
    base: Any
    ft: Any


def setting_diffs(base: Checkpoint, ft: Checkpoint) -> Iterator[SettingDiff]:
    """The keys in which the models' configuration files differ; damaged files as wholes."""
    here, there = base.folder, ft.folder
    if here is None or there is None:
        return
    for name in _FILES:
        if here.has(name) != there.has(name):
            yield SettingDiff(name, "", *("there" if folder.has(name) else ABSENT for folder in (here, there)))
        elif here.has(name):
            a, b = (_settings(folder, name) for folder in (here, there))
            for key in sorted(a.keys() | b.keys()):
                if a.get(key, ABSENT) != b.get(key, ABSENT):
                    yield SettingDiff(name, key, a.get(key, ABSENT), b.get(key, ABSENT))


def _settings(folder: Folder, name: str) -> dict[str, Any]:
    try:
        return dict(_flat(folder.load_json(name)))
    except CheckpointError as e:
        return {"(damaged)": str(e)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if not prefix and key in (_NO_SETTINGS | _APART):
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def tokenizer_diffs(base: Checkpoint, ft: Checkpoint) -> Iterator[str]:
    """The differences between the models' tokenizers and chat templates, a sentence each."""
    here, there = base.tokenizer_folder, ft.tokenizer_folder
    if here is None or there is None:
        return
    have = [any(map(folder.has, TOKENIZER_FILES)) for folder in (here, there)]
    if have[0] != have[1]:
        yield f"Only {(base if have[0] else ft).name} has a tokenizer."
    elif all(have):
        yield from _tokens(base, ft, here, there)
    try:
        own, theirs = ((template_of(folder) or "").strip() for folder in (here, there))
    except CheckpointError as e:
        yield f"The chat templates cannot be compared: {e}"
        return
    if bool(own) != bool(theirs):
        yield f"Only {(base if own else ft).name} has a chat template."
    elif own != theirs:
        yield "The chat templates differ."


def _tokens(base: Checkpoint, ft: Checkpoint, here: Folder, there: Folder) -> Iterator[str]:
    if not (here.has(TOKENIZER) and there.has(TOKENIZER)):
        unlike = [n for n in TOKENIZER_FILES if _is_other(here, there, n) and "config" not in n and "template" not in n]
        if unlike:
            yield f"The tokenizers differ in {listed(unlike)}."
        return
    if same_bytes(here, there, TOKENIZER):
        return
    try:
        comparison = compare_tokenizers(here, there)
        if comparison.num_moved or any(comparison.num_alone):
            yield f"{explain(base, ft)}."
        if parts := unlike_parts(comparison):
            yield f"The tokenizers split texts in other ways: {listed(parts, 10)} differ."
    except CheckpointError as e:
        yield f"The tokenizers cannot be compared: {e}"


def _is_other(here: Folder, there: Folder, name: str) -> bool:
    return here.has(name) != there.has(name) or (here.has(name) and not same_bytes(here, there, name))
