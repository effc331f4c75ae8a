"""The folders of a merge: missing ones are made, empty ones are removed, and folders of others are never touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from merge_tool.errors import OutputError, listed, output_failed, shown
from merge_tool.models.side_files import SYSTEM_FILES
from merge_tool.output.marks import MARK
from merge_tool.output.owner import OWNER
from merge_tool.plan.target import existing_folder

FILES = "files"  # the finished files of each output
PARTS = "parts"  # the pieces and receipts of many workers
_OWN_ENTRIES = frozenset({"lock", "journal.jsonl", FILES, "names", PARTS, MARK, OWNER})


def refuse_foreign(work: Path) -> None:
    """Raise OutputError unless `work` is missing or looks like a work folder of ours: nothing else is wiped."""
    what = None
    if work.is_symlink():
        what = "is a link"
    elif work.exists() and not work.is_dir():
        what = "is a file"
    elif work.is_dir() and (others := [name for name in _names_in(work) if not SYSTEM_FILES.fullmatch(name)]):
        what = f"holds other files ({listed(sorted(others))})"
    if what:
        raise OutputError(f"{shown(work)}: {what}; the work of a merge goes there. Move it away.")


def _names_in(work: Path) -> set[str]:
    return {entry.name for entry in work.iterdir()} - _OWN_ENTRIES


def remove_empty(folder: Path, stop: Path) -> None:
    """Remove a folder and its parents below `stop`, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        while folder != stop:
            folder.rmdir()
            folder = folder.parent


def make_folders(path: Path) -> list[Path]:
    """Create `path` and its missing parents; returns the created folders, deepest first."""
    missing, there = [], existing_folder(path)
    while path != there and not path.exists():
        missing.append(path)
        path = path.parent
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    except OSError as e:
        raise output_failed(missing[0] if missing else path, e) from e
    return missing


def remove_folders(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()
