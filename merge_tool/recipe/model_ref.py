"""How a recipe names a model: PATH[@REVISION][+ADAPTER[@REVISION]]. If the whole text is an existing path, it is that
path. With a folder of models, names are paths in that folder; what has the form of a Hub id and is not there stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from merge_tool.errors import RecipeError, shown

_MOST_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A folder, file or repository id, optionally at a revision, optionally with a LoRA adapter."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        """The text form, which `parse_ref` reads back (unless a path of that name exists)."""
        return _joined(self.path, self.revision) + (f"+{_joined(self.lora, self.lora_revision)}" if self.lora else "")


def _joined(path: str, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a recipe's text names a model: the position at which the scalar ends, the model, and a text before it."""

    end: int
    ref: ModelRef
    lead: str = ""


def parse_ref(text: str, folder: str = "") -> ModelRef:
    """The model that `text` names, in `folder` if there is one. Raises RecipeError for an empty part, or for an
    ambiguous number of `+` or `@`.

    >>> parse_ref("org/model@v1.0+org/adapter")
    ModelRef(path='org/model', revision='v1.0', lora='org/adapter', lora_revision=None)
    """
    if len(text) > _MOST_CHARACTERS or not text.isprintable():
        raise RecipeError(f"The model '{shown(text, 50)}' is too long for a path, or has characters that none has.")
    path, lora = _split(text, "+", "an adapter", folder)
    return ModelRef(*split_revision(path, folder), *((None, None) if lora is None else split_revision(lora, folder)))


def split_revision(text: str, folder: str = "") -> tuple[str, str | None]:
    """PATH[@REVISION] -> both."""
    path, revision = _split(text, "@", "a revision", folder)
    return located(path, folder), revision


def located(path: str, folder: str) -> str:
    """`path` (or several, with + between them) in the folder of models. An absolute path stays; so does ORG/NAME that
    the folder does not have, neither the model nor a folder ORG."""
    if not folder or os.path.isabs(path):  # noqa: PTH117
        return path
    if not _exists(path, folder) and "+" in path:
        return "+".join(located(part, folder) for part in path.split("+"))
    organisation, slash, name = path.partition("/")
    may_be_of_hub = slash and name and "/" not in name and not organisation.startswith(".")
    is_there = _exists(path, folder) or _exists(organisation, folder)
    return path if may_be_of_hub and not is_there else _in(folder, path)


def _split(text: str, sign: str, what: str, folder: str) -> tuple[str, str | None]:
    if _exists(text, folder) or sign not in text:
        parts: tuple[str, str | None] = text, None
    elif on_disk := next(_existing_heads(text, sign, folder), None):
        parts = on_disk, text[len(on_disk) + 1 :]
    elif text.count(sign) == 1:
        head, _, tail = text.partition(sign)
        parts = head, tail
    else:
        raise RecipeError(
            f"The model '{shown(text)}' has {text.count(sign)} '{sign}', expected at most one, before {what}; a "
            "local path may have more if it exists."
        )
    if not parts[0].strip() or (parts[1] is not None and not parts[1].strip()):
        raise RecipeError(f"The model '{shown(text)}' lacks a name or {what} beside '{sign}'.")
    return parts


def _existing_heads(text: str, sign: str, folder: str) -> Iterator[str]:
    """The texts before one of the signs that are existing paths (a revision may follow), the longest first."""
    for end in range(len(text) - 1, 0, -1):
        if text[end] == sign and _exists(text[:end], folder):
            yield text[:end]


def _exists(text: str, folder: str) -> bool:
    return os.path.exists(_in(folder, text))  # noqa: PTH110  Path.exists raises for names that are too long


def _in(folder: str, path: str) -> str:
    return os.path.join(folder, path) if folder else path  # noqa: PTH118  Path would drop a trailing slash
