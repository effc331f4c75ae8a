"""`--names-from FILE`: what FT calls BASE's tensors, as JSON or in two columns. Texts only."""

from __future__ import annotations

import json
from pathlib import Path

from merge_tool.errors import RecipeError, reason, shown

_MOST_BYTES = 50_000_000
_EXPECTED = 'expected JSON ({"FT name": "BASE name"}), or a line "FT-NAME BASE-NAME" for each tensor'


def read_names(value: str) -> str:
    """The mapping FT name -> BASE name as JSON, of a file, or as `read_names` gave it. Raises RecipeError."""
    if value.lstrip().startswith("{"):
        text, where = value, "--names-from"
    else:
        where = f"--names-from {shown(value)}"
        try:
            if Path(value).stat().st_size > _MOST_BYTES:
                raise RecipeError(f"{where}: has more than {_MOST_BYTES:,} bytes, which is no list of names.")
            text = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as e:
            raise RecipeError(f"{where}: cannot be read ({reason(e)}).") from e
    return json.dumps(_parse(text, where), sort_keys=True)


def _parse(text: str, where: str) -> dict[str, str]:
    pairs = _from_json(text, where) if text.lstrip().startswith("{") else _from_lines(text, where)
    if not pairs:
        raise RecipeError(f"{where}: names nothing, {_EXPECTED}.")
    for side, what in ((0, "FT"), (1, "BASE")):
        names = [pair[side] for pair in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RecipeError(f"{where}: {shown(twice)} of {what} is named twice; a tensor has one name on each side.")
    return dict(pairs)


def _from_json(text: str, where: str) -> list[tuple[str, str]]:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda items: items)
    except (ValueError, RecursionError) as e:
        raise RecipeError(f"{where}: is not JSON ({shown(e)}), {_EXPECTED}.") from e
    if not all(isinstance(value, str) for _, value in pairs):
        raise RecipeError(f"{where}: has a value that is no name, {_EXPECTED}.")
    return list(pairs)


def _from_lines(text: str, where: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise RecipeError(f"{where}, line {number}: has {len(words)} words, {_EXPECTED}.")
        pairs.append((words[0], words[1]))
    return pairs
