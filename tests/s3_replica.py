"""A small replica of S3 on 127.0.0.1: what obstore's client really asks of it.

Buckets are dictionaries in memory. GET with ranges and If-Match, HEAD, ListObjectsV2 in pages, PUT (with
If-None-Match), multipart uploads, DELETE of one and of many. Every request needs a signature with the key; it is not
verified. Every request is kept, and may be made to fail.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from hub_replica import Server

KEY, SECRET = "AKIDOFTHETESTS", "thesecretofthetests"
PAGE = 50  # objects in one answer to a listing


@dataclass(frozen=True)
class Object:
    data: bytes
    etag: str
    metadata: dict[str, str] = field(default_factory=dict)
    changed: float = field(default_factory=time.time)


@dataclass
class Replica:
    """A running replica: `url` is the endpoint, `buckets` what is stored, `asked` every request so far, `served` the
    bytes of bodies by key. The rest misbehaves."""

    url: str = ""
    buckets: dict[str, dict[str, Object]] = field(default_factory=dict)
    uploads: dict[str, tuple[dict[str, str], dict[int, bytes]]] = field(default_factory=dict)  # metadata and parts
    asked: list[tuple[str, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)  # bytes by key
    faults: dict[int, str] = field(default_factory=dict)  # requests, by their number from 0 on, fail in these ways
    count: int = 0
    spoilt: dict[str, str] = field(default_factory=dict)  # ranges behind the first 10 kB of these keys fail, too
    read_only: bool = False
    forgets_metadata: bool = False
    latency: float = 0.0  # seconds before each answer
    lock: threading.RLock = field(default_factory=threading.RLock)
    over: threading.Event = field(default_factory=threading.Event)

    def put(self, bucket: str, key: str, data: bytes, etag: str = "", metadata: dict[str, str] | None = None) -> str:
        etag = etag or f'"{hashlib.md5(data).hexdigest()}"'
        with self.lock:
            self.buckets.setdefault(bucket, {})[key] = Object(data, etag, metadata or {})
        return etag

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def contents(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """The objects below a prefix, by their names there."""
        with self.lock:
            below = self.buckets.get(bucket, {}).items()
            return {key.removeprefix(f"{prefix}/"): one.data for key, one in below if key.startswith(f"{prefix}/")}

    def environment(self) -> dict[str, str]:
        """Variables for a client with keys for this endpoint."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1,localhost",
        }


@contextmanager
def serve() -> Iterator[Replica]:
    """A replica with one empty bucket, `bucket`, until the block ends."""
    replica = Replica(buckets={"bucket": {}})
    server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"replica": replica}))
    server.daemon_threads = True
    replica.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield replica
    finally:
        replica.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    replica: Replica
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.replica.lock:
            number, self.replica.count = self.replica.count, self.replica.count + 1
            self.replica.asked.append((self.command, f"{bucket}/{key}"))
        time.sleep(self.replica.latency)
        self.fault = self.replica.faults.get(number, "")
        if int((re.findall(r"\d+", self.headers.get("Range") or "") or [0])[0]) > 10_000:
            self.fault = self.fault or self.replica.spoilt.get(key, "")
        try:
            self._fail()
            if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
                raise _Refused(403, "InvalidAccessKeyId")
            if bucket not in self.replica.buckets:
                raise _Refused(404, "NoSuchBucket")
            if self.command not in ("GET", "HEAD") and self.replica.read_only:
                raise _Refused(403, "AccessDenied")
            with self.replica.lock:
                answer = self._reply(bucket, key, query, body)
            self._send(*answer)
        except _Refused as e:
            text = f"<Error><Code>{e.code}</Code><Message>no</Message><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>"
            self._send(e.status, text.encode(), {})
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - the library's names

    def _fail(self) -> None:
        if self.fault.isdecimal():
            raise _Refused(int(self.fault), "Made")
        if self.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionResetError
        if self.fault == "stall":
            self.replica.over.wait(30)
            raise ConnectionResetError

    def _reply(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects = self.replica.buckets[bucket]
        match self.command, key, query:
            case "GET", "", {"list-type": "2"}:
                return 200, self._list(objects, query), {}
            case "GET" | "HEAD", _, _:
                return self._get(objects, key)
            case "POST", _, {"uploads": _}:
                upload = f"upload-{self.replica.count}"
                self.replica.uploads[upload] = self._metadata(), {}
                return 200, f"<R><UploadId>{upload}</UploadId></R>".encode(), {}
            case "PUT", _, {"partNumber": part, "uploadId": upload}:
                self.replica.uploads[upload][1][int(part)] = body
                self.replica.received[key] += len(body)
                return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
            case "POST", _, {"uploadId": upload}:
                return 200, self._complete(bucket, key, upload, body), {}
            case "DELETE", _, {"uploadId": upload}:
                self.replica.uploads.pop(upload, None)
                return 204, b"", {}
            case "PUT", _, _:
                if self.headers.get("If-None-Match") == "*" and key in objects:
                    raise _Refused(412, "PreconditionFailed")
                self.replica.received[key] += len(body)
                return 200, b"", {"ETag": self.replica.put(bucket, key, body, metadata=self._metadata())}
            case "POST", "", {"delete": _}:
                for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    objects.pop(_plain(name), None)
                return 200, b"<DeleteResult></DeleteResult>", {}
            case "DELETE", _, _:
                objects.pop(key, None)
                return 204, b"", {}
        raise _Refused(400, "InvalidRequest")

    def _metadata(self) -> dict[str, str]:
        given = {name.lower(): value for name, value in self.headers.items()}
        found = {name.removeprefix("x-amz-meta-"): v for name, v in given.items() if name.startswith("x-amz-meta-")}
        return {} if self.replica.forgets_metadata else found

    def _list(self, objects: dict[str, Object], query: dict[str, str]) -> bytes:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        names = sorted(name for name in objects if name.startswith(prefix) and name > after)
        page, is_cut = names[:PAGE], len(names) > PAGE
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(objects[name].etag)}</ETag><Size>{len(objects[name].data)}</Size></Contents>"
            for name in page
        )
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        cut = f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        return f"<ListBucketResult>{cut}{more}{entries}</ListBucketResult>".encode()

    def _get(self, objects: dict[str, Object], key: str) -> tuple[int, bytes, dict[str, str]]:
        if key not in objects:
            raise _Refused(404, "NoSuchKey")
        one = objects[key]
        etag = '"0"' if self.fault == "etag" else one.etag
        if self.headers.get("If-Match", etag) != etag:
            raise _Refused(412, "PreconditionFailed")
        headers = {"ETag": etag, "Last-Modified": formatdate(one.changed, usegmt=True)}
        headers |= {f"x-amz-meta-{name}": value for name, value in one.metadata.items()}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None:
            return 200, one.data, headers
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(one.data))
        if start >= len(one.data):
            raise _Refused(416, "InvalidRange")
        if self.fault == "range":
            start, stop = start + 1, stop + 1
        size = len(one.data) + (self.fault == "size")
        return 206, one.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}

    def _complete(self, bucket: str, key: str, upload: str, body: bytes) -> bytes:
        stored = self.replica.uploads.pop(upload, None)
        if stored is None:
            raise _Refused(404, "NoSuchUpload")
        numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", body.decode())]
        parts = [stored[1][number] for number in numbers]
        digest = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
        etag = self.replica.put(bucket, key, b"".join(parts), f'"{digest}-{len(parts)}"', stored[0])
        return f"<R><ETag>{escape(etag)}</ETag></R>".encode()

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = data[: len(data) // 2] if self.fault == "short" else data
        self.wfile.write(sent)
        with self.replica.lock:
            self.replica.served[unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]] += len(sent)
        self.close_connection |= len(sent) < len(data)


def _plain(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
