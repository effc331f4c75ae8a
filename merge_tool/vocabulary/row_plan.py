"""Which rows of the models make each row of the output's vocabulary. Arrays and numbers only.

If a model lacks a token, its row is taken from the only model that has the token, else from base_model, else it is the
mean of the models that have the token. The recipe can decide otherwise for tokens that it names. So all models have a
row for each of the output's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge_tool.arrays import Array
from merge_tool.errors import RecipeError, listed, shown
from merge_tool.recipe.recipe import Tokenizer, TokenRow
from merge_tool.vocabulary.join import Joined
from merge_tool.vocabulary.rows import FIRST_AVERAGE, MEAN, ZERO, Rows, code, kept


@dataclass(frozen=True)
class Side:
    """A model that lends rows: its number in the recipe, its number of rows, whether it is merged, and the index of its
    tokenizer among the joined ones."""

    number: int
    name: str
    rows: int
    is_merged: bool
    tokenizer: int


class RowPlan:
    """The rows of the output in each of `sides`. `lead` is the number of the model whose ids the output has, `base` of
    base_model, if there is one. Raises RecipeError if a model lacks a token whose row `ask` takes from it.

    `size` is the number of the output's rows, `num_new` the number of padding rows that no model has.
    """

    def __init__(self, ask: Tokenizer, joined: Joined, sides: Sequence[Side], *, lead: int, base: int | None) -> None:
        self.ask, self.joined, self.sides = ask, joined, sides
        self.index_of = {side.number: index for index, side in enumerate(sides)}
        self.lead, self.base = self.index_of.get(lead), self.index_of.get(-1 if base is None else base)
        self.size, self.num_new = self._sizes()
        self.own = [self._own(index, side) for index, side in enumerate(sides)]
        merged = [index for index, side in enumerate(sides) if side.is_merged]
        self.merged, self.count = merged, np.sum([self.own[index] >= 0 for index in merged], axis=0)

    def _sizes(self) -> tuple[int, int]:
        """The output's number of rows, and how many of them are new padding. The lead's padding stays."""
        there = 0 if self.lead is None else self.sides[self.lead].rows
        grows = there == 0 or self.ask.source == "union" or len(self.ask.tokens) > 0
        kept = max(there, self.joined.size) if grows else there
        multiple = self.ask.pad_to_multiple_of or 1
        size = -(-kept // multiple) * multiple
        return size, size - kept

    def _own(self, index: int, side: Side) -> Array:
        """A model's own row for each row of the output, -1 if it has none."""
        own = np.full(self.size, -1, np.int64)
        ids = np.asarray(self.joined.ids[side.tokenizer][: self.size], np.int64)
        own[: len(ids)] = np.where(ids < side.rows, ids, -1)
        if index == self.lead:  # the lead also keeps ids without a token, and rows behind the tokens
            rows = np.arange(min(side.rows, self.size))
            rows = rows[(rows < self.joined.sizes[side.tokenizer]) | (rows >= self.joined.size)]
            own[rows] = rows
        return own

    def rows(self) -> list[Rows | None]:
        """The rows for each side; None for a side that is not merged."""
        defaults, averages = self._defaults()
        forced = np.zeros(self.size, bool)
        self._name_rows(defaults, forced)
        codes = {
            index: np.where((self.own[index] >= 0) & ~forced, code(index, self.own[index]), defaults)
            for index in self.merged
        }
        first, *others = codes.values()
        alike = np.logical_and.reduce([first == other for other in others] or [np.zeros(self.size, bool)])
        alone = kept(alike & (first != MEAN))
        has_mean = any((side_codes == MEAN).any() for side_codes in codes.values())
        means = min(self.joined.size, self.size) * has_mean, kept(averages)
        made = {index: Rows(kept(side_codes), alone, *means) for index, side_codes in codes.items()}
        return [made.get(index) for index in range(len(self.sides))]

    def _defaults(self) -> tuple[Array, Array]:
        """The code of the substitute for each row that a model may lack; and the averages."""
        codes = np.full(self.size, MEAN, np.int64)
        for index in self.merged:
            codes = np.where((self.own[index] >= 0) & (self.count == 1), code(index, self.own[index]), codes)
        has_base = np.zeros(self.size, bool)
        if self.base in self.merged:
            base = self.own[self.base]
            has_base = base >= 0
            codes = np.where(has_base & (self.count > 1), code(self.base, base), codes)
        mixed = np.flatnonzero((self.count > 1) & (self.count < len(self.merged)) & ~has_base)
        averages = np.full((len(mixed), len(self.sides)), -1, np.int32)
        for index in self.merged:
            averages[:, index] = self.own[index][mixed]
        codes[mixed] = FIRST_AVERAGE - np.arange(len(mixed))
        return codes, averages

    # ------------------------------------------------------------------------------- tokens given by name

    def _name_rows(self, defaults: Array, forced: Array) -> None:
        """Apply the recipe's entries for single tokens."""
        ids = iter(self.joined.wanted)
        for token, row in self.ask.tokens.items():
            token_row = self.joined.named[token]
            forced[token_row] = row.force
            if row.kind == "zero":
                defaults[token_row] = ZERO
            elif row.model is not None:
                own = int(self.own[self.index_of[row.model]][token_row])
                number = row.token_id if row.kind == "model_token" else own
                defaults[token_row] = self._named_row(token, row, next(ids) if number is None else number)

    def _named_row(self, token: str, row: TokenRow, number: int) -> int:
        assert row.model is not None
        index = self.index_of[row.model]
        side, where = self.sides[index], f"tokenizer: the token '{shown(token)}'"
        if number < 0:
            what = "such token" if row.token is None else f"token '{shown(row.token)}'"
            raise RecipeError(f"{where} is to have a row of {side.name}, which has no {what}.")
        if number >= side.rows:
            raise RecipeError(f"{where} is to have row {number:,} of {side.name}, which has {side.rows:,} rows.")
        return int(code(index, np.array(number)))

    # ------------------------------------------------------------------------------- what to tell

    def warnings(self, of: str, figures: str) -> Iterator[str]:
        """Warnings about where the rows come from. `of` names the models whose tokens the output has; `figures` say how
        far these models agree."""
        padding = max(0, self.size - self.joined.size)
        new = f", {self.num_new:,} of them new: the mean of the rows with tokens" if self.num_new else ""
        yield (
            f"Rows were matched by token{f': {figures}' if figures else ''}. The output has the tokens of {of}, "
            f"{self.size:,} rows, {padding:,} of them without a token{new if padding else ''}."
        )
        for side in self.sides:
            count, some = self.joined.lacking[side.tokenizer]
            if count and side.is_merged:
                yield f"{count:,} tokens of {side.name} are not in the output's vocabulary: {listed(some)}."
            if (beyond := self.joined.sizes[side.tokenizer] - side.rows) > 0:
                yield f"{side.name}: {beyond:,} ids of its tokenizer are beyond its embedding's {side.rows:,} rows."
        if without := self._without_rows():
            named = [token for token, token_row in self.joined.named.items() if token_row in without]
            which = f" ({listed(named)})" if named else ""
            yield f"{len(without):,} tokens have no row in any model{which}: each gets the mean of all tokens' rows."

    def _without_rows(self) -> set[int]:
        """Tokens without a row in any model, and without an entry in the recipe."""
        named: Mapping[str, int] = self.joined.named
        is_token = np.any([np.asarray(ids) >= 0 for ids in self.joined.ids], axis=0)[: self.size]
        is_token[[token_row for token_row in named.values() if token_row < len(is_token)]] = True
        without = set(np.flatnonzero(is_token & (self.count[: len(is_token)] == 0)).tolist())
        return without - {named[token] for token, row in self.ask.tokens.items() if row.kind != "default"}
