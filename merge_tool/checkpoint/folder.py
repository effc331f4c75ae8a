"""A folder of files from a stranger: which paths may be followed, and which files are weights.

A symlink is followed when it ends inside the folder, or, in a Hub cache, inside that model's blobs.
Nothing else outside the folder is ever opened.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from merge_tool.checkpoint.lookalikes import known_start
from merge_tool.errors import CheckpointError, listed, reason, shown

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | frozenset(
    {".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".npz", ".tflite", ".mlmodel"}
    | {".nemo", ".distcp"}
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # what peft writes, and wrote; the first wins
PIPELINE = "model_index.json"  # the index of a diffusers pipeline: several models, each in its own folder
_STATE_FILES = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)[^/]*", re.IGNORECASE)  # of a training
_DEEPEST_JSON = 100  # a configuration has about 5 levels
LARGEST_JSON = 32_000_000  # bytes; an index of 100,000 tensors has about 12,000,000


class Folder:
    """A folder whose files are opened only if their links stay inside. `name` is for messages and cards; by default it
    is the folder's own."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.root = path.resolve()
        self.name = name or folder_name(self.root)
        self._blobs = _hub_blobs(self.root)

    @property
    def is_of_hub(self) -> bool:
        """Whether the folder lies in the Hub's cache; its name is then an id."""
        return self._blobs is not None

    def path(self, relative: str) -> Path:
        """The real path of an existing file of this folder; raises CheckpointError if it leads elsewhere."""
        where = f"{self.name}/{shown(relative)}"
        parts = PurePosixPath(relative.replace("\\", "/") if os.name == "nt" else relative)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in relative:
            raise CheckpointError(f"{where}: is not a path inside the folder.")
        try:
            target = (self.root / relative).resolve(strict=True)
        except FileNotFoundError as e:
            link = self.root / relative
            what = f"a link to {shown(link.readlink())}, which is missing" if link.is_symlink() else "missing"
            raise CheckpointError(f"{where}: is {what}.") from e
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{where}: cannot be followed ({reason(e)}).") from e
        if not target.is_relative_to(self.root) and not (self._blobs and target.is_relative_to(self._blobs)):
            raise CheckpointError(
                f"{where}: is a link to {shown(target)}, outside the folder. "
                "Put the file itself there, or pass the folder that holds it."
            )
        return target

    def regular(self, relative: str) -> Path:
        """As `path`, for a regular file: opening a pipe could wait forever."""
        target = self.path(relative)
        if not stat.S_ISREG(self._status(relative, target).st_mode):
            raise CheckpointError(f"{self.name}/{shown(relative)}: is not a regular file.")
        return target

    def _status(self, relative: str, target: Path) -> os.stat_result:
        try:
            return target.stat()
        except OSError as e:
            raise self.unreadable(relative, e) from e

    def size(self, relative: str) -> int:
        """The size of a regular file in bytes."""
        return self._status(relative, self.regular(relative)).st_size

    def read(self, relative: str) -> bytes:
        """The content of a regular file. Raises CheckpointError where it cannot be read."""
        path = self.regular(relative)
        try:
            return path.read_bytes()
        except OSError as e:
            raise self.unreadable(relative, e) from e

    def unreadable(self, relative: str, e: Exception) -> CheckpointError:
        """The error for a file of the folder that cannot be read."""
        return CheckpointError(f"{self.name}/{shown(relative)}: cannot be read ({reason(e)}).")

    def has(self, relative: str) -> bool:
        return os.path.lexists(self.root / relative)

    def walk(self, skip: Callable[[str], bool]) -> Iterator[str]:
        """Every file below the folder as a relative path with '/', sorted; links to folders are followed.

        Files and folders for which `skip` returns true are left out, unread.
        """
        yield from self._walk("", frozenset({self.root}), skip)

    def _walk(self, prefix: str, above: frozenset[Path], skip: Callable[[str], bool]) -> Iterator[str]:
        try:
            names = sorted(entry.name for entry in (self.root / prefix).iterdir())
        except OSError as e:
            raise CheckpointError(f"{self.name}/{shown(prefix)}: cannot be listed ({reason(e)}).") from e
        for name in names:
            relative = f"{prefix}{name}"
            if skip(relative):
                continue
            target = self.path(relative)
            mode = self._status(relative, target).st_mode
            if stat.S_ISDIR(mode):
                if target in above:
                    raise CheckpointError(f"{self.name}/{shown(relative)}: is a link to a folder above it.")
                yield from self._walk(f"{relative}/", above | {target}, skip)
            elif stat.S_ISREG(mode):
                yield relative
            else:
                raise CheckpointError(f"{self.name}/{shown(relative)}: is not a regular file.")

    def load_json(self, relative: str, *, unique_keys: bool = False) -> dict[str, Any]:
        """The JSON object in a file. Raises CheckpointError for any other content, and for files that are too large."""
        where = f"{self.name}/{shown(relative)}"
        if (size := self.size(relative)) > LARGEST_JSON:
            raise CheckpointError(f"{where}: has {size:,} bytes, at most {LARGEST_JSON:,} are read.")
        raw = self.read(relative)
        try:
            value = json.loads(raw, object_pairs_hook=_unique_keys if unique_keys else None)
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{where}: {known_start(raw) or f'is not valid JSON ({reason(e)})'}.") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: holds a {type(value).__name__}, expected a JSON object.")
        if _is_deeper(value, _DEEPEST_JSON):
            raise CheckpointError(f"{where}: is nested more than {_DEEPEST_JSON} levels deep.")
        return value


def is_weight_file(relative: str) -> bool:
    return PurePosixPath(relative).suffix.lower() in WEIGHT_SUFFIXES


def is_pickle(relative: str) -> bool:
    return PurePosixPath(relative).suffix.lower() in PICKLE_SUFFIXES


def find_weights(name: str, listing: Sequence[str], *, of_hub: bool = False) -> tuple[str | None, str | None]:
    """The single weights file, or the index: safetensors before pickles, as transformers does; of either,
    model.safetensors (pytorch_model.bin) first, then its index, else the only one of its kind.

    `name` is the folder's name, for messages, and `of_hub` says whether it is an id of the Hub. Files in sub-folders of
    the listing count only as parts of a pipeline.
    Raises CheckpointError when there is neither.
    """
    everything, listing = listing, [file for file in listing if "/" not in file]
    safetensors = [file for file in listing if file.endswith((".safetensors", ".safetensors.index.json"))]
    if safetensors:
        return _choose(name, safetensors, "model.safetensors", ".safetensors")
    states = [file for file in listing if is_pickle(file) and not _STATE_FILES.match(file)]
    states += [file for file in listing if file.endswith(".bin.index.json")]
    if states:
        return _choose(name, states, "pytorch_model.bin", ".bin")
    if others := [file for file in listing if is_weight_file(file)]:
        raise CheckpointError(f"{name}: {unread_format(others)}")
    if PIPELINE in listing:
        raise CheckpointError(f"{name}: {_pipeline(name, everything, of_hub)}")
    numbers = [int(match[1]) for file in listing if (match := re.fullmatch(r"checkpoint-(\d{1,12})", file))]
    inside = f" Its folder checkpoint-{max(numbers)} is a training's last: give that." if numbers else ""
    inside = " Its folder `final` is what mixce-train leaves: give that." if "final" in listing else inside
    raise CheckpointError(
        f"{name}: no weights found, expected model.safetensors or model.safetensors.index.json.{inside}"
    )


def _pipeline(name: str, listing: Sequence[str], of_hub: bool) -> str:
    """The message for a diffusers pipeline: which of its folders to give."""
    parts = sorted({file.partition("/")[0] for file in listing if file.count("/") == 1 and is_weight_file(file)})
    what = f"is a pipeline of diffusers ({PIPELINE}), of several models. Give the folder of one of them"
    if not parts:
        return f"{what}; none is here yet: finish the download."
    if of_hub:  # sub-folders have no ids
        return (
            f"{what}: hf download {name} --local-dir FOLDER, then {listed((f'FOLDER/{part}' for part in parts), 20)}."
        )
    return f"{what}: {listed((f'{name}/{part}' for part in parts), 20)}."


def _choose(name: str, files: list[str], usual: str, suffix: str) -> tuple[str | None, str | None]:
    indexes = [file for file in files if file.endswith(".index.json")]
    singles = [file for file in files if not file.endswith(".index.json")]
    if usual in singles:
        return usual, None
    if f"{usual}.index.json" in indexes:
        return None, f"{usual}.index.json"
    if len(indexes) == 1:
        return None, indexes[0]
    if len(singles) == 1 and not indexes:
        return singles[0], None
    kind = f"{suffix} files" if suffix == ".safetensors" else "pickled files of weights"
    raise CheckpointError(
        f"{name}: has {len(singles)} {kind} but neither {usual} nor one index "
        f"({listed(indexes or singles)}). Name one file instead of the folder, or add its index."
    )


def unread_format(names: Sequence[str]) -> str:
    """The message for a folder whose weights are only in formats that are not read: the reason and the next step."""
    if any(name.lower().endswith((".gguf", ".ggml")) for name in names):
        return (
            f"GGUF weights ({listed(names)}) are not read: they are packed for inference, most of them in blocks of "
            "few bits. Merge the original safetensors and convert the result (llama.cpp: convert_hf_to_gguf.py)."
        )
    if all(_STATE_FILES.match(name) for name in names):
        return f"no weights found, only a training's state ({listed(names)}). Give the folder that holds the model."
    return (
        f"only weights in formats that are not read ({listed(names)}). Convert them first: load with transformers, "
        "then save_pretrained(FOLDER) writes safetensors."
    )


def weight_map_files(index: Any) -> list[str]:
    """The weights files that an index names, sorted; ValueError when it names none."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise ValueError("it has no weight_map from tensor names to file names")
    return sorted(set(weight_map.values()))


def folder_name(root: Path) -> str:
    """A resolved folder's name for messages: its last part, or `org/name` in a Hub cache; never the whole path."""
    if _hub_blobs(root):
        return root.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return _printable(root.name) or "folder"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def meant_path(path: str | Path) -> str:
    """For a path that is not there: ` Did you mean ...?`, with the nearest name in the deepest folder that is there."""
    wanted = Path(path)
    for place in (wanted, *wanted.parents):
        try:
            if place.exists() or not place.parent.is_dir():
                continue
            names = {entry.name.lower(): entry.name for entry in place.parent.iterdir()}
        except (OSError, ValueError):
            break
        close = difflib.get_close_matches(place.name.lower(), names, 1)
        near = place.with_name(names[close[0]]) / wanted.relative_to(place) if close else None
        return f" Did you mean {shown(near)}?" if near is not None and near.exists() else " Check the spelling."
    return " Check the spelling."


def snapshot_of(path: Path) -> Path:
    """Of a model's folder in the Hub's cache (`models--org--name`), the snapshot of `main`, or the only one; any other
    path as it is."""
    if not _resolved(path).name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    snapshots = sorted((path / "snapshots").iterdir())
    try:
        named = path / "snapshots" / (path / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        named = path
    if named in snapshots:
        return named
    if len(snapshots) != 1:
        found = listed(p.name for p in snapshots) or "none"
        raise CheckpointError(f"{shown(path)}: is a model in the Hub's cache; give one of its snapshots: {found}.")
    return snapshots[0]


def distinct_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The name of each folder or file. Where several have one name, as many of their parents come before it as are
    needed to tell them apart: `a/final` and `b/final`. Two commits of a model of the Hub are `org/name@commit`."""
    roots = {path: _resolved(snapshot_of(path)) for path in paths}
    names = {root: _own_name(path, root) for path, root in roots.items()}
    for name in {name for name in names.values() if list(names.values()).count(name) > 1}:
        alike = [root for root in names if names[root] == name]
        for root in alike:
            names[root] = f"{name}@{root.name[:8]}" if _hub_blobs(root) else name
        local = [root for root in alike if not _hub_blobs(root)]
        depth = 2
        while len({root.parts[-depth:] for root in local}) < len(local):
            depth += 1
        for root in local if len(local) > 1 else ():
            names[root] = _printable(Path(*root.parts[-depth:]).as_posix())
    return {path: names[root] for path, root in roots.items()}


def _resolved(path: Path) -> Path:
    """The path without links; as it is if they lead in a circle, which opening it will say."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()


def _own_name(path: Path, root: Path) -> str:
    return path.name if root.is_file() else folder_name(root)


def _hub_blobs(root: Path) -> Path | None:
    repo = root.parent.parent
    if root.parent.name == "snapshots" and repo.name.startswith("models--"):
        return repo / "blobs"
    return None


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` levels deep: walking or printing deeper ones would fail."""
    level = [value]
    for _ in range(most):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)]
        level = [v for v in level if isinstance(v, (dict, list))]
    return bool(level)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key '{shown(key)}' appears twice")
        content[key] = value
    return content
