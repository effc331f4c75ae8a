"""A thread that says when it runs and when it has ended.

threading.Thread.start waits for its thread to say that it runs, forever if the system has no memory for that thread to
get so far. A merge under a limit on memory must not hang, so it waits with a limit of its own.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

from merge_tool.errors import WorkerError, reason

_START_SECONDS = 30.0


class Worker:
    """Runs `target` in a thread of its own, which does not keep the process alive. `target` deals with its errors; what
    gets past it all the same is kept as `error`. Raises WorkerError where no thread can be started."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._begun, self._ended = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        try:
            _thread.start_new_thread(self._run, (target,))
        except RuntimeError as e:
            raise cannot_start(e) from e
        if not self._begun.wait(_START_SECONDS):
            raise WorkerError(
                f"A worker thread did not begin within {_START_SECONDS:g} s: the system is short of memory, or very "
                "busy. Give fewer --jobs, then run the same command: it continues."
            )

    def _run(self, target: Callable[[], None]) -> None:
        try:
            self._begun.set()
            target()
        except BaseException as e:  # noqa: BLE001 - nobody is above this
            self.error = e
        finally:
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()


def cannot_start(e: RuntimeError) -> WorkerError:
    """What to raise where Python says that it can start no thread: for lack of memory for its stack, or by a limit."""
    return WorkerError(
        f"The system starts no other thread ({reason(e)}): memory, or the number of threads, is limited. Give fewer "
        "--jobs, then run the same command: it continues."
    )


def ended(error: BaseException | None) -> WorkerError:
    """What to raise where a thread has ended that should not have."""
    cause = f"{type(error).__name__}: {reason(error)}" if error is not None else "it left no message"
    return WorkerError(
        f"A worker thread ended unexpectedly ({cause}). Run the same command: it continues. If that happens again, "
        "please report it."
    )
