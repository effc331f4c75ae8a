"""What the package's functions say to a Python program: keyword arguments in place of the command line's options, calls
in place of commands, and warnings in the logger `merge_tool`.

Messages are written once, in the words of the command line; here they are translated on their way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache, wraps
from inspect import signature
from typing import Any, TypeVar

from merge_tool.errors import MergeToolError

R = TypeVar("R")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]+)(?:[ =]('[^'\n]*'|[^\s,;()]*[^\s,;().:]))?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kMGT]?B)?")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# An option's keyword, and what its value is: nothing (a switch), a number, a size, or a text.
_KEYWORDS: Mapping[str, tuple[str, str]] = {
    "overwrite": ("overwrite", "switch"), "check-resumed": ("check_resumed", "switch"), "full": ("full", "switch"),
    "extrapolate": ("extrapolate", "switch"), "keep": ("keep", "switch"), "memory": ("memory_bytes", "size"),
    "jobs": ("jobs", "number"), "report": ("report_path", "text"), "recipe": ("recipe", "text"),
    "models-dir": ("models_dir", "text"), "set": ("values", "text"), "minimize": ("minimize", "text"),
    "against": ("against", "text"), "t": ("t", "number"), "vary": ("vary", "text"), "sample": ("sample", "number"),
    "eval": ("command", "text"), "in-process": ("judge", "text"), "maximize": ("maximize", "text"),
    "trials": ("trials", "number"), "space": ("space", "text"), "storage": ("storage", "text"),
    "sampler": ("sampler", "text"), "pruner": ("pruner", "text"), "choose": ("choose", "text"),
    "test": ("test", "text"), "uniform": ("uniform", "number"), "search-seed": ("search_seed", "number"),
    "batch": ("batch", "number"), "progress": ("progress", "text"),
    "try": ("prompt", "text"), "fill": ("fill", "switch"), "executor": ("executor", "text"),
    "parts": ("num_parts", "number"), "plan-file": ("plan_file", "text"),
    "stream": ("stream", "switch"), "downloads": ("downloads", "number"),
    "spool": ("spool_bytes", "size"), "work": ("work", "text"), "private": ("private", "switch"),
    "names-to": ("names_to", "text"),
    "part": ("part", "number"), "of": ("size", "number"), "steal": ("steal", "switch"), "lease": ("lease", "number"),
}  # fmt: skip
_NO_VALUES = frozenset(
    [
        "again",
        "and",
        "anyway",
        "copies",
        "for",
        "gives",
        "goes",
        "has",
        "if",
        "is",
        "leave",
        "leaves",
        "makes",
        "merges",
        "must",
        "of",
        "or",
        "out",
        "says",
        "that",
        "then",
        "there",
        "to",
        "was",
        "which",
        "with",
        "without",
    ]
)
_CALLS = {
    "merge-tool verify": "verify", "merge-tool run": "merge_models", "merge-tool diff": "diff",
    "merge-tool sweep": "sweep", "merge-tool search": "search", "merge-tool inspect": "inspect", "slerp-merge": "merge",
    "merge-tool push": "push", "merge-tool average": "average",
}  # fmt: skip
_COMMAND = re.compile(rf"\b({'|'.join(_CALLS)})((?: [A-Z][A-Z_.a-z]*| [\w./]+\.yaml| hub:[\w/]+)+)")
_PHRASES = {
    "Run the same command": "Make the same call", "run the same command": "make the same call",
    "The same command": "The same call", "the same command": "the same call", "run its command": "make its call",
    "run the command there": "make the call there", "run the same sweep": "make the same call",
    "on the command line": "as an argument",
}  # fmt: skip


def in_python(text: str) -> str:
    """A message of this package in the words of a Python program.

    >>> in_python("Give --on-missing base, or --overwrite, then run the same command.")
    'Give on_missing="base", or overwrite=True, then make the same call.'
    >>> in_python("Give --memory 70MB or more; merge-tool verify OUT finds that.")
    'Give memory_bytes=70_000_000 or more; merge_tool.verify(OUT) finds that.'
    """
    text = text.replace("--no-stream", "stream=False").replace("--no-publish", "publish=False")
    text = _FLAG.sub(_keyword, re.sub(r"--against ([A-Z]+) ([A-Z]+)", r"against=(\1, \2)", text))
    for command, call in _PHRASES.items():
        text = text.replace(command, call)
    text = _COMMAND.sub(lambda m: f"merge_tool.{_CALLS[m[1]]}({', '.join(map(_argument, m[2].split()))})", text)
    return re.sub(r"\bmerge-tool (verify|diff|sweep|inspect)\b", r"merge_tool.\1", text)


def _argument(word: str) -> str:
    return word if word.isupper() else f'"{word}"'


@cache
def _keywords() -> dict[str, tuple[str, str]]:
    from merge_tool.recipe.average import AverageOptions
    from merge_tool.recipe.options import Options
    from merge_tool.recipe.pair import PairOptions

    of_options = {
        field.metadata["flag"][2:]: (
            field.name,
            "switch" if field.metadata.get("is_flag")
            else "size" if field.metadata.get("is_size")
            else "number" if field.metadata.get("is_whole")
            else " ".join(field.metadata.get("choices") or ()) or "text",
        )
        for kind in (Options, PairOptions, AverageOptions)
        for field in fields(kind)
    }  # fmt: skip
    return {**of_options, **_KEYWORDS}


def _keyword(match: re.Match[str]) -> str:
    """An option with its value, if one follows, as a keyword argument; what is no option of ours stays."""
    flag, value = match[1], match[2] or ""
    if flag not in _keywords():
        return match[0]
    name, kind = _keywords()[flag]
    rest = match[0].removeprefix(f"--{flag}")
    if kind == "switch":
        return f"{name}=True{rest}"
    if kind == "size" and (size := _SIZE.fullmatch(value)):
        return f"{name}={round(float(size[1]) * _UNITS.get(size[2], 1)):_}"
    if kind == "number" and re.fullmatch(r"[\d.]+", value):
        return f"{name}={value}"
    is_text = kind == "text" and value not in _NO_VALUES and not value.startswith("{")
    if value and (is_text or value in kind.split()):
        return f"{name}={value}" if value[0] == "'" or value.isupper() else f'{name}="{value}"'
    return f"{name}{rest}"


# ------------------------------------------------------------------------------------------- functions


def spoken(function: Callable[..., R]) -> Callable[..., R]:
    """The function with errors, warnings and reports in Python's words. A function that takes `on_warning` and is given
    none writes its warnings to the logger `merge_tool`."""
    parameters = signature(function).parameters

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        if "on_warning" in parameters:
            kwargs["on_warning"] = _heard(kwargs.get("on_warning"))
        if "watch" in parameters:
            from merge_tool.output.merge_report import Watch

            watch = kwargs.get("watch") or Watch()
            kwargs["watch"] = replace(watch, on_warning=_heard(watch.on_warning))
        try:
            return _translated(function(*args, **kwargs))  # type: ignore[no-any-return]
        except MergeToolError as e:
            e.args = tuple(in_python(arg) if isinstance(arg, str) else arg for arg in e.args)
            raise

    return wrapped


def _heard(on_warning: Callable[[str], None] | None) -> Callable[[str], None]:
    hear = on_warning or _log
    return lambda message: hear(in_python(message))


def _translated(result: Any) -> Any:
    """A report with its messages in Python's words."""
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return tuple(map(_translated, result))
    if not is_dataclass(result) or isinstance(result, type):
        return result
    said = [f.name for f in fields(result) if f.name in ("warnings", "problems", "notices")]
    return replace(result, **{name: tuple(map(in_python, getattr(result, name))) for name in said}) if said else result


def _log(message: str) -> None:
    import logging

    logging.getLogger("merge_tool").warning(message)
