"""How every command begins and ends: output that cannot fail, errors as one message, signals, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import click

from merge_tool.errors import MergeToolError, reason, shown
from merge_tool.streams import forgiving, write_error

P = ParamSpec("P")
R = TypeVar("R")

CONTINUES, READS = "Run the same command to continue.", "Nothing was changed."


def print_errors(after_signal: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """MergeToolError -> `Error: ...` and exit code 1; signals -> exit codes 130 and 143, and a line on how to go on."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                _load_numpy()
                with _terminable():
                    result = function(*args, **kwargs)
                if after_signal == READS:
                    check_written()
                return result
            except MergeToolError as e:
                raise click.ClickException(str(e)) from e
            except MemoryError as e:
                raise click.ClickException(
                    f"The system has too little memory left ({shown(e) or 'an allocation failed'}). Give it more, or a "
                    "smaller --memory, then run the same command."
                ) from e
            except Exception as e:
                if isinstance(e, OSError) and not _has_current_folder():
                    raise click.ClickException("The current folder is gone. Change to one that exists.") from e
                if not _is_in_import(e):
                    raise
                raise click.ClickException(
                    f"A library cannot be loaded ({type(e).__name__}: {shown(e)}). Either memory is short, or its "
                    "installation is damaged: give it more memory, or install it again, then run the same command."
                ) from e
            except KeyboardInterrupt:
                click.echo(f"\nInterrupted. {after_signal}", err=True)
                sys.exit(130)
            except _TerminatedError:
                click.echo(f"\nTerminated. {after_signal}", err=True)
                sys.exit(143)

        return wrapped

    return decorate


def _load_numpy() -> None:
    """Load numpy with one thread: its BLAS starts one a core, of which we use none, and some boxes allow only two."""
    has_choice = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import numpy  # noqa: F401

    if not has_choice:  # not for the programs that a sweep starts
        del os.environ["OPENBLAS_NUM_THREADS"]


def check_written() -> None:
    """Exit with 1 if what a command is there to print could not be written. A merge is there to write OUT."""
    if (e := write_error()) is not None:
        if e.errno != errno.EPIPE:  # else the reader (`head`) has seen enough
            click.echo(f"Error: The output cannot be written ({reason(e)}). Give it another place.", err=True)
        sys.exit(1)


def _is_in_import(error: Exception) -> bool:
    """Whether an error was raised while a module was loaded: some are loaded when they are first needed."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, ImportError) or any(frame.f_code.co_name == "<module>" for frame in frames)


def _has_current_folder() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109 - a Path of it asks the same
    except OSError:
        return False


class _TerminatedError(BaseException):
    """SIGTERM was received."""


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Command(click.Command):
    """A command whose output cannot fail."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with forgiving():
            return super().main(*args, **kwargs)


class Group(click.Group):
    """Commands whose output cannot fail."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with forgiving():
            return super().main(*args, **kwargs)
