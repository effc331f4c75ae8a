"""A question to a module of ours, answered in a process of its own: Hub, pickles, tokenizers, strangers' patterns.

Whatever the answer needs (torch, a library, minutes) ends with that process and costs the merge nothing. The module has
a `main` that calls `answer`. Question and answer are JSON in UTF-8; bytes may follow the answer.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import IO, Any

from merge_tool.errors import MergeToolError, reason, shown
from merge_tool.streams import forgiving, has_descriptor

# With the same search path as ours: Python would put the current folder first, which may hold a stranger's modules.
_START = "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from {module} import main; main()"
_REFUSED, _INTERRUPTED = 3, 130  # exit codes


def ask(
    module: str,
    question: Any,
    *,
    what: str,
    error: type[MergeToolError],
    hint: str,
    into: IO[bytes] | None = None,
    keep_errors: bool = False,
    timeout: float | None = None,
) -> tuple[Any, bytes]:
    """The answer of a module's `main`: a value, and bytes. With `into`, a file, the bytes stay in that file, from its
    position on. The process writes to our standard error, so that progress bars show, unless `keep_errors`.

    Raises `error` with the module's own message, or with `what` failed and the `hint` what to do; TimeoutExpired after
    `timeout` seconds.
    """
    try:
        done = subprocess.run(
            command_of(module),
            input=json.dumps(question).encode(),
            stdout=into or subprocess.PIPE,
            stderr=subprocess.PIPE if keep_errors else None if has_descriptor(2) else subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except OSError as e:
        raise error(f"{what}: Python cannot be started for it ({reason(e)}).") from e
    if done.returncode in (_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    rest = b""
    if into is None:
        line, _, rest = done.stdout.partition(b"\n")
    else:
        into.seek(0)
        line = into.readline()
    if done.returncode == _REFUSED:
        raise error(json.loads(line))
    if done.returncode:
        raise error(f"{what}: reading it {_ending(done.returncode, done.stderr or b'')}. {hint}")
    return json.loads(line), rest


def command_of(module: str) -> list[str]:
    """The command that runs a module's `main` in a process of its own."""
    return [sys.executable, "-c", _START.format(module=module), json.dumps(sys.path)]


def _ending(code: int, errors: bytes) -> str:
    if code < 0:
        return f"was ended by signal {-code}, by the system for lack of memory most likely"
    last = errors.decode(errors="replace").strip().splitlines()[-1:]
    return f"ended with code {code}" + (f" ({shown(last[0])})" if last else "")


def answer(reply: Callable[[Any], tuple[Any, Iterable[bytes]]]) -> None:
    """Read the question and write the reply to it; a MergeToolError becomes a refusal with its message. Everything else
    that is printed goes to standard error."""
    pieces: Iterable[bytes] = ()
    try:
        with forgiving(), redirect_stdout(sys.stderr):
            value, pieces = reply(json.loads(sys.stdin.buffer.read()))
        code = 0
    except MergeToolError as e:
        value, code = str(e), _REFUSED
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
    sys.exit(code)
