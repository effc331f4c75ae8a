"""Whether an output would touch an input: by device and inode, for one folder may have several names.

A link, a mount, or another spelling on a disk that ignores case: the text of two paths says little. Some drivers give
two spellings of one folder two inodes; a file that is made in one of them then shows up in the other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what is at `path`, links followed; None where nothing is, or nothing that has an inode."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def lies_in(path: Path, other: Path) -> bool:
    """Whether `path` is `other`, or lies inside it, be it there or still to be made."""
    real, other_real = path.resolve(), other.resolve()
    if real.is_relative_to(other_real):
        return True
    own = identity(other_real)
    return own is not None and own in map(identity, (real, *real.parents))


def find_shared(paths: Iterable[Path], inputs: Iterable[Path]) -> tuple[Path, Path] | None:
    """The first of `paths` that is an input, or lies inside or around one or in a folder of one; and that input."""
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
    """The input that shows the file `name` with the content `mark`, which is new in the work folder of an output.

    That output, a folder or one file (`is_file`), is then the input, or one of them lies inside the other.
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
    """All folders below `root` but hidden ones, which are no part of a model."""
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _holds(path: Path, content: bytes) -> bool:
    try:
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and status.st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
