"""Many checkpoints of one layout, such as those of a training run: what they share is kept once, and few of their files
are open at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint, FileTensor
from merge_tool.checkpoint.source import ByteSource, TensorSource

MOST_OPEN = 64  # inputs of one tensor; more of them are opened for each chunk. Many systems allow 256 open files


class AlikeSources(Sequence[TensorSource]):
    """One tensor in many files, at one place in each: a few dozen bytes, however many files there are."""

    __slots__ = ("_files", "_info")

    def __init__(self, info: TensorInfo, files: tuple[ByteSource, ...]) -> None:
        self._info, self._files = info, files

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[TensorSource]:
        return (FileTensor(self._info, file) for file in self._files)

    @overload
    def __getitem__(self, index: int) -> TensorSource: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorSource]: ...

    def __getitem__(self, index: int | slice) -> TensorSource | Sequence[TensorSource]:
        if isinstance(index, slice):
            return tuple(FileTensor(self._info, file) for file in self._files[index])
        return FileTensor(self._info, self._files[index])


class Shelf:
    """Makes AlikeSources of sources that allow it; tensors that lie in the same files share the list of files."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, ...], tuple[ByteSource, ...]] = {}

    def sources(self, sources: Sequence[TensorSource]) -> Sequence[TensorSource]:
        """The same sources. Three and more that are plain files with one entry in their headers take little memory."""
        first = sources[0]
        if len(sources) < 3 or not isinstance(first, FileTensor):
            return sources
        files = []
        for source in sources:
            if not isinstance(source, FileTensor) or source.info is not first.info or source.written_as is not None:
                return sources
            files.append(source.file)
        return AlikeSources(first.info, self._files.setdefault(tuple(map(id, files)), tuple(files)))


def share_entries(models: Sequence[Checkpoint]) -> None:
    """Let the last of `models` share the header's entries with the first, if they are equal: of 200 checkpoints with
    10,000 tensors, one set is kept."""
    first, last = models[0].tensors, models[-1].tensors
    if last is first or len(last) != len(first):
        return
    if all(first.get(name) == info for name, info in last.items()) and list(first) == list(last):
        models[-1].tensors = first


def to_hold(sources: Sequence[TensorSource]) -> Sequence[TensorSource]:
    """The sources to keep open while a tensor is read: of very many, those that are more than bytes of a file."""
    return sources if len(sources) <= MOST_OPEN else [one for one in sources if not isinstance(one, FileTensor)]
