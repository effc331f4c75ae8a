"""The problems that the check of an output has found so far, and the comparison of bytes with a file's. Only reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from merge_tool.checkpoint.source import ByteSource
from merge_tool.errors import shown
from merge_tool.plan.plan import TensorJob
from merge_tool.progress import Progress

_PIECE = 1 << 20
_MOST = 50  # at most so many problems are named; the others are counted


@dataclass
class Checks:
    """The problems and counts of one output's check so far."""

    num_files: int = 0
    nbytes: int = 0
    num_compared: int = 0
    problems: list[str] = field(default_factory=list)
    more: int = 0
    progress: Progress = field(default_factory=lambda: Progress("none"))

    def add(self, problem: str) -> None:
        if len(self.problems) < _MOST:
            self.problems.append(problem)
        else:
            self.more += 1


def check_bytes(
    checks: Checks,
    file: ByteSource,
    offset: int,
    expected: memoryview,
    what: str,
    room: bytearray | None = None,
    job: TensorJob | None = None,
) -> bool:
    """Compare `expected` with the file's bytes from `offset` on."""
    position = first_difference(file, offset, expected, room if room is not None else bytearray(_PIECE))
    if position is None:
        return True
    where = f"byte {position:,}"
    if job is not None:
        where = f"element {(position - job.out.offset) // (job.out.nbytes // job.out.numel):,}"
    checks.add(f"{shown(file.name)}: {shown(what)} is not the merge of these parents: {where} differs.")
    return False


def first_difference(file: ByteSource, offset: int, expected: memoryview, room: bytearray) -> int | None:
    """The offset in the file of the first byte that is not as expected; None if there is none."""
    for start in range(0, len(expected), len(room)):
        piece = expected[start : start + len(room)]
        view = memoryview(room)[: len(piece)]
        file.read_into(offset + start, view)
        file.forget(offset + start, len(view))
        if view != piece:
            return offset + start + next(k for k, (a, b) in enumerate(zip(view, piece, strict=True)) if a != b)
    return None


__all__ = ["Checks", "check_bytes", "first_difference"]
