"""A small replica of the Hub on 127.0.0.1: what huggingface_hub, transformers and datasets really ask of it.

Repositories are folders: `root/models/ORG/NAME` and `root/datasets/ORG/NAME`. Each has one commit (the digest of its
files) under `main` and the tags given. Gated and private ones answer 401 without the token. Every request is kept.
Large files are, as on the Hub, behind a redirect to another host, which asks for no token and wants none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

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
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }


def run(
    hub: Replica, tmp_path: Path, *arguments: str, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """merge-tool in an empty folder (or `cwd`), with a cache of its own."""
    (tmp_path / "cwd").mkdir(exist_ok=True)
    environment = {**os.environ, **hub.environment(tmp_path / "home"), **more}
    return subprocess.run(
        [sys.executable, "-m", "merge_tool", *arguments],
        cwd=cwd or tmp_path / "cwd", env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def refusal(hub: Replica, tmp_path: Path, *arguments: str, **more: str) -> str:
    """The one line that says why the command did nothing."""
    done = run(hub, tmp_path, *arguments, **more)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


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

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.replica.asked.append((self.command, path))
        try:
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), parse_qs(url.query), body)
            elif path.startswith("/cdn/"):
                self.replica.has_leaked |= "Authorization" in self.headers
                self._resolve(path.removeprefix("/cdn"), is_signed=True)
            else:
                self._resolve(path)
        except _Refused as e:
            headers = {"X-Error-Code": e.code, "X-Error-Message": e.message}
            self._send(e.status, json.dumps({"error": e.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # ------------------------------------------------------------------------------------ the two kinds

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if write := re.fullmatch(r"repos/create|validate-yaml|models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            return self._write(write, body)
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
            data = path.read_bytes()
            entry = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
            if path.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            found.append(entry)
        return found

    def _resolve(self, path: str, *, is_signed: bool = False) -> None:
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        kind, repo, revision, name = match.groups()
        root = "datasets" if kind else "models"
        folder = self.replica.root / root / repo if is_signed else self._repo(root, repo, revision)
        file = folder / name
        if not file.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        is_large = file.suffix in LFS_SUFFIXES
        etag = hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.replica.commit(folder), "Accept-Ranges": "bytes"}
        if is_large:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        if is_large and not is_signed:
            port = urlsplit(self.replica.url).port
            headers["Location"] = f"http://localhost:{port}/cdn{quote(path)}"
            return self._send(302, b"", headers)
        if name in self.replica.stalls:
            self.replica.stalled.set()
            self.replica.over.wait(60)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or self.replica.ignores_ranges:
            return self._send(200, data, headers, f"{repo}/{name}")
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        whole = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        headers["Content-Range"] = self.replica.claims.get(name, whole)
        return self._send(206, data[start:stop], headers, f"{repo}/{name}")

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
        is_hidden = self.replica.hides_sizes and self.command == "GET" and status == 200 and name
        length = {"Connection": "close"} if is_hidden else {"Content-Length": str(len(data))}
        for key, value in {**headers, **length}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        file = name.rpartition("/")[2]
        limit = min(len(data), self.replica.fails_after.get(file, len(data)))
        for start in range(0, limit, 65_536):
            piece = data[start : min(start + 65_536, limit)]
            self.wfile.write(piece)
            self.replica.served[name] += len(piece)
        if limit < len(data):
            self.close_connection = True
            if not self.replica.fails_again:
                del self.replica.fails_after[file]
