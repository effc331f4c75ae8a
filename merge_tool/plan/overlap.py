"""Whether an output would touch an input: by device and inode, because one folder may have several names.

The text of two paths is not enough: there are links, mounts, and other spellings on a disk that ignores case. Some
drivers give two spellings of one folder two inodes; a file made under one spelling then appears under the other, too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_tool.errors import input_failed


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file or folder at `path`, links followed; None if there is none, or it has no inode."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def lies_in(path: Path, other: Path) -> bool:
    """Whether `path` is `other` or inside it. Neither path needs to exist."""
    real, other_real = path.resolve(), other.resolve()
    if real.is_relative_to(other_real):
        return True
    own = identity(other_real)
    return own is not None and own in map(identity, (real, *real.parents))


def find_shared(paths: Iterable[Path], inputs: Iterable[Path]) -> tuple[Path, Path] | None:
    """The first of `paths` that is an input, or is inside or around an input; and that input."""
    inside: dict[tuple[int, int] | None, Path] = {}
    above: dict[tuple[int, int] | None, Path] = {}
    for source in inputs:
        inside |= dict.fromkeys(map(identity, (source, *_folders_in(source))), source)
        above |= dict.fromkeys(map(identity, source.resolve().parents), source)
    for owners in (inside, above):
        owners.pop(None, None)
    for path in paths:
        real = path.resolve()
        for own in map(identity, (real, *real.parents)):
            if own in inside:
                return path, inside[own]
        if (own := identity(real)) in above:
            return path, above[own]
    return None


def find_showing(
    mark: Path, content: bytes, inputs: Iterable[Path], *, above: bool = True, is_in_out: bool = False
) -> Path | None:
    """The input in which the file `mark` with that content shows up. The file was just made two levels below an output
    (`OUT/.slerp-merge/lock`) or one level (`OUT/t-0.3/.mark`): `mark.name` and perhaps its folder's name are ours. Or
    it `is_in_out` itself: a folder beside the input may have the name of OUT.

    The output is then that input, or inside it, or, unless `above` is false, around it.
    """
    real = mark.parent.resolve() / mark.name
    for source in inputs:
        with _reading(source):
            if any(holds(place, content) for place in _places(real, source.resolve(), above, not is_in_out)):
                return source
    return None


def _places(real: Path, source: Path, above: bool, has_folder: bool) -> Iterator[Path]:
    """The places where a mark would be if the output were this input, or inside or around it."""
    yield from (source / real.relative_to(parent) for parent in real.parents)
    folders = [source, *_folders_in(source)] if source.is_dir() else []
    for folder in (*folders, *(source.parents if above else ())):
        yield folder / real.name
        if has_folder:
            yield folder / real.parent.name / real.name
    yield source.with_name(f"{source.name}{real.parent.suffix}") / real.name  # the work beside a single file


def find_look_alike(out: Path, inputs: Iterable[Path]) -> Path | None:
    """A file of an input, or an input, that OUT seems to hold: of the same name, size and time. Some drivers show one
    folder as two."""
    here = [out] if out.is_file() else [path for path in out.iterdir() if path.is_file()]
    ours = {_look(path) for path in here}
    for source in inputs:
        with _reading(source):
            if (alike := _looks_like(out, ours, source.resolve())) is not None:
                return alike
    return None


def _looks_like(out: Path, ours: set[tuple[str, int, int]], source: Path) -> Path | None:
    files = [source]
    if source.is_dir():
        files = sorted(f for folder in (source, *_folders_in(source)) for f in folder.iterdir() if f.is_file())
    if alike := next((file for file in files if _look(file) in ours), None):
        return alike
    for parent in source.parents if files and out.is_dir() else ():
        if (there := out / files[0].relative_to(parent)).is_file() and _look(there) == _look(files[0]):
            return source
    return None


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn OSErrors into errors that name the input."""
    try:
        yield
    except OSError as e:
        raise input_failed(source, e) from e


def _look(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name.casefold(), status.st_size, status.st_mtime_ns


def _folders_in(root: Path) -> Iterator[Path]:
    """All folders below `root`, without hidden ones, which are not part of a model."""
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def holds(path: Path, content: bytes) -> bool:
    """Whether a file with this content is there."""
    try:
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and status.st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
