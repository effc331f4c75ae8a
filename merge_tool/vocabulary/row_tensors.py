"""The tensors with a row for each token, found by name and shape; and these tensors of all models with their rows as
planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import MismatchError, shown
from merge_tool.models.naming import EMBEDDINGS, embeds_tokens, has_token_rows, is_head, is_in_layer, is_of_positions
from merge_tool.models.renaming import find_renaming
from merge_tool.vocabulary.rows import Rows, RowTensor


def _embeddings(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    return {
        info.name: info
        for info in infos
        if len(info.shape) == 2 and embeds_tokens(info.name) and info.dtype in FLOAT_DTYPES
    }


def embedding_rows(infos: Iterable[TensorInfo]) -> int | None:
    """The embedding's number of rows; None if there is no embedding, or if several differ."""
    counts = {info.shape[0] for info in _embeddings(infos).values()}
    return counts.pop() if len(counts) == 1 else None


def has_row_tensors(infos: Iterable[TensorInfo]) -> bool:
    """Whether any of these tensors is an embedding or a head, by its name."""
    return any(has_token_rows(info.name) for info in infos)


def rows_of(model: Checkpoint) -> int | None:
    """As `embedding_rows`, for a model."""
    return embedding_rows(model.tensors.values())


def known_rows(model: Checkpoint) -> int:
    if (rows := rows_of(model)) is None:
        embeddings = [
            f"{shown(name)} {list(info.shape)}" for name, info in sorted(_embeddings(model.tensors.values()).items())
        ]
        what = f"has no embedding under a known name ({', '.join(EMBEDDINGS)})"
        if embeddings:
            what = f"has embeddings of different sizes ({', '.join(embeddings)})"
        raise MismatchError(
            f"{model.name}: {what}, so the rows of tokens are not known. Do not match rows by token (leave out "
            "--vocab, or the recipe's tokenizer), and copy such tensors from BASE: --exclude PATTERN."
        )
    return rows


def align_rows(
    models: Sequence[Checkpoint], lead: int, before: Sequence[int], rows: Sequence[Rows | None]
) -> tuple[list[dict[str, TensorSource]], list[str]]:
    """Every tensor that has a row for each token, of each model, with its rows as in `rows`; and warnings.

    `before` is each model's present number of rows. `lead` is the model whose names and shapes count. A model without
    `rows` only lends rows to others. Raises MismatchError with all tensors that other models lack, or that differ
    there.
    """
    names = [find_renaming(models[lead], model).ft_names if k != lead else {} for k, model in enumerate(models)]
    made: list[dict[str, TensorSource]] = [{} for _ in models]
    notices, unfit = [], []
    for name in sorted(_row_tensors(models[lead], before[lead])):
        theirs = [ft_names.get(name, name) for ft_names in names]
        if problem := _misfit(name, models, theirs, before, lead):
            unfit.append(problem)
            continue
        sources = tuple(model.source(other) for model, other in zip(models, theirs, strict=True))
        for k, (model, other, own) in enumerate(zip(models, theirs, rows, strict=True)):
            if own is None:
                continue
            if tied := is_head(name) and not is_head(other):
                notices.append(
                    f"{shown(name)} is not in {model.name}, whose head is tied: merged with its input embedding "
                    f"{shown(other)}. The output has a head of its own, as {models[lead].name}."
                )
            key = name if tied else other
            shape = _with_rows(models[lead].tensors[name].shape, before[lead], len(own.codes))
            info = TensorInfo(key, _common(sources, own), shape, 0)
            made[k][key] = RowTensor(info, sources, k, own)
    if unfit:
        raise MismatchError("Rows cannot be matched by token in\n  " + "\n  ".join(unfit))
    return made, notices


def _misfit(name: str, models: Sequence[Checkpoint], theirs: Sequence[str], before: Sequence[int], lead: int) -> str:
    """The reason why a tensor's rows cannot be matched; empty if they can."""
    a = models[lead].tensors[name]
    for model, other, rows in zip(models, theirs, before, strict=True):
        if other not in model.tensors:
            return f"{shown(name)}: is not in {model.name}"
        b = model.tensors[other]
        if _columns(a, before[lead]) != _columns(b, rows) or not {a.dtype, b.dtype} <= FLOAT_DTYPES:
            return f"{shown(name)}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} have other columns"
    return ""


def _row_tensors(model: Checkpoint, rows: int) -> Iterator[str]:
    """Embeddings, heads and their biases: tensors with a row for each token, by name or by position in the model. There
    may be as many positions as tokens; tensors of positions are excluded by name."""
    widths = {info.shape[1] for info in _embeddings(model.tensors.values()).values()}
    for name, info in model.tensors.items():
        has_rows = info.shape[:1] == (rows,) or (info.shape == (1, rows) and "bias" in name)
        by_position = not is_in_layer(name) and rows not in widths and not is_of_positions(name)
        if has_rows and (has_token_rows(name) or by_position):
            yield name


def _columns(info: TensorInfo, rows: int) -> int:
    return info.numel // rows if info.numel % rows == 0 else -1


def _with_rows(shape: tuple[int, ...], before: int, after: int) -> tuple[int, ...]:
    return (after, *shape[1:]) if shape[0] == before else (1, after)


def _common(sources: Sequence[TensorSource], rows: Rows) -> str:
    """A dtype that holds the values of all sources exactly, and every digit of averages, so that differences from an
    average add up to 0."""
    dtypes = {source.info.dtype for source in sources} | ({"F64"} if len(rows.averages) else set())
    return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
