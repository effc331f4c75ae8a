"""What the replica of the Hub does when it is written to: LFS uploads, commits, pull requests, as the real client asks.

A repository's `main` is its folder; pull request N is a copy of it beside the models, `root/pulls/ORG/NAME/N`, until it
is merged. Large files are uploaded first, to `root/lfs`, and a commit names them by their SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = re.compile(
    r"/api/(repos/create|validate-yaml|whoami-v2)"
    r"|/api/models/([^/]+/[^/]+)/(auth-check|preupload|commit|discussions)(?:/(.+))?"
    r"|/([^/]+/[^/]+)\.git/info/lfs/objects/batch|/lfs/([0-9a-f]{64})(/verify)?"
)
WHEN = "2026-01-01T00:00:00.000Z"


@dataclass
class Pull:
    """A pull request: its title and status. Its files are in a folder of its own."""

    title: str
    status: str = "draft"
    author: str = "me"


@dataclass
class Writes:
    """What was written. `uploaded` counts bytes by SHA-256; `states` has the files of `main` after each request."""

    pulls: dict[str, list[Pull]] = field(default_factory=dict)
    uploaded: dict[str, int] = field(default_factory=dict)
    states: list[tuple[str, frozenset[str]]] = field(default_factory=list)


def answer(handler: Any, match: re.Match[str], query: dict[str, list[str]], body: bytes) -> Any:
    """The JSON that answers a request to write."""
    what, repo, kind, rest, lfs_repo, oid, verifies = match.groups()
    handler.check_token(repo or lfs_repo)
    root: Path = handler.replica.root
    writes: Writes = handler.replica.writes
    if what == "validate-yaml":
        return {"errors": [], "warnings": []}
    if what == "whoami-v2":
        orgs = [{"name": name, "roleInOrg": role} for name, role in handler.replica.orgs.items()]
        access = {"accessToken": {"role": handler.replica.role}}
        return {"type": "user", "name": handler.replica.user, "orgs": orgs, "auth": access}
    if what == "repos/create":
        return _create(handler, root, json.loads(body))
    if lfs_repo is not None:
        return _batch(handler, root, json.loads(body))
    if oid is not None:
        return _upload(handler, root, writes, oid, body) if verifies is None else {}
    folder = root / "models" / repo
    if not folder.is_dir():
        handler.refuse(404, "RepoNotFound", "Repository not found")
    if kind == "auth-check":
        return {}
    if kind == "preupload":
        return _preupload(handler, folder, json.loads(body))
    if kind == "commit":
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        return _commit(handler, root, writes, repo, rest, "create_pr" in query, lines)
    return _discussions(handler, root, writes, repo, rest, query, body)


def _create(handler: Any, root: Path, asked: dict[str, Any]) -> dict[str, Any]:
    repo = f"{asked['organization']}/{asked['name']}"
    folder = root / "models" / repo
    if folder.is_dir():
        handler.refuse(409, "", "You already created this model repo")
    folder.mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    if asked.get("visibility") == "private" or asked.get("private"):
        handler.replica.private.add(repo)
    return {"url": f"{handler.replica.url}/{repo}", "name": repo}


def _preupload(handler: Any, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    modes = []
    for file in asked["files"]:
        is_large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
        mode = "lfs" if is_large else "regular"
        modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
    return {"files": modes}


def _batch(handler: Any, root: Path, asked: dict[str, Any]) -> dict[str, Any]:
    objects: list[dict[str, Any]] = []
    for one in asked["objects"]:
        here = (root / "lfs" / one["oid"]).is_file()
        href = f"{handler.replica.url}/lfs/{one['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(one if here else {**one, "actions": actions})
    return {"transfer": "basic", "objects": objects}


def _upload(handler: Any, root: Path, writes: Writes, oid: str, body: bytes) -> dict[str, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        handler.refuse(400, "", "the digest is another one")
    (root / "lfs").mkdir(exist_ok=True)
    (root / "lfs" / oid).write_bytes(body)
    writes.uploaded[oid] = writes.uploaded.get(oid, 0) + len(body)
    return {}


def _commit(
    handler: Any, root: Path, writes: Writes, repo: str, revision: str, makes_pull: bool, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    main = root / "models" / repo
    header = lines[0]["value"]
    pulls = writes.pulls.setdefault(repo, [])
    number = re.fullmatch(r"refs/pr/(\d+)", revision)
    if makes_pull:
        pulls.append(Pull(header["summary"], author=handler.replica.user))
        folder = root / "pulls" / repo / str(len(pulls))
        shutil.copytree(main, folder)
    elif number is not None:
        folder = root / "pulls" / repo / number[1]
    else:
        folder = main
    for line in lines[1:]:
        value = line["value"]
        path = folder / value["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if line["key"] == "lfsFile":
            if not (root / "lfs" / value["oid"]).is_file():
                handler.refuse(400, "", "a large file was not uploaded")
            shutil.copy(root / "lfs" / value["oid"], path)
        elif line["key"] == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        else:
            path.unlink()
    commit = handler.replica.commit(folder)
    url = f"{handler.replica.url}/{repo}"
    pull = {"pullRequestUrl": f"{url}/discussions/{len(pulls)}"} if makes_pull else {}
    return {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", **pull}


def _discussions(
    handler: Any, root: Path, writes: Writes, repo: str, rest: str | None, query: dict[str, list[str]], body: bytes
) -> dict[str, Any]:
    pulls = writes.pulls.setdefault(repo, [])
    if rest is None:
        found = [_described(repo, n, pull) for n, pull in enumerate(pulls, 1)]
        if query.get("status") == ["open"]:
            found = [one for one in found if one["status"] in ("open", "draft")]
        return {"discussions": found, "count": len(found), "start": 0}
    number, _, action = rest.partition("/")
    pull = pulls[int(number) - 1]
    if action == "status":
        pull.status = json.loads(body)["status"]
        data = {"status": pull.status}
        event = {"id": "1", "type": "status-change", "createdAt": WHEN, "author": {"name": "me"}, "data": data}
        return {"newStatus": event}
    if action == "merge":
        if pull.status != "open":
            handler.refuse(400, "", f"this pull request is {pull.status}")
        main = root / "models" / repo
        shutil.rmtree(main)
        shutil.copytree(root / "pulls" / repo / number, main)
        pull.status = "merged"
        return {}
    return {**_described(repo, int(number), pull), "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []} | {
        "events": [], "diff": "",
    }  # fmt: skip


def _described(repo: str, number: int, pull: Pull) -> dict[str, Any]:
    return {
        "title": pull.title, "num": number, "author": {"name": pull.author}, "createdAt": WHEN, "status": pull.status,
        "repo": {"name": repo, "type": "model"}, "isPullRequest": True,
    }  # fmt: skip
