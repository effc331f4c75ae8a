"""The sources of a mixture -> tokenised examples in a store, and a count of what became of every row.

The law of this file: nothing is tokenised twice. A store is named by a digest of its inputs (the content of the rows,
the templates, the tokenizer). One process writes it while the others wait; the report is written last, so a store with
a report is complete. `batches.py` decides the order of the examples.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.chat import BadRow, Rendered
from train.config import SourceConfig, TrainConfig
from train.errors import TrainError
from train.output import publish_text
from train.sources import open_rows, render_row

STORE_VERSION = 4  # raise it when the same inputs would give other tokens
_TOKENIZE_ROWS = 256


@dataclass(frozen=True)
class SourceReport:
    """The counts for one source: every row and example is in one of them."""

    title: str
    rows: int  # in the file or data set
    rows_kept: int  # after `where`
    rows_held_out: int
    examples: int
    tokens: int
    labelled_tokens: int
    dropped_long: int  # examples longer than sequence_length
    dropped_empty: int  # examples with nothing to learn
    held_out_examples: int
    held_out_tokens: int
    repeated: int = 0  # rows left out, as a held-out row says the same
    dropped_bad: int = 0  # rows that cannot become text, with on_bad_row: skip
    special_tokens: int = 0  # examples with text that spells a special token, and is read as one
    last_turn_only: int = 0  # conversations of whose turns the template keeps the last alone as it was


@dataclass(frozen=True)
class Examples:
    """Token ids of many examples end to end; example i is [offsets[i], offsets[i + 1])."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]  # whether the token is one to be predicted
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Source:
    """One source, tokenised: what is learned from it and what is held out."""

    title: str
    train: Examples
    held_out: Examples
    report: SourceReport
    digest: str


# ---- tokenised examples, kept by content -------------------------------------------------------------


def prepare_sources(config: TrainConfig, tokenizer: Any, cache: Path) -> list[str]:
    """The name of each source's example store below `cache`; a store that is missing is made now.

    One process calls this; the others get the names. Raises TrainError for unreadable sources, missing
    columns, or a source that gives no example.
    """
    return [_prepare_source(source, config, tokenizer, cache) for source in config.sources]


def _prepare_source(source: SourceConfig, config: TrainConfig, tokenizer: Any, cache: Path) -> str:
    rows = open_rows(source)
    facts = {
        "version": STORE_VERSION,
        "rows": rows.digest,
        "source": {k: v for k, v in asdict(source).items() if k not in ("weight", "label", "path", "judge")},
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "tokenizer": tokenizer_digest(tokenizer),
        **({} if source.weight else {"evaluation_only": True}),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    store = cache / digest
    if not (store / "report.json").exists():
        try:
            store.mkdir(parents=True, exist_ok=True)
            report = _tokenize_source(source, config, tokenizer, rows, store)
            publish_text(store / "report.json", json.dumps(asdict(report), indent=1))
        except OSError as e:
            raise TrainError(
                f"{cache}: the tokens of {source.title} cannot be stored ({e.strerror}). Make room, then start again."
            ) from e
    return digest


def open_sources(config: TrainConfig, cache: Path, names: Sequence[str]) -> list[Source]:
    """The stores that `prepare_sources` named, memory-mapped."""
    sources = []
    for source_config, name in zip(config.sources, names, strict=True):
        stored = json.loads((cache / name / "report.json").read_text())
        report = SourceReport(**{**stored, "title": source_config.title})
        train, held_out = (_open_examples(cache / name, part) for part in ("train", "held_out"))
        sources.append(Source(title=source_config.title, train=train, held_out=held_out, report=report, digest=name))
    return sources


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((content + str(tokenizer.chat_template)).encode()).hexdigest()


def _tokenize_source(source: SourceConfig, config: TrainConfig, tokenizer: Any, rows: Any, store: Path) -> SourceReport:
    kept, held_out, repeated = rows.split(source, config.seed)
    train = _tokenize(source, tokenizer, rows, kept, config.sequence_length, source.take, store, "train")
    if source.weight and not len(train.examples):
        raise TrainError(
            f"Source {source.title}: gives no example. {rows.count} rows, {len(kept) + len(held_out)} after `where`; "
            f"{train.long} examples longer than sequence_length {config.sequence_length}, {train.empty} with nothing "
            "to learn. Correct `where`, the templates or sequence_length."
        )
    take = None if source.weight else source.take
    held = _tokenize(source, tokenizer, rows, held_out, config.sequence_length, take, store, "held_out")
    if (len(held_out) or not source.weight) and not len(held.examples):
        raise TrainError(
            f"Source {source.title}: none of its {len(held_out)} held-out rows gives an example ({held.long} longer "
            f"than sequence_length {config.sequence_length}, {held.empty} with nothing to learn), so it cannot be "
            "evaluated. Raise held_out or sequence_length, or set held_out: 0."
        )
    return SourceReport(
        title=source.title,
        rows=rows.count,
        rows_kept=len(kept) + len(held_out) + repeated,
        rows_held_out=len(held_out),
        examples=len(train.examples),
        tokens=len(train.examples.ids),
        labelled_tokens=int(train.examples.learned.sum()),
        dropped_long=train.long + held.long,
        dropped_empty=train.empty + held.empty,
        held_out_examples=len(held.examples),
        held_out_tokens=int(held.examples.learned.sum()),
        repeated=repeated,
        dropped_bad=train.bad + held.bad,
        special_tokens=train.special_tokens + held.special_tokens,
        last_turn_only=train.last_turn_only + held.last_turn_only,
    )


@dataclass(frozen=True)
class _Tokenized:
    examples: Examples
    long: int
    empty: int
    bad: int
    last_turn_only: int
    special_tokens: int


def _tokenize(
    source: SourceConfig, tokenizer: Any, rows: Any, order: Any, longest: int, take: int | None, store: Path, part: str
) -> _Tokenized:
    """Store the first `take` examples that fit, in the order of the rows; over-long ones are dropped, not cut."""
    counts = Counter[str]()
    special = _special_ids(source, tokenizer)
    kinds = {"ids": np.int32, "learned": np.bool_, "offsets": np.int64}
    with ExitStack() as stack:
        paths = {name: store / f"{part}.{name}.npy" for name in kinds}
        files = {name: stack.enter_context(closing(_Growing(paths[name], kinds[name]))) for name in kinds}
        end = 0
        files["offsets"].add([end])
        for is_last_turn, example in _token_lists(source, tokenizer, rows, order, counts):
            if take is not None and counts["kept"] == take:
                break
            tokens = np.concatenate([np.asarray(t, np.int32) for t, _ in example] or [np.empty(0, np.int32)])
            marks = np.concatenate([np.full(len(t), mark) for t, mark in example] or [np.empty(0, bool)])
            if len(tokens) > longest:
                counts["long"] += 1
            elif not marks[1:].any():  # the first token is predicted from nothing
                counts["empty"] += 1
            else:
                end += len(tokens)
                for name, values in (("ids", tokens), ("learned", marks), ("offsets", [end])):
                    files[name].add(values)
                counts["kept"] += 1
                counts["last_turn_only"] += is_last_turn
                counts["special_tokens"] += bool(np.isin(tokens, special).any())
    names = ("long", "empty", "bad", "last_turn_only", "special_tokens")
    return _Tokenized(_open_examples(store, part), **{name: counts[name] for name in names})


def _special_ids(source: SourceConfig, tokenizer: Any) -> NDArray[np.int32]:
    """The ids that only text of the data can bring into an example; a chat template writes such tokens itself."""
    ids = [] if source.format == "chat-template" else tokenizer.all_special_ids
    return np.array(ids, np.int32)


def _token_lists(
    source: SourceConfig, tokenizer: Any, rows: Any, order: Sequence[int], counts: Counter[str]
) -> Iterator[tuple[bool, list[tuple[list[int], bool]]]]:
    """Each example as [(ids, learned)], its segments tokenised apart, a few hundred rows at a time; and whether only
    its last turn is learned. Counts the rows that are skipped as bad."""
    as_text = {"split_special_tokens": True} if source.special_tokens_in_data == "text" else {}
    for start in range(0, len(order), _TOKENIZE_ROWS):
        numbers = order[start : start + _TOKENIZE_ROWS]
        examples: list[Rendered] = []
        for number, row in zip(numbers, rows.select(numbers), strict=True):
            try:
                examples.extend(render_row(source, row, tokenizer))
            except BadRow as e:
                if source.on_bad_row == "error":
                    raise TrainError(
                        f"Source {source.title}, row {number + 1}: {e} (on_bad_row: skip leaves such rows out.)"
                    ) from e
                counts["bad"] += 1
        texts = [segment.text for example in examples for segment in example.segments]
        ids = iter(tokenizer(texts, add_special_tokens=False, **as_text)["input_ids"] if texts else [])
        for example in examples:
            yield example.last_turn_only, [(next(ids), segment.learned) for segment in example.segments]


def _open_examples(folder: Path, part: str) -> Examples:
    return Examples(*(np.load(folder / f"{part}.{name}.npy", mmap_mode="r") for name in ("ids", "learned", "offsets")))


class _Growing:
    """A one-dimensional .npy file that grows, so that a source may be larger than memory. Raises OSError."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._file, self._dtype, self._count = open(path, "wb"), np.dtype(dtype), 0  # noqa: SIM115
        self._write_header()

    def _write_header(self) -> None:
        self._file.seek(0)
        shape = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({self._count:20},), }}"
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + shape.ljust(117).encode() + b"\n")

    def add(self, values: Any) -> None:
        self._count += len(values)
        self._file.write(np.asarray(values, self._dtype).tobytes())

    def close(self) -> None:
        self._write_header()
        self._file.close()


def report_table(reports: Sequence[SourceReport]) -> str:
    """A line per source for people: examples, tokens, and everything that was dropped."""
    names = [
        "source", "rows", "kept", "held out", "examples", "tokens", "labelled", "too long", "empty",
    ]  # fmt: skip
    lines = [names]
    for r in reports:
        numbers = (
            r.rows, r.rows_kept, r.rows_held_out, r.examples, r.tokens, r.labelled_tokens,
            r.dropped_long, r.dropped_empty,
        )  # fmt: skip
        lines.append([r.title, *(f"{n:,}" for n in numbers)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    table = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = [note for r in reports for note in _notes(r)]
    return "\n".join([*table, *notes])


def _notes(r: SourceReport) -> Iterator[str]:
    """What the table does not show."""
    if r.repeated:
        yield f"{r.title}: {r.repeated:,} rows are left out, as a held-out row says the same."
    if r.dropped_bad:
        yield f"{r.title}: {r.dropped_bad:,} rows cannot become text and are skipped."
    if r.special_tokens:
        yield (
            f"{r.title}: {r.special_tokens:,} examples have text that spells a special token and is read as that token "
            "(special_tokens_in_data: text reads it as text)."
        )
    if r.last_turn_only:
        yield (
            f"{r.title}: the chat template writes earlier turns in another way in {r.last_turn_only:,} examples; of "
            "those only the last turn is learned."
        )
