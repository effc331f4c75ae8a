"""The journal of a merge: finished shards, in lines of JSON that survive a crash."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, output_failed, shown
from merge_tool.files import leads_out, sync_file

_SUM = b', "crc32": "'  # the line's last member; eight digits and `"}` follow, the checksum of the text before it


class Journal:
    """Append-only lines of JSON, each with its checksum. Reading ends at the first line that a crash or a disk
    damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, kind: str = "") -> Iterator[dict[str, Any]]:
        """The complete records in order, of one `kind` if given; none if the journal is missing or has another
        format."""
        try:
            with self.path.open("rb") as lines:
                for line in lines:
                    if kind and f'"record": "{kind}"'.encode() not in line and _is_whole(line):
                        continue
                    if (record := _parsed(line)) is None:
                        return
                    if not kind or record.get("record") == kind:
                        yield record
        except FileNotFoundError:
            return
        except OSError as e:
            raise output_failed(self.path, e) from e

    def publishing(self) -> dict[str, dict[str, list[str]]] | None:
        """The files that the publishing moves and removes, by output; None before it has begun. Raises OutputError for
        names that lead out of OUT."""
        for record in self.records("publish"):
            return {key: inside(self.path, record[key]) for key in ("files", "remove")}
        return None

    def trim(self) -> None:
        """Cut off a damaged end, so that records added later can be read."""
        with self.path.open("r+b") as file:
            content = 0
            for line in file:
                if _parsed(line) is None:
                    break
                content += len(line)
            if content != file.seek(0, os.SEEK_END):  # some file systems refuse even a truncation that changes nothing
                file.truncate(content)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and make them durable."""
        try:
            with self.path.open("ab") as file:
                for record in records:
                    text = json.dumps(record, sort_keys=True).encode()[:-1]
                    file.write(text + _SUM + b'%08x"}\n' % zlib.crc32(text))
                file.flush()
                sync_file(file.fileno())
        except OSError as e:
            raise output_failed(self.path, e) from e


def inside(journal: Path, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files in a journal, by output. Raises OutputError for names that lead out of OUT, because a stranger may have
    made the journal."""
    for label, files in names.items() if isinstance(names, dict) else [("", [str(names)])]:
        for name in files:
            if not isinstance(names, dict) or leads_out(name) or (label and leads_out(label)):
                raise OutputError(
                    f"{shown(journal)}: names {shown(f'{label}/{name}'.lstrip('/'))}, which is not a path inside OUT. "
                    "No merge wrote that. Remove this folder, or choose another OUT."
                )
    return names


def _is_whole(line: bytes) -> bool:
    text, _, end = line.rpartition(_SUM)
    return end == b'%08x"}\n' % zlib.crc32(text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is damaged."""
    if not _is_whole(line):
        return None
    try:
        record: dict[str, Any] = json.loads(line.rpartition(_SUM)[0] + b"}")
    except (ValueError, RecursionError):
        return None
    return record
