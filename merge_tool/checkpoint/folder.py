"""A folder of files from a stranger: which paths may be followed.

A symlink is followed when it ends inside the folder, or, in a Hub cache, inside that model's blobs.
Nothing else outside the folder is ever opened.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from merge_tool.checkpoint.lookalikes import known_start
from merge_tool.errors import CheckpointError, input_failed, listed, reason, shown
from merge_tool.files import leads_out

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".jit"})
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | frozenset(
    {".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".npz", ".tflite", ".mlmodel"}
    | {".nemo", ".distcp"}
)
_DEEPEST_JSON = 100  # a configuration has about 5 levels
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP})
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
        posix = PurePosixPath(relative)  # on POSIX a name that was listed may have any other sign
        outside = posix.is_absolute() or ".." in posix.parts or "\0" in relative or not posix.parts
        if outside or (os.name == "nt" and leads_out(relative)):
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
        return is_there(self.root / relative, f"{self.name}/{shown(relative)}")

    def listing(self) -> list[str]:
        """The names of the files and folders in the folder, sorted."""
        try:
            return sorted(entry.name for entry in self.root.iterdir())
        except OSError as e:
            raise CheckpointError(f"{self.name}: cannot be listed ({reason(e)}).") from e

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


def folder_name(root: Path) -> str:
    """A resolved folder's name for messages: its last part, or `org/name` in a Hub cache; never the whole path."""
    if _hub_blobs(root):
        return root.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return _printable(root.name) or "folder"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def is_there(path: str | Path, name: str = "") -> bool:
    """Whether a file, folder or link is at `path`; `name` is for the message. Raises CheckpointError where the system
    cannot tell (a dead mount, a folder that may not be entered): os.path.lexists says no there."""
    try:
        os.lstat(path)
    except ValueError:  # a zero byte
        return False
    except OSError as e:
        if e.errno in _MISSING:
            return False
        raise input_failed(name or path, e) from e
    return True


def meant_path(path: str | Path) -> str:
    """For a path that is not there: ` Did you mean ...?`, with the nearest path that is there."""
    near = nearest_path(path)
    return f" Did you mean {shown(near)}?" if near is not None else " Check the spelling."


def nearest_path(path: str | Path) -> Path | None:
    """For a path that is not there: the same with the nearest name in the deepest folder that is there, if that path
    exists."""
    wanted = Path(path)
    for place in (wanted, *wanted.parents):
        try:
            if place.exists() or not place.parent.is_dir():
                continue
            names = {entry.name.lower(): entry.name for entry in place.parent.iterdir()}
        except (OSError, ValueError):
            break
        close = difflib.get_close_matches(place.name.lower(), names)
        paths = (place.with_name(names[name]) / wanted.relative_to(place) for name in close)
        return next((path for path in paths if path.exists()), None)
    return None


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
        names = listed(p.name for p in snapshots) or "none"
        raise CheckpointError(f"{shown(path)}: is a model in the Hub's cache; give one of its snapshots: {names}.")
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
