"""In a process of its own, beside a merge: finished shards -> a repository of the Hub, or a folder of an object store.

Questions come from an Uploader (uploader.py). A Session answers them: hub_session.py, store_session.py.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from merge_tool.checkpoint.addresses import is_store
from merge_tool.errors import OutputError


class Session(Protocol):
    """The questions that an Uploader may ask; each method's arguments and answer are JSON. A draft is an output that
    is not complete: its shards, a receipt for each, and the plan. Raises OutputError."""

    def look(self) -> dict[str, Any]:
        """`url`: what users call the place; `files`: what is there, but drafts, by name."""

    def stored(self, number: int | None, folder: str) -> dict[str, Any] | None:
        """An output that is whole there, or in the draft of that `number`: `files` as they must be, `changed_at` in
        seconds since 1970. Its report and sums are then in `folder`. None for anything else."""

    def draft(self, digest: str, overwrites: bool) -> dict[str, Any]:
        """The draft of the merge of this digest: `number` (None if there is none), `files` with size and SHA-256, the
        text of its `plan`. `others`: sentences about other drafts."""

    def receipt(self, name: str) -> str:
        """The text of a file of the draft."""

    def begin(self, private: bool, plan: str, is_new: bool, overwrites: bool) -> int | None:
        """Make what is missing of the place and the draft; the draft's number, if it has one to show. If it `is_new`,
        it holds nothing but the plan then. Refuses who may not write."""

    def shard(self, path: str, sha256: str, tensors: list[Any], receipt: str) -> None:
        """Upload a finished shard with its receipt."""

    def finish(
        self, folder: str, sides: list[str], files: Mapping[str, Sequence[Any]], overwrites: bool, publishes: bool
    ) -> dict[str, Any]:
        """Add the files `sides` of `folder`, compare every file with what the merge wrote, and show the output.
        `others`: what else the place has."""

    def tidy(self) -> None:
        """Remove what is left of the draft of an output that is shown."""

    def drop(self) -> None:
        """Remove the draft: there is nothing to continue."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends us, by closing our input
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(questions, out), daemon=True).start()
    for line in iter(sys.stdin.buffer.readline, b""):
        questions.put(line)
    os._exit(0)  # whatever is still on its way


def _serve(questions: queue.SimpleQueue[bytes], out: int) -> None:
    try:
        settings = json.loads(questions.get())
        session: Session | None = None
        while True:
            question = json.loads(questions.get())
            try:
                with _explaining(settings["repo"]):
                    session = session or _open(**settings)
                    reply = {"answer": getattr(session, question.pop("kind"))(**question)}
            except OutputError as e:
                reply = {"refused": str(e)}
            view = memoryview(json.dumps(reply).encode() + b"\n")
            while view:
                view = view[os.write(out, view) :]
    except BaseException:  # noqa: BLE001 - the main thread waits for questions
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _open(repo: str, waits: Sequence[float]) -> Session:
    if is_store(repo):
        from merge_tool.output.store_session import StoreSession  # each needs its own library

        return StoreSession(repo, waits)
    from merge_tool.output.hub_session import HubSession

    return HubSession(repo, waits)


def _explaining(repo: str) -> AbstractContextManager[None]:
    """Every error inside becomes an OutputError."""
    if is_store(repo):
        from merge_tool.checkpoint import stores

        return stores.explaining(repo, OutputError)
    from merge_tool.output import repository

    return repository.explaining(repo)
