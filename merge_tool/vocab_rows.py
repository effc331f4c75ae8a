"""Which rows of both models the rows of the output's vocabulary are made of, and the tensors that have such rows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import MismatchError, shown
from merge_tool.methods import Array
from merge_tool.recipe import Recipe
from merge_tool.renaming import find_renaming, is_head
from merge_tool.rows import FIRST_OTHER, MEAN, Rows, RowTensor
from merge_tool.tokens import ALONE, Vocabularies

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens\w*|wte|word_embeddings?|embed_in|tok_embeddings|shared|token_embedding|embeddings|emb)"
    r"\.weight$"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|head|output|output_projection|proj_out|vocab_projector|predictions)(?:\.decoder)?"
    r"\.(?:weight|bias)$|(?:^|\.)final_logits_bias$"
)
_LAYER = re.compile(r"(?:^|\.)[0-9]+\.")


def _embeddings(model: Checkpoint) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in model.tensors.items()
        if len(info.shape) == 2 and _EMBEDDING.search(name) and info.dtype in FLOAT_DTYPES
    }


def rows_of(model: Checkpoint) -> int | None:
    """How many rows the embedding has; None if there is none, or if several differ."""
    found = {info.shape[0] for info in _embeddings(model).values()}
    return found.pop() if len(found) == 1 else None


def known_rows(model: Checkpoint) -> int:
    if (rows := rows_of(model)) is None:
        found = [f"{shown(name)} {list(info.shape)}" for name, info in sorted(_embeddings(model).items())]
        what = f"has embeddings of different sizes ({', '.join(found)})" if found else "has no embedding that is known"
        raise MismatchError(f"{model.name}: {what}, so --vocab cannot tell which rows are tokens.")
    return rows


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


class Aligner:
    """Every tensor that has a row for each token, of both sides."""

    def __init__(self, base: Checkpoint, ft: Checkpoint, before: tuple[int, int], plan: RowPlan) -> None:
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
