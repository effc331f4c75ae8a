"""Any number of tokenizer.json -> one vocabulary, each model's ids of its tokens, and how far the models agree."""

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
_SOME = 3  # at most so many tokens are named


@dataclass(frozen=True)
class Joined:
    """A vocabulary. `ids[k][i]` is model k's id for the vocabulary's token i, -1 if model k lacks the token, or if no
    token has the id i. `sizes` are the models' numbers of ids (the largest id + 1), `kinds` the kinds of their
    tokenizers. `lacking[k]` is about model k's tokens that the vocabulary lacks: their number, and some of them;
    `alone[k]` are some tokens that no other model has. `added` is about the tokens behind the lead's: their number, and
    how many of them are pieces of another tokenizer's model. `insert` is an offset in the lead's tokenizer.json, and
    the bytes that add the other tokens there. `unlike` are the parts of tokenizer.json besides the vocabulary that
    differ. `named` has the vocabulary's ids of the tokens that the question names, `wanted` the ids of tokens in
    models, -1 if there is no such token.
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
        """For two models: the number of tokens whose id differs."""
        return sum(a != b for a, b in zip(*self.ids, strict=True) if a >= 0 and b >= 0)

    @property
    def num_alone(self) -> tuple[int, int]:
        """For two models: the number of tokens that only the first has, and only the second."""
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
    """How far two tokenizers agree. Raises CheckpointError if a tokenizer.json is missing or cannot be read."""
    return join_tokenizers([first, second], 0, union=True)


def join_tokenizers(
    folders: Sequence[Folder],
    lead: int,
    *,
    union: bool,
    named: Sequence[str] = (),
    wanted: Sequence[tuple[int, str]] = (),
) -> Joined:
    """The vocabulary of the model `lead`; in a `union` followed by the other models' tokens, model by model; then by
    the `named` tokens that are still missing. `wanted` are pairs (model, token), for the token's id in that model.

    Raises CheckpointError where there is no tokenizer.json, or none that can be read.
    """
    question = {"lead": lead, "union": union, "named": list(named), "wanted": [list(pair) for pair in wanted]}
    answer, rest = ask_apart(__name__, folders, question)
    size, count = answer["size"], len(folders)
    ids = array("i", rest[: 4 * size * count])
    return Joined(
        ids=tuple(ids[size * k : size * (k + 1)] for k in range(count)),
        sizes=tuple(answer["sizes"]),
        kinds=tuple(answer["kinds"]),
        lacking=tuple((number, tuple(some)) for number, some in answer["lacking"]),
        alone=tuple(map(tuple, answer["alone"])),
        added=(answer["added"], answer["pieces"]),
        insert=(answer["insert_at"], rest[4 * len(ids) :]),
        unlike=tuple(answer["unlike"]),
        named=answer["named"],
        wanted=tuple(answer["wanted"]),
    )


def main() -> None:
    answer_apart(_joined)


def _joined(tokenizers: list[TokenizerJson], question: Mapping[str, Any]) -> tuple[Any, bytes]:
    lead = tokenizers[question["lead"]]
    tokens: list[str | None] = lead.numbered()
    ids = dict(lead.ids)
    new = list(_new_tokens(lead, tokenizers if question["union"] else (), question["named"]))
    for token in new:
        ids[token] = len(tokens)
        tokens.append(token)
    lacking = [[token for token in _added_first(one) if token not in ids] for one in tokenizers]
    answer = {
        "size": len(tokens), "sizes": [one.size for one in tokenizers], "insert_at": lead.insert_at, "added": len(new),
        "pieces": sum(token not in question["named"] and _settings(token, tokenizers) is None for token in new),
        "lacking": [[len(some), some[:_SOME]] for some in lacking],
        "kinds": [one.kind for one in tokenizers], "alone": [_alone(one, tokenizers) for one in tokenizers],
        "named": {token: ids[token] for token in question["named"]},
        "unlike": [part for part in lead.parts if len({one.parts[part] for one in tokenizers}) > 1],
        "wanted": [tokenizers[model].ids.get(token, _NONE) for model, token in question["wanted"]],
    }  # fmt: skip
    entries = [added_entry(token, ids[token], _settings(token, tokenizers)) for token in new]
    maps = b"".join(
        array("i", (_NONE if token is None else one.ids.get(token, _NONE) for token in tokens)) for one in tokenizers
    )
    return answer, maps + (lead.insertion(entries) if entries else b"")


def _alone(one: TokenizerJson, all_of_them: Sequence[TokenizerJson]) -> list[str]:
    """Some tokens that only this tokenizer has."""
    others = [other.ids for other in all_of_them if other is not one]
    only = (token for token in _added_first(one) if not any(token in ids for ids in others))
    return list(islice(only, _SOME))


def _added_first(one: TokenizerJson) -> Iterable[str]:
    """All tokens, added tokens first, because users know these."""
    return dict.fromkeys((*one.added, *one.ids))


def _new_tokens(lead: TokenizerJson, others: Sequence[TokenizerJson], named: Sequence[str]) -> Iterator[str]:
    """The tokens behind the lead's, each once."""
    known = set(lead.ids)
    for token in (*(t for one in others for t in one.numbered()), *named):
        if token is not None and token not in known:
            known.add(token)
            yield token


def _settings(token: str, tokenizers: Sequence[TokenizerJson]) -> Mapping[str, Any] | None:
    """A token's settings in the first tokenizer that has it as an added token."""
    return next((one.added[token] for one in tokenizers if token in one.added), None)
