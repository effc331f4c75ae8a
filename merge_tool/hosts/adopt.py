"""Receipts -> the journal: finished pieces become finished shards of an ordinary merge, which then continues."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from merge_tool.checkpoint.source import sha256_of
from merge_tool.errors import OutputError, RecipeError, input_failed, shown
from merge_tool.hosts.pieces import Piece
from merge_tool.hosts.plan_file import PlanFile, absent, read_plan_file
from merge_tool.hosts.receipts import PLAN, PartsFolder, Receipt
from merge_tool.output.complete import is_complete
from merge_tool.output.folders import PARTS
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan.plan import ShardPlan
from merge_tool.plan.prepare import Prepared
from merge_tool.run.findings import Findings

_READ_BYTES = 1 << 20


def adopt_parts(work: WorkFolder, plan_file: PlanFile, *, fill: bool, check: bool = False) -> None:
    """Take all finished pieces into the merge of `work`. The SHA-256 of a shard is computed again with `check`, and
    always if several workers wrote the shard.

    Raises OutputError if a piece lacks its receipt or its file, or does not match its receipt. With `fill`, this
    process makes such shards instead.
    """
    parts, lacking = PartsFolder(work.path, plan_file, work.plan.labels), list[int]()
    shards = {
        shard.number: [number for number, piece in enumerate(plan_file.pieces) if piece.shard == shard.number]
        for shard in work.plan.shards
        if shard.number not in work.done_shards
    }
    if not fill:
        lacking = parts.missing(number for numbers in shards.values() for number in numbers)
        shards = {} if lacking else shards  # nothing is moved before everything is there
    for shard, numbers in shards.items():
        try:
            bad = _adopt(work, work.plan.shards[shard], parts, numbers, check=check)
        except OutputError:
            if not fill:
                raise
            bad = numbers
        lacking += bad
    if lacking and not fill:
        raise OutputError(
            f"{shown(work.target.path)}: {len(lacking):,} of {len(plan_file.pieces):,} pieces are not finished: "
            f"{absent(plan_file, lacking)}. Run their workers again (merge-tool work), or give --fill to make them "
            "here. If other hosts have finished them, these hosts do not write into this folder."
        )


def check_finished(prepared: Prepared, plan_file: PlanFile) -> None:
    """Raise OutputError unless OUT holds the complete merge of this plan."""
    try:
        if is_complete(prepared):
            return
    except OutputError as e:
        why: OutputError | None = e
    else:
        why = None
    target = prepared.target
    raise PartsFolder(target.work, plan_file, prepared.plan.labels).not_planned(target.path) from why


def has_ended(prepared: Prepared, plan_file: PlanFile, work: WorkFolder) -> bool:
    """Whether the merge of this plan is finished. If not, its parts are in `work`, or it is half published.

    Raises OutputError if OUT is not the folder of this plan, and changes nothing there.
    """
    is_planned = PartsFolder(work.path, plan_file, prepared.plan.labels).is_planned()
    if is_planned or work.is_half_published():
        return False
    try:
        check_finished(prepared, plan_file)
    finally:
        if next(work.journal.records(), None) is None:  # it has only a publishing's rest, or what this run just made
            work.discard()
    return True


def adopt_planned(work: WorkFolder, *, check: bool = False) -> None:
    """Take the whole shards of this merge that workers have finished, by any plan."""
    for copy in sorted((work.path / PARTS).glob(f"*/{PLAN}")):
        with contextlib.suppress(RecipeError):  # another version's, or another merge's
            plan_file = read_plan_file(copy)
            plan_file.check_versions()
            plan_file.check(work.plan, work.samples)
            adopt_parts(work, plan_file, fill=True, check=check)


def _adopt(work: WorkFolder, shard: ShardPlan, parts: PartsFolder, numbers: Sequence[int], *, check: bool) -> list[int]:
    """Take one shard if all its pieces are there. Returns the missing pieces."""
    receipts = {number: parts.read(number) for number in numbers}
    whole = len(numbers) == 1
    there = parts.files(numbers[0])
    lacking = [n for n in numbers if not parts.is_done(n) or not _covers(receipts[n], shard, parts)]
    if lacking:
        return lacking
    known = [receipt for receipt in receipts.values() if receipt is not None]
    pieces = [parts.plan.pieces[number] for number in numbers]
    digests = []
    for output, path in enumerate(there):
        if whole and not check:
            digests.append(known[0].sha256[output])
            continue
        try:
            digest, of_pieces = _digests(path, shard, pieces)
        except OSError as e:
            raise input_failed(path, e) from e
        bad = [n for n, receipt, d in zip(numbers, known, of_pieces, strict=True) if receipt.sha256[output] != d]
        if bad:
            raise OutputError(
                f"{shown(path)}: the bytes of {absent(parts.plan, bad)} do not match the receipt: the file was damaged "
                "or replaced. Remove the receipt, and run that part's worker again, or give --fill."
            )
        digests.append(digest)
    findings = Findings()
    for number, finding in sorted((pair for receipt in known for pair in receipt.findings), key=lambda pair: pair[0]):
        findings.add(number, finding)
    work.adopt(shard, there, digests, findings)
    return []


def _covers(receipt: Receipt | None, shard: ShardPlan, parts: PartsFolder) -> bool:
    """Whether a receipt has a finding for each of its piece's tensors, and a digest for each output."""
    if receipt is None:
        return False
    piece = parts.plan.pieces[receipt.piece]
    numbers = {job.number for job in shard.jobs[piece.start : piece.stop]}
    return numbers == {number for number, _ in receipt.findings}


def _digests(path: Path, shard: ShardPlan, pieces: Sequence[Piece]) -> tuple[str, list[str]]:
    """The SHA-256 of a file and of each piece's bytes in it (the first has the header), in one read."""
    if len(pieces) == 1:
        digest = sha256_of(path)
        return digest, [digest]
    ends = [shard.jobs[piece.stop].out.offset for piece in pieces[:-1]] + [shard.size]
    whole, of_pieces = hashlib.sha256(), []
    with path.open("rb", buffering=0) as file:
        for end in ends:
            part = hashlib.sha256()
            for data in _read_until(file, end):
                part.update(data)
                whole.update(data)
            of_pieces.append(part.hexdigest())
    return whole.hexdigest(), of_pieces


def _read_until(file: IO[bytes], end: int) -> Iterator[bytes]:
    while (count := min(_READ_BYTES, end - file.tell())) > 0:
        data = file.read(count)
        if not data:
            return
        yield data
