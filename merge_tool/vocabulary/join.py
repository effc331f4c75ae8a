"""Any number of tokenizer.json -> one vocabulary, which of each model's tokens its tokens are, how far they agree."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.errors import listed
from merge_tool.vocabulary.tokenizer_json import TokenizerJson, added_entry, answer_apart, ask_apart

_NONE = -1
_SOME = 3  # tokens that are named


@dataclass(frozen=True)
class Joined:
    """A vocabulary: `ids[k][i]` is model k's id of its token i, -1 if that lacks it, or no token has that id.

    `sizes` are the models' own numbers of ids (the largest and one), `kinds` those of their tokenizers' models.
    `lacking[k]` are those of model k's tokens that are not in it: how many, and some; `alone[k]` are some that no
    other model has. `added` are its tokens behind the lead's: how many, and how many of them are pieces of another
    tokenizer's model. `insert` is what makes the lead's tokenizer.json that of all: bytes, and where
    they are put in. `unlike` are the parts beside the vocabulary in which the tokenizers differ. `named` are the
    vocabulary's ids of the tokens asked for, `wanted` those of models, -1 where there is no such token.
    """

    ids: tuple[array[int], ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    lacking: tuple[tuple[int, tuple[str, ...]], ...]
    alone: tuple[tuple[str, ...], ...]
    added: tuple[int, int]
    insert: tuple[int, bytes]
    unlike: tuple[str, ...]
    named: Mapping[str, int]
    wanted: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ids[0])

    @property
    def num_moved(self) -> int:
        """Of two models: how many tokens have another id in the second."""
        return sum(a != b for a, b in zip(*self.ids, strict=True) if a >= 0 and b >= 0)

    @property
    def num_alone(self) -> tuple[int, int]:
        """Of two models: how many tokens only the first and only the second has."""
        here, there = self.ids
        first = sum(a >= 0 > b for a, b in zip(here, there, strict=True)) + self.lacking[0][0]
        second = sum(b >= 0 > a for a, b in zip(here, there, strict=True)) + self.lacking[1][0]
        return first, second

    def figures(self, names: Sequence[str]) -> str:
        """How far two models' vocabularies agree, in one clause."""
        shared = sum(a >= 0 and b >= 0 for a, b in zip(*self.ids, strict=True))
        only = " and ".join(
            f"{count:,} only in {name}" + (f" ({listed(some, _SOME)})" if some else "")
            for count, name, some in zip(self.num_alone, names, self.alone, strict=True)
        )
        return f"{shared:,} tokens are in both, {self.num_moved:,} of them with another id, {only}"


def compare_tokenizers(first: Folder, second: Folder) -> Joined:
    """How far two tokenizers agree. Raises CheckpointError where there is none, or none that can be read."""
    return join_tokenizers([first, second], 0, union=True)


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
        ids=tuple(ids[size * k : size * (k + 1)] for k in range(count)),
        sizes=tuple(told["sizes"]),
        kinds=tuple(told["kinds"]),
        lacking=tuple((number, tuple(some)) for number, some in told["lacking"]),
        alone=tuple(map(tuple, told["alone"])),
        added=(told["added"], told["pieces"]),
        insert=(told["place"], rest[4 * len(ids) :]),
        unlike=tuple(told["unlike"]),
        named=told["named"],
        wanted=tuple(told["wanted"]),
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
    lacking = [[token for token in _added_first(one) if token not in ids] for one in found]
    told = {
        "size": len(tokens), "sizes": [one.size for one in found], "place": lead.place, "added": len(new),
        "pieces": sum(not any(token in one.added for one in found) for token in new if token not in question["named"]),
        "lacking": [[len(some), some[:_SOME]] for some in lacking],
        "kinds": [one.kind for one in found], "alone": [_alone(one, found) for one in found],
        "named": {token: ids[token] for token in question["named"]},
        "unlike": [part for part in lead.parts if len({one.parts[part] for one in found}) > 1],
        "wanted": [found[model].ids.get(token, _NONE) for model, token in question["wanted"]],
    }  # fmt: skip
    entries = [added_entry(token, ids[token], _settings(token, found)) for token in new]
    maps = b"".join(array("i", (one.ids.get(t, _NONE) if t is not None else _NONE for t in tokens)) for one in found)
    return told, maps + (lead.insertion(entries) if entries else b"")


def _alone(one: TokenizerJson, all_of_them: Sequence[TokenizerJson]) -> list[str]:
    """Some tokens that only one tokenizer has."""
    others = [other.ids for other in all_of_them if other is not one]
    only = (token for token in _added_first(one) if not any(token in ids for ids in others))
    return list(islice(only, _SOME))


def _added_first(one: TokenizerJson) -> Iterable[str]:
    """All tokens; those that were added first, which people know."""
    return dict.fromkeys((*one.added, *one.ids))


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
