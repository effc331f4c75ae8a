"""The process that writes to the Hub or a bucket beside a merge (uploading.py), as the merge sees it: one question at a
time.

Questions and answers are lines of JSON on its standard input and output. It ends with its input, so also if we are
killed: nothing is uploaded for a merge that is over.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from typing import Any

from merge_tool.apart import command_of
from merge_tool.checkpoint.addresses import is_store
from merge_tool.errors import OutputError, reason
from merge_tool.streams import has_descriptor

WAITS = (1.0, 4.0, 15.0, 60.0)  # seconds before each further try of what may pass


class Uploader:
    """The running process, for one repository of the Hub, or one folder of an object store."""

    def __init__(self, repo: str) -> None:
        self._lock = threading.Lock()
        self.name = repo if is_store(repo) else f"hub:{repo}"
        try:
            self.process = subprocess.Popen(
                command_of("merge_tool.output.uploading"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if has_descriptor(2) else subprocess.DEVNULL,
            )
        except OSError as e:
            raise OutputError(f"{self.name}: Python cannot be started to upload ({reason(e)}).") from e
        self._send({"repo": repo, "waits": WAITS})

    def ask(self, kind: str, **arguments: Any) -> Any:
        """The answer to a question: the method of that name of a Session (uploading.py). Raises OutputError."""
        with self._lock:
            self._send({"kind": kind, **arguments})
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise OutputError(
                f"{self.name}: the process that uploads ended with code {self.process.poll()}. Its last words are "
                "above. Run the same command again: it continues."
            )
        answer = json.loads(line)
        if "refused" in answer:
            raise OutputError(answer["refused"])
        return answer["answer"]

    def _send(self, question: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, which the missing answer says
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdout.close()
