"""The order in which a merge reads files on servers -> blocks to download, each at most 8 MB of one file.

Blocks of one tensor's inputs alternate, as its chunks are read; small tensors that lie side by side share blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.checkpoint.source import TensorSource, collect_hints

BLOCK_BYTES = 8_000_000
SMALL_BYTES = 4_096
_GAP_BYTES = 65_536  # a shorter gap between two ranges is downloaded with them
_MOST_RANGES = 1_000  # of one file: rows in another order may be a hundred thousand


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor that is read: its number, its inputs, and whether it is read again later, under the same number."""

    number: int
    sources: Sequence[TensorSource]
    is_again_later: bool = False


@dataclass(slots=True, eq=False)
class Block:
    """Bytes [start, stop) of a file (by number), of which the tensors that are read need `needed`, each time.

    `uses` are the times to come that are not announced yet, `unread` the bytes still to be read of those that are,
    `unforgotten` the bytes that are still to be forgotten. While it is downloaded or here it has an `age`, and a place:
    `slot` in the spool, or `data` if it is small. `twin` is an older block of the same bytes, which it counts as.
    """

    file: int
    start: int
    stop: int
    needed: int = 0
    uses: int = 1
    unread: int = 0
    unforgotten: int = 0
    age: int = -1
    slot: int | None = None
    data: bytearray | None = None
    arrived: int = 0
    readers: int = 0
    twin: Block | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_small(self) -> bool:
        return self.size <= SMALL_BYTES

    @property
    def is_live(self) -> bool:
        return self.age >= 0

    @property
    def is_here(self) -> bool:
        return self.is_live and self.arrived == self.size

    @property
    def is_idle(self) -> bool:
        """Whether it may make room for others."""
        return self.is_here and not self.readers and self.unread <= 0


def in_order(uses: Iterable[Use], numbers: dict[Any, int]) -> Iterator[list[Block]]:
    """The blocks of these uses, of the files that have `numbers`. A tensor that is read again has the same blocks
    again; tensors that are read once share blocks."""
    kept: dict[int, list[Block]] = {}
    group = _Ranges(numbers)
    for use in uses:
        again = kept.pop(use.number, None)
        alone = again is not None or use.is_again_later
        if group.nbytes and (alone or group.is_full):
            yield group.blocks(1)
            group = _Ranges(numbers)
        if again is not None:
            yield again
            continue
        for source in use.sources:
            collect_hints(source, group.add)
        if alone:
            kept[use.number] = group.blocks(2)
            group = _Ranges(numbers)
            yield kept[use.number]
    if group.nbytes:
        yield group.blocks(1)


class _Ranges:
    """Ranges of files, joined where they touch: [start, stop, bytes needed of these], by file."""

    def __init__(self, numbers: dict[Any, int]) -> None:
        self._numbers = numbers
        self._by_file: dict[int, list[list[int]]] = {}
        self.nbytes = 0

    @property
    def is_full(self) -> bool:
        return self.nbytes >= BLOCK_BYTES * len(self._by_file)

    def add(self, file: Any, offset: int, length: int) -> None:
        if (number := self._numbers.get(file)) is None:
            return  # a local file
        self.nbytes += length
        ranges = self._by_file.setdefault(number, [])
        if ranges and ranges[-1][0] <= offset and offset - ranges[-1][1] <= _GAP_BYTES:
            ranges[-1][1] = max(ranges[-1][1], offset + length)
            ranges[-1][2] += length
            return
        ranges.append([offset, offset + length, length])
        if len(ranges) > _MOST_RANGES:
            ranges[:] = _joined(ranges, _GAP_BYTES)
        if len(ranges) > _MOST_RANGES // 2:
            ranges[:] = _joined(ranges, ranges[-1][1])

    def blocks(self, uses: int) -> list[Block]:
        """All blocks, those of several files in turn."""
        placed: list[tuple[float, int, Block]] = []
        for order, (number, ranges) in enumerate(self._by_file.items()):
            blocks = [block for one in _joined(ranges, _GAP_BYTES) for block in _cut(number, one, uses)]
            total, done = sum(block.size for block in blocks), 0
            for block in blocks:
                placed.append((done / total, order, block))
                done += block.size
        return [block for _, _, block in sorted(placed, key=lambda one: one[:2])]


def _joined(ranges: Sequence[list[int]], gap: int) -> list[list[int]]:
    """The ranges in order, those with at most `gap` bytes between them as one."""
    joined: list[list[int]] = []
    for start, stop, needed in sorted(ranges):
        if joined and start - joined[-1][1] <= gap:
            joined[-1][1] = max(joined[-1][1], stop)
            joined[-1][2] += needed
        else:
            joined.append([start, stop, needed])
    return joined


def _cut(file: int, joined: Sequence[int], uses: int) -> Iterator[Block]:
    """One range as blocks of about the same size."""
    start, stop, needed = joined
    count = -(-(stop - start) // BLOCK_BYTES)
    for number in range(count):
        begin, end = (start + (stop - start) * n // count for n in (number, number + 1))
        share = needed * (end - begin) // (stop - start)
        yield Block(file, begin, end, needed=share, uses=uses, unforgotten=share)
