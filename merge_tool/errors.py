"""Every error that a user can cause or meet, and how names from files are shown in messages.

    MergeToolError          anything this package refuses to do; the command line prints it and exits 1
    ├── RecipeError         the request makes no sense: t out of range, an unknown method, too little memory
    ├── CheckpointError     an input cannot be read: missing, damaged, quantised, changed while we read it
    │   ├── FetchError      a model of the Hub cannot be fetched: gated, missing, offline, no such revision
    │   └── HeaderError     the header of one safetensors file breaks the format's rules
    ├── MismatchError       two inputs do not fit together: names, shapes
    ├── DataError           values that cannot be merged: NaN, infinity, overflow, unequal integers
    ├── OutputError         the output cannot be written: not empty, in use, disk full
    ├── EvaluationError     a sweep's evaluation command failed, or its scores cannot be read
    └── WorkerError         a thread of ours could not be started, or ended unexpectedly

A message says which file or tensor, what was found, what was expected, and what to do next. Any other exception is a
bug of this package and may show a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path

# What a network, FUSE or unplugged disk says once it is gone
_GONE_NAMES = [
    "ESTALE",
    "ENOTCONN",
    "ECONNABORTED",
    "ECONNRESET",
    "ETIMEDOUT",
    "EHOSTDOWN",
    "ENODEV",
    "ENXIO",
    "EREMOTEIO",
]
_GONE = frozenset(getattr(errno, name) for name in _GONE_NAMES if hasattr(errno, name))


class MergeToolError(Exception):
    """Base of all errors that this package raises on purpose."""


class RecipeError(MergeToolError):
    """The request itself is wrong, independent of the files."""


class CheckpointError(MergeToolError):
    """An input checkpoint cannot be used."""


class HeaderError(CheckpointError):
    """A safetensors header breaks the format's rules."""


class FetchError(CheckpointError):
    """A model of the Hub cannot be fetched."""


class MismatchError(MergeToolError):
    """The inputs do not fit together. `suggested`: names of one model's tensors, and what the other may call them."""

    def __init__(self, message: str, suggested: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.suggested = suggested or {}


class DataError(MergeToolError):
    """A tensor holds values that cannot be merged."""


class OutputError(MergeToolError):
    """The output folder or file cannot be used or written."""


class EvaluationError(MergeToolError):
    """The user's evaluation command failed or printed no scores."""


class WorkerError(MergeToolError):
    """A worker thread could not be started, or ended unexpectedly; its cause, if one is known, is `__cause__`."""


def install(extra: str) -> str:
    """The command that installs an extra. Not the package's name: it is on no registry.

    >>> install("plot")
    "pip install '.[plot]' in slerp-merge's folder (a checkout)"
    """
    return f"pip install '.[{extra}]' in slerp-merge's folder (a checkout)"


def shown(name: object, limit: int = 200) -> str:
    """`name` as it may be printed: control characters escaped, at most `limit` characters.

    >>> shown("model.norm.weight")
    'model.norm.weight'
    >>> shown("evil\\x1b[2J")
    'evil\\\\x1b[2J'
    """
    whole = str(name)
    text = whole[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(whole) <= limit else f"{text}… ({len(whole)} characters)"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first `most` names and how many more there are: `a, b, c and 4 more`."""
    names = list(names)
    head = ", ".join(shown(name) for name in names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most:,} more"


def counted(number: int, one: str, many: str = "") -> str:
    """A number and its noun: `1 tensor`, `1,024 tensors`. `many` is the plural, by default `one` with an s.

    >>> counted(1, "tensor is", "tensors are"), counted(1024, "tensor")
    ('1 tensor is', '1,024 tensors')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def sized(nbytes: int) -> str:
    """A number of bytes for people.

    >>> sized(1_234_567_890), sized(12)
    ('1.23 GB', '12 bytes')
    """
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= width:
            return f"{nbytes / width:.3g} {unit}" if nbytes < 1000 * width else f"{nbytes / width:,.0f} {unit}"
    return f"{nbytes} bytes"


def reason(e: BaseException) -> str:
    """An error's message without the user's path, which the system's errors contain.

    >>> reason(FileNotFoundError(2, "No such file or directory", "/home/me/model/config.json"))
    'No such file or directory'
    >>> reason(UnicodeDecodeError("utf-8", b"abc", 1, 2, "invalid start byte"))
    'it is not utf-8 text, at byte 1'
    """
    if isinstance(e, OSError) and e.strerror:
        return shown(e.strerror)
    if isinstance(e, UnicodeDecodeError):
        return f"it is not {e.encoding} text, at byte {e.start:,}"
    return shown(str(e) or type(e).__name__, 600)


def next_step(e: OSError) -> str:
    """What to do about an input whose disk or connection is gone; an empty text for other errors."""
    if e.errno in _GONE:
        return " Its disk or connection is gone: mount it again, then run the same command: it continues."
    return ""


def input_failed(name: object, e: OSError) -> CheckpointError:
    """The error for an operation on an input that the system refused."""
    return CheckpointError(f"{shown(name)}: cannot be read ({reason(e)}).{next_step(e)}")


def output_failed(path: Path, e: OSError) -> OutputError:
    """The error for an operation on the output at `path` that the system refused."""
    return OutputError(
        f"{shown(path)}: {reason(e)}. Correct that, then run the same command: it continues where it stopped."
    )
