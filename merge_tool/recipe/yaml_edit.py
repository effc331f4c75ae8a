"""Edits of a recipe's text that change single values and keep the rest, byte for byte: names in place of paths, and the
options that make a published recipe run again. Every edit is checked: the new text is parsed and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

OWN = "merge_tool"  # the key of our options in a published recipe; mergekit does not read it
_SAFE = re.compile(r"[A-Za-z_./][\w./+@-]*", re.ASCII)


def replace_scalars(text: str, new: Mapping[int, str]) -> str:
    """The text with other values for the scalars that end at these positions."""
    import yaml

    pieces, done = list[str](), 0
    token: Any
    for token in yaml.scan(text, Loader=yaml.SafeLoader) if new else ():
        value = new.get(token.end_mark.index) if isinstance(token, yaml.ScalarToken) else None
        if value is None or value == token.value:
            continue
        start, end = token.start_mark.index, token.end_mark.index
        lines = "\n" if token.style in ("|", ">") and text[start:end].endswith("\n") else ""
        pieces += [text[done:start], _scalar(value, token.style), lines]
        done = end
    return "".join([*pieces, text[done:]])


def _scalar(value: str, style: str | None) -> str:
    """A text as a YAML scalar that fits everywhere, quoted as before if it was quoted."""
    import yaml

    if style in (None, "") and _SAFE.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    if style == "'" and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    return json.dumps(value, ensure_ascii=False)


def with_own(text: str, content: Mapping[str, Any]) -> str:
    """The recipe with `content` (JSON) under the key of our options, which is new or replaced; without content, a text
    that has no such key stays as it is."""
    import yaml

    before = yaml.safe_load(text)
    if (before.get(OWN) or {}) == content:
        return text
    wanted = {**before, OWN: dict(content)}
    for candidate in _candidates(text, json.dumps(content, ensure_ascii=False)):
        try:
            if yaml.safe_load(candidate) == wanted:
                return candidate
        except yaml.YAMLError:
            continue
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)


def without_own(text: str) -> str:
    """The recipe without the key of our options: the text that `with_own` was given."""
    import yaml

    top: Any = yaml.compose(text, Loader=yaml.SafeLoader) if OWN in text else None
    own = [(key, value) for key, value in top.value if key.value == OWN] if top else []
    if not own:
        return text
    rest = {key: value for key, value in yaml.safe_load(text).items() if key != OWN}
    start, end = own[0][0].start_mark.index, own[0][1].end_mark.index
    before, after = text[:start], text[end:]
    indent = " " * own[0][0].start_mark.column
    for shorter in (
        before + after.removeprefix(f"\n{indent}"),
        before + after.removeprefix(", "),
        before.rstrip(" ,") + after.removeprefix("\n"),
    ):
        try:
            if yaml.safe_load(shorter) == rest:
                return shorter
        except yaml.YAMLError:
            continue
    return text


def _candidates(text: str, content: str) -> Iterator[str]:
    import yaml

    top: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in top.value:
        if key.value == OWN:
            start, end = value.start_mark.index, value.end_mark.index
            yield text[:start] + content + text[end:]
            yield text[:start] + content + "\n" + text[end:]
    start, end = top.start_mark.index, top.end_mark.index
    entry = f"{OWN}: {content}"
    if top.flow_style:
        yield f"{text[: start + 1]}{entry}, {text[start + 1 :]}"
        return
    indent = " " * top.start_mark.column
    yield f"{text[:start]}{entry}\n{indent}{text[start:]}"
    yield f"{text[:end]}{'' if text[:end].endswith(chr(10)) else chr(10)}{indent}{entry}\n{text[end:]}"
