"""The models with a row for each of the output's tokens, for `--vocab` or a recipe's tokenizer; and the tokenizer's
files and settings of the output.

Every checkpoint gets rows in the output's order, so that all tensors to be merged have one shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint, CheckpointFile
from merge_tool.checkpoint.source import LocalFile, TensorSource, sha256_of
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import CheckpointError, shown
from merge_tool.models.side_files import SideFile, SideFiles, with_member
from merge_tool.recipe.recipe import Recipe, Tokenizer
from merge_tool.vocabulary.join import Joined, compare_tokenizers, join_tokenizers
from merge_tool.vocabulary.row_plan import RowPlan, Side
from merge_tool.vocabulary.row_tensors import align_rows, known_rows, rows_of
from merge_tool.vocabulary.tokenizer_json import SLOW_FILES, TOKENIZER

TOKENIZER_FILES = (
    TOKENIZER, "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_ADDED, _CONFIG = "added_tokens.json", "tokenizer_config.json"
_IDS = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos|image|audio)_token_id")


@dataclass(frozen=True)
class Alignment:
    """The output's vocabulary: what its files and settings must contain.

    `tokenizer` is the folder whose tokenizer the output has; `insert` is an offset in its tokenizer.json, and the bytes
    to insert there. `sizes_before` are the numbers of rows that the models have or name in config.json; `rows` is the
    output's number. `new_id(model, number)` is the output's id for the token that has the id `number` in a model; None
    if the output lacks the token.
    """

    tokenizer: Folder
    insert: tuple[int, bytes] | None
    sizes_before: frozenset[int]
    rows: int
    new_id: Callable[[int, int], int | None]


def align(recipe: Recipe, models: Sequence[Checkpoint]) -> tuple[list[Checkpoint], Alignment | None]:
    """The models with their rows by token, if the recipe asks for it; None if all models are alike already.

    Raises RecipeError for tokens that a model lacks although the recipe takes their rows from it, CheckpointError for
    tokenizers that cannot be read, MismatchError if rows cannot be matched.
    """
    ask = recipe.tokenizer
    if ask is None:
        return list(models), None
    lead, lent = _lead(recipe, ask), {row.model for row in ask.tokens.values() if row.model is not None}
    folders = _folders(recipe, models, {*recipe.sources, *lent, recipe.first, lead}, lead)
    asks_for_more = ask.tokens or ask.pad_to_multiple_of or lead != recipe.first
    if not asks_for_more and _are_alike(models, folders, {*recipe.sources, recipe.first}):
        return list(models), None
    numbers = {k: position for position, k in enumerate(folders)}
    joined = _joined(ask, folders, numbers, lead)
    sides = [
        Side(
            number=k,
            name=models[k].name,
            rows=known_rows(models[k]),
            is_merged=k in recipe.sources,
            tokenizer=numbers[k],
        )
        for k in sorted({*recipe.sources, *lent})
    ]
    plan = RowPlan(ask, joined, sides, lead=lead, base=recipe.base)
    of_first = plan.index_of.get(recipe.first, plan.merged[0])
    made, notices = align_rows(
        [models[side.number] for side in sides], of_first, [side.rows for side in sides], plan.rows()
    )
    warnings = (*_warnings(recipe, ask, models, folders, joined, plan), *notices)
    sizes = {size for model in models for size in config_sizes(model)} | {side.rows for side in sides}

    def new_id(model: int, number: int) -> int | None:
        ids = joined.ids[numbers[model]] if model in numbers else ()
        return ids.index(number) if number in ids else None

    insert = joined.insert if joined.added[0] else None
    alignment = Alignment(
        tokenizer=folders[lead], insert=insert, sizes_before=frozenset(sizes), rows=plan.size, new_id=new_id
    )
    return _aligned(models, folders, sides, made, warnings), alignment


def _lead(recipe: Recipe, ask: Tokenizer) -> int:
    """The model whose ids the output has; a union's other tokens get ids behind these."""
    return ask.source if isinstance(ask.source, int) else recipe.first


def _folders(recipe: Recipe, models: Sequence[Checkpoint], numbers: set[int], lead: int) -> dict[int, Folder]:
    """Every model's tokenizer folder. A model without a tokenizer uses the first model's, if both have equally many
    rows."""
    folders: dict[int, Folder] = {}
    for k in sorted(numbers):
        folder = models[k].tokenizer_folder
        if folder is None or not any(map(folder.has, TOKENIZER_FILES)):
            folder = models[recipe.first].tokenizer_folder
            if k == lead or folder is None or known_rows(models[k]) != known_rows(models[recipe.first]):
                way = f"Put its {TOKENIZER} beside its weights." if models[k].folder else "Give its folder instead."
                raise CheckpointError(
                    f"{models[k].name}: has no tokenizer, which rows by token ({recipe.rows_option}) need. {way}"
                )
        folders[k] = folder
    return folders


def _are_alike(models: Sequence[Checkpoint], folders: Mapping[int, Folder], numbers: set[int]) -> bool:
    """Whether these models have the same tokenizer.json and equally many rows."""
    digests = {sha256_of(folders[k].regular(TOKENIZER)) if folders[k].has(TOKENIZER) else None for k in numbers}
    return len(digests) == 1 and len({rows_of(models[k]) for k in numbers}) == 1


def _joined(ask: Tokenizer, folders: Mapping[int, Folder], numbers: Mapping[int, int], lead: int) -> Joined:
    wanted = [
        (numbers[row.model], row.token)
        for row in ask.tokens.values()
        if row.model is not None and row.token is not None
    ]
    union = ask.source == "union"
    return join_tokenizers(list(folders.values()), numbers[lead], union=union, named=list(ask.tokens), wanted=wanted)


def _aligned(
    models: Sequence[Checkpoint],
    folders: Mapping[int, Folder],
    sides: Sequence[Side],
    made: Sequence[Mapping[str, TensorSource]],
    warnings: Sequence[str],
) -> list[Checkpoint]:
    """The models with their tensors replaced by `made`; the first model gets the warnings."""
    aligned = list(models)
    for side, sources in zip(sides, made, strict=True):
        model = models[side.number]
        files = (tokenizer_file(folders[side.number]),)
        aligned[side.number] = model.with_made(model.name, files, sources, model.notices)
    aligned[0] = aligned[0].with_notices((*aligned[0].notices, *warnings))
    return aligned


def tokenizer_file(folder: Folder) -> CheckpointFile:
    """The tokenizer.json that decided the rows, as an input file with its digest."""
    path = folder.regular(TOKENIZER)
    return CheckpointFile(f"tokenizer/{TOKENIZER}", LocalFile(path, f"{folder.name}/{TOKENIZER}"), sha256_of(path))


# ---------------------------------------------------------------------------------------------- warnings


def _warnings(
    recipe: Recipe, ask: Tokenizer, models: Sequence[Checkpoint], folders: Iterable[int], joined: Joined, plan: RowPlan
) -> Iterator[str]:
    first = models[_lead(recipe, ask)].name
    of = f"all, {first}'s first" if ask.source == "union" else first
    yield from plan.warnings(of, joined.figures([models[k].name for k in folders]) if len(joined.sizes) == 2 else "")
    added, pieces = joined.added
    if pieces:
        yield (
            f"{pieces:,} of the {added:,} added tokens are ordinary tokens of another model's tokenizer. Its "
            f"merges and scores cannot be added to {TOKENIZER}. Added tokens match before all others, so text with "
            "these tokens is split differently than before."
        )
    if len(kinds := sorted(set(joined.kinds))) > 1:
        names = ", ".join(map(shown, kinds))
        yield f"The tokenizers are of {len(kinds)} kinds ({names}), which may spell a token in two ways."


def explain(base: Checkpoint, other: Checkpoint) -> str:
    """How far the vocabularies agree, and how many rows have no token, for an error or a warning."""
    here, there = base.tokenizer_folder, other.tokenizer_folder
    if here is None or there is None or not any(f.has(n) for f in (here, there) for n in TOKENIZER_FILES):
        return ""
    comparison = compare_tokenizers(here, there)
    padding = [
        f"{rows - size:,} in {model.name}"
        for model, size in zip((base, other), comparison.sizes, strict=True)
        if (rows := rows_of(model)) is not None
    ]
    text = comparison.figures((base.name, other.name))
    return text + (f"; rows beyond the tokenizer (padding): {', '.join(padding)}" if padding else "")


# -------------------------------------------------------------------------------------------------- files


def config_sizes(model: Checkpoint) -> Iterator[int]:
    """Every vocab_size in config.json for the language model."""
    return (part["vocab_size"] for part in text_configs(model.config) if type(part.get("vocab_size")) is int)


def side_files_of(alignment: Alignment, side_files: SideFiles) -> SideFiles:
    """The side files with the chosen tokenizer's files in place of the donor's, and config.json's new vocab_size."""
    copied = list(side_files.copied)
    if side_files.folder is not None and alignment.tokenizer is not side_files.folder:
        copied = [file for file in copied if file.source not in TOKENIZER_FILES]
        folder = alignment.tokenizer
        copied += [SideFile(name, name, folder.size(name), folder) for name in TOKENIZER_FILES if folder.has(name)]
    if (insert := alignment.insert) is not None:
        copied = [
            replace(file, size=file.size + len(insert[1]), insert=insert) if file.source == TOKENIZER else file
            for file in copied
        ]
        copied = _for_slow_readers(alignment.tokenizer, copied, json.loads(b"[" + insert[1].lstrip(b",") + b"]"))
    before, rows = alignment.sizes_before, alignment.rows
    return replace(side_files, copied=tuple(copied), vocab_sizes=(before, rows) if before != {rows} else None)


def _for_slow_readers(
    tokenizer: Folder, copied: Sequence[SideFile], entries: Sequence[Mapping[str, Any]]
) -> list[SideFile]:
    """The files with the added tokens where those look for them who do not read tokenizer.json: converters, and slow
    tokenizers, beside their own file of pieces."""
    if not any(file.source in SLOW_FILES for file in copied):
        return list(copied)
    ids = tokenizer.load_json(_ADDED) if tokenizer.has(_ADDED) else {}
    content = json.dumps({**ids, **{entry["content"]: entry["id"] for entry in entries}}, ensure_ascii=False, indent=2)
    edited = [file for file in copied if file.source != _ADDED]
    edited.append(_written(_ADDED, f"{content}\n".encode("utf-8", "surrogatepass")))
    if not tokenizer.has(_CONFIG) or not any(file.source == _CONFIG for file in copied):
        return edited
    decoder = tokenizer.load_json(_CONFIG).get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return edited
    more = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
    changed = with_member(tokenizer.read(_CONFIG), "added_tokens_decoder", {**decoder, **more})
    return [_written(_CONFIG, changed) if file.source == _CONFIG else file for file in edited]


def _written(name: str, content: bytes) -> SideFile:
    return SideFile(name, name, len(content), content=content)


def settings_warnings(alignment: Alignment, model: int, folder: Folder | None) -> Iterator[str]:
    """Warnings about token ids in the copied settings of a model (by its number) that are other tokens in the
    output."""
    if folder is None:
        return
    for name in ("config.json", "generation_config.json"):
        config = folder.load_json(name) if folder.has(name) else {}
        for part in text_configs(config):
            for key, value in part.items():
                if _IDS.fullmatch(key):
                    yield from _moved(alignment, model, f"{folder.name}/{name}: {shown(key)}", value)


def _moved(alignment: Alignment, model: int, what: str, value: Any) -> Iterator[str]:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            new = alignment.new_id(model, number)
            if new != number:
                where = "does not have" if new is None else f"has as {new:,}"
                yield f"{what} is {number:,}, a token that the output's tokenizer {where}. Correct that file of OUT."
