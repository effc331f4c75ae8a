"""The files in a model folder that are not merged: which are copied to the output, which are not, and why.

Configuration, tokenizer, templates and code are copied byte for byte, sub-folders included. Weights are not copied
(they would be the unmerged ones), except in sub-folders that the model's index of modules names.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from merge_tool.checkpoint.folder import LARGEST_JSON, Folder, is_weight_file
from merge_tool.checkpoint.sub_configs import KeyPath, is_of_text, is_sub_config
from merge_tool.checkpoint.weight_files import ADAPTER_WEIGHTS
from merge_tool.errors import CheckpointError, reason, shown
from merge_tool.models.layer_counts import PREDICTED
from merge_tool.recipe.options import DTYPE_NAMES

CARD, REPORT, SUMS = "README.md", "merge_report.json", "SHA256SUMS"
RECIPE = "mergekit_config.yml"  # the file where other tools look for a recipe; verbatim
BASE_CARD, FT_CARD = "README.base.md", "README.ft.md"  # the name of the copies of the parents' cards
WORK = ".slerp-merge"

_COPY_BYTES = 1 << 20
_SKIPPED_FOLDERS = re.compile(r"original|checkpoint-[^/]*|\.git|\.cache|\.ipynb_checkpoints|__pycache__")
_SKIPPED_FILES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state)[^/]*\.[^/]+|training_args\.bin|trainer_state\.json"
    r"|[^/]*\.(safetensors|bin)\.index(\.[A-Za-z0-9_]+)?\.json",
    re.IGNORECASE,
)
# What systems leave in folders that they show: macOS, Windows
SYSTEM_FILES = re.compile(r"\._.*|\.DS_Store|desktop\.ini|Thumbs\.db|\.Trashes|\.Spotlight-V100", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n\r]*")
_CONFIG_NAMES = {code: name for name, code in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: where it is in the folder, what it is called in the output, and its size in bytes.

    `folder` is set if the file is not from the common folder. `insert` is a byte offset in the file and the bytes to
    insert there. `content` replaces the whole content.
    """

    source: str
    target: str
    size: int
    folder: Folder | None = None
    insert: tuple[int, bytes] | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The copied files, the skipped files (folders end in '/'), and the copied files that are unmerged weights."""

    folder: Folder | None
    copied: tuple[SideFile, ...]
    skipped: tuple[str, ...]
    unmerged: tuple[str, ...]
    layers: tuple[int, ...] = ()  # the model's layer that each output layer was, if that changes
    vocab_sizes: tuple[frozenset[int], int] | None = None  # the sizes to replace in config.json, and the new size
    predicted: int | None = None  # the new number of layers that predict further tokens, if that changes
    ties: bool | None = None  # the new tie_word_embeddings of config.json, if that changes
    task: Mapping[str, Any] = field(default_factory=dict)  # config.json's members about a task, from another model
    keeps_quantization: bool = False  # whether the output is quantised, so that quantization_config stays

    @property
    def size(self) -> int:
        return sum(file.size for file in self.copied)

    def read(self, file: SideFile, dtype: str | None) -> Iterator[bytes]:
        """The bytes of the output's copy of `file`: config.json with the output's dtype, layers and vocabulary, and
        without quantization_config unless the output is quantised; every other file unchanged."""
        if file.content is not None:
            yield file.content
            return
        folder = file.folder or self.folder
        assert folder is not None
        path = folder.regular(file.source)
        try:
            if file.source == "config.json" and file.size <= LARGEST_JSON:
                config = path.read_bytes()
                config = config if self.keeps_quantization else _edit_config(config, dtype)
                config = edit_vocab_size(config, *self.vocab_sizes) if self.vocab_sizes else config
                config = config if self.ties is None else edit_ties(config, self.ties)
                config = edit_members(config, self.task) if self.task else config
                config = edit_config_layers(config, self.layers) if self.layers else config
                yield config if self.predicted is None else edit_predicted(config, self.predicted)
                return
            with path.open("rb") as content:
                if file.insert is not None:
                    position, text = file.insert
                    yield content.read(position)
                    yield text
                while chunk := content.read(_COPY_BYTES):
                    yield chunk
        except (OSError, ValueError) as e:  # config.json has changed since it was planned, and is no JSON now
            raise CheckpointError(
                f"{folder.name}/{shown(file.source)}: cannot be read ({reason(e)}). Correct that, then run the same "
                "command: it continues where it stopped."
            ) from e


def folded(name: str) -> str:
    """One text for all names that a disk which ignores case or normalises Unicode takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def card_name(folder: Folder | None) -> str | None:
    """The model card's file name, in whatever spelling the folder has it."""
    names = sorted(entry.name for entry in folder.root.iterdir()) if folder is not None else []
    cards = [name for name in names if folded(name) == folded(CARD)]
    return CARD if CARD in cards else next(iter(cards), None)


def plan_side_files(folder: Folder | None, merged: frozenset[str], *, card: str = BASE_CARD) -> SideFiles:
    """Decide about every file of `folder` except the `merged` ones; README.md, in any spelling, is copied as
    `card`.

    Raises CheckpointError for links that lead out of the folder and for files that may not be read.
    """
    if folder is None:
        return SideFiles(None, (), (), ())
    modules, own_card = _module_folders(folder), card_name(folder)
    own = {folded(name) for name in (REPORT, SUMS, RECIPE, *([card] if own_card else []))}
    skipped: list[str] = []

    def skip(relative: str) -> bool:
        path = PurePosixPath(relative)
        is_folder = (folder.root / relative).is_dir()
        if is_folder:
            unwanted = _SKIPPED_FOLDERS.fullmatch(path.name) is not None or folded(relative) == WORK
        else:
            in_module = len(path.parts) > 1 and path.parts[0] in modules
            unwanted = _SKIPPED_FILES.fullmatch(path.name) is not None and not in_module
            unwanted |= is_weight_file(relative) and not in_module
            # mixce-train's checkpoints have it, and no other folder has both names
            unwanted |= relative == "state.json" and folder.has("generators.safetensors")
            # beside a model's weights, this file would make loaders look for an adapter
            unwanted |= relative == "adapter_config.json" and not merged & {*ADAPTER_WEIGHTS}
            unwanted |= folded(relative) in own
        if SYSTEM_FILES.fullmatch(path.name):
            return True
        if unwanted and relative not in merged:
            skipped.append(f"{relative}/" if is_folder else relative)
        return unwanted or relative in merged

    copied = []
    for relative in folder.walk(skip):
        path = folder.path(relative)
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{folder.name}/{shown(relative)}: may not be read (permission denied).")
        copied.append(SideFile(relative, card if relative == own_card else relative, folder.size(relative)))
    unmerged = tuple(file.source for file in copied if is_weight_file(file.source))
    return SideFiles(folder, tuple(copied), tuple(skipped), unmerged)


def _module_folders(folder: Folder) -> frozenset[str]:
    """The sub-folders that modules.json (sentence-transformers) or model_index.json (diffusers) names as parts."""
    folders: set[str] = set()
    if folder.has("model_index.json"):
        index = folder.load_json("model_index.json")
        folders.update(key for key, value in index.items() if isinstance(value, list))
    if folder.has("modules.json"):
        for module in _load_modules(folder):
            if isinstance(module, dict) and isinstance(module.get("path"), str):
                folders.add(module["path"].split("/")[0])
    return frozenset(folders - {""})


def _load_modules(folder: Folder) -> Iterable[Any]:
    if folder.size("modules.json") > 1_000_000:
        return []
    try:
        modules = json.loads(folder.read("modules.json"))
    except (ValueError, RecursionError):
        return []
    return modules if isinstance(modules, list) else []


def _edit_config(config: bytes, dtype: str | None) -> bytes:
    plain = without_quantization_config(config)
    dtype = dtype or ("BF16" if plain != config else None)
    return plain if dtype is None else edit_config_dtype(plain, dtype)


def without_quantization_config(config: bytes) -> bytes:
    """config.json without quantization_config, also in its parts; otherwise byte for byte."""
    return _replaced(config, lambda text: ((begin, end, "") for begin, end in _quantization_spans(text, _first(text))))


def _quantization_spans(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The (begin, end) of each member to remove from the JSON object at `start`, with one comma each, in the text's
    order."""
    members, previous, gone = list(_members(text, start)), None, None
    for member in members:
        if member.key == "quantization_config" and member.value is not None:
            gone = member.begin if gone is None else gone
            continue
        if gone is not None:
            yield gone, member.begin
        previous, gone = member.end, None
        if is_sub_config(member.key, member.value):
            yield from _quantization_spans(text, member.start)
    if gone is not None:
        yield gone if previous is None else previous, members[-1].end


def with_member(content: bytes, key: str, value: Any) -> bytes:
    """A JSON object with a new value for an existing key; otherwise byte for byte."""
    new = json.dumps(value, ensure_ascii=False)

    def edits(text: str) -> Iterator[tuple[int, int, str]]:
        return ((m.start, m.end, new) for m in _members(text, _first(text)) if m.key == key)

    return _replaced(content, edits)


def _replaced(content: bytes, edits: Callable[[str], Iterable[tuple[int, int, str]]]) -> bytes:
    """A JSON file with the edits (begin, end, new text), which are in order; otherwise byte for byte."""
    encoding = json.detect_encoding(content)  # as json.loads does
    text = content.decode(encoding, "surrogatepass")
    for begin, end, new in reversed(list(edits(text))):
        text = text[:begin] + new + text[end:]
    return text.encode(encoding, "surrogatepass")


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an object in a JSON text: it starts at `begin`; its value is from `start` to `end`."""

    key: str
    value: Any
    begin: int
    start: int
    end: int


def _first(text: str) -> int:
    """The index at which the JSON object of a file begins."""
    return text.index("{")


def _members(text: str, start: int) -> Iterator[_Member]:
    """The members of the object of valid JSON that begins at `start`."""
    decoder = json.JSONDecoder()
    start = _after(text, start + 1)
    while text[start] != "}":
        key, key_end = decoder.raw_decode(text, start)
        begin, start = start, _after(text, _after(text, key_end) + 1)
        value, end = decoder.raw_decode(text, start)
        yield _Member(key=key, value=value, begin=begin, start=start, end=end)
        start = _after(text, end)
        start = _after(text, start + 1) if text[start] == "," else start


def _config_members(text: str, start: int, keys: KeyPath = ()) -> Iterator[tuple[KeyPath, _Member]]:
    """The members of the configuration at `start`, and of its parts' configurations, in the text's order, with their
    keys."""
    for member in _members(text, start):
        if is_sub_config(member.key, member.value):
            yield from _config_members(text, member.start, (*keys, member.key))
        else:
            yield keys, member


def _set(config: bytes, new: Callable[[KeyPath, str, Any], Any]) -> bytes:
    """config.json with `new(keys, key, value)` as the value of each member that is not a part's configuration."""

    def edits(text: str) -> Iterator[tuple[int, int, str]]:
        for keys, member in _config_members(text, _first(text)):
            value = new(keys, member.key, member.value)
            if value != member.value:
                yield member.start, member.end, json.dumps(value, ensure_ascii=False)

    return _replaced(config, edits)


def _after(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def edit_config_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with `dtype` and `torch_dtype` set to `dtype` (a code such as BF16), in its parts, too.

    Only those words change: spaces, order, line ends and values that name no float type stay as they are.
    """

    def new(keys: KeyPath, key: str, value: Any) -> Any:
        if key not in {"dtype", "torch_dtype"} or not isinstance(value, str):
            return value
        prefix = "torch." if value.startswith("torch.") else ""
        is_float = value.removeprefix(prefix).startswith(("float", "bfloat"))
        return f"{prefix}{_CONFIG_NAMES[dtype]}" if is_float else value

    return _set(config, new)


def edit_vocab_size(config: bytes, before: frozenset[int], after: int) -> bytes:
    """config.json with vocab_size `after` wherever the language model's vocab_size is in `before`; the rest is
    unchanged."""
    return _set(
        config,
        lambda keys, key, value: (
            after if key == "vocab_size" and type(value) is int and value in before and is_of_text(keys) else value
        ),
    )


def edit_ties(config: bytes, ties: bool) -> bytes:
    """config.json with `tie_word_embeddings` set wherever the language model has it, or inserted as the first member;
    the rest is unchanged."""

    def edits(text: str) -> Iterator[tuple[int, int, str]]:
        word, first = json.dumps(ties), _first(text)
        members = (member for keys, member in _config_members(text, first) if is_of_text(keys))
        ties_members = [m for m in members if m.key == "tie_word_embeddings" and isinstance(m.value, bool)]
        for member in ties_members:
            yield member.start, member.end, word
        if not ties_members:
            comma = "" if text[_after(text, first + 1)] == "}" else ","
            yield first + 1, first + 1, f'\n  "tie_word_embeddings": {word}{comma}'

    return _replaced(config, edits)


def edit_members(config: bytes, members: Mapping[str, Any]) -> bytes:
    """config.json with these members of the whole model set, or inserted in front; the rest is unchanged."""

    def edits(text: str) -> Iterator[tuple[int, int, str]]:
        first, known = _first(text), {member.key: member for member in _members(text, _first(text))}
        new = {key: json.dumps(value, ensure_ascii=False) for key, value in members.items()}
        comma = "" if text[_after(text, first + 1)] == "}" else ","
        inserted = ",".join(f"\n  {json.dumps(key)}: {value}" for key, value in new.items() if key not in known)
        if inserted:
            yield first + 1, first + 1, inserted + comma
        yield from ((known[key].start, known[key].end, new[key]) for key in known if key in new)

    return _replaced(config, edits)


def edit_predicted(config: bytes, count: int) -> bytes:
    """config.json with `count` wherever the language model's number of layers that predict further tokens is
    announced; the rest is unchanged."""
    return _set(
        config,
        lambda keys, key, value: count if key in PREDICTED and type(value) is int and is_of_text(keys) else value,
    )


def edit_config_layers(config: bytes, layers: Sequence[int]) -> bytes:
    """config.json for a language model whose layer k was layer `layers[k]`: the number of layers changes, and with it
    what it says layer by layer, in all configurations of the language model (layer_config.py)."""
    from merge_tool.models.layer_config import restack  # 2 MB: for stacks alone

    content, _ = restack(json.loads(config), layers)
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
