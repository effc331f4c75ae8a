"""Any number of tokenizer.json -> one vocabulary, and which of each model's tokens its tokens are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.vocabulary.tokenizer_json import TokenizerJson, added_entry, answer_apart, ask_apart

_NONE = -1


@dataclass(frozen=True)
class Joined:
    """A vocabulary: `ids[k][i]` is model k's id of its token i, -1 if that lacks it, or no token has that id.

    `sizes` are the models' own numbers of ids (the largest and one). `lacking[k]` are those of model k's tokens that
    are not in it: how many, and some. `added` are its tokens behind the lead's: how many, and how many of them are
    pieces of another tokenizer's model. `insert` is what makes the lead's tokenizer.json that of all: bytes, and where
    they are put in. `named` are the vocabulary's ids of the tokens asked for, `wanted` those of models, -1 where there
    is no such token.
    """

    ids: tuple[array[int], ...]
    sizes: tuple[int, ...]
    lacking: tuple[tuple[int, tuple[str, ...]], ...]
    added: tuple[int, int]
    insert: tuple[int, bytes]
    named: Mapping[str, int]
    wanted: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ids[0])


def join_tokenizers(
    folders: Sequence[Folder],
    lead: int,
    *,
    union: bool,
    named: Sequence[str] = (),
    wanted: Sequence[tuple[int, str]] = (),
) -> Joined:
    """The vocabulary of the model `lead`; in a `union` followed by the others' tokens, model by model; then by those
    `named` that are not in it yet. `wanted` are (model, token) whose ids there are asked for.

    Raises CheckpointError where there is no tokenizer.json, or none that can be read.
    """
    question = {"lead": lead, "union": union, "named": list(named), "wanted": [list(pair) for pair in wanted]}
    told, rest = ask_apart(__name__, folders, question)
    size, count = told["size"], len(folders)
    ids = array("i", rest[: 4 * size * count])
    return Joined(
        tuple(ids[size * k : size * (k + 1)] for k in range(count)),
        tuple(told["sizes"]),
        tuple((number, tuple(some)) for number, some in told["lacking"]),
        (told["added"], told["pieces"]),
        (told["place"], rest[4 * len(ids) :]),
        told["named"],
        tuple(told["wanted"]),
    )


def main() -> None:
    answer_apart(_joined)


def _joined(found: list[TokenizerJson], question: Mapping[str, Any]) -> tuple[Any, bytes]:
    lead = found[question["lead"]]
    tokens: list[str | None] = lead.numbered()
    ids = dict(lead.ids)
    new = list(_new_tokens(lead, found if question["union"] else (), question["named"]))
    for token in new:
        ids[token] = len(tokens)
        tokens.append(token)
    lacking = [[token for token in one.ids if token not in ids] for one in found]
    told = {
        "size": len(tokens), "sizes": [one.size for one in found], "place": lead.place, "added": len(new),
        "pieces": sum(not any(token in one.added for one in found) for token in new if token not in question["named"]),
        "lacking": [[len(some), some[:3]] for some in lacking],
        "named": {token: ids[token] for token in question["named"]},
        "wanted": [found[model].ids.get(token, _NONE) for model, token in question["wanted"]],
    }  # fmt: skip
    entries = [added_entry(token, ids[token], _settings(token, found)) for token in new]
    maps = b"".join(array("i", (one.ids.get(t, _NONE) if t is not None else _NONE for t in tokens)) for one in found)
    return told, maps + (lead.insertion(entries) if entries else b"")


def _new_tokens(lead: TokenizerJson, others: Sequence[TokenizerJson], named: Sequence[str]) -> Iterator[str]:
    """What comes behind the lead's tokens, each once."""
    known = set(lead.ids)
    for token in (*(t for one in others for t in one.numbered()), *named):
        if token is not None and token not in known:
            known.add(token)
            yield token


def _settings(token: str, found: Sequence[TokenizerJson]) -> Mapping[str, Any] | None:
    """How the first tokenizer that added a token did it."""
    return next((one.added[token] for one in found if token in one.added), None)
