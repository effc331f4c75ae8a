"""The models that are asked for -> where they are: folders and files here, or in the Hub's cache, with weights to come.

A merge is planned and checked with the headers of what is still to come; then, and only then, the rest is fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from merge_tool.checkpoint.hub import Snapshot, look
from merge_tool.errors import FetchError, shown
from merge_tool.models.lora import Coming, known_parts


@dataclass(frozen=True, slots=True)
class Download:
    """Weights of models of the Hub, in bytes.

    `nbytes` are still to download, `cached_bytes` already in the cache, `fetched_bytes` of these fetched for planning;
    `begun_bytes` were left by an interrupted download. `cache` is a folder in the cache, if anything is to download.
    """

    nbytes: int = 0
    cached_bytes: int = 0
    fetched_bytes: int = 0
    begun_bytes: int = 0
    cache: Path | None = None

    @property
    def disk_bytes(self) -> int:
        """Disk space that the download will take."""
        return max(0, self.nbytes - self.begun_bytes)

    def check_room(self) -> None:
        """Raise FetchError unless the disk of the cache can take what is to be fetched."""
        if self.cache is None:
            return
        free = shutil.disk_usage(self.cache).free
        if self.disk_bytes > free:
            raise FetchError(
                f"{shown(self.cache)}: the weights to fetch take {self.disk_bytes:,} bytes, the disk of the Hub's "
                f"cache has {free:,} free. Free some space, or set HF_HUB_CACHE to a folder on another disk."
            )


class Inputs:
    """The models of a merge, each `MODEL[+ADAPTER...]`, found: `refs` name them by local paths, `paths` are all models
    and adapters, `coming` has the weights that a folder still lacks. Its headers can be read until `close`.

    A model that is named twice is looked for once. Raises FetchError, CheckpointError.
    """

    def __init__(self, refs: Iterable[str | Path]) -> None:
        self._held = ExitStack()
        self._found: dict[Path, Snapshot] = {}
        with ExitStack() as held:  # closed if one of them cannot be had
            parts = [[self._find(held, part) for part in known_parts(ref)] for ref in refs]
            self._held = held.pop_all()
        self.refs = tuple(Path("+".join(map(str, found))) for found in parts)
        self.paths = tuple(path for found in parts for path in found)

    def _find(self, held: ExitStack, part: Path) -> Path:
        if part not in self._found:
            self._found[part] = look(part)
            held.callback(self._found[part].close)
        return self._found[part].folder

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._held.close()

    @property
    def coming(self) -> Coming:
        return {one.folder: one.coming for one in self._found.values() if one.coming}

    @property
    def download(self) -> Download:
        found = {one.folder: one for one in self._found.values()}.values()  # two revisions may be one commit
        return Download(
            nbytes=sum(file.size for one in found for file in one.coming.values()),
            cached_bytes=sum(one.cached_bytes for one in found),
            fetched_bytes=sum(one.fetched_bytes for one in found),
            begun_bytes=sum(one.begun_bytes for one in found),
            cache=next((one.folder for one in found if one.coming), None),
        )

    def fetch(self) -> None:
        """Fetch all weights that are to come; nothing is then. Raises FetchError."""
        for one in self._found.values():
            one.fetch()
        self._held.close()
        self._found.clear()
