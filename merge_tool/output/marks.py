"""Checks that no folder in OUT is an input's by a link, a mount or a spelling, and that files can be moved into OUT.

Before the merge, devices and inodes are compared. Under the lock, marks are used: a marked file is moved as the model's
files will be. If it then shows up in an input, OUT is that input, whatever inode numbers the disk's driver gives.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from merge_tool.errors import OutputError, output_failed, reason, shown
from merge_tool.files import patiently
from merge_tool.models.side_files import folded
from merge_tool.output.lock import FolderLock, new_mark
from merge_tool.output.older import older_labels, outdated
from merge_tool.plan.overlap import find_shared, find_showing, holds
from merge_tool.plan.target import Target, shared_with

MARK = ".slerp-merge-mark"  # in the folder that is checked with letters behind it, see `_fresh`
_LONG_PATH = 240  # Windows ends at 259, unless long paths are enabled
_NAME_ERRORS = frozenset({errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOENT})


def check_folders(target: Target, labels: Iterable[str], names: Iterable[str], inputs: Iterable[Path]) -> None:
    """Raise OutputError where a folder in OUT, by a link or a mount, is an input's, and the merge would write into it
    or remove files from it. `labels` are the outputs, `names` their files."""
    path, new = target.path, list(names)
    try:
        folders = {path: None}
        for label in () if target.is_file else dict.fromkeys((*labels, *older_labels(path))):
            folder = path / label
            changed = (*new, *outdated(folder))
            folders |= {folder / parent: None for name in changed for parent in PurePosixPath(name).parents}
        shared = find_shared(folders, inputs)
    except (OSError, RuntimeError, ValueError) as e:
        raise OutputError(f"{shown(path)}: cannot be used ({reason(e)}).") from e
    if shared is not None:
        raise shared_with(*shared)


def check_marks(
    lock: FolderLock, target: Target, labels: Iterable[str], names: Iterable[str], inputs: Iterable[Path]
) -> None:
    """Raise OutputError if the lock, or a mark in an existing folder of OUT, shows up in an input; and if files cannot
    be renamed from the work folder into such a folder because it is on another disk."""
    inputs, new = tuple(inputs), list(names)
    content = lock.mark()
    if (source := find_showing(lock.path, content, inputs, above=not target.is_file)) is not None:
        raise shared_with(target.path, source)
    if target.is_file:
        check_apart_by_mark(target.path.parent, inputs, name=target.path.name)
        return
    written = [target.path, *_inner_folders(target.path, labels, new)]
    for folder in dict.fromkeys((*written, *_inner_folders(target.path, older_labels(target.path)))):
        _check_mark(folder, lock.path.with_name(MARK), content, inputs, folder in written, folder == target.path)


def check_apart_by_mark(folder: Path, inputs: Iterable[Path], *, name: str = "") -> None:
    """Raise OutputError if a mark in this folder shows up in an input. Without a `name` the folder's content will be
    removed, so inputs below it count as well; with a `name` only the file of that name counts."""
    mark, content, inputs = _fresh(folder), new_mark(), tuple(inputs)
    try:
        mark.write_bytes(content)
        source = find_showing(mark, content, inputs, above=not name)
        beside = [
            path for path in inputs if folded(path.name) == folded(name) and holds(path.parent / mark.name, content)
        ]
    finally:
        _remove(mark)
    if source is not None or beside:
        raise shared_with(folder / name, source or beside[0])


def check_names(folder: Path, labels: Iterable[str], names: Iterable[str]) -> None:
    """Raise OutputError unless this disk can hold files with all these names in each output. `folder` is made for the
    trial, and removed; its paths are as long as the paths of the unfinished files."""
    name, chosen = "", list(names)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for label in labels:
            for name in chosen:
                (folder / label / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / label / name).open("xb").close()
    except FileExistsError as e:
        raise OutputError(
            f"{shown(name)}: for the disk of {shown(folder.parent)} this is the name of another file of the model, "
            "too. Rename one of the two in the model's folder, or choose another disk."
        ) from e
    except OSError as e:
        if e.errno not in _NAME_ERRORS:
            raise output_failed(folder, e) from e
        length = len(str(folder.absolute() / label / name))
        shorter = f" Its path has {length} characters: a shorter OUT may help." if length > _LONG_PATH else ""
        raise OutputError(
            f"{shown(name)}: the disk of {shown(folder.parent)} cannot hold this name ({reason(e)}).{shorter} "
            "Rename it in the model's folder, or choose another disk."
        ) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inner_folders(out: Path, labels: Iterable[str], names: Iterable[str] | None = None) -> list[Path]:
    """The existing folders below OUT that hold files of the outputs: the files with these names, or outdated files."""
    chosen = None if names is None else list(names)
    folders = [
        out / label / parent
        for label in labels
        for name in (outdated(out / label) if chosen is None else chosen)
        for parent in PurePosixPath(name).parents
    ]
    return [folder for folder in dict.fromkeys(folders) if folder != out and folder.is_dir()]


def _remove(mark: Path) -> None:
    """Remove a mark; if that fails, try once more: a mark must not stay beside the user's files."""
    try:
        mark.unlink(missing_ok=True)
    except OSError:
        mark.unlink(missing_ok=True)


def _fresh(folder: Path) -> Path:
    """A new path for a mark: an overlay mount, or a share, remembers for a while that a name did not exist."""
    return folder / f"{MARK}-{secrets.token_hex(4)}"


def _check_mark(
    folder: Path, made: Path, content: bytes, inputs: tuple[Path, ...], is_written: bool, is_out: bool
) -> None:
    """Move a mark into a folder as its files will be moved, and look for it in the inputs."""
    mark = _fresh(folder)
    try:
        for left in folder.glob(f"{MARK}*"):  # by a run that was killed
            left.unlink(missing_ok=True)
        try:
            made.write_bytes(content)
            patiently(lambda: made.replace(mark))
        except OSError as e:
            if e.errno == errno.EXDEV and is_written:
                raise OutputError(
                    f"{shown(folder)}: is on another disk than {shown(made.parent)}, so finished files cannot be moved "
                    "into it. Unmount it, or choose another OUT."
                ) from e
            if e.errno != errno.EXDEV:
                raise output_failed(folder, e) from e
            mark.write_bytes(content)
        source = find_showing(mark, content, inputs, is_in_out=is_out)
    finally:
        for path in (made, mark):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    if source is not None:
        raise shared_with(folder, source)
