"""A model of the Hugging Face Hub by its id -> the folder in the Hub's cache that holds it, or all but its weights.

The library does the work (fetching.py), in a process of its own: it takes 15 MB to import and more to download, which
the merge's memory budget keeps for itself. Of weights that are not in the cache `look` fetches the headers alone, which
is what a plan needs; into an unnamed temporary file, of which nothing is left whatever ends us.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any

from merge_tool.apart import ask
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.checkpoint.source import ComingFile
from merge_tool.errors import FetchError, shown

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)


def hub_id(ref: str | Path) -> tuple[str, str | None] | None:
    """(`org/name`, revision or None) when `ref` is a hub id and nothing local is called so, else None.

    >>> hub_id("euclaise/Memphis-CoT-3B@main")
    ('euclaise/Memphis-CoT-3B', 'main')
    >>> hub_id("runs/model.safetensors") is None
    True
    """
    text = ref.as_posix() if isinstance(ref, PurePath) else ref
    found = _HUB_ID.fullmatch(text)
    if found is None or is_weight_file(found[1]) or os.path.lexists(text):
        return None
    return found[1], found[2]


def local_path(ref: str | Path) -> Path:
    """`ref` as a path; a hub id becomes the folder of the Hub's cache that holds it, fetched if it is not there yet.

    Raises FetchError when it cannot be had: gated, missing, offline, no such revision.
    """
    asked = hub_id(ref)
    return Path(ref) if asked is None else _fetch_whole(*asked)


@dataclass(frozen=True)
class Snapshot:
    """A model's folder, and the weights that are still to be fetched into it, by name: of these only headers are here,
    until `close`. Of a model of the Hub `cached_bytes` of weights are in the cache, `fetched_bytes` of these since
    it was looked at; `begun_bytes` are what an earlier, broken download of the others has there already, and will not
    take again."""

    folder: Path
    coming: Mapping[str, ComingFile] = field(default_factory=dict)
    cached_bytes: int = 0
    fetched_bytes: int = 0
    begun_bytes: int = 0
    asked: tuple[str, str | None] | None = None
    held: IO[bytes] | None = None

    def close(self) -> None:
        if self.held is not None:
            self.held.close()

    def fetch(self) -> None:
        """Fetch what is still to come, of the very commit that was looked at. Raises FetchError."""
        if self.coming and self.asked is not None:
            _fetch_whole(*self.asked, commit=self.folder.name)


def look(ref: str | Path) -> Snapshot:
    """As `local_path`, but of safetensors that are not in the cache only the headers are fetched; pickles and adapters
    are fetched whole. To be closed."""
    asked = hub_id(ref)
    if asked is None:
        return Snapshot(Path(ref))
    held = _unnamed_file(asked[0])
    try:
        answer = _ask_apart(held, "look", *asked)
        folder, coming, place = Path(answer["folder"]), {}, held.tell()
        for name, size, length in answer["coming"]:
            coming[name] = ComingFile(name=f"{asked[0]}/{name}", size=size, held=held, place=place, length=length)
            place += length
        cached, fetched, begun = (int(answer[f"{what}_bytes"]) for what in ("cached", "fetched", "begun"))
        return Snapshot(
            folder=folder,
            coming=coming,
            cached_bytes=cached,
            fetched_bytes=fetched,
            begun_bytes=begun,
            asked=asked,
            held=held,
        )
    except BaseException:
        held.close()
        raise


def _fetch_whole(repo: str, revision: str | None, commit: str | None = None) -> Path:
    with _unnamed_file(repo) as held:
        return Path(_ask_apart(held, "fetch", repo, revision, commit))


def _unnamed_file(repo: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as e:
        raise FetchError(f"{shown(repo)}: no temporary file can be made to fetch it ({e.strerror}).") from e


def _ask_apart(held: IO[bytes], *request: str | None) -> Any:
    """What fetching.main answers, in a process of its own that has our standard error for its progress bars. Other
    bytes that it gives follow in `held`, from its position on."""
    repo = shown(request[1])
    value, _ = ask(
        "merge_tool.checkpoint.fetching",
        request,
        what=repo,
        error=FetchError,
        hint="Its last words are above. Run the same command again: it continues.",
        into=held,
    )
    return value
