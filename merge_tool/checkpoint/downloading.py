"""In a process of its own: byte ranges of files on servers -> frames on standard output (fetcher.py).

Requests go through huggingface_hub's session and its public calls: proxies, tokens, endpoint, offline mode; those for
an object store through obstore (store_file.py). A range that breaks off continues where it broke; addresses that
expired are resolved again; a server that is busy is obeyed.
What cannot be the planned file (another ETag, size or range) is refused: it must never become part of a merge.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

from merge_tool.checkpoint.addresses import is_store
from merge_tool.checkpoint.fetcher import FRAME, PIECE_BYTES
from merge_tool.checkpoint.fetching import explained
from merge_tool.checkpoint.ranges import PASSING, Passing, etag_of, opened, pieces_of, plain_etag, request_headers
from merge_tool.checkpoint.source import Place
from merge_tool.errors import FetchError, sized

_LONGEST_WAIT = 330.0  # seconds: the Hub counts requests in windows of five minutes
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_CHANGED = "Nothing is lost: when the file is as it should be, run the same command."


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends us, by closing our input
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no frame
    lines = iter(sys.stdin.buffer.readline, b"")
    settings = json.loads(next(lines))
    downloads = Downloads(out, settings["stall_seconds"], settings["waits"])
    pool = ThreadPoolExecutor(settings["threads"])
    for line in lines:
        question = json.loads(line)
        if "file" in question:
            downloads.files.append(_file(**question["file"]))
        else:
            pool.submit(downloads.send, *question["range"])
    os._exit(0)  # whatever is still on its way


class File(Protocol):
    """A file of known size and ETag that is read by range."""

    size: int

    @property
    def where(self) -> str: ...

    def pieces(self, start: int, stop: int, stall_seconds: float) -> Iterator[bytes]:
        """The bytes [start, stop), or fewer if the line breaks. Raises Passing, FetchError, a library's errors."""

    def explained(self, error: Exception) -> str:
        """What a library's error means, and what to do."""


class RemoteFile:
    """A file of known size and ETag. Its address is found at the first request, and again when it expires."""

    def __init__(self, place: Mapping[str, Any], size: int, etag: str) -> None:
        self.place, self.size, self.etag = Place(**place), size, etag
        self._lock = threading.Lock()
        self._address = "" if self.place.repo else self.place.url
        self._body_etag = ""  # another one, if another host has the bytes

    @property
    def where(self) -> str:
        return self.place.where

    def address(self) -> str:
        with self._lock:
            if not self._address:
                self._address = self._resolve()
            return self._address

    def expire(self, address: str) -> bool:
        """Forget an address. False if there is no other way to find one."""
        with self._lock:
            if self._address == address and self.place.repo:
                self._address, self._body_etag = "", ""
            return self.place.repo is not None

    def _resolve(self) -> str:
        from huggingface_hub import get_hf_file_metadata

        found = get_hf_file_metadata(self.place.url)
        self.check(found.size, plain_etag(found.etag))
        return found.location

    def headers(self, address: str) -> dict[str, str]:
        """Only the host of the Hub gets the token; signed addresses want none."""
        is_same = urlsplit(address).netloc == urlsplit(self.place.url).netloc
        return request_headers(with_token=is_same and (self.place.repo is not None or _is_of_hub(address)))

    def check(self, size: int | None, etag: str) -> None:
        if size != self.size or (etag and self.etag and etag != self.etag):
            raise FetchError(
                f"{self.where}: the file on the server changed while it was being merged: it has "
                f"{'no size' if size is None else f'{size:,} bytes'} and the ETag '{etag}', expected {self.size:,} and "
                f"'{self.etag}'. {_CHANGED}"
            )

    def check_body(self, size: int, etag: str) -> None:
        """Check an answer with bytes. The host behind a redirect may have an ETag of its own, always the same."""
        self.check(size, "" if self.place.repo else etag)
        with self._lock:
            self._body_etag = self._body_etag or etag
            if etag and etag != self._body_etag:
                raise FetchError(
                    f"{self.where}: the file on the server changed while it was being merged: its ETag was "
                    f"'{self._body_etag}', now '{etag}'. {_CHANGED}"
                )

    def explained(self, error: Exception) -> str:
        return explained(error, self.place.repo or self.where, self.place.commit)

    def pieces(self, start: int, stop: int, stall_seconds: float) -> Iterator[bytes]:
        """The bytes [start, stop), or fewer if the line breaks. Raises Passing, FetchError, the session's errors."""
        address = self.address()
        headers = {**self.headers(address), "Range": f"bytes={start}-{stop - 1}"}
        with opened(address, headers, stall_seconds) as response:
            self._check_answer(address, response, start, stop)
            yield from pieces_of(response)

    def _check_answer(self, address: str, response: Any, start: int, stop: int) -> None:
        """Whether the answer has the bytes [start, stop) of the planned file."""
        status, headers = response.status_code, response.headers
        if status in (401, 403) and self.expire(address):
            raise Passing(f"the server answers {status}")
        if status in PASSING:
            raise Passing(f"the server answers {status}", _asked_seconds(headers))
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if status == 206 and found is not None:
            self.check_body(int(found[3]), etag_of(response) if not self.place.repo else _own_etag(headers))
            if (int(found[1]), int(found[2]) + 1) == (start, stop) and _is_plain(headers):
                return
        if status == 200 and (start, stop) == (0, self.size) and _is_plain(headers):
            self.check_body(int(headers.get("Content-Length", self.size)), _own_etag(headers))
            return
        raise FetchError(
            f"{self.where}: cannot be read by range: asked for bytes {start:,} to {stop:,}, the server answers "
            f"{status} with Content-Range '{headers.get('Content-Range', '')}', Content-Length "
            f"'{headers.get('Content-Length', '')}' and Content-Encoding '{headers.get('Content-Encoding', '')}'. "
            "Download the file, then give its folder (of a model of the Hub: --no-stream)."
        )


def _file(place: Mapping[str, Any], size: int, etag: str) -> File:
    if not is_store(place["url"]):
        return RemoteFile(place, size, etag)
    from merge_tool.checkpoint.store_file import StoreFile  # with obstore

    return StoreFile(place, size, etag)


class Downloads:
    """The files, and how a range of one is sent."""

    def __init__(self, out: int, stall_seconds: float, waits: Sequence[float]) -> None:
        self.files: list[File] = []
        self._out, self._stall_seconds, self._waits = out, stall_seconds, waits
        self._lock = threading.Lock()

    def send(self, number: int, file: int, start: int, stop: int) -> None:
        """Send the bytes [start, stop) of a file, or the reason why they cannot be had."""
        remote = self.files[file]
        try:
            for piece in self._download(remote, start, stop):
                for begin in range(0, len(piece), PIECE_BYTES):
                    self._write(number, piece[begin : begin + PIECE_BYTES])
        except FetchError as e:
            self._refuse(number, str(e))
        except Exception as e:  # noqa: BLE001 - several libraries' errors, each means: cannot be had
            self._refuse(number, remote.explained(e))

    def _refuse(self, number: int, message: str) -> None:
        data = message.encode()[:PIECE_BYTES]
        self._write(number, data, -len(data))

    def _write(self, number: int, data: bytes, length: int | None = None) -> None:
        view = memoryview(FRAME.pack(number, len(data) if length is None else length) + data)
        with self._lock:
            while view:
                view = view[os.write(self._out, view) :]

    def _download(self, file: File, start: int, stop: int) -> Iterator[bytes]:
        tries = 0
        while True:
            try:
                for piece in file.pieces(start, stop, self._stall_seconds):
                    if len(piece) > stop - start:
                        raise FetchError(f"{file.where}: the server sends more bytes than were asked for.")
                    if piece:
                        start, tries = start + len(piece), 0
                        yield piece
                if start == stop:
                    return
                raise Passing(f"the answer ended at byte {start:,}, expected {stop:,}")
            except FetchError:
                raise
            except Exception as e:
                if not (seconds := _seconds(e, self._waits[tries] if tries < len(self._waits) else None)):
                    raise _given_up(file, e, tries) from e
                tries += 1
                time.sleep(seconds)


def _is_of_hub(url: str) -> bool:
    from huggingface_hub import constants

    return url.startswith(f"{constants.ENDPOINT}/")


def _is_plain(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "identity") in ("", "identity")


def _own_etag(headers: Mapping[str, str]) -> str:
    return plain_etag(headers.get("ETag"))


# ------------------------------------------------------------------------------------------ failures


def _seconds(error: Exception, wait: float | None) -> float | None:
    """How long to wait before another try; None if there shall be none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if wait is None or (status is not None and status not in PASSING):
        return None
    asked = error.seconds if isinstance(error, Passing) else None
    if status is not None:
        asked = _asked_seconds(error.response.headers)  # type: ignore[attr-defined]
    return wait if asked is None else min(max(wait, asked), _LONGEST_WAIT)


def _asked_seconds(headers: Mapping[str, str]) -> float | None:
    """How long a busy server asks to wait: Retry-After in seconds or as a date, or the Hub's RateLimit."""
    after = headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(after))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    from huggingface_hub import utils

    parse = getattr(utils, "parse_ratelimit_headers", None)
    limit = parse(headers) if parse is not None else None
    return None if limit is None else float(limit.reset_in_seconds)


def _given_up(file: File, error: Exception, tries: int) -> Exception:
    """What is said of a download after its last try."""
    if getattr(error, "response", None) is not None:
        return error
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    said = re.sub(r"\?\S+", "", said)  # the signature of an address is nobody's business
    return FetchError(
        f"{file.where}: downloading ({sized(file.size)}) failed {tries + 1} times in a row ({said}). Check the "
        "connection, then run the same command: it continues with the shard that it was at."
    )
