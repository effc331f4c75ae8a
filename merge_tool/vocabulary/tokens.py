"""Two tokenizer.json -> which token of the one is which of the other, and what the first would be with both."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.errors import listed
from merge_tool.vocabulary.tokenizer_json import TokenizerJson, added_entry, answer_apart, ask_apart

ALONE, NO_TOKEN = -1, -2  # instead of the other side's id


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
    told, rest = ask_apart(__name__, [base, ft])
    maps = array("i", rest[: 4 * (told["base"] + told["ft"])])
    insert = told["place"], rest[4 * len(maps) :]
    return Vocabularies(
        maps[: told["base"]], maps[told["base"] :], tuple(told["kinds"]), told["pieces"],
        (tuple(told["examples"][0]), tuple(told["examples"][1])), insert,
    )  # fmt: skip


def main() -> None:
    answer_apart(lambda found, question: compared(*found))


def compared(base: TokenizerJson, ft: TokenizerJson) -> tuple[Any, bytes]:
    """What there is to tell; then both maps as 32-bit integers, and the text to insert."""
    maps = [_map(base, ft), _map(ft, base)]
    only = [token for token in ft.numbered() if token is not None and token not in base.ids]
    entries = [added_entry(token, base.size + number, ft.added.get(token)) for number, token in enumerate(only)]
    told = {
        "base": len(maps[0]), "ft": len(maps[1]), "kinds": [base.kind, ft.kind],
        "examples": [_examples(base, ft), _examples(ft, base)],
        "pieces": sum(token not in ft.added for token in only), "place": base.place,
    }  # fmt: skip
    return told, maps[0].tobytes() + maps[1].tobytes() + base.insertion(entries)


def _map(here: TokenizerJson, there: TokenizerJson) -> array[int]:
    found = array("i", [NO_TOKEN]) * here.size
    for token, number in here.ids.items():
        found[number] = there.ids.get(token, ALONE)
    return found


def _examples(here: TokenizerJson, there: TokenizerJson, most: int = 3) -> list[str]:
    """Some tokens that only one side has: added ones first, which people know."""
    only = [token for token in (*here.added, *here.ids) if token not in there.ids]
    return list(dict.fromkeys(only))[:most]
