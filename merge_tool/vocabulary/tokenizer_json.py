"""One tokenizer.json: its tokens and their ids, and the offset at which tokens can be inserted.

Parsed in a process of its own: two files of 128,000 tokens took 260 MB, and the merge needs that memory. Two tokens are
the same if their strings in the files are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in CPython since 2.6, not in its stubs
from pathlib import Path
from typing import Any

from merge_tool.apart import answer, ask
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.lookalikes import known_start
from merge_tool.errors import CheckpointError, listed, reason, shown

TOKENIZER = "tokenizer.json"
SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_MOST_BYTES = 200_000_000
_MOST_ROWS = 1 << 22  # no vocabulary has larger ids, and a map of them would take too much memory
_SPACES = (" ", "\t", "\r", "\n")


def tokenizer_path(folder: Folder) -> Path:
    """The path of a folder's tokenizer.json. Raises CheckpointError if it is missing or too large."""
    if not folder.has(TOKENIZER):
        if slow := [name for name in SLOW_FILES if folder.has(name)]:
            raise CheckpointError(
                f"{folder.name}: has no {TOKENIZER} (only {listed(slow)}: a slow tokenizer). Convert it first: "
                "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)."
            )
        raise CheckpointError(
            f"{folder.name}: has no {TOKENIZER}, nor another tokenizer. Put the model's {TOKENIZER} beside its weights."
        )
    if folder.size(TOKENIZER) > _MOST_BYTES:
        raise CheckpointError(f"{folder.name}/{TOKENIZER}: has more than {_MOST_BYTES:,} bytes; that is no tokenizer.")
    return folder.regular(TOKENIZER)


def ask_apart(module: str, folders: Sequence[Folder], question: Any = None) -> tuple[Any, bytes]:
    """The answer of a module's `main` about the folders' tokenizers, in a process of its own: a value, and bytes.
    Raises CheckpointError if a tokenizer.json is missing or cannot be read.
    """
    names = [f"{folder.name}/{TOKENIZER}" for folder in folders]
    paths = [str(tokenizer_path(folder)) for folder in folders]
    size, largest = max((folder.size(TOKENIZER), name) for folder, name in zip(folders, names, strict=True))
    return ask(
        module,
        [paths, names, question],
        what=" and ".join(dict.fromkeys(names)),
        error=CheckpointError,
        hint=f"That takes about 15 bytes of memory for each byte of them, and the largest, {largest}, has {size:,}. "
        "Free some memory, then run the same command.",
    )


# ------------------------------------------------------------------------------------ in its own process


def answer_apart(reply: Callable[[list[TokenizerJson], Any], tuple[Any, bytes]]) -> None:
    """Read the question of `ask_apart`, and write the answer of `reply` about the tokenizers."""

    def of_files(request: Any) -> tuple[Any, list[bytes]]:
        paths, names, question = request
        value, rest = reply([TokenizerJson(Path(p), n) for p, n in zip(paths, names, strict=True)], question)
        return value, [rest]

    answer(of_files)


class _Broken(Exception):
    """The problem with a tokenizer.json, without its name."""


class TokenizerJson:
    """`ids` has every token; `added` the entries of added_tokens; `insert_at` the byte offset at which entries can be
    inserted, -1 without added_tokens; `parts` a digest of each other part that decides how a text is split."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.insert_at, self.is_empty = name, -1, True
        try:
            raw = path.read_bytes()
            if known := known_start(raw):
                raise CheckpointError(f"{name}: {known}.")
            members = dict(self._members(_text(raw)))
            self.ids, self.kind = _model_ids(members.get("model"))
            self.added = {entry["content"]: entry for entry in _added(members.get("added_tokens"))}
            self.parts = _parts(members)
        except _Broken as e:
            raise CheckpointError(
                f"{name}: is not a tokenizer that can be read: {e}. Fetch it again, or save it again with transformers."
            ) from e
        except OSError as e:
            raise CheckpointError(f"{name}: cannot be read ({reason(e)}).") from e
        for content, entry in self.added.items():
            self.ids.setdefault(content, entry["id"])  # for a token of the model, the library uses the model's id
        self._check_ids()
        self.size = max(self.ids.values(), default=-1) + 1

    def _check_ids(self) -> None:
        owners: dict[int, str] = {}
        for token, number in self.ids.items():
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_ROWS:
                raise CheckpointError(
                    f"{self.name}: the token '{shown(token)}' has the id '{shown(number)}', expected a whole number "
                    f"below {_MOST_ROWS:,}."
                )
            if (owner := owners.setdefault(number, token)) != token:  # the row's token would be ambiguous
                raise CheckpointError(
                    f"{self.name}: the tokens '{shown(owner)}' and '{shown(token)}' have the same id, {number:,}; the "
                    "tokenizers library would give an added one another. Save the tokenizer again as it is loaded: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
                )

    def _members(self, text: str) -> Iterator[tuple[str, Any]]:
        """The members of the object in `text`; sets `insert_at` to the end of the list of added tokens."""
        decoder, at, sign = json.JSONDecoder(), _after(text, 0, "{"), ","
        if text[at] == "}":
            sign, at = "}", at + 1
        while sign == ",":
            key, at = _read(scanstring, text, _after(text, at, '"', skip=False))
            value, end = _read(decoder.raw_decode, text, _after(text, at, ":"))
            if key == "added_tokens" and isinstance(value, list):
                last = len(text[: end - 1].rstrip())
                self.insert_at, self.is_empty = len(text[:last].encode()), not value
            yield key, value
            at = _skip(text, end)
            sign, at = text[at], at + 1
        if sign != "}" or text[at:].strip():
            raise _Broken(f"it is not one object of JSON, at character {at:,}")

    def numbered(self) -> list[str | None]:
        """The token of each id, None where there is none."""
        tokens: list[str | None] = [None] * self.size
        for token, number in self.ids.items():
            tokens[number] = token
        return tokens

    def insertion(self, entries: Sequence[Mapping[str, Any]]) -> bytes:
        """The bytes that add tokens if inserted at `insert_at`. Raises CheckpointError if the file has no list
        added_tokens."""
        if self.insert_at < 0:
            raise CheckpointError(f"{self.name}: has no list added_tokens. Save it again with transformers.")
        text = ",".join(f"\n    {json.dumps(entry)}" for entry in entries)
        return (("," if entries and not self.is_empty else "") + text).encode()


def added_entry(token: str, number: int, added: Mapping[str, Any] | None) -> dict[str, Any]:
    """A token as an entry of added_tokens, with its settings from another tokenizer."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": number, "content": token, **usual, **{k: v for k, v in (added or {}).items() if k in usual}}


def _text(raw: bytes) -> str:
    if not raw.strip():
        raise _Broken("it is empty")
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise _Broken(f"it is not UTF-8 text, at byte {e.start:,}") from e


def _read(read: Callable[[str, int], tuple[Any, int]], text: str, at: int) -> tuple[Any, int]:
    """The value that a JSON reader finds at `at`, and the index behind it."""
    try:
        return read(text, at)
    except ValueError as e:
        raise _Broken(f"its JSON is damaged or cut short, at character {getattr(e, 'pos', at):,}") from e
    except RecursionError as e:
        raise _Broken("it is nested too deep") from e


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _SPACES:
        at += 1
    if at >= len(text):
        raise _Broken("it ends in the middle of its JSON")
    return at


def _after(text: str, at: int, sign: str, *, skip: bool = True) -> int:
    """The index behind `sign`, which must come next."""
    at = _skip(text, at)
    if text[at] != sign:
        raise _Broken(f"its JSON is damaged, expected {sign} at character {at:,}")
    return _skip(text, at + 1) if skip else at + 1


def _model_ids(model: Any) -> tuple[dict[str, Any], str]:
    """The tokens of the model itself: a map (BPE, WordPiece, WordLevel), or a list in the order of ids (Unigram)."""
    if not isinstance(model, dict):
        raise _Broken("it has no model")
    vocab, kind = model.get("vocab"), str(model.get("type") or "BPE")
    if isinstance(vocab, dict):
        return dict(vocab), kind
    if not isinstance(vocab, list):
        raise _Broken("its model has no vocab")
    if odd := [entry for entry in vocab if not _is_scored(entry)]:
        raise _Broken(f"its vocab has '{shown(odd[0])}', expected a token and its score")
    return {token: number for number, (token, _) in enumerate(vocab)}, kind


_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


_TEXTS = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
_NO_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": _TEXTS[:1],
    "pair": _TEXTS,
    "special_tokens": {},
}  # adds nothing


def _parts(members: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each step beside the model's vocabulary; not of padding and truncation, which callers choose."""
    model = members["model"]
    settings = {key: _plain(members.get(key)) for key in _STEPS}
    if settings["post_processor"] == _plain(_NO_PROCESSOR):
        settings["post_processor"] = None
    settings["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
    settings["scores"] = [entry[1] for entry in model["vocab"]] if isinstance(model["vocab"], list) else []
    settings["model"] = _plain({key: value for key, value in model.items() if key not in ("vocab", "merges")})
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in settings.items()
    }


def _plain(value: Any) -> Any:
    """Settings without those that say no, which one version of the library writes and another leaves out."""
    if isinstance(value, dict):
        return {key: plain for key, item in value.items() if (plain := _plain(item)) not in (None, False, "")}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _is_scored(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def _added(entries: Any) -> list[dict[str, Any]]:
    """The list added_tokens; a tokenizer may have none."""
    if entries is not None and not isinstance(entries, list):
        raise _Broken("its added_tokens are no list")
    for entry in entries or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise _Broken(f"its added_tokens have '{shown(entry)}', expected a token with its content and id")
    return entries or []
