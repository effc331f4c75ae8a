"""Tokenised sources -> batches, by step number.

The law of this file: the order of the data is a pure function of the seed. A batch is computed from its step number, so
a resumed run, or a run on another number of processes, gets the same sequences.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.config import TrainConfig
from train.contrast.ranking import Ranking
from train.data import Examples, Source
from train.errors import TrainError

_OPEN_BINS = 64
_WIDTHS = 64  # a compiled model is compiled for each width: fewer widths


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All tensors are [rows, tokens], int64.

    `labels[:, t]` is the token to predict at t (-100: nothing); `positions` restart with each example;
    `lengths` is the length of the example a token belongs to, 0 for padding. `ranking` is of batches of pairs.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: Tensor
    sources: tuple[str, ...]  # titles, sorted, of the sources inside
    labelled: Tensor | None = None  # flat places of the labels: found on the host, or a GPU would be waited for
    ranking: Ranking | None = None

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`, copied from pinned memory while the GPU computes."""
        flat = (self.labels.flatten() != -100).nonzero().squeeze(-1)
        parts = (self.ids, self.labels, self.positions, self.lengths, flat)
        pinned = (part.pin_memory() for part in parts) if device.type == "cuda" else parts
        ids, labels, positions, lengths, labelled = (part.to(device, non_blocking=True) for part in pinned)
        return Batch(ids, labels, positions, lengths, self.sources, labelled, self.ranking and self.ranking.to(device))

    @property
    def learned_labels(self) -> Tensor:
        """The labels whose number divides the loss: all, but not those of responses that are only ranked."""
        return self.labels if self.ranking is None else self.labels[self.ranking.learned]


Row = tuple[tuple[int, int], ...]  # the examples of one sequence, as (source, example)


class Plan:
    """The sequences of one epoch by number, in about 20 bytes for each example."""

    def __init__(self, source: NDArray[np.int32], example: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self._source, self._example, self._starts = source, example, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Row:
        span = slice(self._starts[number], self._starts[number + 1])
        return tuple(zip(self._source[span].tolist(), self._example[span].tolist(), strict=True))


def plan_rows(sources: Sequence[Source], config: TrainConfig, epoch: int) -> Plan:
    """The sequences of one epoch, in order: examples shuffled, then packed or one to a sequence."""
    passes = [
        _passes(len(source.train), source_config.weight, epoch, (config.seed, 1, number))
        for number, (source, source_config) in enumerate(zip(sources, config.sources, strict=True))
    ]
    order = np.random.default_rng((config.seed, 2, epoch)).permutation(sum(map(len, passes)))
    source = np.repeat(np.arange(len(passes), dtype=np.int32), [len(part) for part in passes])[order]
    example = np.concatenate(passes)[order]
    if not config.packing or config.global_batch_examples:
        return Plan(source, example, np.arange(len(order) + 1))
    lengths = np.empty(len(order), np.int32)
    for number, one in enumerate(sources):
        here = source == number
        lengths[here] = one.train.lengths[example[here]]
    row = assign_rows(map(int, lengths), config.sequence_length)
    order = np.argsort(row, kind="stable")
    return Plan(source[order], example[order], np.concatenate([[0], np.cumsum(np.bincount(row))]))


def _length(sources: Sequence[Source], pick: tuple[int, int]) -> int:
    offsets = sources[pick[0]].train.offsets
    return int(offsets[pick[1] + 1] - offsets[pick[1]])


def _passes(count: int, weight: float, epoch: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Examples of one source in one epoch: a window of `weight` passes over endless fresh permutations."""
    start, stop = round(count * weight * epoch), round(count * weight * (epoch + 1))
    parts = []
    for number in range(start // count, -(-stop // count)) if count else ():
        order = np.random.default_rng((*seed, number)).permutation(count)
        parts.append(order[max(0, start - number * count) : stop - number * count])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def assign_rows(lengths: Iterable[int], capacity: int) -> NDArray[np.int64]:
    """The row of each example. Best fit in order: each goes to the fullest open row that holds it, else to a new one.

    At most 64 rows are open, the fullest is closed first; rows are numbered as they are opened.
    """
    rows, count = array("q"), 0
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for length in lengths:
        at = bisect_left(room, (length, -1))
        if at == len(room):
            left, row, count = capacity, count, count + 1
        else:
            left, row = room.pop(at)
        rows.append(row)
        insort(room, (left - length, row))
        if len(room) > _OPEN_BINS:
            room.pop(0)
    return np.frombuffer(rows, np.int64)


def pack(items: Sequence[tuple[tuple[int, int], int]], capacity: int) -> list[Row]:
    """Examples with their lengths, in rows as `assign_rows` says."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for (pick, _), row in zip(items, assign_rows((length for _, length in items), capacity).tolist(), strict=True):
        rows.setdefault(row, []).append(pick)
    return [tuple(row) for row in rows.values()]


class Mixture:
    """Batches by step number, for one process of `world_size`."""

    def __init__(self, sources: Sequence[Source], config: TrainConfig, pad_id: int, world_size: int) -> None:
        self.sources, self._config, self._pad_id = sources, config, pad_id
        self._rows_per_step, self._world_size = config.sequences_per_step(world_size), world_size
        self._epochs: dict[int, Plan] = {}
        self._starts = [0]  # of the epochs planned so far, in rows
        self.steps = config.max_steps or self._total_rows() // self._rows_per_step
        if self.steps == 0:
            raise TrainError(
                f"{config.epochs:g} epochs give {self._total_rows()} sequences, fewer than one global batch "
                f"of {self._rows_per_step}. Lower global_batch, raise epochs, or set max_steps."
            )

    def _total_rows(self) -> int:
        whole = int(self._config.epochs)
        rows = sum(len(self._epoch(e)) for e in range(whole))
        return rows + int((self._config.epochs - whole) * len(self._epoch(whole)))

    def _epoch(self, epoch: int) -> Plan:
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}  # two at a time
            self._epochs[epoch] = plan_rows(self.sources, self._config, epoch)
        if epoch == len(self._starts) - 1:
            self._starts.append(self._starts[-1] + len(self._epochs[epoch]))
        return self._epochs[epoch]

    def row(self, number: int) -> Row:
        """Sequence `number` (from 0) of all epochs, one after the other."""
        epoch = 0
        while True:
            rows = self._epoch(epoch) if len(self._starts) <= epoch + 1 else None
            if number < self._starts[epoch + 1]:
                return (rows or self._epoch(epoch))[number - self._starts[epoch]]
            epoch += 1

    def step_batches(self, step: int, rank: int) -> list[Batch]:
        """This process's micro-batches of a step (from 0): every world_size-th row of its global batch.

        Every process gets equally many; one that lacks rows repeats its first micro-batch without labels.
        """
        rows, size = self._step_rows(step), self._config.micro_batch
        mine = rows[rank :: self._world_size] or rows[:1]
        batches = [self._collate(mine[i : i + size]) for i in range(0, len(mine), size)]
        blank = [self._collate(mine[:size]) for _ in range(len(batches), -(-len(rows) // (size * self._world_size)))]
        for batch in blank if rank < len(rows) else [*blank, *batches]:
            batch.labels.fill_(-100)
            batch.lengths.fill_(0)
        return batches + blank

    def _step_rows(self, step: int) -> list[Row]:
        """The sequences of one global batch: packed examples, or one to a row with the longest first, so that those of
        one micro-batch need little padding."""
        config, first = self._config, step * self._rows_per_step
        rows = [self.row(first + i) for i in range(self._rows_per_step)]
        if config.packing and not config.global_batch_examples:
            return rows
        sized = sorted(((row[0], _length(self.sources, row[0])) for row in rows), key=lambda item: -item[1])
        return pack(sized, config.sequence_length) if config.packing else [(pick,) for pick, _ in sized]

    def _collate(self, rows: Sequence[Row]) -> Batch:
        picked = [[(self.sources[s].title, self.sources[s].train, e) for s, e in row] for row in rows]
        return collate(picked, self._pad_id, _WIDTHS if self._config.compile else 1, self._config.sequence_length)

    def held_out_batches(self, source: Source, rank: int) -> Iterator[Batch]:
        """This process's share of a source's held-out examples, one to a row, a micro-batch at a time.

        Every process gets equally many batches, since a sharded model computes in step; extra ones have no labels.
        """
        size, count = self._config.micro_batch, len(source.held_out)
        starts = list(range(0, count, size))[: self._config.eval_batches]
        for first in range(0, len(starts), self._world_size):
            start = starts[min(first + rank, len(starts) - 1)]
            block = range(start, min(count, start + size))
            batch = collate([[(source.title, source.held_out, e)] for e in block], self._pad_id)
            if first + rank >= len(starts):
                batch.labels.fill_(-100)
            yield batch


def collate(
    rows: Sequence[Sequence[tuple[str, Examples, int]]], pad_id: int, multiple: int = 1, most: int | None = None
) -> Batch:
    """Rows of (title, examples, index) -> a Batch as wide as the longest row, or the next `multiple` up to `most`.

    A token's label is the next token of the same example, if that token is to be learned. The last token of each
    example and all padding have no label. After packed examples the positions of the padding restart at 0, like those
    of one more example; after a single example they go on, so that no mask is needed.
    """
    sizes = [sum(int(ex.offsets[i + 1] - ex.offsets[i]) for _, ex, i in row) for row in rows]
    width = -(-max(sizes) // multiple) * multiple
    width = max(max(sizes), min(width, most or width))
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, -100, np.int64)
    positions, lengths = np.tile(np.arange(width), (len(rows), 1)), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        at = 0
        for _, examples, index in row:
            span = slice(int(examples.offsets[index]), int(examples.offsets[index + 1]))
            tokens, learned = examples.ids[span], examples.learned[span]
            stop = at + len(tokens)
            ids[number, at:stop] = tokens
            labels[number, at : stop - 1] = np.where(learned[1:], tokens[1:], -100)
            positions[number, at:stop] = np.arange(len(tokens))
            lengths[number, at:stop] = len(tokens)
            at = stop
        if len(row) > 1:
            positions[number, at:] = np.arange(width - at)
    titles = tuple(sorted({title for row in rows for title, _, _ in row}))
    tensors = [torch.from_numpy(a) for a in (ids, labels, positions, lengths)]
    return Batch(ids=tensors[0], labels=tensors[1], positions=tensors[2], lengths=tensors[3], sources=titles)
