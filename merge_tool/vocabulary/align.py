"""A recipe's vocabulary: all models with a row for each of the output's tokens, as `tokenizer_source` or `tokenizer`
asks; and what becomes of the tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import TensorSource, sha256_of
from merge_tool.errors import CheckpointError
from merge_tool.recipe.models_recipe import ModelsRecipe, TokenizerAsk
from merge_tool.vocabulary.join import Joined, join_tokenizers
from merge_tool.vocabulary.row_plan import JoinedRows, Side
from merge_tool.vocabulary.row_tensors import align_rows, known_rows, rows_of
from merge_tool.vocabulary.tokenizer_json import TOKENIZER
from merge_tool.vocabulary.vocab import TOKENIZER_FILES, Alignment, config_sizes, pieces_told, tokenizer_file


def join_vocabularies(asked: ModelsRecipe, models: Sequence[Checkpoint]) -> tuple[list[Checkpoint], Alignment | None]:
    """The models with their rows by token, as far as the recipe asks for it; None where all are alike already.

    Raises RecipeError for tokens that are not where the recipe says, CheckpointError for tokenizers that cannot be
    read, MismatchError where rows cannot be matched.
    """
    ask = asked.tokenizer
    if ask is None:
        return list(models), None
    lead, lent = _lead(asked, ask), {row.model for row in ask.tokens.values() if row.model is not None}
    folders = _folders(ask, models, {*asked.sources, *lent, asked.donor, lead}, lead, asked.donor)
    asks_for_more = ask.tokens or ask.pad_to_multiple_of or lead != asked.donor
    if not asks_for_more and _are_alike(models, folders, {*asked.sources, asked.donor}):
        return list(models), None
    numbers = {k: place for place, k in enumerate(folders)}
    joined = _joined(ask, folders, numbers, lead)
    sides = [
        Side(k, models[k].name, known_rows(models[k]), k in asked.sources, numbers[k])
        for k in sorted({*asked.sources, *lent})
    ]
    rows = JoinedRows(ask, joined, sides, lead=lead, base=asked.base)
    of_donor = rows.places.get(asked.donor, rows.merged[0])
    made, notices = align_rows(
        [models[side.number] for side in sides], of_donor, [side.rows for side in sides], rows.rows()
    )
    first = models[lead].name
    told = (*rows.told(f"all, {first}'s first" if ask.source == "union" else first), *_added(joined), *notices)
    sizes = {size for model in models for size in config_sizes(model)} | {side.rows for side in sides}
    insert = joined.insert if joined.added[0] else None

    def new_id(model: int, number: int) -> int | None:
        ids = joined.ids[numbers[model]] if model in numbers else ()
        return ids.index(number) if number in ids else None

    alignment = Alignment(folders[lead], insert, frozenset(sizes), rows.size, new_id)
    return _aligned(models, folders, sides, made, told), alignment


def _lead(asked: ModelsRecipe, ask: TokenizerAsk) -> int:
    """The model whose ids the output has; a union's other tokens come behind them."""
    return ask.source if isinstance(ask.source, int) else asked.donor


def _folders(
    ask: TokenizerAsk, models: Sequence[Checkpoint], numbers: set[int], lead: int, donor: int
) -> dict[int, Folder]:
    """Every model's tokenizer; a model that has none, but as many rows as the donor, is taken to have the donor's."""
    found: dict[int, Folder] = {}
    for k in sorted(numbers):
        folder = models[k].tokenizer_folder
        if folder is None or not any(map(folder.has, TOKENIZER_FILES)):
            folder = models[donor].tokenizer_folder
            if k == lead or folder is None or known_rows(models[k]) != known_rows(models[donor]):
                source = "a model" if isinstance(ask.source, int) else ask.source
                raise CheckpointError(
                    f"{models[k].name}: has no tokenizer, which the recipe's tokenizer (source: {source}) needs. "
                    f"Put its {TOKENIZER} beside it."
                )
        found[k] = folder
    return found


def _are_alike(models: Sequence[Checkpoint], folders: Mapping[int, Folder], numbers: set[int]) -> bool:
    """Whether these models have the same tokenizer.json and as many rows."""
    digests = {sha256_of(folders[k].regular(TOKENIZER)) if folders[k].has(TOKENIZER) else None for k in numbers}
    return len(digests) == 1 and len({rows_of(models[k]) for k in numbers}) == 1


def _joined(ask: TokenizerAsk, folders: Mapping[int, Folder], numbers: Mapping[int, int], lead: int) -> Joined:
    wanted = [
        (numbers[row.model], row.token)
        for row in ask.tokens.values()
        if row.model is not None and row.token is not None
    ]
    union = ask.source == "union"
    return join_tokenizers(list(folders.values()), numbers[lead], union=union, named=list(ask.tokens), wanted=wanted)


def _added(joined: Joined) -> Iterator[str]:
    added, pieces = joined.added
    if pieces:
        yield pieces_told(f"{pieces:,} of the {added:,} tokens that were added", "another")


def _aligned(
    models: Sequence[Checkpoint],
    folders: Mapping[int, Folder],
    sides: Sequence[Side],
    made: Sequence[Mapping[str, TensorSource]],
    told: Sequence[str],
) -> list[Checkpoint]:
    """The models with what was made in place of their own tensors; the first one tells."""
    found = list(models)
    for side, sources in zip(sides, made, strict=True):
        model = models[side.number]
        files = (tokenizer_file(folders[side.number]),)
        found[side.number] = model.with_made(model.name, files, sources, model.notices)
    found[0] = found[0].with_made(found[0].name, (), {}, (*found[0].notices, *told))
    return found
