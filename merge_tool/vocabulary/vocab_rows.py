"""Which rows of both models the rows of the output's vocabulary are made of."""

from __future__ import annotations

import numpy as np

from merge_tool.arrays import Array
from merge_tool.recipe.recipe import Recipe
from merge_tool.vocabulary.rows import MEAN, Rows, code, kept
from merge_tool.vocabulary.tokens import ALONE, Vocabularies


class RowPlan:
    """Which rows of both the output's rows are made of: -1 where a side has none."""

    def __init__(self, recipe: Recipe, found: Vocabularies, before: tuple[int, int]) -> None:
        self.before = before
        self.side = int(recipe.vocab == "ft")  # whose ids the output has
        ids = np.asarray(found.base_of_ft if self.side else found.ft_of_base, np.int64)
        rows, other_rows = before[self.side], before[1 - self.side]
        size = max(rows, len(ids)) if recipe.vocab == "union" else rows
        own, other = np.where(np.arange(size) < rows, np.arange(size), -1), _usable(ids, size, other_rows)
        self.base, self.ft = (other, own) if self.side else (own, other)
        self.num_tokens = min(len(ids), size)
        if recipe.vocab == "union":
            self._append(np.flatnonzero(np.asarray(found.base_of_ft) == ALONE))
        kept, multiple = len(self.base), recipe.pad_vocab_to_multiple_of or 1
        self.size = -(-kept // multiple) * multiple
        self.num_new = self.size - kept
        self.base, self.ft = (_extended(part, self.size) for part in (self.base, self.ft))
        needs_mean = ((self.base < 0) & (self.ft < 0)).any()
        self.num_averaged = self.num_tokens if needs_mean else 0

    def _append(self, ids: Array) -> None:
        """FT's other tokens after BASE's, over its rows of padding first."""
        start, stop = self.num_tokens, self.num_tokens + len(ids)
        self.base, self.ft = (_extended(rows, max(len(rows), stop)) for rows in (self.base, self.ft))
        self.base[start:stop] = -1
        self.ft[start:stop] = np.where(ids < self.before[1], ids, -1)
        self.num_tokens = stop

    @property
    def told(self) -> str:
        padding = max(0, self.size - self.num_tokens)
        made = f", {self.num_new:,} of them new: the mean of the rows with tokens" if self.num_new else ""
        return f"The output has {self.size:,} rows, {padding:,} of them without a token{made if padding else ''}."

    def rows(self) -> list[Rows]:
        """Of each side: its own rows, the other's where it has none, the mean where neither has one."""
        alone = kept((self.base < 0) != (self.ft < 0))
        base, ft = code(0, self.base), code(1, self.ft)
        own_first = (
            np.where(self.base >= 0, base, np.where(self.ft >= 0, ft, MEAN)),
            np.where(self.ft >= 0, ft, np.where(self.base >= 0, base, MEAN)),
        )
        return [Rows(kept(codes), alone, self.num_averaged) for codes in own_first]


def _usable(ids: Array, size: int, other_rows: int) -> Array:
    """For each of a side's ids the other side's row of the same token; -1 where there is none."""
    found = np.full(size, -1, np.int64)
    given = ids[:size]
    found[: len(given)] = np.where((given >= 0) & (given < other_rows), given, -1)
    return found


def _extended(rows: Array, size: int) -> Array:
    return np.concatenate([rows, np.full(size - len(rows), -1, np.int64)])
