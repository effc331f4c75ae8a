"""A small replica of the Hub on 127.0.0.1: what huggingface_hub, transformers and datasets really ask of it.

Repositories are folders: `root/models/ORG/NAME` and `root/datasets/ORG/NAME`. Each has one commit (the digest of its
files) under `main` and the tags given. Gated and private ones answer 401 without the token. Every request is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thetokenofthetests"
LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".parquet", ".gguf", ".h5"})


@dataclass
class Replica:
    """A running replica: `url` is the HF_ENDPOINT to use, `asked` every request so far, `fails_after` breaks bodies."""

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    tags: dict[str, set[str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    fails_after: dict[str, int] = field(default_factory=dict)  # file name -> bytes sent before the line breaks

    def fetched(self) -> set[str]:
        """The files whose bodies were asked for, as REPO/FILE."""
        found = (
            re.fullmatch(r"/(?:datasets/)?(.+?)/resolve/[^/]+/(.+)", path) for verb, path in self.asked if verb == "GET"
        )
        return {f"{match[1]}/{match[2]}" for match in found if match}

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def commit(self, folder: Path) -> str:
        digest = hashlib.sha1()
        for path in self.files(folder):
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha1(path.read_bytes()).digest())
        return digest.hexdigest()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a client that has never been anywhere: an empty cache, no token, this endpoint."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }


@contextmanager
def serve(root: Path) -> Iterator[Replica]:
    """A replica of the repositories below `root`, until the block ends."""
    replica = Replica(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"replica": replica}))
    server.daemon_threads = True
    replica.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield replica
    finally:
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

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.replica.asked.append((self.command, path))
        try:
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), parse_qs(url.query), body)
            else:
                self._resolve(path)
        except _Refused as e:
            headers = {"X-Error-Code": e.code, "X-Error-Message": e.message}
            self._send(e.status, json.dumps({"error": e.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # ------------------------------------------------------------------------------------ the two kinds

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        match = re.fullmatch(r"(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if match is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        kind, repo, what, revision, below = match.groups()
        folder = self._repo(kind, repo, revision)
        if what == "tree":
            recursive = "true" in [value.lower() for value in query.get("recursive", ["false"])]
            return self._json(self._tree(folder, below or "", recursive))
        if what == "paths-info":
            names = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return self._json([entry for entry in self._tree(folder, "", True) if entry["path"] in names])
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in self.replica.files(folder)]
        gated = "manual" if repo in self.replica.gated else False
        commit = self.replica.commit(folder)
        facts = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": []}
        return self._json({**facts, "modelId": repo, "downloads": 0, "likes": 0, "disabled": False})

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
            data = path.read_bytes()
            entry = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
            if path.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            found.append(entry)
        return found

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        kind, repo, revision, name = match.groups()
        folder = self._repo("datasets" if kind else "models", repo, revision)
        file = folder / name
        if not file.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        is_large = file.suffix in LFS_SUFFIXES
        etag = hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.replica.commit(folder), "Accept-Ranges": "bytes"}
        if is_large:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, data, headers, name)
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers, name)

    def _repo(self, kind: str, repo: str, revision: str | None) -> Path:
        """The folder of a repository; refuses as the Hub does."""
        folder = self.replica.root / kind / repo
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

    def _send(self, status: int, data: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.replica.fails_after.pop(name, None)
        self.wfile.write(data[:limit])
        if limit is not None:
            self.close_connection = True
