"""The record of the run that works in a work folder, for runs that the lock does not separate.

A file lock may hold on one machine only (a mount with local locks), or not through another path to the same folder
(sshfs beside the local path). So a run also creates the file `owner`, which only one run can create. The file names the
run, and changes while the run works.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, output_failed, shown

OWNER = "owner"
_BEAT_SECONDS = 2.0  # while there is progress, the record changes about this often
_PATIENCE_SECONDS = 20.0  # if a record did not change for so long, its run counts as ended


class Owner:
    """This run's record in `folder`. `may_share`: an earlier run left its record, and nothing proves that it ended.

    Raises OutputError while another run works here.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / OWNER
        self.run = secrets.token_hex(8)
        self.may_share = False
        self._beats, self._next_beat = 0, 0.0
        while True:
            try:
                fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
            except FileExistsError:
                self._await_end(_content(self.path))
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
                    continue
            except FileNotFoundError as e:  # the run that worked here has just removed the folder
                out = self.path.parent.parent
                raise OutputError(
                    f"{shown(out)}: another merge has just ended here. Run the same command again."
                ) from e
            except OSError as e:
                raise output_failed(self.path, e) from e
            with contextlib.suppress(OSError), os.fdopen(fd, "wb") as file:  # an empty record counts as well
                file.write(self._record())
            return

    def _record(self) -> bytes:
        started = _started(os.getpid())
        record = {"run": self.run, "machine": machine(), "process": os.getpid(), "started": started}
        return json.dumps({**record, "beats": self._beats}).encode()

    def _await_end(self, content: bytes) -> None:
        """Return once the run that left this record has ended. Raises OutputError if that run still works."""
        ended = has_ended(content)
        end = time.monotonic() + _PATIENCE_SECONDS
        while ended is None and time.monotonic() < end:
            time.sleep(min(0.25, _PATIENCE_SECONDS))
            if (now := _content(self.path)) != content:
                ended = not now
        self.may_share |= ended is None
        if ended is False:
            raise OutputError(
                f"{shown(self.path.parent.parent)}: another merge is writing here ({_who(content)}). Wait for it, or "
                "choose another folder."
            )

    def beat(self) -> None:
        """Show that this run works. Raises OutputError once another run has taken the folder."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + _BEAT_SECONDS
        self.confirm()
        self._beats += 1
        with contextlib.suppress(OSError):
            self.path.write_bytes(self._record())

    def confirm(self) -> None:
        """Raise OutputError if another run has taken the folder."""
        content = _content(self.path)
        if _parsed(content).get("run") not in (None, self.run):  # None: another thread is writing it
            raise OutputError(
                f"{shown(self.path.parent.parent)}: another merge has begun here meanwhile ({_who(content)}); the "
                "disk's locks do not separate the two runs. This run ends, and the other one continues."
            )

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if _parsed(_content(self.path)).get("run") in (self.run, None):
                self.path.unlink(missing_ok=True)


def machine() -> str:
    """A text that identifies this machine, its last boot, and its set of process numbers (a container has its own)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def has_ended(content: bytes) -> bool | None:
    """Whether the run of a record has ended; None if that cannot be known from here."""
    record = _parsed(content)
    process = record.get("process")
    if not content:  # a power cut may leave a name without content
        return True
    if record.get("machine") != machine() or not isinstance(process, int):
        return None
    if process == os.getpid() or sys.platform == "win32":  # we hold the lock, which holds on all of one machine
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process, so it exists
    except OSError:
        return None
    started = _started(process)
    return None if started is None else started != record.get("started")


def _started(process: int) -> str | None:
    """The start time of a process in the system's ticks; an empty text if the process has ended, None if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _who(content: bytes) -> str:
    record = _parsed(content)
    name = str(record.get("machine", "another machine")).partition(" ")[0]
    return f"process {shown(record.get('process', '?'), 20)} on {shown(name, 60)}"
