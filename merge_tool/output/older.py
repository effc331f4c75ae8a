"""Files already in OUT: files that a new model replaces, files that block it, and files that are not touched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path, PurePosixPath

from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import OutputError, shown
from merge_tool.files import leads_out
from merge_tool.models.side_files import REPORT, SUMS, SYSTEM_FILES, WORK
from merge_tool.recipe.average import are_weights, is_average_label
from merge_tool.recipe.recipe import label_of

# Files that loaders read by name: an older model's files would mix with the new model's.
_LOADED = re.compile(
    r"(adapter_|generation_|preprocessor_|video_preprocessor_|processor_|tokenizer_|sentence_bert_)?config\.json"
    r"|config_sentence_transformers\.json|chat_template\.(json|jinja)|(tokenizer|vocab|added_tokens|modules)\.json"
    r"|(model_index|special_tokens_map|merge_report)\.json|(merges|vocab)\.txt|(tokenizer|spiece|[^/]*bpe|tiktoken)\.model"
    r"|README(\.base|\.ft)?\.md|SHA256SUMS|mergekit_config\.yml"
)
_PARAMETERS = re.compile(r'"parameters": (\{[^{}]*\})')  # in a report's head
_MOST_PARAMETERS = 12  # more than any method has; a stranger's report may list thousands
_SUMS_LINE = re.compile(r"(\\?)[0-9a-f]{64} [ *](.+)")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def is_model_file(name: str) -> bool:
    """Whether a file in a model folder itself is weights or an index of weights: loaders look for these first."""
    return "/" not in name and (is_weight_file(name) or name.endswith(".index.json"))


def read_sums(folder: Path) -> dict[str, str]:
    """A SHA256SUMS as {name: digest}, without names that lead out of the folder; empty if the file cannot be read."""
    try:
        lines = os.fsdecode((folder / SUMS).read_bytes()).split("\n")
    except OSError:
        return {}
    sums = {}
    for line in lines:
        if match := _SUMS_LINE.fullmatch(line):
            name = re.sub(r"\\[\\nr]", lambda m: _ESCAPES[m[0]], match[2]) if match[1] else match[2]
            if not leads_out(name):
                sums[name] = line.removeprefix("\\")[:64]
    return sums


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an output of this tool."""
    return (folder / REPORT).is_file() and (folder / SUMS).is_file()


def outdated(folder: Path) -> list[str]:
    """Files of an older model in `folder`, the index first: files that this tool wrote, and files that loaders read."""
    if not folder.is_dir():
        return []
    names = set(read_sums(folder)) if is_ours(folder) else set()
    names |= {e.name for e in folder.iterdir() if is_model_file(e.name) or _LOADED.fullmatch(e.name)}
    files = (name for name in names if os.path.lexists(folder / name) and not (folder / name).is_dir())
    files = (name for name in files if "/" not in name or _stays_in(folder, name))
    return sorted(files, key=lambda name: (not name.endswith(".index.json"), not is_model_file(name), name))


def _stays_in(folder: Path, name: str) -> bool:
    """Whether the path to a file stays in the folder, links followed."""
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def older_labels(out: Path) -> Iterator[str]:
    """The folders in OUT that may hold models: OUT itself, and sub-folders that this tool made as one of several
    outputs."""
    yield ""
    if out.is_dir():
        yield from (e.name for e in sorted(out.iterdir()) if is_output_of_several(e))


def is_output_of_several(folder: Path) -> bool:
    """Whether a folder is one of several outputs of this tool, named by its parameters (`t-0.3`) or as an average."""
    if "-" not in folder.name or not is_ours(folder):
        return False
    try:
        with (folder / REPORT).open(encoding="utf-8") as file:
            match = _PARAMETERS.search(file.read(65_536))
        words = json.loads(match[1]) if match else {}
    except (OSError, ValueError):
        return False
    if are_weights(words) and is_average_label(folder.name):
        return True
    if len(words) > _MOST_PARAMETERS:
        return False
    chosen = (subset for count in range(1, len(words) + 1) for subset in combinations(words, count))
    return any(label_of({key: words[key] for key in subset}) == folder.name for subset in chosen)


def check_conflicts(out: Path, names: Iterable[str]) -> None:
    """Raise OutputError if OUT has a folder where the new model has a file, or a file where it has a folder."""
    for name in names:
        if (out / name).is_dir():
            raise OutputError(f"{shown(out / name)}: is a folder where the new model has a file. Move it away.")
        for parent in PurePosixPath(name).parents:
            if os.path.lexists(out / parent) and not (out / parent).is_dir():
                raise OutputError(f"{shown(out / parent)}: is a file where the new model has a folder. Move it away.")


def strangers(out: Path, labels: Iterable[str], names: Iterable[str]) -> list[str]:
    """The entries of OUT that belong neither to the new model nor to a system (.DS_Store). `labels` are the model's
    outputs, `names` their files."""
    ours = {PurePosixPath(name).parts[0] for name in names} | set(labels) | {WORK}
    names = (entry.name for entry in out.iterdir())
    return sorted(name for name in names if name not in ours and not SYSTEM_FILES.fullmatch(name))
