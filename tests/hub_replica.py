"""A small replica of the Hub on 127.0.0.1: what huggingface_hub, transformers and datasets really ask of it.

Repositories are folders: `root/models/ORG/NAME` and `root/datasets/ORG/NAME`. Each has one commit (the digest of its
files) under `main` and the tags given. Gated and private ones answer 401 without the token. Every request is kept.
Large files are, as on the Hub, behind a redirect to another host, which asks for no token and wants none. That
address is signed, and may expire. Any request can be made to fail, in many ways.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from click.testing import CliRunner

from hub_writes import WRITES, Writes, answer
from merge_tool.cli import merge_tool

TOKEN = "hf_thetokenofthetests"
LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".parquet", ".gguf", ".h5"})


@dataclass
class Replica:
    """A running replica: `url` is the HF_ENDPOINT to use, `asked` every request so far, `served` the bytes of bodies by
    REPO/FILE, `has_leaked` whether the other host was given a token. The rest misbehaves, by files' names."""

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    tags: dict[str, set[str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    has_leaked: bool = False
    fails_after: dict[str, int] = field(default_factory=dict)  # -> bytes sent before the line breaks
    fails_again: bool = False  # ... every time
    claims: dict[str, str] = field(default_factory=dict)  # -> what Content-Range says
    ignores_ranges: bool = False
    hides_sizes: bool = False  # of whole files, as a proxy does that passes pieces on
    stalls: set[str] = field(default_factory=set)  # not answered before the end
    faults: dict[int, str] = field(default_factory=dict)  # requests, by their number from 0 on, fail in these ways
    count: int = 0  # requests so far
    uses: int | None = None  # of a signed address, until it expires
    address_uses: Counter[str] = field(default_factory=Counter)
    latency: float = 0.0  # seconds before each answer
    rate: float | None = None  # bytes of bodies a second, all together
    lock: threading.Lock = field(default_factory=threading.Lock)
    digests: dict[tuple[str, int, int], tuple[str, str]] = field(default_factory=dict)
    of_others: set[str] = field(default_factory=set)  # repositories that the token cannot write to
    renamed: dict[str, str] = field(default_factory=dict)  # repositories that have another name now
    user: str = "me"  # whose the token is
    role: str = "write"  # of the token
    orgs: dict[str, str] = field(default_factory=dict)  # the user's, with the role in each
    writes: Writes = field(default_factory=Writes)
    free_at: float = 0.0  # when the line has sent what it was given
    stalled: threading.Event = field(default_factory=threading.Event)  # somebody waits for one of them
    over: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> set[str]:
        """The files whose bodies were asked for, as REPO/FILE."""
        found = (
            re.fullmatch(r"(?:/cdn)?/(?:datasets/)?(.+?)/resolve/[^/]+/(.+)", path)
            for verb, path in self.asked
            if verb == "GET"
        )
        return {f"{match[1]}/{match[2]}" for match in found if match}

    def weights(self) -> Counter[str]:
        """The bytes served of files of safetensors."""
        return Counter({name: count for name, count in self.served.items() if name.endswith(".safetensors")})

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def commit(self, folder: Path) -> str:
        digest = hashlib.sha1()
        for path in self.files(folder):
            digest.update(path.relative_to(folder).as_posix().encode() + self.digests_of(path)[0].encode())
        return digest.hexdigest()

    def digests_of(self, path: Path) -> tuple[str, str]:
        """SHA-1 and SHA-256 of a file, made once for each content."""
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key not in self.digests:
            with path.open("rb") as one, path.open("rb") as two:
                sha1, sha256 = hashlib.file_digest(one, "sha1"), hashlib.file_digest(two, "sha256")
                self.digests[key] = sha1.hexdigest(), sha256.hexdigest()
        return self.digests[key]

    def send(self, nbytes: int) -> None:
        """Wait until the line, which is slow, has sent so many bytes."""
        if self.rate is None:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + nbytes / self.rate
            until = self.free_at
        time.sleep(max(0.0, until - time.monotonic()))

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a client that has never been anywhere: an empty cache, no token, this endpoint."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }


def run(
    hub: Replica, tmp_path: Path, *arguments: str, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """merge-tool in an empty folder (or `cwd`), with a cache of its own. It runs in this process; what talks to the Hub
    is started by it, with this environment."""
    (tmp_path / "cwd").mkdir(exist_ok=True)
    before, here = dict(os.environ), Path.cwd()
    os.environ.update({**hub.environment(tmp_path / "home"), **more})
    os.chdir(cwd or tmp_path / "cwd")
    try:
        done = CliRunner().invoke(merge_tool, arguments, prog_name="merge-tool")
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def refusal(hub: Replica, tmp_path: Path, *arguments: str, **more: str) -> str:
    """The one line that says why the command did nothing."""
    done = run(hub, tmp_path, *arguments, **more)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has ended is no error; nothing of the server belongs to what a command says."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc(file=sys.__stderr__)


@contextmanager
def serve(root: Path) -> Iterator[Replica]:
    """A replica of the repositories below `root`, until the block ends."""
    replica = Replica(root)
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
    """The answer is an error of the Hub's kind."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    replica: Replica
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def refuse(self, status: int, code: str, message: str) -> None:
        raise _Refused(status, code, message)

    def check_token(self, repo: str | None) -> None:
        """Writing needs the token, and a repository that is not of others; what was uploaded is at a signed address."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not has_token and not self.path.startswith("/lfs/"):
            raise _Refused(401, "", "Invalid credentials")
        if repo in self.replica.of_others:
            raise _Refused(403, "", "You have no write permission")

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.replica.lock:
            number, self.replica.count = self.replica.count, self.replica.count + 1
            self.replica.asked.append((self.command, path))
        time.sleep(self.replica.latency)
        self.fault = self.replica.faults.get(number, "")
        try:
            if self.fault.isdecimal():
                raise _Refused(int(self.fault), "", "this request fails")
            if self.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                raise ConnectionResetError
            if self.fault == "stall":
                self.replica.over.wait(30)
                raise ConnectionResetError
            is_read = self.command in ("GET", "HEAD") and not re.search(
                "/(auth-check|discussions|whoami-v2)(/|$)", path
            )
            if not is_read and (match := WRITES.fullmatch(path)):
                return self._json(answer(self, match, parse_qs(url.query), body))
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), parse_qs(url.query), body)
            elif path.startswith("/cdn/"):
                self.replica.has_leaked |= "Authorization" in self.headers
                self.replica.address_uses[url.query] += 1
                if self.replica.uses is not None and self.replica.address_uses[url.query] > self.replica.uses:
                    raise _Refused(403, "", "this address has expired")
                self._resolve(path.removeprefix("/cdn"), is_signed=True)
            else:
                self._resolve(path)
        except _Refused as e:
            headers = {"X-Error-Code": e.code, "X-Error-Message": e.message} if e.code else {}
            headers |= {"Retry-After": "0"} if e.status == 429 else {}
            self._send(e.status, json.dumps({"error": e.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # ------------------------------------------------------------------------------------ the two kinds

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        match = re.fullmatch(
            r"(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|commits)/(refs/pr/[0-9]+|[^/]+)(?:/(.*))?)?",
            path,
        )
        if match is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        kind, repo, what, revision, below = match.groups()
        folder = self._repo(kind, repo, revision)
        if what == "tree":
            recursive = "true" in [value.lower() for value in query.get("recursive", ["false"])]
            return self._json(self._tree(folder, below or "", recursive))
        if what == "commits":
            last = max((path.stat().st_mtime for path in self.replica.files(folder)), default=0.0)
            date = f"{datetime.fromtimestamp(last, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
            commit = {"id": self.replica.commit(folder), "date": date, "authors": [], "title": "", "message": ""}
            return self._json([commit])
        if what == "paths-info":
            names = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return self._json([entry for entry in self._tree(folder, "", True) if entry["path"] in names])
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in self.replica.files(folder)]
        gated = "manual" if repo in self.replica.gated else False
        commit = self.replica.commit(folder)
        facts = {
            "id": self.replica.renamed.get(repo, repo),
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "gated": gated,
            "tags": [],
        }
        return self._json({**facts, "modelId": repo, "downloads": 0, "likes": 0, "disabled": False})

    def _write(self, match: re.Match[str], body: bytes) -> None:
        """Create a repository; take files into it, each as a whole in a line of the commit."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, "Unauthorized", "Invalid username or password.")
        if match[0] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match[0] == "repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            (self.replica.root / "models" / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"{self.replica.url}/{name}", "id": name})
        repo, what = match.groups()
        if what == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.replica.root / "models" / repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.replica.commit(self.replica.root / "models" / repo)
        return self._json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.replica.url}/{repo}/commit/{commit}"}
        )

    def _tree(self, folder: Path, below: str, recursive: bool) -> list[dict[str, Any]]:
        start = folder / below
        if not start.exists():
            raise _Refused(404, "EntryNotFound", f"{below} does not exist")
        found = []
        for path in sorted(start.rglob("*") if recursive else start.iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                found.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
                continue
            (sha1, sha256), size = self.replica.digests_of(path), path.stat().st_size
            data = b"blob %d\0" % size + path.read_bytes() if size < 10_000_000 else b""
            blob = hashlib.sha1(data).hexdigest() if data else sha1
            entry = {"type": "file", "path": name, "oid": blob, "size": size}
            if path.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            found.append(entry)
        return found

    def _resolve(self, path: str, *, is_signed: bool = False) -> None:
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/pr/[0-9]+|[^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        kind, repo, revision, name = match.groups()
        root = "datasets" if kind else "models"
        folder = self.replica.root / root / repo if is_signed else self._repo(root, repo, revision)
        file = folder / name
        if not file.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        size = file.stat().st_size
        is_large = file.suffix in LFS_SUFFIXES
        etag = self.replica.digests_of(file)[is_large]
        if self.fault == "etag":
            etag = "0" * len(etag)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.replica.commit(folder), "Accept-Ranges": "bytes"}
        if is_large:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"'}
        if is_large and not is_signed:
            port = urlsplit(self.replica.url).port
            headers["Location"] = f"http://localhost:{port}/cdn{quote(path)}?signature={self.replica.count}"
            return self._send(302, b"", headers)
        if name in self.replica.stalls:
            self.replica.stalled.set()
            self.replica.over.wait(60)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or self.replica.ignores_ranges:
            return self._send_file(200, file, 0, size, headers, f"{repo}/{name}")
        start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
        if self.fault == "range":
            start, stop = start + 1, stop + 1
        headers["Content-Range"] = self.replica.claims.get(name, f"bytes {start}-{stop - 1}/{size}")
        return self._send_file(206, file, start, stop, headers, f"{repo}/{name}")

    def _repo(self, kind: str, repo: str, revision: str | None) -> Path:
        """The folder of a repository; refuses as the Hub does."""
        folder = self.replica.root / kind / repo
        pull = self.replica.root / "pulls" / repo / (revision or "").removeprefix("refs/pr/")
        if (revision or "").startswith("refs/pr/") and pull.is_dir():
            return pull
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not folder.is_dir() or (repo in self.replica.private and not has_token):
            raise _Refused(401 if not has_token else 404, "RepoNotFound", "Repository not found")
        known = {None, "main", self.replica.commit(folder), *self.replica.tags.get(repo, ())}
        if revision not in known:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        is_listing = "/api/" in self.path  # of a gated repository anybody may list the files
        if repo in self.replica.gated and not has_token and not is_listing:
            raise _Refused(401, "GatedRepo", f"Access to model {repo} is restricted")
        return folder

    # ------------------------------------------------------------------------------------- the bytes

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _send_file(self, status: int, path: Path, start: int, stop: int, headers: dict[str, str], name: str) -> None:
        """Bytes [start, stop) of a file, or fewer, if the line is to break."""
        is_hidden = self.replica.hides_sizes and self.command == "GET" and status == 200
        self._head(status, headers | ({"Connection": "close"} if is_hidden else {"Content-Length": str(stop - start)}))
        if self.command == "HEAD":
            return
        file = name.rpartition("/")[2]
        limit = start + min(stop - start, self.replica.fails_after.get(file, stop - start))
        if self.fault == "short":
            limit = (start + stop) // 2
        with path.open("rb") as source:
            source.seek(start)
            for begin in range(start, limit, 65_536):
                piece = source.read(min(65_536, limit - begin))
                self.replica.send(len(piece))
                self.wfile.write(piece)
                with self.replica.lock:
                    self.replica.served[name] += len(piece)
        if limit < stop:
            self.close_connection = True
            if not self.replica.fails_again:
                self.replica.fails_after.pop(file, None)
