"""The model cards of the inputs: what an output inherits of them, and whose licences differ.

Only plain strings are taken from a card, which may be a stranger's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.folder import Folder, distinct_names
from merge_tool.errors import CheckpointError, listed, reason, shown
from merge_tool.models.side_files import card_name

Cards = Mapping[str, Path | None]  # by the name of a model or adapter; None for one without a card


def cards_of(paths: Iterable[Path]) -> Cards:
    """The card of each model and adapter, by its name."""
    return {name: _card(path, name) for path, name in distinct_names(paths).items()}


def _card(path: Path, name: str) -> Path | None:
    if not path.is_dir():
        return None
    folder = Folder(path, name)
    try:
        file = card_name(folder)
        return folder.regular(file) if file is not None else None
    except CheckpointError:  # a link that leads out of the folder
        return None


@dataclass(frozen=True, slots=True)
class Licences:
    """`stated`: the licence that each model's card states, by the model's name; `silent`: the models without one;
    `fields`: the licence for the output's card. If licences differ, that is `other`, with all of them in its name."""

    stated: Mapping[str, str]
    silent: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def differ(self) -> bool:
        return len({text.lower() for text in self.stated.values()}) > 1

    @property
    def sentence(self) -> str:
        """What a user should know; empty if all models state one licence, or none does."""
        each = "; ".join(f"{name}: {text}" for name, text in self.stated.items())
        silent = f"{listed(self.silent)} {'states' if len(self.silent) == 1 else 'state'} no licence."
        if self.differ:
            more = f" {silent}" if self.silent else ""
            return f"The licences differ ({each}).{more} The terms of all of them apply: read them before you publish."
        return silent if self.stated and self.silent else ""


_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)


def terms_in_words(terms: Licences, files: Iterable[str], owner: str) -> str:
    """What a user should know of the licences, and that the output's `files` have those of `owner` alone."""
    own = [name for name in files if _TERMS.fullmatch(name)] if terms.differ else []
    verb = "is" if len(own) == 1 else "are"
    return terms.sentence + (f" The output's {listed(own)} {verb} {owner}'s alone." if own else "")


def licences(cards: Cards) -> Licences:
    """The licences of all models. Without two cards that state one, no card's licence can differ."""
    terms = {name: {k: v for k, v in inherited(card).items() if k in _LICENCE} for name, card in cards.items()}
    stated = {name: _licence(fields) for name, fields in terms.items() if "license" in fields}
    silent = tuple(name for name in cards if name not in stated)
    fields: Mapping[str, Any] = next((terms[name] for name in stated), {})
    result = Licences(stated, silent, fields)
    if not result.differ:
        return result
    several = "-and-".join(dict.fromkeys(re.sub(r"[^a-z0-9.]+", "-", text.lower()) for text in stated.values()))
    return Licences(stated, silent, {"license": "other", "license_name": several})


def _licence(fields: Mapping[str, Any]) -> str:
    text = fields["license"]
    if text == "other":
        text = fields.get("license_name") or " ".join(["other", *(str(fields[k]) for k in _LINK if k in fields)])
    return shown(", ".join(text) if isinstance(text, list) else text, 100)


_NOTHING = ("", "~", "null", "Null", "NULL")
_LINK = ("license_link",)
_LICENCE = ("license", "license_name", *_LINK)
_INHERITED = (*_LICENCE, "language", "pipeline_tag", "library_name")


def inherited(first_card: Path | None) -> dict[str, Any]:
    """Licence, language, task and library from a model's card, if they are plain strings or lists of them."""
    facts: dict[str, Any] = {}
    for key, value in front_matter(first_card).items():
        is_list = isinstance(value, list) and 0 < len(value) < 200 and all(isinstance(v, str) for v in value)
        is_text = isinstance(value, str) and value not in _NOTHING
        if key in _INHERITED and (is_text or is_list) and len(str(value)) < 4000:
            facts[key] = value
    return facts


def front_matter(card: Path | None) -> dict[str, Any]:
    import yaml

    if card is None:
        return {}
    try:
        with card.open("rb") as file:
            head = file.read(65_536).decode("utf-8", "replace")
    except OSError as e:
        raise CheckpointError(
            f"{shown(card.name)}, a model card: cannot be read ({reason(e)}). Correct that, then "
            "run the same command: it continues where it stopped."
        ) from e
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", head, re.DOTALL)
    if not match:
        return {}
    try:
        # Text, lists and mappings only: no merge keys that multiply, no numbers or dates to overflow, and the
        # language `no` stays Norwegian.
        content = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
