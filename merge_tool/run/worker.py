"""A thread that says when it runs and when it has ended.

threading.Thread.start waits for its thread to say that it runs, forever if the system has no memory for that thread to
get so far. A merge under a limit on memory must not hang, so it waits with a limit of its own.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

_START_SECONDS = 30.0


class Worker:
    """Runs `target` in a thread of its own, which does not keep the process alive. `target` deals with its errors."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._begun, self._ended = threading.Event(), threading.Event()
        try:
            _thread.start_new_thread(self._run, (target,))
        except RuntimeError as e:  # how Python says that the system has no memory for its stack
            raise MemoryError("no thread can be started") from e
        if not self._begun.wait(_START_SECONDS):
            raise MemoryError("a thread was started and did not begin")

    def _run(self, target: Callable[[], None]) -> None:
        try:
            self._begun.set()
            target()
        finally:
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()
