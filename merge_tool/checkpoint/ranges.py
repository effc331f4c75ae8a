"""The first bytes of safetensors files on the Hub, by HTTP range requests: in the fetching process only.

The first request is for 8 bytes, the header's length; the second for the header. No byte of a weight is fetched: if a
server ignores ranges and sends the whole file, the connection is closed. Requests go through huggingface_hub's own
session (proxies, tokens, redirects), which is of requests before version 1 and of httpx since.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.header import MAX_HEADER_BYTES
from merge_tool.checkpoint.source import Place
from merge_tool.errors import FetchError, shown

_NEEDED = ("build_hf_headers", "get_session", "hf_raise_for_status")
_LENGTH_BYTES = 8
_THREADS = 8
_WAITS = (0.5, 1.0, 2.0)  # seconds before another try: a large model takes hundreds of requests
PASSING = frozenset({429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes 0-\d+/(\d{1,18}|\*)", re.ASCII)


class Passing(Exception):
    """This try failed, another may not. `seconds` is how long the server asks to wait."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


def can_ask() -> bool:
    """Whether this version of huggingface_hub has the functions that are needed here, under public names."""
    return all(hasattr(_hub(), name) for name in _NEEDED)


def _hub() -> Any:
    from huggingface_hub import utils

    return utils


@dataclass(frozen=True, slots=True)
class Start:
    """A file's size, its ETag without quotes (empty if the server gives none), its first bytes, and the SHA-256 that is
    noted beside an object."""

    size: int
    etag: str
    data: bytes
    sha256: str = ""


def fetch_headers(places: Sequence[Place], fetch: Callable[[Place, int], Start] | None = None) -> list[Start]:
    """Size, ETag and the first bytes up to the header's end of each safetensors file, in order.

    If a header's length is impossible, only the first 8 bytes, which the reader then refuses. Raises FetchError for
    answers that cannot be used, and the errors of the session. `fetch(place, count)` gets the first bytes of a file; by
    default by HTTP.
    """
    fetch = fetch or _fetch
    with ThreadPoolExecutor(_THREADS) as pool:
        starts = list(pool.map(lambda place: fetch(place, _LENGTH_BYTES), places))
        ends = [_header_end(start.size, start.data) for start in starts]
        if (total := sum(ends)) > MAX_HEADER_BYTES:
            raise FetchError(
                f"{places[0].repo or places[0].where}: the headers of its weights have {total:,} bytes, at most "
                f"{MAX_HEADER_BYTES:,} are fetched ahead of the rest. Download the model, then give its folder."
            )
        longer = [(place, end) for place, end in zip(places, ends, strict=True) if end > _LENGTH_BYTES]
        whole = dict(zip(longer, pool.map(lambda one: fetch(*one), longer), strict=True))
    return [whole.get(key, first) for key, first in zip(zip(places, ends, strict=True), starts, strict=True)]


def _header_end(size: int, start: bytes) -> int:
    end = _LENGTH_BYTES + int.from_bytes(start, "little")
    return end if end <= min(size, MAX_HEADER_BYTES) else _LENGTH_BYTES


def _fetch(place: Place, count: int) -> Start:
    """The first `count` bytes of a file, or the whole file if it is shorter."""
    for wait in (*_WAITS, None):
        try:
            return _ask(place, count)
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", None)
            if wait is None or isinstance(e, FetchError) or (status is not None and status not in PASSING):
                raise
            time.sleep(wait)
    raise AssertionError("the last try raises")


def _ask(place: Place, count: int) -> Start:
    where = shown(place.where)
    headers = {**request_headers(with_token=place.repo is not None), "Range": f"bytes=0-{count - 1}"}
    with opened(place.url, headers) as response:
        _hub().hf_raise_for_status(response)
        size = _size(where, place.url, response)
        start = _read(response, min(count, size))
    if len(start) < min(count, size):
        raise OSError(f"{where}: the answer ended after {len(start):,} bytes, expected {min(count, size):,}")
    return Start(size, etag_of(response), start)


def request_headers(*, with_token: bool) -> dict[str, str]:
    """The headers of a request for bytes as they are. The token is for the Hub alone."""
    token = {} if with_token else {"token": False}
    return {**_hub().build_hf_headers(**token), "Accept-Encoding": "identity"}


def etag_of(response: Any) -> str:
    """What the server calls the file's content: of a file behind a redirect, as the Hub names it."""
    answers = [*response.history, response]
    linked = next((one.headers["X-Linked-ETag"] for one in answers if "X-Linked-ETag" in one.headers), None)
    return plain_etag(linked or response.headers.get("ETag", ""))


def plain_etag(text: str | None) -> str:
    return (text or "").removeprefix("W/").strip('"')


def opened(url: str, headers: dict[str, str], timeout: float | None = None) -> AbstractContextManager[Any]:
    """The answer to a GET, its body not read yet. `timeout`: seconds without a byte (default: the library's)."""
    from huggingface_hub import constants

    session = _hub().get_session()
    timeout = timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):
        stream: AbstractContextManager[Any] = session.stream("GET", url, headers=headers, timeout=timeout)
        return stream
    return closing(session.get(url, headers=headers, timeout=timeout, stream=True))  # of requests


def _size(where: str, url: str, response: Any) -> int:
    """The size of the whole file: from Content-Range if the answer is a part, from Content-Length if it is the whole
    file, else by another request."""
    from huggingface_hub import get_hf_file_metadata

    part, whole = (response.headers.get(key, "") for key in ("Content-Range", "Content-Length"))
    is_part = response.status_code == 206 and _CONTENT_RANGE.fullmatch(part)
    if is_part or response.status_code == 200:
        length = is_part[1] if is_part else whole
        size = int(length) if length.isdecimal() else get_hf_file_metadata(url).size
        if size is not None:
            return size
    raise FetchError(
        f"{where}: its header cannot be fetched alone: the server answers {response.status_code} with Content-Range "
        f"'{shown(part)}' and Content-Length '{shown(whole)}', expected a range and the file's size. Download the "
        "model, then give its folder."
    )


def _read(response: Any, count: int) -> bytes:
    """The body's first `count` bytes; the rest is not received."""
    body, pieces = bytearray(), pieces_of(response)
    while len(body) < count and (piece := next(pieces, None)) is not None:
        body += piece
    return bytes(body[:count])


def pieces_of(response: Any) -> Iterator[bytes]:
    """The body, piece by piece."""
    return iter(response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(65_536))
