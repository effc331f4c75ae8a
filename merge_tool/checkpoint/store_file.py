"""In the process that downloads: one object of an object store, read by range. Every answer must be of the planned one:
its ETag is a condition of the request, its size and range are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_tool.checkpoint.fetcher import PIECE_BYTES
from merge_tool.checkpoint.ranges import Passing
from merge_tool.checkpoint.source import Place
from merge_tool.checkpoint.stores import explained, first_line, folder_url, is_passing, library, open_store
from merge_tool.errors import FetchError


class StoreFile:
    """An object of known size and ETag."""

    def __init__(self, place: Mapping[str, Any], size: int, etag: str) -> None:
        self.place, self.size, self.etag = Place(**place), size, etag

    @property
    def where(self) -> str:
        return self.place.where

    def explained(self, error: Exception) -> str:
        return explained(error, self.where)

    def pieces(self, start: int, stop: int, stall_seconds: float) -> Iterator[bytes]:
        """The bytes [start, stop), or fewer if the line breaks. Raises Passing, FetchError."""
        folder, name = folder_url(self.place.url)
        options: dict[str, Any] = {"range": (start, stop)} | ({"if_match": self.etag} if self.etag else {})
        try:
            answer = library(folder).get(open_store(folder, stall_seconds), name, options=options)
            self._check(answer, start, stop)
            yield from answer.stream(min_chunk_size=PIECE_BYTES)
        except FetchError:
            raise
        except Exception as e:
            if type(e).__name__ == "PreconditionError":
                raise self._changed("it has another ETag") from e
            if is_passing(e):
                raise Passing(first_line(e)) from e
            raise FetchError(self.explained(e)) from e

    def _check(self, answer: Any, start: int, stop: int) -> None:
        meta = answer.meta
        if meta["size"] != self.size:
            raise self._changed(f"it has {meta['size']:,} bytes")
        if self.etag and meta["e_tag"] != self.etag:
            raise self._changed(f"it has the ETag {meta['e_tag'] or 'of none'}")
        if tuple(answer.range) != (start, stop):
            raise FetchError(f"{self.where}: asked for bytes {start:,} to {stop:,}, got {answer.range}.")
        if (encoding := answer.attributes.get("Content-Encoding", "identity")) not in ("", "identity"):
            raise FetchError(f"{self.where}: is stored as {encoding}, and cannot be read by range. Store it as it is.")

    def _changed(self, found: str) -> FetchError:
        return FetchError(
            f"{self.where}: the object changed while it was being merged: {found}, expected {self.size:,} bytes and "
            f"the ETag {self.etag}. Nothing is lost: when it is as it should be, run the same command."
        )
