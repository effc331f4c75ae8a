"""The first bytes of safetensors files on the Hub, by HTTP range requests: in the fetching process only.

The first request is for 8 bytes, the header's length; the second for the header. No byte of a weight is fetched: if a
server ignores ranges and sends the whole file, the connection is closed. Requests go through huggingface_hub's own
session (proxies, tokens, redirects), which is of requests before version 1 and of httpx since.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from typing import Any

from merge_tool.checkpoint.header import MAX_HEADER_BYTES
from merge_tool.errors import FetchError, shown

_NEEDED = ("build_hf_headers", "get_session", "hf_raise_for_status")
_LENGTH_BYTES = 8
_THREADS = 8
_WAITS = (0.5, 1.0, 2.0)  # seconds before another try: a large model takes hundreds of requests
_PASSING = frozenset({429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes 0-\d+/(\d{1,18}|\*)", re.ASCII)


def can_ask() -> bool:
    """Whether this version of huggingface_hub has the functions that are needed here, under public names."""
    return all(hasattr(_hub(), name) for name in _NEEDED)


def _hub() -> Any:
    from huggingface_hub import utils

    return utils


def fetch_headers(repo: str, commit: str, names: Sequence[str]) -> list[tuple[int, bytes]]:
    """(the file's size, its first bytes up to the header's end) of each safetensors file, in order.

    If a header's length is impossible, only the first 8 bytes, which the reader then refuses. Raises FetchError for
    answers that cannot be used, and the errors of the session.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        starts = list(pool.map(lambda name: _fetch(repo, commit, name, _LENGTH_BYTES), names))
        ends = [_header_end(size, start) for size, start in starts]
        if (total := sum(ends)) > MAX_HEADER_BYTES:
            raise FetchError(
                f"{repo}: the headers of its weights have {total:,} bytes, at most {MAX_HEADER_BYTES:,} are fetched "
                "ahead of the rest. Download the model, then give its folder."
            )
        longer = [(name, end) for name, end in zip(names, ends, strict=True) if end > _LENGTH_BYTES]
        whole = dict(zip(longer, pool.map(lambda one: _fetch(repo, commit, *one), longer), strict=True))
    return [whole.get(key, first) for key, first in zip(zip(names, ends, strict=True), starts, strict=True)]


def _header_end(size: int, start: bytes) -> int:
    end = _LENGTH_BYTES + int.from_bytes(start, "little")
    return end if end <= min(size, MAX_HEADER_BYTES) else _LENGTH_BYTES


def _fetch(repo: str, commit: str, name: str, count: int) -> tuple[int, bytes]:
    """The size of a file and its first `count` bytes, or the whole file if it is shorter."""
    for wait in (*_WAITS, None):
        try:
            return _ask(repo, commit, name, count)
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", None)
            if wait is None or isinstance(e, FetchError) or (status is not None and status not in _PASSING):
                raise
            time.sleep(wait)
    raise AssertionError("the last try raises")


def _ask(repo: str, commit: str, name: str, count: int) -> tuple[int, bytes]:
    from huggingface_hub import hf_hub_url

    where = f"{repo}/{shown(name)}"
    headers = {**_hub().build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repo, name, revision=commit)
    with _opened(url, headers) as response:
        _hub().hf_raise_for_status(response)
        size = _size(where, url, response)
        start = _read(response, min(count, size))
    if len(start) < min(count, size):
        raise OSError(f"{where}: the answer ended after {len(start):,} bytes, expected {min(count, size):,}")
    return size, start


def _opened(url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """The answer to a GET, its body not read yet."""
    from huggingface_hub import constants

    session = _hub().get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):
        opened: AbstractContextManager[Any] = session.stream("GET", url, headers=headers, timeout=timeout)
        return opened
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
    body = bytearray()
    pieces = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(65_536)
    while len(body) < count and (piece := next(pieces, None)) is not None:
        body += piece
    return bytes(body[:count])
