"""One source of the mixture: rows from the Hub or a file, filtered and ordered, then rendered to segments of text.

Nothing here knows tokens. A segment is tokenised by itself and is either learned or only read; the formats below decide
where one segment ends and the next begins. Rows are read by the library `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.chat import (
    USER,
    BadRow,
    ChatTemplate,
    Message,
    Rendered,
    Segment,
    memphis_chat,
    read_messages,
    without_empty,
)
from train.config import SourceConfig, Template
from train.errors import TrainError
from train.hub import explain
from train.selection import Sort, Where

Numbers = NDArray[np.int64]  # of rows

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


# ---- rows ----------------------------------------------------------------------------------------------


class Rows:
    """The rows of one source; `digest` names their content, whatever the file is called."""

    def __init__(self, dataset: Any, digest: str, title: str, *, is_csv: bool = False) -> None:
        self._dataset, self.digest, self._title = dataset, digest, title
        self.count: int = len(dataset)
        self._whole = [name for name in dataset.column_names if self._holds_whole_numbers(name)] if is_csv else []

    def _holds_whole_numbers(self, name: str) -> bool:
        """A CSV column of whole numbers with an empty cell is read as floats: 4 would be written as 4.0."""
        values = self._column(name) if self._dataset.features[name].dtype == "float64" else []
        return None in values and all(value is None or value.is_integer() for value in values)

    def select(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """These rows, in this order."""
        rows = list(self._dataset.select(indices))
        for row in rows:
            row.update({name: int(row[name]) for name in self._whole if row[name] is not None})
        return rows

    def split(self, source: SourceConfig, seed: int) -> tuple[Numbers, Numbers, int]:
        """Row numbers to learn from, ordered as `shuffle` and `sort` say; those held out; and how many rows are
        neither, as a row that is held out says the same. Of a source without weight, none is learned from."""
        self._check_columns(source)
        kept = np.ones(self.count, bool)
        for test in source.where:
            values = zip(kept, self._values(test.column), strict=True)
            kept = np.fromiter((bool(k) and _holds(v, test, self._title) for k, v in values), bool, self.count)
        train, held_out = _hold_out(np.flatnonzero(kept), source, seed)
        if source.shuffle is not None:
            train = train[np.random.default_rng((source.shuffle, 3)).permutation(len(train))]
        if not source.weight:
            return train[:0], held_out if len(held_out) else self._sorted(train, source.sort), 0
        learned = self._without(train, held_out, source)
        return self._sorted(learned, source.sort), held_out, len(train) - len(learned)

    def _without(self, rows: Numbers, others: Numbers, source: SourceConfig) -> Numbers:
        """The rows that say something else than all of the others, in the columns that become text."""
        if not len(others):
            return rows
        columns = sorted(set(_text_columns(source)))
        known = set(self._contents(others, columns))
        is_new = np.fromiter((content not in known for content in self._contents(rows, columns)), bool, len(rows))
        learned: Numbers = rows[is_new]
        return learned

    def _contents(self, rows: Numbers, columns: list[str]) -> Iterator[bytes]:
        chosen = self._dataset.select_columns(columns)
        for start in range(0, len(rows), 1000):
            for row in chosen.select(rows[start : start + 1000]):
                yield hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()

    def _values(self, name: str) -> Iterator[Any]:
        for part in self._dataset.select_columns([name]).iter(1000):
            yield from part[name]

    def _column(self, name: str) -> list[Any]:
        return list(self._dataset[name])

    def _sorted(self, rows: Numbers, sort: Sort | None) -> Numbers:
        if sort is None:
            return rows
        column = self._column(sort.column)
        values = {int(i): _cast(column[i], sort.cast, sort.column, self._title) for i in rows}
        empty = [i for i in values if values[i] is None or values[i] != values[i]]  # None, NaN: last, not dropped
        rest = [i for i in values if values[i] == values[i] and values[i] is not None]
        try:
            return np.array([*sorted(rest, key=lambda i: values[i], reverse=sort.descending), *empty], np.int64)
        except TypeError as e:
            raise TrainError(f"Source {self._title}: cannot be sorted by {sort.column} ({e}). Add `cast`.") from e

    def _check_columns(self, source: SourceConfig) -> None:
        known = self._dataset.column_names
        for column in _columns(source):
            if column not in known:
                raise TrainError(f"Source {self._title}: has no column {column!r}. Its columns are {', '.join(known)}.")


def open_rows(source: SourceConfig) -> Rows:
    """The rows of a local file or folder when the path exists, else of a hub data set.

    Raises TrainError with the source and the reason when they cannot be read.
    """
    import datasets  # type: ignore[import-untyped]

    local = Path(source.path).expanduser()
    if _looks_local(source.path) and not local.exists():
        raise TrainError(f"Source {source.title}: there is no file {source.path}. Check the path.")
    try:
        if local.is_file():
            builder = _builder(local)
            # In a CSV only an empty cell is empty: "None", "NA" and "null" are words.
            options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
            dataset = datasets.load_dataset(builder, data_files=str(local), split=source.split, **options)
        elif local.is_dir():
            dataset = datasets.load_dataset(str(local), name=source.name, split=source.split)
        else:
            dataset = datasets.load_dataset(source.path, name=source.name, split=source.split, revision=source.revision)
    except TrainError:
        raise
    except Exception as e:  # the library raises dozens of kinds; all mean: not readable
        reason = explain(e, source.path, source.revision, "data set") or _first_line(e)
        raise TrainError(f"Source {source.title}: {source.path} cannot be loaded. {reason}") from e
    is_csv = local.suffix == ".csv"
    return Rows(dataset, _content_digest(local) or dataset._fingerprint, source.title, is_csv=is_csv)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).suffix in _BUILDERS


def _builder(path: Path) -> str:
    if path.suffix not in _BUILDERS:
        raise TrainError(f"{path}: ends in {path.suffix!r}, expected one of {', '.join(_BUILDERS)}.")
    return _BUILDERS[path.suffix]


def _content_digest(path: Path) -> str | None:
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0].rstrip('.')}."


def _hold_out(rows: Numbers, source: SourceConfig, seed: int) -> tuple[Numbers, Numbers]:
    """Split by row, before templates: all examples of one row are learned, or all are held out."""
    share = source.held_out
    count = int(share) if share >= 1 else round(share * len(rows))
    if share and not count:
        raise TrainError(f"Source {source.title}: held_out is {share} of {len(rows)} rows, which is none. Raise it.")
    if count and count >= len(rows):
        raise TrainError(f"Source {source.title}: held_out is {count} of {len(rows)} rows, which is all. Lower it.")
    held_out = np.zeros(len(rows), bool)
    held_out[np.random.default_rng((seed, 4)).permutation(len(rows))[:count]] = True
    return rows[~held_out], rows[held_out]


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}
_CASTS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str}


def _cast(value: Any, cast: str | None, column: str, title: str) -> Any:
    if cast is None or value is None:
        return value
    try:
        return _CASTS[cast](value)
    except (TypeError, ValueError, OverflowError) as e:
        raise TrainError(
            f"Source {title}: column {column} holds {value!r}, which cannot be cast to {cast}. Correct either."
        ) from e


def _holds(value: Any, test: Where, title: str) -> bool:
    """Whether the comparison holds; an empty cell fails every one but != and `not in`."""
    value = _cast(value, test.cast, test.column, title)
    if value is None:
        return test.op in ("!=", "not in")
    try:
        return _OPERATORS[test.op](value, test.value)
    except TypeError as e:
        raise TrainError(
            f"Source {title}: column {test.column} holds {value!r} ({type(value).__name__}), which cannot be compared "
            f"with {test.value!r} by {test.op}. Add `cast: int` (or float, str)."
        ) from e


def _columns(source: SourceConfig) -> Iterable[str]:
    yield from (test.column for test in source.where)
    if source.sort is not None:
        yield source.sort.column
    yield from _text_columns(source)


def _text_columns(source: SourceConfig) -> Iterable[str]:
    """The columns that become text."""
    yield from (column for column in (source.messages, source.tools) if column is not None)
    for template in source.templates:
        for text in (template.prompt, template.rationale, template.response, template.text):
            yield from template_fields(text or "", source.title)


# ---- templates -----------------------------------------------------------------------------------------


def template_fields(text: str, title: str) -> list[str]:
    """The columns a template names; raises TrainError for anything beyond a plain `{column}`."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as e:
        raise TrainError(f"Source {title}: template {text!r} is not valid ({e}). Write braces as {{{{ and }}}}.") from e
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or _FIELD.fullmatch(name) is None):
            raise TrainError(
                f"Source {title}: template {text!r} has a field that is neither a {{column}} nor a part of one, as "
                "{column.key[0]}."
            )
    return [re.split(r"[.\[]", name, maxsplit=1)[0] for _, name, _, _ in parts if name is not None]


_FIELD = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[[0-9]+\])*")


def _lookup(row: Mapping[str, Any], field: str) -> Any:
    """A column, or a part of it: `answers.text[0]`. BadRow for a part that is not there, and for a list or mapping: as
    text it would be Python's."""
    column, *parts = re.findall(r"[^.\[\]]+", field)
    value = row[column]
    for part in parts:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadRow(f"{{{field}}}: column {column} is {row[column]!r:.80}, which has no {part}.") from e
    if isinstance(value, (list, Mapping)):
        raise BadRow(
            f"{{{field}}} is {value!r:.80}, expected text or a number; write {{{field}[0]}} or {{{field}.KEY}}."
        )
    return value


def fill(text: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values, without white space at its ends; an empty cell is empty text."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(text):
        value = None if name is None else _lookup(row, name)
        pieces += [literal, "" if value is None else str(value)]
    return "".join(pieces).strip()


# ---- formats -------------------------------------------------------------------------------------------

RATIONALE, ANSWER = "### Rationale:\n", "### Answer:\n"


def render_row(source: SourceConfig, row: Mapping[str, Any], tokenizer: Any) -> list[Rendered]:
    """One example per template (or conversation); without segments when nothing is to be learned."""
    if source.messages is not None:
        messages = read_messages(row[source.messages], source.messages)
        return [_render_messages(source, messages, tokenizer, _tools(source, row))]
    return [_render_template(source, template, row, tokenizer) for template in source.templates]


def _render_template(source: SourceConfig, template: Template, row: Mapping[str, Any], tokenizer: Any) -> Rendered:
    if source.format == "text":
        text = fill(template.text or "", row)
        return Rendered([Segment(text, True)] if text else [])
    prompt, response = fill(template.prompt, row), fill(template.response, row)
    if not response:
        return Rendered()
    if source.format == "tinycot":
        rationale = fill(template.rationale or "", row)
        # The next turn's header ends the answer, so it is learned too.
        answer = f"{rationale}\n{ANSWER}{response}\n{USER}"
        return Rendered([Segment(f"{USER}{prompt}\n{RATIONALE}", False), Segment(answer, True)])
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return _render_messages(source, messages, tokenizer, None)


def _render_messages(source: SourceConfig, messages: Sequence[Message], tokenizer: Any, tools: Any) -> Rendered:
    if source.format == "chat-template":
        return ChatTemplate(tokenizer, source.title, tools).render(messages)
    return memphis_chat(messages)


def _tools(source: SourceConfig, row: Mapping[str, Any]) -> Any:
    """The tools that a row offers: a list of JSON schemas, or the text of one."""
    tools = row[source.tools] if source.tools is not None else None
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as e:
            raise BadRow(f"column {source.tools} is {tools!r:.80}, expected a list of tools, or its JSON ({e}).") from e
    return without_empty(tools) or None
