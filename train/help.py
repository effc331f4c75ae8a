"""What each key means, for people: `mixce-train --help` and the tables of docs/training.md.

Both are made of the docstrings in `config.py`, so they cannot differ.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.config import Average, Lora, SourceConfig, TrainConfig
from train.contrast.options import ContrastConfig, QuestionsConfig, VerifyConfig

USAGE = "usage: mixce-train CONFIG.yaml [--key value ...]"
_HEAD = f"""{USAGE}

Finetune a causal language model with the MixCE loss. CONFIG.yaml holds the keys below (defaults in
brackets). A flag overrides the key of the file; its value is YAML. docs/training.md has examples.
"""


_BLOCKS: dict[str, type[Any]] = {
    "each entry of sources": SourceConfig,
    "lora": Lora,
    "average": Average,
    "contrast": ContrastConfig,
    "contrast.questions": QuestionsConfig,
    "contrast.verify": VerifyConfig,
}


def help_text(width: int) -> str:
    """All keys with their defaults and meanings, in lines of `width` characters."""
    parts = [_HEAD, *_lines(TrainConfig, "--", width)]
    for title, config in _BLOCKS.items():
        parts += ["", f"Keys of {title}:", "", *_lines(config, "", width)]
    return "\n".join(parts)


def _lines(config: type[Any], dashes: str, width: int) -> Iterator[str]:
    for key, default, meaning in _keys(config):
        text = f"  {dashes + key:26} [{default}] {meaning}".replace("`", "")
        yield textwrap.fill(text, width, subsequent_indent=" " * 29, break_on_hyphens=False)


def keys_table(config: type[Any]) -> str:
    """The same as a Markdown table."""
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _keys(config)]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _keys(config: type[Any]) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each field, from the lines `key [default]: meaning` of the docstring."""
    lines = re.findall(r"^    (\w+)(?: \[(.+)\])?: ((?:.+\n)(?:     +.+\n)*)", config.__doc__ or "", re.MULTILINE)
    said = {key: (default, " ".join(meaning.split())) for key, default, meaning in lines}
    hints = get_type_hints(config)
    for field in fields(config):
        default, meaning = said[field.name]
        shown = default or _shown(field.default)
        if get_origin(hints[field.name]) is Literal:
            shown += f" (or {', '.join(c for c in get_args(hints[field.name]) if c != field.default)})"
        yield field.name, shown, meaning


def _shown(default: Any) -> str:
    if isinstance(default, tuple) and default:
        return ", ".join(map(_shown, default))
    if isinstance(default, bool | str):
        return str(default).lower()
    return "required" if default is MISSING else f"{default:.10g}" if default not in (None, ()) else "none"
