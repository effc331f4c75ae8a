"""Claims: which worker makes a piece, if workers take pieces that nobody has finished (`--steal`).

A claim is a file that only one worker can create (O_EXCL); the worker touches it while it works. If a claim was not
touched for a while, its worker counts as dead, and another worker may take the piece. Two workers on one piece do no
harm: they write the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from merge_tool.errors import OutputError, output_failed
from merge_tool.files import write_whole
from merge_tool.hosts.worker import Progress, Worker

LEASE_SECONDS = 60.0
_LOOKS_SECONDS = 1.0  # how often an idle worker looks for what others have left


class Claims:
    """The claims of one worker. Times are the file system's, so that hosts need no common clock."""

    def __init__(self, worker: Worker, lease: float = LEASE_SECONDS) -> None:
        self._parts, self._run, self._lease = worker.parts, worker.run, lease
        self._clock = worker.parts.path / f"clock.{worker.run}"
        self._next_touch = 0.0

    def take(self, piece: int) -> bool:
        """Claim a piece; False if a living worker has it. Raises OutputError."""
        path = self._parts.claim(piece)
        try:
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                if not self._is_stale(path):
                    return False
                write_whole(path, [self._run.encode()], path.with_name(f"{path.name}.{self._run}.part"))
        except OSError as e:
            raise output_failed(path, e) from e
        return True

    def _is_stale(self, path: Path) -> bool:
        self._clock.touch()
        try:
            return self._clock.stat().st_mtime - path.stat().st_mtime > self._lease
        except FileNotFoundError:  # its worker has just finished
            return False

    def touch(self, piece: int) -> None:
        """Show that the piece is being made; called often."""
        if time.monotonic() >= self._next_touch:
            self._next_touch = time.monotonic() + self._lease / 4
            with contextlib.suppress(OSError):
                os.utime(self._parts.claim(piece))

    def drop(self, piece: int) -> None:
        with contextlib.suppress(OSError):
            self._parts.claim(piece).unlink(missing_ok=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._clock.unlink(missing_ok=True)


def steal(
    worker: Worker,
    first: Sequence[int],
    *,
    lease: float = LEASE_SECONDS,
    on_progress: Progress | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> list[int]:
    """Make pieces until all have their receipts: the worker's own share `first`, then pieces that nobody makes. Returns
    the pieces that this worker has made."""
    claims, made = Claims(worker, lease), list[int]()
    order = [*first, *(number for number in range(len(worker.plan_file.pieces)) if number not in set(first))]
    try:
        while missing := worker.parts.missing(order):
            taken = next((piece for piece in missing if claims.take(piece)), None)
            if taken is None:
                wait(min(_LOOKS_SECONDS, lease / 4))
                continue
            try:
                if worker.parts.missing([taken]):  # else another worker finished it between the look and the claim

                    def report(nbytes: int, tensor: str, taken: int = taken) -> None:
                        claims.touch(taken)
                        if on_progress is not None:
                            on_progress(nbytes, tensor)

                    worker.make([taken], report)
                    made.append(taken)
            finally:
                claims.drop(taken)
    except OutputError:
        worker.check_folder()  # perhaps the merge is finished, or planned anew
        raise
    finally:
        claims.close()
    return made
