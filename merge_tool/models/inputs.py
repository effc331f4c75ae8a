"""The models of a recipe -> their paths: local folders and files, or folders in the Hub's cache, with weights still to
be fetched. A merge is planned and checked with the headers of those weights; only then are the weights fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from merge_tool.checkpoint.hub import Snapshot, look
from merge_tool.errors import FetchError, shown, sized
from merge_tool.files import free_bytes
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
        """Raise FetchError unless the cache's disk has room for the download."""
        if self.cache is None:
            return
        free = free_bytes(self.cache)
        if free is not None and self.disk_bytes > free:
            raise FetchError(
                f"{shown(self.cache)}: the weights to fetch take {sized(self.disk_bytes)}, the disk of the Hub's "
                f"cache has {sized(free)} free. Free some space, or set HF_HUB_CACHE to a folder on another disk."
            )


class Inputs:
    """The models of a merge, each `MODEL[+ADAPTER...]`, as local paths. `refs` name them by local paths, `pinned` by
    absolute paths or commits of the Hub; `paths` are all models and adapters. `coming` has the weights that folders
    still lack; their headers can be read until `close`.

    A model that is named twice is looked up once. `variant` chooses among files of weights. Raises FetchError,
    CheckpointError.
    """

    def __init__(self, refs: Iterable[str | Path], variant: str | None = None) -> None:
        self._held, self._variant = ExitStack(), variant
        self._snapshots: dict[str, Snapshot] = {}
        with ExitStack() as held:  # closed if a model cannot be fetched
            parts = [[self._find(held, part) for part in known_parts(ref)] for ref in refs]
            self._held = held.pop_all()
        self.refs = tuple(Path("+".join(str(one.folder) for one in several)) for several in parts)
        self.pinned = tuple("+".join(one.pinned for one in several) for several in parts)
        self.paths = tuple(one.folder for several in parts for one in several)

    def _find(self, held: ExitStack, part: str) -> Snapshot:
        if part not in self._snapshots:
            self._snapshots[part] = look(part, self._variant)
            held.callback(self._snapshots[part].close)
        return self._snapshots[part]

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._held.close()

    @property
    def coming(self) -> Coming:
        return {one.folder: one.coming for one in self._snapshots.values() if one.coming}

    @property
    def download(self) -> Download:
        snapshots = {one.folder: one for one in self._snapshots.values()}.values()  # two revisions may be one commit
        return Download(
            nbytes=sum(file.size for one in snapshots for file in one.coming.values()),
            cached_bytes=sum(one.cached_bytes for one in snapshots),
            fetched_bytes=sum(one.fetched_bytes for one in snapshots),
            begun_bytes=sum(one.begun_bytes for one in snapshots),
            cache=next((one.folder for one in snapshots if one.coming), None),
        )

    def fetch(self) -> None:
        """Fetch all missing weights; `coming` is then empty. Raises FetchError."""
        for one in self._snapshots.values():
            one.fetch()
        self._held.close()
        self._snapshots.clear()
