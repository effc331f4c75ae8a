"""What a model's tokenizer, chat template and end tokens say otherwise than those of the output. For warnings: each
difference once, by its content and not by the layout of a file, with the option that takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import CheckpointError, listed, shown
from merge_tool.vocabulary.align import TOKENIZER_FILES, explain
from merge_tool.vocabulary.chat_template import template_of
from merge_tool.vocabulary.join import Joined, compare_tokenizers
from merge_tool.vocabulary.tokenizer_json import TOKENIZER

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_SPECIAL = ("bos_token", "eos_token")
_ADDED = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
_SLOW = tuple(name for name in TOKENIZER_FILES if name not in (TOKENIZER, _CONFIG, _MAP) and "template" not in name)
_PARTS = {  # of tokenizer.json -> what differs where they do
    "merges": "its merges", "scores": "its scores", "model": "its model's settings", "normalizer": "its normalizer",
    "pre_tokenizer": "its pre_tokenizer", "post_processor": "its post_processor (special tokens around a text)",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ways:
    """The options that take a difference from the other model: in this kind of recipe. `rows` is how rows are matched
    by token; nothing where they are. `template` is nothing where the recipe chooses a template."""

    rows: str
    files: str
    template: str


def tokenizer_warnings(donor: Checkpoint, other: Checkpoint, ways: Ways) -> Iterator[str]:
    """What `other` has otherwise than `donor`, whose files the output has."""
    here, there = donor.tokenizer_folder, other.tokenizer_folder
    if here is None and there is not None and any(map(there.has, (*TOKENIZER_FILES, "config.json"))):
        yield (
            f"{donor.name} is a file without a folder, and so the output has no configuration and no tokenizer. "
            f"{ways.files} takes {other.name}'s files."
        )
    if here is None or there is None:
        return
    if not any(map(here.has, TOKENIZER_FILES)):
        if any(map(there.has, TOKENIZER_FILES)):
            yield f"{donor.name} has no tokenizer, and so the output has none. {ways.files} takes {other.name}'s files."
        return
    if not any(map(there.has, TOKENIZER_FILES)):
        return
    yield from _tokens(donor, other, here, there, ways)
    yield from _template(donor, other, here, there, ways)
    differing = []
    for key in _SPECIAL:
        own, theirs = _special(here, key), _special(there, key)
        if theirs is not None and own != theirs:
            differing.append(_differs(key, own, theirs, donor, other))
    for key in _ADDED:
        own, theirs = (_config(folder).get(key) for folder in (here, there))
        if None not in (own, theirs) and own != theirs:
            differing.append(_differs(key, own, theirs, donor, other))
    if differing:
        yield f"{'; '.join(differing)}. The output has {donor.name}'s; {ways.files} takes {other.name}'s files."


# ----------------------------------------------------------------------------------------------- tokens


def _tokens(donor: Checkpoint, other: Checkpoint, here: Folder, there: Folder, ways: Ways) -> Iterator[str]:
    """Whether a text becomes other tokens, or a token is another row."""
    if not (here.has(TOKENIZER) and there.has(TOKENIZER)):
        unlike = [name for name in _SLOW if here.has(name) and there.has(name) and not same_bytes(here, there, name)]
        for name in unlike:
            yield f"{name} differs between {donor.name} and {other.name}: tokens may not mean the same in both."
        return
    if same_bytes(here, there, TOKENIZER):
        return
    try:
        comparison = compare_tokenizers(here, there)
    except CheckpointError as e:
        yield (
            f"{TOKENIZER} differs between {donor.name} and {other.name}: tokens may not mean the same in both. The "
            f"vocabularies cannot be compared: {str(e).rstrip('.')}."
        )
        return
    if ways.rows and (comparison.num_moved or any(comparison.num_alone)):
        yield (
            f"{TOKENIZER} differs between {donor.name} and {other.name}: tokens do not mean the same in both. "
            f"{explain(donor, other)}. With {ways.rows} rows are matched by token."
        )
    if parts := unlike_parts(comparison):
        yield (
            f"{TOKENIZER} of {other.name} splits texts in another way: {listed(parts, 10)} differ from {donor.name}'s, "
            f"which the output has. {ways.files} takes {other.name}'s files."
        )


def unlike_parts(comparison: Joined) -> list[str]:
    """Parts that differ although the vocabularies do not: merges of other tokens are others, of course."""
    follows = {"merges", "scores"} if any(comparison.num_alone) or comparison.num_moved else set()
    return [words for part, words in _PARTS.items() if part in comparison.unlike and part not in follows]


# --------------------------------------------------------------------------------- template, end of texts


def _template(donor: Checkpoint, other: Checkpoint, here: Folder, there: Folder, ways: Ways) -> Iterator[str]:
    own, theirs = ((template_of(folder) or "").strip() for folder in (here, there))
    if not ways.template or not theirs or own == theirs:
        return
    what = f"{donor.name} has none, and so the output has none" if not own else f"the output has {donor.name}'s"
    yield (
        f"The chat template of {other.name} is {'another' if own else 'not in the output'}: {what}. {ways.template} "
        f"takes it; {ways.files} takes all of {other.name}'s files."
    )


def end_warnings(donor: Checkpoint, other: Checkpoint, ways: Ways) -> Iterator[str]:
    """The ids by which generation begins and ends, where `other` has other ones than `donor`, whose config.json and
    generation_config.json the output has."""
    differing = []
    for key in ("bos_token_id", "eos_token_id") if donor.folder is not None else ():
        ids, others = (_ids(model, key) for model in (donor, other))
        if others and ids != others:
            differing.append(_differs(key, ids, others, donor, other))
    if differing:
        yield f"{'; '.join(differing)}. The output has {donor.name}'s; {ways.files} takes {other.name}'s files."


def _differs(key: str, own: Any, theirs: Any, donor: Checkpoint, other: Checkpoint) -> str:
    return f"{key} is {_words(own)} in {donor.name}, {_words(theirs)} in {other.name}"


def _special(folder: Folder, key: str) -> str | None:
    for name in (_CONFIG, _MAP):
        token = folder.load_json(name).get(key) if folder.has(name) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _config(folder: Folder) -> Mapping[str, Any]:
    return folder.load_json(_CONFIG) if folder.has(_CONFIG) else {}


def _ids(model: Checkpoint, key: str) -> tuple[int, ...]:
    """The ids of generation_config.json, which counts, else those of config.json."""
    folder = model.folder
    settings = folder.load_json("generation_config.json") if folder and folder.has("generation_config.json") else {}
    for part in (settings, *text_configs(model.config)):
        ids = part.get(key)
        ids = ids if isinstance(ids, list) else [ids]
        if numbers := sorted({number for number in ids if type(number) is int}):
            return tuple(numbers)
    return ()


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " or ".join(map(str, value)) or "not there"
    return "not there" if value is None else shown(json.dumps(value, ensure_ascii=False))


def same_bytes(here: Folder, there: Folder, name: str) -> bool:
    """Whether two folders have the same file of this name. Raises CheckpointError where one cannot be read."""
    if here.size(name) != there.size(name):
        return False
    pieces = zip(_pieces(here, name), _pieces(there, name), strict=False)
    return all(left == right for left, right in pieces)


def _pieces(folder: Folder, name: str) -> Iterator[bytes]:
    """A file in pieces, then an empty one. Raises CheckpointError where it cannot be read."""
    try:
        with folder.regular(name).open("rb") as file:
            while piece := file.read(65_536):
                yield piece
        yield b""
    except OSError as e:
        raise folder.unreadable(name, e) from e
