"""The models of a recipe -> their paths: local folders and files, or folders in the Hub's cache, with weights still to
be fetched. A merge is planned and checked with the headers of those weights; only then are the weights fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from merge_tool.checkpoint.addresses import is_store
from merge_tool.checkpoint.hub import Snapshot, look, not_read_here
from merge_tool.checkpoint.source import ByteSource
from merge_tool.checkpoint.streaming import Streaming
from merge_tool.errors import FetchError, shown, sized
from merge_tool.files import free_bytes
from merge_tool.models.lora import Coming, known_parts

if TYPE_CHECKING:  # most merges read no file by range
    from merge_tool.checkpoint.blocks import Use
    from merge_tool.checkpoint.range_file import Ranges


def _kinds(snapshots: Iterable[Snapshot]) -> list[str]:
    """Where weights come from, in words, each kind once."""
    kinds = {
        ("the Hub" if not one.address else "buckets" if is_store(one.address) else "addresses") for one in snapshots
    }
    return sorted(kinds, reverse=True)


@dataclass(frozen=True, slots=True)
class Download:
    """Weights of models of the Hub, in bytes.

    `nbytes` are still to download, `cached_bytes` already in the cache, `fetched_bytes` of these fetched for planning;
    `begun_bytes` were left by an interrupted download. `cache` is a folder in the cache, if anything is to download.
    If they are read by range (`is_streamed`), only the spool takes disk space: `spool_bytes` in the folder `spool`.
    Some may be at addresses: `sources` are in words where they come from.
    """

    nbytes: int = 0
    cached_bytes: int = 0
    fetched_bytes: int = 0
    begun_bytes: int = 0
    cache: Path | None = None
    is_streamed: bool = False
    spool_bytes: int = 0
    sources: str = "the Hub"

    @property
    def disk_bytes(self) -> int:
        """Disk space that the download will take."""
        return self.spool_bytes if self.is_streamed else max(0, self.nbytes - self.begun_bytes)

    def check_room(self) -> None:
        """Raise FetchError unless the cache's disk has room for the download."""
        if self.cache is None:
            return
        free = free_bytes(self.cache)
        if free is not None and self.disk_bytes > free and self.is_streamed:
            raise FetchError(
                f"{shown(self.cache)}: the spool of the weights that are read by range takes up to "
                f"{sized(self.disk_bytes)}, its disk has {sized(free)} free. Give a smaller --spool, or free some "
                "space."
            )
        if free is not None and self.disk_bytes > free:
            raise FetchError(
                f"{shown(self.cache)}: the weights to fetch take {sized(self.disk_bytes)}, the disk of the Hub's "
                f"cache has {sized(free)} free. Free some space, or set HF_HUB_CACHE to a folder on another disk."
            )


class Inputs:
    """The models of a merge, each `MODEL[+ADAPTER...]`, as local paths. `refs` name them by local paths, `pinned` by
    absolute paths or commits of the Hub; `paths` are all models and adapters. `coming` has the weights that folders
    still lack: of them, headers can be read until `close`, and after `stream` everything.

    A model that is named twice is looked up once. `variant` chooses among files of weights. Raises FetchError,
    CheckpointError.
    """

    def __init__(
        self, refs: Iterable[str | Path], streaming: Streaming | None = None, *, variant: str | None = None
    ) -> None:
        self.streaming, self._variant = streaming or Streaming(), variant
        self._held = ExitStack()
        self._snapshots: dict[str, Snapshot] = {}
        self._ranges: Ranges | None = None
        self._streamed: Coming = {}
        self._spool: Path | None = None  # its folder
        self._spool_slots = self._spool_bytes = 0
        with ExitStack() as held:  # closed if a model cannot be fetched
            parts = [[self._find(held, part) for part in known_parts(ref)] for ref in refs]
            self._held = held.pop_all()
        self.refs = tuple(Path("+".join(str(one.folder) for one in several)) for several in parts)
        self.pinned = tuple("+".join(one.pinned for one in several) for several in parts)
        self.paths = tuple(one.folder for several in parts for one in several)

    def _find(self, held: ExitStack, part: str) -> Snapshot:
        if part not in self._snapshots:
            by_range = self.streaming.stream is True
            self._snapshots[part] = look(part, by_range=by_range, variant=self._variant)
            held.callback(self._snapshots[part].close)
        return self._snapshots[part]

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.end_downloads()
        self._held.close()

    def end_downloads(self) -> None:
        """End the process that downloads: the weights are merged. Side files can still be read."""
        if self._ranges is not None:
            self._ranges.close()
            self._ranges = None

    @property
    def coming(self) -> Coming:
        return self._streamed or {one.folder: one.coming for one in self._snapshots.values() if one.coming}

    @property
    def must_stream(self) -> bool:
        """Whether weights are at addresses, which have no cache."""
        return any(one.address for one in self._snapshots.values())

    @property
    def download(self) -> Download:
        snapshots = {one.folder: one for one in self._snapshots.values()}.values()  # two revisions may be one commit
        cache = next((one.folder for one in snapshots if one.coming), None)
        return Download(
            nbytes=sum(file.size for one in snapshots for file in one.coming.values()),
            cached_bytes=sum(one.cached_bytes for one in snapshots),
            fetched_bytes=sum(one.fetched_bytes for one in snapshots),
            begun_bytes=sum(one.begun_bytes for one in snapshots),
            cache=cache if self._spool is None else self._spool,
            is_streamed=self._spool is not None,
            spool_bytes=self._spool_bytes,
            sources=" and ".join(_kinds(one for one in snapshots if one.coming)) or "the Hub",
        )

    def fetch(self) -> None:
        """Fetch all missing weights; `coming` is then empty. Raises FetchError, also for models at addresses."""
        self.check_have_paths()
        for one in self._snapshots.values():
            one.fetch()
        self._held.close()
        self._snapshots.clear()

    def check_have_paths(self) -> None:
        """Raise FetchError for models at addresses, which can only be read by range."""
        if address := next((one.address for one in self._snapshots.values() if one.address), ""):
            raise FetchError(not_read_here(address))

    def choose_streaming(self, folder: Path, waiting_bytes: int | None = None) -> None:
        """From here on, the missing weights count as read by range, with the spool in `folder`. If the output does not
        stay on that disk, and only `waiting_bytes` of it are there at a time, the spool may take half of the rest."""
        if self.coming:
            from merge_tool.checkpoint import blocks

            nbytes = sum(file.size for files in self.coming.values() for file in files.values())
            for one in self._snapshots.values():
                for file in one.coming.values():
                    file.identify()
            self._spool, free = folder, free_bytes(folder)
            if free is not None and waiting_bytes is not None:
                free = 2 * max(0, free - waiting_bytes)  # of which a quarter is taken
            self._spool_slots = self.streaming.spool_slots(blocks.BLOCK_BYTES, len(self._snapshots), free)
            self._spool_bytes = min(self._spool_slots * blocks.BLOCK_BYTES, nbytes)

    def stream(self) -> None:
        """Begin to read the missing weights by range, after `choose_streaming`. Raises FetchError."""
        if self._spool is None:
            return
        from merge_tool.checkpoint.range_file import Ranges

        self._ranges = Ranges(downloads=self.streaming.downloads, slots=self._spool_slots, folder=self._spool)
        streamed: dict[Path, Mapping[str, ByteSource]] = {}
        for one in self._snapshots.values():
            if one.coming and one.folder not in streamed:
                files = self._ranges.add(list(one.coming.values()))
                streamed[one.folder] = dict(zip(one.coming, files, strict=True))
        self._streamed = streamed

    @property
    def is_streamed(self) -> bool:
        """Whether weights are read by range."""
        return self._ranges is not None

    def read_ahead(self, uses: Iterable[Use]) -> None:
        """Download ahead for these tensors, in this order."""
        assert self._ranges is not None
        self._ranges.read_ahead(uses)
