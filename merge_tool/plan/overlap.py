"""Whether an output would touch an input: by device and inode, because one folder may have several names.

A link, a mount, or another spelling on a disk that ignores case: the text of two paths is not enough. Some drivers give
two spellings of one folder two inodes; a file made under one spelling then appears under the other, too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file or folder at `path`, links followed; None if there is none, or it has no inode."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def lies_in(path: Path, other: Path) -> bool:
    """Whether `path` is `other` or inside it. Both may be missing still."""
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


def find_showing(work: Path, name: str, mark: bytes, inputs: Iterable[Path], *, is_file: bool) -> Path | None:
    """The input in which the file `name` with the content `mark` appears, which was just made in an output's work
    folder.

    The output (one file if `is_file`, else a folder) is then the input, or one of them is inside the other.
    """
    real = work.resolve()
    for source in inputs:
        input_path = source.resolve()
        folders = [input_path / real.relative_to(parent) for parent in real.parents]
        if is_file:
            folders.append(input_path.with_name(f"{input_path.name}{real.suffix}"))
        else:
            folders += [parent / real.name for parent in input_path.parents]
        if any(_holds(folder / name, mark) for folder in folders):
            return source
    return None


def _folders_in(root: Path) -> Iterator[Path]:
    """All folders below `root`, without hidden ones, which are not part of a model."""
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _holds(path: Path, content: bytes) -> bool:
    try:
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and status.st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
