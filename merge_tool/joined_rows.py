"""A recipe's vocabulary: any number of models with their rows by token, as `tokenizer_source` or `tokenizer` asks.

A token that a model lacks has there the row of the only model that has it, else of base_model, else the mean of those
that have it; or what the recipe says of it by name. So all models have a row for each of the output's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import sha256_of
from merge_tool.errors import CheckpointError, RecipeError, listed, shown
from merge_tool.joined_tokens import Joined, join_tokenizers
from merge_tool.methods import Array
from merge_tool.recipes.models_recipe import ModelsRecipe, TokenizerAsk, TokenRow
from merge_tool.row_tensors import align_rows, known_rows, rows_of
from merge_tool.rows import FIRST_AVERAGE, MEAN, ZERO, Rows, code
from merge_tool.tokenizer_json import TOKENIZER
from merge_tool.vocab import TOKENIZER_FILES, Alignment, config_sizes, tokenizer_file

_LACKS = -9  # no model has a row for the token


@dataclass(frozen=True)
class _Side:
    """A model that lends rows: its number in the recipe, how many it has, and whether it is merged."""

    number: int
    rows: int
    is_merged: bool


def join_vocabularies(asked: ModelsRecipe, models: Sequence[Checkpoint]) -> tuple[list[Checkpoint], Alignment | None]:
    """The models with their rows by token, as far as the recipe asks for it; None where all are alike already.

    Raises RecipeError for tokens that are not where the recipe says, CheckpointError for tokenizers that cannot be
    read, MismatchError where rows cannot be matched.
    """
    ask = asked.tokenizer
    if ask is None:
        return list(models), None
    folders = _folders(asked, ask, models)
    merged = sorted(asked.sources)
    asks_for_more = ask.tokens or ask.pad_to_multiple_of or _lead(asked, ask) != asked.donor
    if not asks_for_more and _are_alike(models, folders, [*merged, asked.donor]):
        return list(models), None
    return _Joining(asked, ask, models, folders).models()


def _lead(asked: ModelsRecipe, ask: TokenizerAsk) -> int:
    """The model whose ids the output has; a union's other tokens come behind them."""
    return ask.source if isinstance(ask.source, int) else asked.donor


def _folders(asked: ModelsRecipe, ask: TokenizerAsk, models: Sequence[Checkpoint]) -> dict[int, Folder]:
    """Every model's tokenizer; a model that has none, but as many rows as the donor, is taken to have the donor's."""
    found: dict[int, Folder] = {}
    lent = {row.model for row in ask.tokens.values() if row.model is not None}
    for k in sorted({*asked.sources, *lent, asked.donor, _lead(asked, ask)}):
        folder = models[k].tokenizer_folder
        if folder is None or not any(map(folder.has, TOKENIZER_FILES)):
            folder = models[asked.donor].tokenizer_folder
            if k == _lead(asked, ask) or folder is None or known_rows(models[k]) != known_rows(models[asked.donor]):
                raise CheckpointError(
                    f"{models[k].name}: has no tokenizer, which {_option(ask)} needs. Put its {TOKENIZER} beside it."
                )
        found[k] = folder
    return found


def _option(ask: TokenizerAsk) -> str:
    return f"the recipe's tokenizer (source: {'a model' if isinstance(ask.source, int) else ask.source})"


def _are_alike(models: Sequence[Checkpoint], folders: Mapping[int, Folder], numbers: Sequence[int]) -> bool:
    """Whether these models have the same tokenizer.json and as many rows."""
    digests = {sha256_of(folders[k].regular(TOKENIZER)) if folders[k].has(TOKENIZER) else None for k in numbers}
    return len(digests) == 1 and len({rows_of(models[k]) for k in numbers}) == 1


class _Joining:
    """What each row of the output is in each model."""

    def __init__(
        self, asked: ModelsRecipe, ask: TokenizerAsk, models: Sequence[Checkpoint], folders: Mapping[int, Folder]
    ) -> None:
        self.asked, self.ask, self.all, self.folders = asked, ask, models, folders
        lent = {row.model for row in ask.tokens.values() if row.model is not None}
        self.sides = [_Side(k, known_rows(models[k]), k in asked.sources) for k in sorted({*asked.sources, *lent})]
        self.places = {side.number: place for place, side in enumerate(self.sides)}
        numbers = list(folders)
        self.tokenizers = {k: place for place, k in enumerate(numbers)}
        self.lead = _lead(asked, ask)
        self.wanted = [
            (self.tokenizers[row.model], row.token)
            for row in ask.tokens.values()
            if row.kind == "model_token" and row.token is not None and row.model is not None
        ]
        self.joined: Joined = join_tokenizers(
            [folders[k] for k in numbers],
            self.tokenizers[self.lead],
            union=ask.source == "union",
            named=list(ask.tokens),
            wanted=self.wanted,
        )
        self.size, self.num_new = self._sizes()
        self.own = [self._own(side) for side in self.sides]

    # ------------------------------------------------------------------------------- which rows there are

    def _sizes(self) -> tuple[int, int]:
        """The output's rows, and how many of them are new padding. Padding that the lead has stays."""
        there = next((side.rows for side in self.sides if side.number == self.lead), 0)
        grows = there == 0 or self.ask.source == "union" or len(self.ask.tokens) > 0
        kept = max(there, self.joined.size) if grows else there
        multiple = self.ask.pad_to_multiple_of or 1
        size = -(-kept // multiple) * multiple
        return size, size - kept

    def _own(self, side: _Side) -> Array:
        """A model's own row for each of the output's, -1 where it has none; the lead's padding is its own."""
        found = np.full(self.size, -1, np.int64)
        ids = np.asarray(self.joined.ids[self.tokenizers[side.number]][: self.size], np.int64)
        found[: len(ids)] = np.where(ids < side.rows, ids, -1)
        if side.number == self.lead:  # ids that no token has, and rows beyond the tokens, are its own as well
            rows = np.arange(min(side.rows, self.size))
            rows = rows[(rows < self.joined.sizes[self.tokenizers[self.lead]]) | (rows >= self.joined.size)]
            found[rows] = rows
        return found

    def _defaults(self) -> tuple[Array, Array, list[str]]:
        """What stands in for a row that a model lacks, as a code, and the averages; warnings of what nobody has."""
        merged = [place for place, side in enumerate(self.sides) if side.is_merged]
        own = np.stack([self.own[place] for place in merged])
        count = (own >= 0).sum(axis=0)
        codes = np.full(self.size, MEAN, np.int64)
        for place in reversed(merged):  # the only one, or of several the first
            codes = np.where((self.own[place] >= 0) & (count == 1), code(place, self.own[place]), codes)
        base = self.places.get(-1 if self.asked.base is None else self.asked.base)
        has_base = np.zeros(self.size, bool)
        if base is not None and self.sides[base].is_merged:
            has_base = self.own[base] >= 0
            codes = np.where(has_base & (count > 1), code(base, self.own[base]), codes)
        mixed = np.flatnonzero((count > 1) & (count < len(merged)) & ~has_base)
        averages = np.full((len(mixed), len(self.sides)), -1, np.int32)
        averages[:, merged] = own[:, mixed].T
        codes[mixed] = FIRST_AVERAGE - np.arange(len(mixed))
        return codes, averages, self._rowless(count)

    def _rowless(self, count: Array) -> list[str]:
        """A warning of tokens that no model has a row for, and of which the recipe says nothing."""
        named = self.joined.found[0]
        given = {named[token] for token, row in self.ask.tokens.items() if row.kind != "default"}
        of_tokenizers = np.any([np.asarray(ids) >= 0 for ids in self.joined.ids], axis=0)[: len(count)]
        places = set(np.flatnonzero((count[: len(of_tokenizers)] == 0) & of_tokenizers).tolist())
        without = (places | {place for place in named.values() if count[place] == 0}) - given
        some = [token for token, place in named.items() if place in without]
        told = f" ({listed(some)})" if some else ""
        found = f"{len(without):,} tokens have no row in any model{told}: theirs is the mean of all tokens' rows."
        return [found] if without else []

    # ------------------------------------------------------------------------------- tokens given by name

    def _name_rows(self, defaults: Array, forced: Array) -> None:
        """Put in what the recipe says of single tokens; raise RecipeError for rows that are not there."""
        ids, found = self.joined.found[0], iter(self.joined.found[1])
        for token, row in self.ask.tokens.items():
            place = ids[token]
            forced[place] = row.force
            if row.kind == "zero":
                defaults[place] = ZERO
            elif row.kind != "default":
                number = next(found) if row.kind == "model_token" and row.token is not None else None
                defaults[place] = self._named_row(token, row, place, number)

    def _named_row(self, token: str, row: TokenRow, place: int, number: int | None) -> int:
        assert row.model is not None
        side = self.places[row.model]
        name, rows = self.all[row.model].name, self.sides[side].rows
        where = f"tokenizer: the token '{shown(token)}'"
        if row.kind == "model":
            found = int(self.own[side][place])
            if found < 0:
                raise RecipeError(f"{where} is to have the row of {name}, which has no such token.")
        else:
            found = row.token_id if row.token_id is not None else -1 if number is None else number
            if found < 0:
                raise RecipeError(f"{where} is to have the row of '{shown(row.token)}', a token that {name} has not.")
        if found >= rows:
            raise RecipeError(f"{where} is to have row {found:,} of {name}, which has {rows:,} rows.")
        return int(code(side, np.array(found)))

    # ------------------------------------------------------------------------------- the models

    def models(self) -> tuple[list[Checkpoint], Alignment]:
        defaults, averages, told = self._defaults()
        forced = np.zeros(self.size, bool)
        self._name_rows(defaults, forced)
        codes = [
            np.where((own >= 0) & ~forced, code(place, own), defaults) if side.is_merged else None
            for place, (side, own) in enumerate(zip(self.sides, self.own, strict=True))
        ]
        merged = [found for found in codes if found is not None]
        alone = np.logical_and.reduce([merged[0] == other for other in merged[1:]] or [np.zeros(self.size, bool)])
        lead = self.places.get(self.asked.donor, self.places[min(self.asked.sources)])
        averaged = self.places.get(self.lead, lead)
        num_averaged = min(self.sides[averaged].rows, self.joined.sizes[self.tokenizers[self.sides[averaged].number]])
        needs_mean = any((found == MEAN).any() for found in merged)
        rows = [
            None if found is None else Rows(found, alone, num_averaged if needs_mean else 0, averages)
            for found in codes
        ]
        sides = [self.all[side.number] for side in self.sides]
        made, notices = align_rows(sides, lead, [side.rows for side in self.sides], rows, averaged)
        return self._aligned(made, (*self._notices(), *told, *notices)), self._alignment()

    def _aligned(self, made: Sequence[Mapping[str, object]], told: Sequence[str]) -> list[Checkpoint]:
        found = list(self.all)
        for side, sources in zip(self.sides, made, strict=True):
            model = self.all[side.number]
            files = (tokenizer_file(self.folders[side.number]),)
            found[side.number] = model.with_made(model.name, files, sources, model.notices)  # type: ignore[arg-type]
        first = found[0]
        found[0] = first.with_made(first.name, (), {}, (*first.notices, *told))
        return found

    def _alignment(self) -> Alignment:
        sizes = {size for model in self.all for size in config_sizes(model)} | {side.rows for side in self.sides}
        insert = self.joined.insert if self.joined.added[0] else None
        return Alignment(self.folders[self.lead], insert, frozenset(sizes), self.size, self.new_id)

    def new_id(self, model: int, number: int) -> int | None:
        """The output's id of the token that has this one in a model; None if it lacks that."""
        if model not in self.tokenizers:
            return number
        ids = self.joined.ids[self.tokenizers[model]]
        return ids.index(number) if number in ids else None

    def _notices(self) -> Iterator[str]:
        of = self.all[self.lead].name if self.ask.source != "union" else f"all, {self.all[self.lead].name}'s first"
        padding = max(0, self.size - self.joined.size)
        new = f", {self.num_new:,} of them new: the mean of the rows with tokens" if self.num_new else ""
        yield (
            f"Rows were matched by token: the output has the tokens of {of}, {self.size:,} rows, {padding:,} of them "
            f"without a token{new if padding else ''}."
        )
        for side in self.sides:
            count, some = self.joined.lacking[self.tokenizers[side.number]]
            if count and side.is_merged:
                yield (
                    f"{count:,} tokens of {self.all[side.number].name} are not in the output's vocabulary: "
                    f"{listed(some)}."
                )
        added, pieces = self.joined.added
        if pieces:
            yield (
                f"{pieces:,} of the {added:,} tokens added to {TOKENIZER} are pieces of another tokenizer's model, "
                "spelled as there. Its merges and scores cannot be taken over: text is not split into such pieces as "
                "it was."
            )
