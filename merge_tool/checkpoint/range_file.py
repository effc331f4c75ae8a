"""Files on servers, read like local ones: their bytes come block by block, ahead of the reader, in the plan's order.

The blocks that the next tensors need are downloaded (by a process of its own, fetcher.py) into the spool, a file
without a name and of bounded size; they stay there until the reader forgets them. If a tensor is read twice and the
spool is too small for it, the blocks whose next use is furthest away are downloaded again.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from merge_tool.checkpoint import blocks
from merge_tool.checkpoint.blocks import SMALL_BYTES, Block, Use, in_order
from merge_tool.checkpoint.fetcher import SMALL_DOWNLOADS, Fetcher
from merge_tool.checkpoint.source import ComingFile, is_collected
from merge_tool.errors import FetchError, reason, shown

_MOST_SMALL = 2_048  # small blocks that are here at a time, at most
_LOOK_AHEAD = 64  # uses that are looked through for a block that is read before its turn


class RangeFile:
    """A ByteSource: one file on a server. Its first bytes are here already."""

    def __init__(self, ranges: Ranges, number: int, coming: ComingFile) -> None:
        self.path, self.name, self.size, self.number = coming.path, coming.name, coming.size, number
        self.mtime_ns, self.digest = coming.mtime_ns, coming.digest
        self._ranges, self._coming = ranges, coming

    def read_into(self, offset: int, buffer: memoryview) -> None:
        room = buffer.cast("B")
        if offset + len(room) <= self._coming.length:
            self._coming.read_into(offset, room)
        elif len(room):
            self._ranges.read_into(self, offset, room)

    def acquire(self) -> None:
        """Nothing is opened."""

    def release(self) -> None:
        """Nothing was opened."""

    def prefetch(self, offset: int, length: int) -> None:
        if not is_collected(self, offset, length) and 0 < length <= SMALL_BYTES:
            self._ranges.prefetch(self, offset, offset + length)

    def forget(self, offset: int, length: int) -> None:
        self._ranges.forget(self, offset, offset + length)


@dataclass(slots=True)
class Traffic:
    """What was asked for: bytes and ranges; and the most bytes of the spool's file."""

    nbytes: int = 0
    ranges: int = 0
    spool_bytes: int = 0


class Ranges:
    """All files of a merge that are read by range; see the top of this file. Safe from several threads.

    `downloads` ranges are in flight. The spool takes at most `slots` blocks, in `folder`.
    """

    def __init__(self, *, downloads: int, slots: int, folder: Path) -> None:
        self.downloads, self.slots, self.traffic = downloads, slots, Traffic()
        self._slot_bytes = blocks.BLOCK_BYTES
        self._changed = threading.Condition()
        self._files: list[RangeFile] = []
        self._live: list[list[Block]] = []  # by file: the blocks that are here or on their way
        self._on_the_way: dict[int, Block] = {}
        self._free: list[int] = []
        self._opened_slots = self._age = self._num_small = self._small_on_the_way = 0
        self._small_waiting: deque[Block] = deque()
        self._coming: deque[Block] = deque()  # the next blocks in the order of their use
        self._uses: Iterator[list[Block]] = iter(())
        self._error: str | None = None
        try:
            self._spool = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close
        except OSError as e:
            raise FetchError(f"{shown(folder)}: no temporary file can be made for the spool ({reason(e)}).") from e
        with ExitStack() as held:  # closed if a thread cannot be started
            held.callback(self._spool.close)
            self._fetcher = Fetcher(downloads)
            held.callback(self._fetcher.close)
            receive, arguments = self._fetcher.receive, (self._on_piece, self._on_refusal)
            self._thread = threading.Thread(target=receive, args=arguments, daemon=True)
            self._thread.start()
            held.pop_all()

    def add(self, files: Sequence[ComingFile]) -> list[RangeFile]:
        """The files, to be read by range."""
        new = [RangeFile(self, number, file) for number, file in enumerate(files, len(self._files))]
        self._fetcher.add_files(
            [{"place": asdict(file.place), "size": file.size, "etag": file.etag} for file in files if file.place]
        )
        self._files += new
        self._live += [[] for _ in new]
        return new

    def close(self) -> None:
        with self._changed:
            self._error = self._error or "The download was given up."
            self._changed.notify_all()
        self._fetcher.close()
        self._thread.join(5)
        self._spool.close()

    # ---------------------------------------------------------------------------------- what is read

    def read_ahead(self, uses: Iterable[Use]) -> None:
        """Download ahead for these tensors, in this order."""
        with self._changed:
            self._uses = in_order(uses, {file: file.number for file in self._files})
            self._pump()

    def prefetch(self, file: RangeFile, start: int, stop: int) -> None:
        """Fetch a few bytes that are read soon, if there is room for them."""
        with self._changed:
            if self._error is None and self._num_small < _MOST_SMALL and self._at(file.number, start) is None:
                self._want(Block(file.number, start, stop, unread=stop - start, unforgotten=stop - start, uses=0))

    def read_into(self, file: RangeFile, offset: int, room: memoryview) -> None:
        """Fill `room` from byte `offset` of a file on. Raises FetchError."""
        done = 0
        while done < len(room):
            position = offset + done
            with self._changed:
                block = self._at(file.number, position) or self._missed(file.number, position, offset + len(room))
                block.readers += 1
                count = min(block.stop, offset + len(room)) - position
                try:
                    self._await(block, position - block.start + count)
                except BaseException:
                    block.readers -= 1
                    raise
            try:
                self._copy(block, position - block.start, room[done : done + count])
            finally:
                with self._changed:
                    block.readers -= 1
                    block.unread -= count
                    self._settle(block)
            done += count

    def forget(self, file: RangeFile, start: int, stop: int) -> None:
        """These bytes are not read again."""
        with self._changed:
            for block in [one for one in self._live[file.number] if one.start < stop and start < one.stop]:
                block.unforgotten -= min(stop, block.stop) - max(start, block.start)
                self._settle(block)

    def _copy(self, block: Block, start: int, room: memoryview) -> None:
        if block.data is not None:
            room[:] = memoryview(block.data)[start : start + len(room)]
            return
        assert block.slot is not None
        done, position = 0, block.slot * self._slot_bytes + start
        try:
            while done < len(room):
                if not (count := _read_some(self._spool.fileno(), position + done, room[done:], self._changed)):
                    raise FetchError("The spool was cut short. Run the same command again: it continues.")
                done += count
        except OSError as e:
            raise FetchError(f"The spool cannot be read ({reason(e)}). Run the same command: it continues.") from e

    # ------------------------------------------------------------------ under the lock: what is where

    def _at(self, file: int, position: int) -> Block | None:
        return next((one for one in self._live[file] if one.start <= position < one.stop), None)

    def _await(self, block: Block, arrived: int) -> None:
        while block.arrived < arrived and self._error is None:
            self._changed.wait(1.0)
        if block.arrived < arrived:
            raise FetchError(self._error)

    def _missed(self, file: int, position: int, stop: int) -> Block:
        """Fetch a block before its turn, or bytes that have none."""
        if self._error is not None:
            raise FetchError(self._error)
        for block in (one for several in self._live for one in several if one.is_here):
            block.unread = min(block.unread, 0)  # the reader is elsewhere
        for _ in range(_LOOK_AHEAD):
            found = next((b for b in self._coming if b.file == file and b.start <= position < b.stop), None)
            if found is not None:
                break
            if (more := next(self._uses, None)) is None:
                break
            self._coming.extend(more)
        else:
            found = None
        if found is None:
            after = min((one.start for one in self._live[file] if one.start > position), default=stop)
            end = min(stop, after, position + self._slot_bytes)
            found = Block(file, position, end, unread=end - position, unforgotten=end - position, uses=0)
        self._want(found)
        return found

    def _want(self, block: Block, slot: int | None = None) -> None:
        """Download a block into `slot`, or whatever must make room for it."""
        self._age += 1
        block.age, block.arrived = self._age, 0
        self._live[block.file].append(block)
        if block.is_small:
            self._num_small += 1
            block.data = bytearray(block.size)
            if self._small_on_the_way >= SMALL_DOWNLOADS:
                self._small_waiting.append(block)
                return
            self._small_on_the_way += 1
        else:
            slot = self._take_slot() if slot is None else slot
            block.slot = self._open_slot() if slot is None else slot
            assert block.size <= self._slot_bytes
        self._ask(block)

    def _ask(self, block: Block) -> None:
        self._on_the_way[block.age] = block
        self.traffic.nbytes += block.size
        self.traffic.ranges += 1
        self._fetcher.ask(block.age, block.file, block.start, block.stop)

    def _take_slot(self) -> int | None:
        """A free slot: one more, or that of an idle block, best of one that is not used again."""
        if self._free:
            return self._free.pop()
        if self._opened_slots < self.slots:
            return self._open_slot()
        idle = [one for several in self._live for one in several if one.is_idle and one.slot is not None]
        if not idle:
            return None
        self._drop(min(idle, key=lambda one: (one.uses > 0, -one.age)))
        return self._free.pop()

    def _open_slot(self) -> int:
        self._opened_slots += 1
        self.traffic.spool_bytes = self._opened_slots * self._slot_bytes
        return self._opened_slots - 1

    def _drop(self, block: Block) -> None:
        self._live[block.file].remove(block)
        if block.slot is not None:
            self._free.append(block.slot)
        else:
            self._num_small -= 1
        block.age, block.slot, block.data = -1, None, None

    def _settle(self, block: Block) -> None:
        """After bytes of a block were read or forgotten: drop it if nobody needs it, and go on."""
        if block.is_live and block.is_here and not block.readers and block.unforgotten <= 0 and not block.uses:
            self._drop(block)
        self._pump()

    def _pump(self) -> None:
        """Announce the next uses, and ask for their blocks, as far as downloads and room allow."""
        while self._error is None:
            if not self._coming:
                if (more := next(self._uses, None)) is None:
                    return
                self._coming.extend(more)
                continue
            block = self._coming[0]
            if block.twin is None and not block.is_live:
                block.twin = self._same(block)
                if block.twin is not None:
                    block.twin.uses += block.uses
                    block.twin.unforgotten += block.unforgotten
            block = block.twin or block
            if not block.is_live:
                ahead = [one for several in self._live for one in several if one.unread > 0 and one.slot is not None]
                if len(self._on_the_way) - self._small_on_the_way >= self.downloads or len(ahead) >= self.slots - 1:
                    return
                slot = None if block.is_small else self._take_slot()
                if (slot is None) != block.is_small or self._num_small >= _MOST_SMALL:
                    return
                self._want(block, slot)
            self._coming.popleft()
            block.uses -= 1
            block.unread += block.needed

    def _same(self, block: Block) -> Block | None:
        return next((b for b in self._live[block.file] if (b.start, b.stop) == (block.start, block.stop)), None)

    # ---------------------------------------------------------------------- from the receiving thread

    def _on_piece(self, number: int, data: memoryview) -> None:
        with self._changed:
            block = self._on_the_way.get(number)
            if block is None or block.arrived + len(data) > block.size:
                self._fail("More bytes arrived than were asked for. This is a bug; please report it.")
                return
        try:
            if block.data is not None:
                block.data[block.arrived : block.arrived + len(data)] = data
            else:
                assert block.slot is not None
                _write_all(self._spool.fileno(), block.slot * self._slot_bytes + block.arrived, data, self._changed)
        except (OSError, ValueError) as e:
            with self._changed:
                self._fail(
                    f"The spool cannot be written ({reason(e)}). Free some space or give a smaller --spool, then run "
                    "the same command: it continues."
                )
            return
        with self._changed:
            block.arrived += len(data)
            if block.is_here:
                del self._on_the_way[number]
                if block.is_small:
                    self._small_on_the_way -= 1
                    if self._small_waiting and self._error is None:
                        self._small_on_the_way += 1
                        self._ask(self._small_waiting.popleft())
                self._settle(block)
            self._changed.notify_all()

    def _on_refusal(self, number: int | None, message: str) -> None:
        with self._changed:
            self._fail(message if number is not None else f"{message}Run the same command again: it continues.")

    def _fail(self, message: str) -> None:
        self._error = self._error or message
        self._changed.notify_all()


def _read_some(fd: int, position: int, room: memoryview, lock: threading.Condition) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [room], position)
    with lock:  # Windows: one shared position
        os.lseek(fd, position, os.SEEK_SET)
        data = os.read(fd, min(len(room), 1 << 20))
    room[: len(data)] = data
    return len(data)


def _write_all(fd: int, position: int, data: memoryview, lock: threading.Condition) -> None:
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(fd, data, position)
        else:
            with lock:  # Windows: one shared position
                os.lseek(fd, position, os.SEEK_SET)
                count = os.write(fd, data)
        data, position = data[count:], position + count
