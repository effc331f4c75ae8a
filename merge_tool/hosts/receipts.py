"""A receipt for every finished piece: `NAME.done.json`, whole or absent, written after the piece's data is synced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, output_failed, reason, shown
from merge_tool.files import write_whole
from merge_tool.hosts.plan_file import PlanFile
from merge_tool.output.folders import FILES, PARTS
from merge_tool.run.findings import Finding, Findings, from_record, to_record


@dataclass(frozen=True, slots=True)
class Receipt:
    """A finished piece: the SHA-256 of its bytes in each output, and what was found of its tensors, by number."""

    piece: int
    sha256: tuple[str, ...]
    findings: tuple[tuple[int, Finding], ...]


class PartsFolder:
    """The folder in the work folder of OUT where workers put pieces and receipts: `0/NAME` is a file of the first
    output. A piece that is part of a shard is written into its place in that file."""

    def __init__(self, work: Path, plan: PlanFile, labels: Sequence[str]) -> None:
        self.path, self.plan, self.labels = work / PARTS, plan, labels
        self._adopted = work / FILES

    def file(self, output: int, piece: int) -> Path:
        """The file that has a piece's bytes."""
        return self.path / str(output) / self.plan.shards[self.plan.pieces[piece].shard][0]

    def files(self, piece: int) -> list[Path]:
        """The files that have a piece's bytes, one an output: here, or where a finish has moved them."""
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
        """A piece's receipt; None if there is none. Raises OutputError for one that is torn, or of another plan."""
        path = self.receipt(piece)
        try:
            stored: Any = json.loads(path.read_bytes())
            if stored["plan_sha256"] != self.plan.sha256 or stored["piece"] != piece:
                raise OutputError(
                    f"{shown(path)}: is a receipt of another plan. Remove it, then run the worker of that part again."
                )
            findings = tuple((int(n), from_record(record)) for n, record in stored["findings"].items())
            return Receipt(piece, tuple(map(str, stored["sha256"])), findings)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise output_failed(path, e) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise OutputError(
                f"{shown(path)}: is a damaged receipt ({reason(e)}). Remove it, then run the worker of that part again."
            ) from e

    def is_done(self, piece: int) -> bool:
        """Whether a piece has its receipt, and its files their sizes."""
        size = self.plan.shards[self.plan.pieces[piece].shard][1]
        has_files = all(path.is_file() and path.stat().st_size == size for path in self.files(piece))
        return self.read(piece) is not None and has_files

    def missing(self, pieces: Iterable[int]) -> list[int]:
        """The pieces that are not finished. Raises OutputError for receipts that are damaged or another plan's."""
        return [piece for piece in pieces if not self.is_done(piece)]
