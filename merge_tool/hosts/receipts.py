"""A receipt for every finished piece: `NAME.done.json`, whole or absent, written after the piece's data is synced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, RecipeError, output_failed, reason, shown
from merge_tool.files import write_whole
from merge_tool.hosts.plan_file import PlanFile, read_plan_file
from merge_tool.output.folders import FILES, PARTS
from merge_tool.run.findings import Finding, Findings, from_record, to_record

PLAN = "plan.json"  # the copy of the plan in the parts' folder
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """A finished piece: the SHA-256 of its bytes in each output, and the findings of its tensors, by number."""

    piece: int
    sha256: tuple[str, ...]
    findings: tuple[tuple[int, Finding], ...]


class PartsFolder:
    """The folder in the work folder of OUT where workers put pieces and receipts: `0/NAME` is a file of the first
    output. A piece that is part of a shard is written at its offset in the shard's file.

    Each plan has a folder of its own. Only `share_plan` makes it, never a worker. So if OUT is planned anew or
    finished, a worker that still runs cannot write into the new work.
    """

    def __init__(self, work: Path, plan: PlanFile, labels: Sequence[str]) -> None:
        self.path, self.plan, self.labels = work / PARTS / plan.sha256[:16], plan, labels
        self._adopted = work / FILES

    def is_planned(self) -> bool:
        """Whether the plan's folder is there, with its copy of the plan."""
        try:
            return read_plan_file(self.path / PLAN).sha256 == self.plan.sha256
        except RecipeError:
            return False

    def not_planned(self, out: Path) -> OutputError:
        """The error for an OUT that is not the folder of this plan."""
        return OutputError(
            f"{shown(out)}: is not the folder in which this merge was planned: {shown(self.path / PLAN)} is missing. "
            "Either this host does not see that folder, or the merge was finished, or planned anew. All hosts need a "
            "shared folder as OUT."
        )

    def file(self, output: int, piece: int) -> Path:
        """The file that has a piece's bytes."""
        return self.path / str(output) / self.plan.shards[self.plan.pieces[piece].shard][0]

    def files(self, piece: int) -> list[Path]:
        """The files that have a piece's bytes, one for each output: here, or where `merge-tool finish` moved them."""
        name = self.file(0, piece).name
        moved = [self._adopted / label / name for label in self.labels]
        ours = [self.file(output, piece) for output in range(len(self.labels))]
        return [path if path.is_file() else other for path, other in zip(ours, moved, strict=True)]

    def receipt(self, piece: int) -> Path:
        name, whole = self.file(0, piece).name, self.plan.is_whole(self.plan.pieces[piece])
        return self.path / (f"{name}.done.json" if whole else f"{name}.{self.plan.pieces[piece].start}.done.json")

    def claim(self, piece: int) -> Path:
        return self.receipt(piece).with_suffix(".claim")

    def write(self, piece: int, sha256: Iterable[str], findings: Findings, run: str) -> None:
        """Write a piece's receipt, whole. Raises OutputError."""
        path = self.receipt(piece)
        content = {
            "plan_sha256": self.plan.sha256,
            "piece": piece,
            "sha256": list(sha256),
            "findings": {str(n): to_record(findings[n]) for n in sorted(findings)},
        }
        try:
            write_whole(path, [json.dumps(content).encode()], path.with_name(f"{path.name}.{run}.part"))
        except OSError as e:
            raise output_failed(path, e) from e

    def read(self, piece: int) -> Receipt | None:
        """A piece's receipt; None if there is none. Raises OutputError if it is torn, or of another plan."""
        path = self.receipt(piece)
        try:
            stored: Any = json.loads(path.read_bytes())
            if stored["plan_sha256"] != self.plan.sha256 or stored["piece"] != piece:
                raise OutputError(
                    f"{shown(path)}: is a receipt of another plan. Remove it, then run the worker of that part again."
                )
            findings = tuple((int(n), from_record(record)) for n, record in stored["findings"].items())
            digests = stored["sha256"]
            if len(digests) != len(self.labels) or not all(map(_DIGEST.fullmatch, digests)):
                raise ValueError("it has no SHA-256 for each output")
            return Receipt(piece, tuple(digests), findings)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise output_failed(path, e) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise OutputError(
                f"{shown(path)}: is a damaged receipt ({reason(e)}). Remove it, then run the worker of that part again."
            ) from e

    def is_done(self, piece: int) -> bool:
        """Whether a piece has its receipt, and its files have their sizes."""
        size = self.plan.shards[self.plan.pieces[piece].shard][1]
        has_files = all(path.is_file() and path.stat().st_size == size for path in self.files(piece))
        return self.read(piece) is not None and has_files

    def missing(self, pieces: Iterable[int]) -> list[int]:
        """The pieces that are not finished. Raises OutputError for receipts that are damaged or of another plan."""
        return [piece for piece in pieces if not self.is_done(piece)]
