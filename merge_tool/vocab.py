"""Vocabularies that differ: both models with their rows matched by token, and what becomes of the tokenizer's files.

`--vocab base`, `ft` and `union` choose the output's tokens; ids are those of that side, for a union BASE's with FT's
other tokens after them. Both checkpoints are given rows of that order here; what is merged then has one shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint, CheckpointFile
from merge_tool.checkpoint.source import LocalFile, TensorSource, sha256_of
from merge_tool.errors import CheckpointError, MismatchError, listed, shown
from merge_tool.methods import Array
from merge_tool.recipe import Recipe
from merge_tool.renaming import find_renaming, is_head
from merge_tool.rows import FIRST_OTHER, MEAN, Rows, RowTensor
from merge_tool.side_files import SideFile, SideFiles
from merge_tool.tokens import ALONE, TOKENIZER, Vocabularies, compare_tokenizers

TOKENIZER_FILES = (
    TOKENIZER, "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens\w*|wte|word_embeddings?|embed_in|tok_embeddings|shared|token_embedding|embeddings|emb)\.weight"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|head|output|output_projection|proj_out|vocab_projector|predictions)(?:\.decoder)?"
    r"\.(?:weight|bias)$|(?:^|\.)final_logits_bias$"
)
_LAYER = re.compile(r"(?:^|\.)[0-9]+\.")
_IDS = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos|image|audio)_token_id")


@dataclass(frozen=True)
class Alignment:
    """How the output's vocabulary came about: what its files and settings must say."""

    choice: str
    vocabularies: Vocabularies
    folders: tuple[Folder, Folder]
    sizes_before: frozenset[int]  # rows of either, and what their configurations say
    rows: int

    @property
    def tokenizer(self) -> Folder:
        """Whose tokenizer the output has, or (a union) extends."""
        return self.folders[self.choice == "ft"]

    def new_id(self, side: int, number: int) -> int | None:
        """The output's id of the token that has this one on a side; None if it lacks that."""
        if side == (self.choice == "ft"):
            return number
        ids = self.vocabularies.base_of_ft if side else self.vocabularies.ft_of_base
        if number >= len(ids):
            return None
        if ids[number] >= 0:
            return ids[number]
        if self.choice != "union" or ids[number] != ALONE:
            return None
        return len(self.vocabularies.ft_of_base) + ids[:number].count(ALONE)


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
        if (rows := _rows(model)) is not None
    ]
    return text + (f"; rows beyond the tokenizer (padding): {', '.join(padding)}" if padding else "")


def has_other_rows(base: Checkpoint, ft: Checkpoint) -> bool:
    """Whether the embeddings differ in how many rows they have."""
    rows = _rows(base), _rows(ft)
    return None not in rows and rows[0] != rows[1]


def align(recipe: Recipe, base: Checkpoint, ft: Checkpoint) -> tuple[Checkpoint, Checkpoint, Alignment]:
    """Both models with the rows of the vocabulary that `recipe.vocab` chooses. Raises CheckpointError for tokenizers
    that cannot be read, MismatchError where rows cannot be matched."""
    assert recipe.vocab is not None
    for model in (base, ft):
        if model.tokenizer_folder is None:
            raise CheckpointError(f"{model.name}: is a single file without a tokenizer, which --vocab needs.")
    folders = base.tokenizer_folder, ft.tokenizer_folder
    found = compare_tokenizers(folders[0], folders[1])  # type: ignore[arg-type]  # neither is None
    before = _known_rows(base), _known_rows(ft)
    plan = _RowPlan(recipe, found, before)
    aligner = _Aligner(base, ft, before, plan)
    sides = aligner.made()
    sizes = frozenset({*before, *_config_sizes(base), *_config_sizes(ft)})
    alignment = Alignment(recipe.vocab, found, folders, sizes, plan.size)  # type: ignore[arg-type]
    told = (*_notices(recipe.vocab, base, ft, found, plan), *aligner.notices)
    models = [
        model.with_made(model.name, (_tokenizer_file(model),), made, (*model.notices, *notices))
        for model, made, notices in ((base, sides[0], told), (ft, sides[1], ()))
    ]
    return models[0], models[1], alignment


def _config_sizes(model: Checkpoint) -> Iterator[int]:
    config = model.config or {}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            yield part["vocab_size"]


def _tokenizer_file(model: Checkpoint) -> CheckpointFile:
    """What decided the rows, as an input by its digest."""
    assert model.tokenizer_folder is not None
    path = model.tokenizer_folder.regular(TOKENIZER)
    file = LocalFile(path, f"{model.tokenizer_folder.name}/{TOKENIZER}")
    return CheckpointFile(f"tokenizer/{TOKENIZER}", file, sha256_of(path))


def _notices(choice: str, base: Checkpoint, ft: Checkpoint, found: Vocabularies, plan: _RowPlan) -> Iterator[str]:
    yield f"Rows were matched by token (--vocab {choice}): {found.figures((base.name, ft.name))}. {plan.told}"
    dropped = {"base": (found.num_only[1], ft, 1), "ft": (found.num_only[0], base, 0)}.get(choice)
    if dropped and dropped[0]:
        count, model, side = dropped
        yield f"{count:,} tokens of {model.name} are not in the output's vocabulary: {listed(found.examples[side])}."
    if choice == "union" and found.pieces:
        yield (
            f"{found.pieces:,} tokens of {ft.name} are pieces of its tokenizer's model; in {TOKENIZER} they are added "
            "tokens, spelled as there. Its merges and scores cannot be taken over: text is not split into such pieces "
            "as it was."
        )
    if found.kinds[0] != found.kinds[1]:
        kinds = " and ".join(map(shown, found.kinds))
        yield f"The tokenizers are of two kinds ({kinds}), which may spell the same token in two ways."
    for model, ids, rows in ((base, found.ft_of_base, plan.before[0]), (ft, found.base_of_ft, plan.before[1])):
        if len(ids) > rows:
            yield f"{model.name}: {len(ids) - rows:,} ids of its tokenizer are beyond its embedding's {rows:,} rows."


# -------------------------------------------------------------------------------------------------- files


def side_files_of(alignment: Alignment, found: SideFiles) -> SideFiles:
    """The side files with the chosen tokenizer's in place of the donor's, and config.json's vocab_size."""
    copied = list(found.copied)
    if found.folder is not None and alignment.tokenizer is not found.folder:
        copied = [file for file in copied if file.source not in TOKENIZER_FILES]
        folder = alignment.tokenizer
        copied += [
            SideFile(name, name, folder.regular(name).stat().st_size, folder)
            for name in TOKENIZER_FILES
            if folder.has(name)
        ]
    if alignment.choice == "union":
        insert = alignment.vocabularies.insert
        copied = [
            replace(file, size=file.size + len(insert[1]), insert=insert) if file.source == TOKENIZER else file
            for file in copied
        ]
    before, rows = alignment.sizes_before, alignment.rows
    return replace(found, copied=tuple(copied), vocab_sizes=(before, rows) if before != {rows} else None)


def settings_warnings(alignment: Alignment, side: int, folder: Folder | None) -> Iterator[str]:
    """What the copied settings of that side (0 is BASE) say of tokens that the output numbers otherwise."""
    if folder is None:
        return
    for name in ("config.json", "generation_config.json"):
        config = folder.load_json(name) if folder.has(name) else {}
        for part in (config, config.get("text_config")):
            for key, value in part.items() if isinstance(part, dict) else ():
                if _IDS.fullmatch(key):
                    yield from _moved(alignment, side, f"{folder.name}/{name}: {shown(key)}", value)


def _moved(alignment: Alignment, side: int, what: str, value: Any) -> Iterator[str]:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            new = alignment.new_id(side, number)
            if new != number:
                told = "does not have" if new is None else f"has as {new:,}"
                yield f"{what} is {number:,}, a token that the output's tokenizer {told}. Mend that file of the output."


# -------------------------------------------------------------------------------------------------- rows


def _embeddings(model: Checkpoint) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in model.tensors.items()
        if len(info.shape) == 2 and _EMBEDDING.search(name) and info.dtype in FLOAT_DTYPES
    }


def _rows(model: Checkpoint) -> int | None:
    """How many rows the embedding has; None if there is none, or if several differ."""
    found = {info.shape[0] for info in _embeddings(model).values()}
    return found.pop() if len(found) == 1 else None


def _known_rows(model: Checkpoint) -> int:
    if (rows := _rows(model)) is None:
        found = [f"{shown(name)} {list(info.shape)}" for name, info in sorted(_embeddings(model).items())]
        what = f"has embeddings of different sizes ({', '.join(found)})" if found else "has no embedding that is known"
        raise MismatchError(f"{model.name}: {what}, so --vocab cannot tell which rows are tokens.")
    return rows


class _RowPlan:
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
        self.num_averaged = min(rows, len(ids)) if needs_mean else 0

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

    def codes(self, own: Array, other: Array) -> Array:
        """For one side: its own rows, the other's where it has none, the mean where neither has one."""
        return np.where(own >= 0, own, np.where(other >= 0, FIRST_OTHER - other, MEAN)).astype(np.int32)


def _usable(ids: Array, size: int, other_rows: int) -> Array:
    """For each of a side's ids the other side's row of the same token; -1 where there is none."""
    found = np.full(size, -1, np.int64)
    given = ids[:size]
    found[: len(given)] = np.where((given >= 0) & (given < other_rows), given, -1)
    return found


def _extended(rows: Array, size: int) -> Array:
    return np.concatenate([rows, np.full(size - len(rows), -1, np.int64)])


class _Aligner:
    """Every tensor that has a row for each token, of both sides."""

    def __init__(self, base: Checkpoint, ft: Checkpoint, before: tuple[int, int], plan: _RowPlan) -> None:
        self.base, self.ft, self.before, self.plan = base, ft, before, plan
        alone = (plan.base < 0) | (plan.ft < 0)
        self.notices: list[str] = []
        self.rows = tuple(
            Rows(plan.codes(own, other), alone, plan.num_averaged)
            for own, other in ((plan.base, plan.ft), (plan.ft, plan.base))
        )

    def made(self) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
        ft_names = find_renaming(self.base, self.ft).ft_names
        base_made: dict[str, TensorSource] = {}
        ft_made: dict[str, TensorSource] = {}
        unfit = []
        for name in sorted(_row_tensors(self.base, self.before[0])):
            other = ft_names.get(name, name)
            if other not in self.ft.tensors:
                unfit.append(f"{shown(name)}: is not in {self.ft.name}")
                continue
            a, b = self.base.tensors[name], self.ft.tensors[other]
            if _columns(a, self.before[0]) != _columns(b, self.before[1]) or not {a.dtype, b.dtype} <= FLOAT_DTYPES:
                unfit.append(
                    f"{shown(name)}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} have other columns"
                )
                continue
            if tied := is_head(name) and not is_head(other):
                self.notices.append(
                    f"{shown(name)} is not in {self.ft.name}, whose head is tied: merged with its input embedding "
                    f"{shown(other)}. The output has a head of its own, as {self.base.name}."
                )
            base_made[name], ft_made[name if tied else other] = self._pair(name, other, name if tied else other)
        if unfit:
            raise MismatchError("--vocab cannot match the rows of\n  " + "\n  ".join(unfit))
        return base_made, ft_made

    def _pair(self, name: str, other: str, ft_name: str) -> tuple[TensorSource, TensorSource]:
        x, y = self.base.source(name), self.ft.source(other)
        dtype = _common(x.info.dtype, y.info.dtype)
        averaged = x if self.plan.side == 0 else y
        shape = _with_rows(x.info.shape, self.before[0], self.plan.size)
        return (
            RowTensor(TensorInfo(name, dtype, shape, 0), x, y, averaged, self.rows[0]),
            RowTensor(TensorInfo(ft_name, dtype, shape, 0), y, x, averaged, self.rows[1]),
        )


def _row_tensors(model: Checkpoint, rows: int) -> Iterator[str]:
    """Embeddings, heads and their biases: what has a row for each token, by its name or by where it stands."""
    widths = {info.shape[1] for info in _embeddings(model).values()}
    for name, info in model.tensors.items():
        has_rows = info.shape[:1] == (rows,) or (info.shape == (1, rows) and "bias" in name)
        is_inside = _LAYER.search(name) is not None
        by_name = _EMBEDDING.search(name) or _HEAD.search(name)
        if has_rows and (by_name or (not is_inside and rows not in widths)):
            yield name


def _columns(info: TensorInfo, rows: int) -> int:
    return info.numel // rows if info.numel % rows == 0 else -1


def _with_rows(shape: tuple[int, ...], before: int, after: int) -> tuple[int, ...]:
    return (after, *shape[1:]) if shape[0] == before else (1, after)


def _common(a: str, b: str) -> str:
    """A dtype that holds the values of both."""
    return a if a == b else "F64" if "F64" in (a, b) else "F32"
