"""In a process of its own: an output that is complete here -> a folder of an object store, what makes it a model last.

Files of weights have receipts meanwhile, as those of a merge that goes there: the same command continues.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from merge_tool.apart import answer
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.checkpoint.stores import explaining
from merge_tool.errors import OutputError, shown, sized
from merge_tool.output.pushing import Pushed, Request
from merge_tool.output.store_session import StoreSession
from merge_tool.output.uploader import WAITS


def main() -> None:
    answer(lambda question: (push_to_store(Request(**question)), ()))


def push_to_store(request: Request) -> dict[str, Any]:
    """Push the files; the fields of a Pushed. Raises OutputError."""
    with explaining(request.repo, OutputError):
        pushed = _push(request, StoreSession(request.repo, WAITS))
    return {name: getattr(pushed, name) for name in Pushed.__slots__}


def _push(request: Request, session: StoreSession) -> Pushed:
    pushed, folder = Pushed(url=request.repo, is_published=True), Path(request.folder)
    if _is_there(request, session):
        pushed.kept_files = len(request.sums)
        session.draft(request.digest, overwrites=True)
        session.tidy()
        return pushed
    draft = session.draft(request.digest, request.overwrites)
    plan = json.dumps({"push": request.digest})
    session.begin(False, plan, draft["plan"] != plan, request.overwrites)
    weights = [name for name in request.sums if is_weight_file(name)]
    for name in weights:
        digest, path = request.sums[name], folder / name
        if draft["plan"] == plan and draft["files"].get(name, (0, ""))[1] == digest:
            pushed.kept_files += 1
            continue
        session.add_weights(name, path, digest, plan)
        pushed.uploaded_bytes += path.stat().st_size
        print(f"{shown(name)}: uploaded, {sized(path.stat().st_size)}", file=sys.stderr)
    files = {name: (Path(folder, name).stat().st_size, digest) for name, digest in request.sums.items()}
    sides = [name for name in request.sums if name not in weights]
    pushed.uploaded_bytes += sum(files[name][0] for name in sides)
    pushed.others = session.finish(str(folder), sides, files, request.overwrites, True)["others"]
    return pushed


def _is_there(request: Request, session: StoreSession) -> bool:
    with tempfile.TemporaryDirectory() as place:
        stored = session.stored(None, place)
    return stored is not None and {name: one[1] for name, one in stored["files"].items()} == request.sums
