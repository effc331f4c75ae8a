"""Vocabularies that differ: both models with their rows matched by token, and what becomes of the tokenizer's files.

`--vocab base`, `ft` and `union` choose the output's tokens; ids are those of that side, for a union BASE's with FT's
other tokens after them. Both checkpoints are given rows of that order here; what is merged then has one shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint, CheckpointFile
from merge_tool.checkpoint.source import LocalFile, sha256_of
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import CheckpointError, listed, shown
from merge_tool.recipe import Recipe
from merge_tool.row_tensors import align_rows, known_rows, rows_of
from merge_tool.side_files import SideFile, SideFiles
from merge_tool.tokenizer_json import TOKENIZER
from merge_tool.tokens import ALONE, Vocabularies, compare_tokenizers
from merge_tool.vocab_rows import RowPlan

TOKENIZER_FILES = (
    TOKENIZER, "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_IDS = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos|image|audio)_token_id")


@dataclass(frozen=True)
class Alignment:
    """How the output's vocabulary came about: what its files and settings must say.

    `tokenizer` is whose tokenizer the output has; `insert` are the bytes that are put into its tokenizer.json, and
    where. `sizes_before` are the numbers of rows that models have, or say that they have, `rows` is the output's.
    `new_id(model, number)` is the output's id of the token that has this one in a model; None if it lacks that.
    """

    tokenizer: Folder
    insert: tuple[int, bytes] | None
    sizes_before: frozenset[int]
    rows: int
    new_id: Callable[[int, int], int | None]


def explain(base: Checkpoint, ft: Checkpoint) -> str:
    """How far the vocabularies agree, and how many rows have no token: what an error and a warning say."""
    folders = base.tokenizer_folder, ft.tokenizer_folder
    if folders[0] is None or folders[1] is None or not any(f.has(n) for f in folders if f for n in TOKENIZER_FILES):
        return ""
    found = compare_tokenizers(folders[0], folders[1])
    text = found.figures((base.name, ft.name))
    padding = [
        f"{rows - len(ids):,} in {model.name}"
        for model, ids in ((base, found.ft_of_base), (ft, found.base_of_ft))
        if (rows := rows_of(model)) is not None
    ]
    return text + (f"; rows beyond the tokenizer (padding): {', '.join(padding)}" if padding else "")


def has_other_rows(base: Checkpoint, ft: Checkpoint) -> bool:
    """Whether the embeddings differ in how many rows they have."""
    rows = rows_of(base), rows_of(ft)
    return None not in rows and rows[0] != rows[1]


def align(recipe: Recipe, base: Checkpoint, ft: Checkpoint) -> tuple[list[Checkpoint], Alignment | None]:
    """Both models with the rows of the vocabulary that `recipe.vocab` chooses, if it chooses one.

    Raises CheckpointError for tokenizers that cannot be read, MismatchError where rows cannot be matched.
    """
    if recipe.vocab is None:
        return [base, ft], None
    folders = _tokenizer_of(base), _tokenizer_of(ft)
    found = compare_tokenizers(*folders)
    before = known_rows(base), known_rows(ft)
    plan = RowPlan(recipe, found, before)
    made, told = align_rows((base, ft), 0, before, plan.rows())
    alignment = Alignment(
        folders[plan.side],
        found.insert if recipe.vocab == "union" else None,
        frozenset({*before, *config_sizes(base), *config_sizes(ft)}),
        plan.size,
        partial(_new_id, recipe.vocab, found),
    )
    notices = (*_notices(recipe.vocab, base, ft, found, plan), *told)
    models = [
        model.with_made(model.name, (tokenizer_file(folders[side]),), made[side], (*model.notices, *more))
        for side, (model, more) in enumerate(((base, notices), (ft, ())))
    ]
    return models, alignment


def _tokenizer_of(model: Checkpoint) -> Folder:
    if model.tokenizer_folder is None:
        raise CheckpointError(f"{model.name}: is a single file without a tokenizer, which --vocab needs.")
    return model.tokenizer_folder


def _new_id(choice: str, found: Vocabularies, side: int, number: int) -> int | None:
    """The output's id of the token that has this one on a side; None if the output lacks it."""
    if side == (choice == "ft"):
        return number
    ids = found.base_of_ft if side else found.ft_of_base
    if number >= len(ids):
        return None
    if ids[number] >= 0:
        return ids[number]
    if choice != "union" or ids[number] != ALONE:
        return None
    return len(found.ft_of_base) + ids[:number].count(ALONE)


def config_sizes(model: Checkpoint) -> Iterator[int]:
    """Every vocab_size that a model's config.json says of its language model."""
    return (part["vocab_size"] for part in text_configs(model.config) if type(part.get("vocab_size")) is int)


def tokenizer_file(folder: Folder) -> CheckpointFile:
    """What decided the rows, as an input by its digest."""
    path = folder.regular(TOKENIZER)
    return CheckpointFile(f"tokenizer/{TOKENIZER}", LocalFile(path, f"{folder.name}/{TOKENIZER}"), sha256_of(path))


def _notices(choice: str, base: Checkpoint, ft: Checkpoint, found: Vocabularies, plan: RowPlan) -> Iterator[str]:
    yield f"Rows were matched by token (--vocab {choice}): {found.figures((base.name, ft.name))}. {plan.told}"
    dropped = {"base": (found.num_only[1], ft, 1), "ft": (found.num_only[0], base, 0)}.get(choice)
    if dropped and dropped[0]:
        count, model, side = dropped
        yield f"{count:,} tokens of {model.name} are not in the output's vocabulary: {listed(found.examples[side])}."
    if choice == "union" and found.pieces:
        yield pieces_told(f"{found.pieces:,} tokens of {ft.name}", "its")
    if found.kinds[0] != found.kinds[1]:
        kinds = " and ".join(map(shown, found.kinds))
        yield f"The tokenizers are of two kinds ({kinds}), which may spell the same token in two ways."
    for model, ids, rows in ((base, found.ft_of_base, plan.before[0]), (ft, found.base_of_ft, plan.before[1])):
        if len(ids) > rows:
            yield f"{model.name}: {len(ids) - rows:,} ids of its tokenizer are beyond its embedding's {rows:,} rows."


def pieces_told(which: str, whose: str) -> str:
    return (
        f"{which} are pieces of {whose} tokenizer's model; in {TOKENIZER} they are added tokens, spelled as there. Its "
        "merges and scores cannot be taken over: added tokens come before all else, so any text with such pieces is "
        "split otherwise than it was."
    )


# -------------------------------------------------------------------------------------------------- files


def side_files_of(alignment: Alignment, found: SideFiles) -> SideFiles:
    """The side files with the chosen tokenizer's in place of the donor's, and config.json's vocab_size."""
    copied = list(found.copied)
    if found.folder is not None and alignment.tokenizer is not found.folder:
        copied = [file for file in copied if file.source not in TOKENIZER_FILES]
        folder = alignment.tokenizer
        copied += [SideFile(name, name, folder.size(name), folder) for name in TOKENIZER_FILES if folder.has(name)]
    if (insert := alignment.insert) is not None:
        copied = [
            replace(file, size=file.size + len(insert[1]), insert=insert) if file.source == TOKENIZER else file
            for file in copied
        ]
    before, rows = alignment.sizes_before, alignment.rows
    return replace(found, copied=tuple(copied), vocab_sizes=(before, rows) if before != {rows} else None)


def settings_warnings(alignment: Alignment, model: int, folder: Folder | None) -> Iterator[str]:
    """What the copied settings of a model, by its number, say of tokens that the output numbers otherwise."""
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
                told = "does not have" if new is None else f"has as {new:,}"
                yield f"{what} is {number:,}, a token that the output's tokenizer {told}. Mend that file of the output."
