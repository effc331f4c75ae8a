"""Names of copied files that are one name on a disk that ignores case (macOS, Windows, exFAT) or normalises Unicode.

Such files would overwrite each other there. The output is the same on every disk, so they are renamed on every disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from merge_tool.errors import CheckpointError, listed, shown
from merge_tool.models.side_files import SideFile, folded

_NO_WINDOWS_SIGNS = frozenset('<>:"|?*\\') | frozenset(map(chr, range(32)))
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))})


def named_apart(copied: Sequence[SideFile], ours: Iterable[str]) -> tuple[tuple[SideFile, ...], list[str]]:
    """The files with names that no disk takes for one another, nor for one of `ours`; and a warning for each new name.

    Of several the one in small letters keeps its name: loaders read such names.
    """
    holders = {folded(name): name for name in ours}
    parents = {folded(parent): parent for file in copied for parent in _parents(file.target)}
    new: dict[str, str] = {}
    warnings = []
    for file in sorted(copied, key=lambda file: (file.target != file.target.lower(), file.target)):
        target, number = file.target, 2
        while folded(target) in holders or folded(target) in parents:
            target, number = _numbered(file.target, number), number + 1
        if target != file.target:
            other = holders.get(folded(file.target)) or f"the folder {parents[folded(file.target)]}"
            warnings.append(
                f"{shown(file.source)} is copied as {shown(target)}: on disks that ignore case it would overwrite "
                f"{shown(other)}."
            )
        holders[folded(target)] = new[file.target] = target
    return tuple(replace(file, target=new[file.target]) for file in copied), warnings


def check_names(names: Iterable[str], *, is_windows: bool = os.name == "nt") -> None:
    """Raise CheckpointError for names that no file on Windows can have: a colon would even name a part of a file."""
    if is_windows and (unfit := [name for name in names if any(map(_is_unfit, PurePosixPath(name).parts))]):
        raise CheckpointError(
            f'{listed(unfit)}: Windows has no file names with any of < > : " | ? * \\, with a dot or space at the end, '
            "or of a device (con, nul, com1). Rename it in the model's folder, or take the files of the other model: "
            "--files-from."
        )


def _is_unfit(part: str) -> bool:
    stem = part.partition(".")[0].rstrip().casefold()
    return bool(_NO_WINDOWS_SIGNS & set(part)) or part.endswith((".", " ")) or stem in _DEVICES


def _parents(name: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(name).parents if parent.name]


def _numbered(name: str, number: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}.{number}{path.suffix}"))
