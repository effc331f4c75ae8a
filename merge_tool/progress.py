"""Progress of a long job: a bar on a terminal or in a notebook, elsewhere a line every half minute.

The only module that imports tqdm, when the first bar is drawn.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from merge_tool.errors import RecipeError, shown, sized

KINDS = ("auto", "bar", "log", "none")
_SECONDS = 30.0  # between two lines of a log


class Progress:
    """The progress of one job after another on standard error. `kind` is one of KINDS; "auto" is a bar on a terminal
    and in a notebook, and `otherwise` elsewhere. Any thread may call it. Raises RecipeError for another kind."""

    def __init__(self, kind: str = "auto", *, otherwise: str = "none", clock: Callable[[], float] = time.monotonic):
        if kind not in KINDS:
            raise RecipeError(f"progress is '{shown(kind)}', expected one of: {', '.join(KINDS)}.")
        is_watched = _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())
        self.kind = kind if kind != "auto" else "bar" if is_watched else otherwise
        self._clock, self._lock = clock, threading.Lock()
        self._what, self._bar = "", None  # type: str, Any
        self._total = self._done = 0
        self._started = clock()
        self._written: float | None = None  # the last line; the first job begins the first half minute

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def begin(self, what: str) -> None:
        """Name the next job, or the part of a job that has no bytes to count."""
        with self._lock:
            self._close()
            self._what, self._total, self._done = what, 0, 0
            self._restart()

    def start(self, total: int) -> None:
        """Begin to count up to `total` bytes."""
        with self._lock:
            self._close()
            self._total, self._done = total, 0
            self._restart()
            if self.kind == "bar":
                settings = {"unit": "B", "unit_scale": True, "leave": False, "desc": self._what or None}
                self._bar = _tqdm()(total=total, file=sys.stderr, dynamic_ncols=True, **settings)

    def advance(self, nbytes: int, name: str) -> None:
        """Count `nbytes` of the tensor `name`."""
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                self._bar.set_postfix_str(shown(name, 40), refresh=False)
                self._bar.update(nbytes)
        self.beat(name)

    def beat(self, name: str = "") -> None:
        """Write a line of the log if half a minute has passed since the last one."""
        if self.kind != "log":
            return
        with self._lock:
            if self._written is None or (now := self._clock()) - self._written < _SECONDS:
                return
            self._written = now
            line = self._line(now - self._started, name)
        self.say(line)

    def _restart(self) -> None:
        self._started = self._clock()
        if self._written is None:
            self._written = self._started

    def _line(self, seconds: float, name: str) -> str:
        what = f"{self._what}: " if self._what else ""
        if not self._total:
            return f"{what}{seconds:,.0f} s so far"
        speed = self._done / max(seconds, 1e-9)
        left = f", {_duration((self._total - self._done) / speed)} left" if speed else ""
        where = f" ({shown(name, 60)})" if name else ""
        share = 100 * self._done // self._total
        return f"{what}{share} % of {sized(self._total)}, {sized(round(speed))}/s{left}{where}"

    def say(self, text: str) -> None:
        """A line on standard error, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _tqdm() -> Any:
    if not _in_notebook():
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():  # without ipywidgets it warns, and draws with letters
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as auto

    return auto
