"""Two tokenizer.json -> which token of the one is which of the other, and what the first would be with both.

Parsed in a process of its own: two of 128,000 tokens took 260 MB, which the merge's memory budget keeps for
itself. Tokens are the same if their strings are, as the files spell them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in CPython since 2.6, not in its stubs
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.errors import CheckpointError, listed, shown

TOKENIZER = "tokenizer.json"
ALONE, NO_TOKEN = -1, -2  # instead of the other side's id
_SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_MOST_BYTES = 200_000_000
_MOST_ROWS = 1 << 22  # ids beyond that are no vocabulary's, and their map would take the memory of one
_START = (  # the same search path as ours: the current folder, which may be a stranger's, is not put in front
    "import sys, os; sys.path[:] = sys.argv.pop(1).split(os.pathsep); from merge_tool.tokens import main; main()"
)
_REFUSED = 3  # exit code: the message is on stdout


@dataclass(frozen=True)
class Vocabularies:
    """`ft_of_base[i]` is FT's id of the token that has id i in BASE, ALONE if FT lacks it, NO_TOKEN if none has that
    id; `base_of_ft` the other way round. Ids go up to the largest of any token.

    `pieces` counts the tokens only in FT that are parts of its model, `examples` has some that only BASE and only FT
    have. `insert` is what makes BASE's tokenizer.json that of both: bytes, and where they are put in.
    """

    ft_of_base: array[int]
    base_of_ft: array[int]
    kinds: tuple[str, str]
    pieces: int
    examples: tuple[tuple[str, ...], tuple[str, ...]]
    insert: tuple[int, bytes]

    @property
    def num_shared(self) -> int:
        return sum(other >= 0 for other in self.ft_of_base)

    @property
    def num_moved(self) -> int:
        return sum(other >= 0 and other != i for i, other in enumerate(self.ft_of_base))

    @property
    def num_only(self) -> tuple[int, int]:
        return self.ft_of_base.count(ALONE), self.base_of_ft.count(ALONE)

    def figures(self, names: tuple[str, str]) -> str:
        """How far the two agree, in one clause."""
        only = " and ".join(
            f"{count:,} only in {name}" + (f" ({listed(some, 3)})" if some else "")
            for count, name, some in zip(self.num_only, names, self.examples, strict=True)
        )
        return f"{self.num_shared:,} tokens are in both, {self.num_moved:,} of them with another id, {only}"


def compare_tokenizers(base: Folder, ft: Folder) -> Vocabularies:
    """Read both folders' tokenizer.json. Raises CheckpointError where there is none, or none that can be read."""
    paths = [_path(folder) for folder in (base, ft)]
    names = [f"{folder.name}/{TOKENIZER}" for folder in (base, ft)]
    command = [sys.executable, "-c", _START, os.pathsep.join(sys.path), *map(str, paths), *names]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode == _REFUSED:
        raise CheckpointError(done.stdout.decode())
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise CheckpointError(f"{names[0]} and {names[1]}: reading them ended with code {done.returncode}.")
    head, _, rest = done.stdout.partition(b"\n")
    told = json.loads(head)
    maps = array("i", rest[: 4 * (told["base"] + told["ft"])])
    insert = told["place"], rest[4 * len(maps) :]
    return Vocabularies(
        maps[: told["base"]], maps[told["base"] :], tuple(told["kinds"]), told["pieces"],
        (tuple(told["examples"][0]), tuple(told["examples"][1])), insert,
    )  # fmt: skip


def _path(folder: Folder) -> Path:
    if not folder.has(TOKENIZER):
        slow = [name for name in _SLOW if folder.has(name)]
        found = f"only {listed(slow)}: a slow tokenizer" if slow else "no tokenizer"
        raise CheckpointError(
            f"{folder.name}: has no {TOKENIZER} ({found}). Convert it first: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)."
        )
    path = folder.regular(TOKENIZER)
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{folder.name}/{TOKENIZER}: has more than {_MOST_BYTES:,} bytes; that is no tokenizer.")
    return path


# ------------------------------------------------------------------------------------ in its own process


def main() -> None:
    """BASE_PATH FT_PATH BASE_NAME FT_NAME -> a line of JSON, both maps as 32-bit integers, the text to insert."""
    try:
        base, ft = (_Tokenizer(Path(path), name) for path, name in zip(sys.argv[1:3], sys.argv[3:5], strict=True))
        sys.stdout.buffer.write(_compared(base, ft))
    except CheckpointError as e:
        sys.stdout.write(str(e))
        sys.exit(_REFUSED)
    except KeyboardInterrupt:
        sys.exit(130)


class _Tokenizer:
    """`ids` of every token; those that were added to its model, as they stand there; where more may be put in."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.place, self.is_empty = name, -1, True
        try:
            text = path.read_bytes().decode()
            members = dict(self._members(text))
            self.ids, self.kind = _model_ids(members["model"])
            self.added = {entry["content"]: entry for entry in members.get("added_tokens") or []}
            for content, entry in self.added.items():
                self.ids.setdefault(content, entry["id"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
            raise CheckpointError(
                f"{name}: is not a tokenizer that can be read ({shown(e) or type(e).__name__})."
            ) from e
        except OSError as e:
            raise CheckpointError(f"{name}: cannot be read ({e.strerror}).") from e
        for token, number in self.ids.items():
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_ROWS:
                raise CheckpointError(f"{name}: the token '{shown(token)}' has the id '{shown(number)}'.")
        self.size = max(self.ids.values(), default=-1) + 1

    def _members(self, text: str) -> Iterator[tuple[str, Any]]:
        """The members of the object that `text` is, and where the list of added tokens ends, in bytes."""
        decoder, at, sign = json.JSONDecoder(), _after(text, 0, "{"), ","
        while sign == ",":
            key, at = scanstring(text, _after(text, at, '"', skip=False))
            value, end = decoder.raw_decode(text, _after(text, at, ":"))
            if key == "added_tokens" and isinstance(value, list):
                last = len(text[: end - 1].rstrip())
                self.place, self.is_empty = len(text[:last].encode()), not value
            yield key, value
            at = _skip(text, end)
            sign, at = text[at], at + 1
        if sign != "}" or text[at:].strip():
            raise ValueError(f"it is not one object of JSON, at character {at:,}")

    def numbered(self) -> list[str | None]:
        found: list[str | None] = [None] * self.size
        for token, number in self.ids.items():
            found[number] = token
        return found


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _after(text: str, at: int, sign: str, *, skip: bool = True) -> int:
    """The place after `sign`, which must come next."""
    at = _skip(text, at)
    if text[at] != sign:
        raise ValueError(f"expected {sign} at character {at:,}")
    return _skip(text, at + 1) if skip else at + 1


def _model_ids(model: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """The tokens of the model itself: a map (BPE, WordPiece, WordLevel), or a list in the order of ids (Unigram)."""
    vocab, kind = model["vocab"], str(model.get("type") or "BPE")
    if isinstance(vocab, list):
        return {token: number for number, (token, _) in enumerate(vocab)}, kind
    return dict(vocab), kind


def _compared(base: _Tokenizer, ft: _Tokenizer) -> bytes:
    if base.place < 0:
        raise CheckpointError(f"{base.name}: has no list added_tokens. Save it again with transformers.")
    maps = [_map(base, ft), _map(ft, base)]
    only = [token for token in ft.numbered() if token is not None and token not in base.ids]
    examples = [_examples(base, ft), _examples(ft, base)]
    told = {
        "base": len(maps[0]), "ft": len(maps[1]), "kinds": [base.kind, ft.kind], "examples": examples,
        "pieces": sum(token not in ft.added for token in only), "place": base.place,
    }  # fmt: skip
    entries = [_entry(token, base.size + number, ft.added.get(token)) for number, token in enumerate(only)]
    text = ",".join(f"\n    {json.dumps(entry)}" for entry in entries)
    insert = ("," if entries and not base.is_empty else "") + text
    return json.dumps(told).encode() + b"\n" + maps[0].tobytes() + maps[1].tobytes() + insert.encode()


def _map(here: _Tokenizer, there: _Tokenizer) -> array[int]:
    found = array("i", [NO_TOKEN]) * here.size
    for token, number in here.ids.items():
        found[number] = there.ids.get(token, ALONE)
    return found


def _examples(here: _Tokenizer, there: _Tokenizer, most: int = 3) -> list[str]:
    """Some tokens that only one side has: added ones first, which people know."""
    only = [token for token in (*here.added, *here.ids) if token not in there.ids]
    return list(dict.fromkeys(only))[:most]


def _entry(token: str, number: int, added: Mapping[str, Any] | None) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": number, "content": token, **usual, **{k: v for k, v in (added or {}).items() if k in usual}}
