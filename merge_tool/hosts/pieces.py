"""Cut a plan into pieces and share them out. A piece is a shard, or, if there are few shards, some tensors of one."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge_tool.plan.plan import MergePlan, ShardPlan


@dataclass(frozen=True, slots=True)
class Piece:
    """The tensors [start, stop) of a shard, in the file's order. `read_bytes` is the size of all their inputs."""

    shard: int
    start: int
    stop: int
    read_bytes: int


def cut(plan: MergePlan, parts: int) -> tuple[Piece, ...]:
    """The pieces of a plan for so many workers: a piece is a shard; if there are fewer shards than workers, a large
    shard becomes several pieces of about the same size. A tensor is never cut."""
    sizes = [[job.input_nbytes for job in shard.jobs] for shard in plan.shards]
    most = float("inf") if len(sizes) >= parts else sum(map(sum, sizes)) / parts
    pieces = []
    for shard, of_jobs in enumerate(sizes):
        start, filled = 0, 0
        for k, nbytes in enumerate(of_jobs):
            if k > start and filled + nbytes / 2 > most:
                pieces.append(Piece(shard, start, k, filled))
                start, filled = k, 0
            filled += nbytes
        pieces.append(Piece(shard, start, len(of_jobs), filled))
    return tuple(pieces)


def share_out(pieces: Sequence[Piece], parts: int) -> list[list[int]]:
    """The numbers of each part's pieces, so that all parts read about as much: the largest piece goes to the part that
    has least so far (R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", 1969)."""
    least = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(pieces)), key=lambda k: (-pieces[k].read_bytes, k)):
        filled, part = heapq.heappop(least)
        shares[part].append(number)
        heapq.heappush(least, (filled + pieces[number].read_bytes, part))
    return [sorted(share) for share in shares]


def shard_of(plan: MergePlan, piece: Piece) -> ShardPlan:
    """A piece as a shard of its own; its tensors keep their offsets in the whole shard."""
    shard = plan.shards[piece.shard]
    return replace(shard, jobs=shard.jobs[piece.start : piece.stop])
