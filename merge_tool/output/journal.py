"""The journal of a merge: what is finished, in lines of JSON that survive a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_tool.errors import output_failed


class Journal:
    """Append-only lines of JSON. A last line that a crash cut short does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[dict[str, Any]]:
        """The complete records, in order; nothing for a journal that is missing or not ours."""
        try:
            with self.path.open("rb") as lines:
                for line in lines:
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError):
                        return
                    if not line.endswith(b"\n") or not isinstance(record, dict):
                        return
                    yield record
        except FileNotFoundError:
            return
        except OSError as e:
            raise output_failed(self.path, e) from e

    def trim(self) -> None:
        """Drop a last line that a crash cut short, so that the next one starts a line of its own."""
        with self.path.open("r+b") as file:
            content = 0
            for line in file:
                content += len(line) if line.endswith(b"\n") else 0
            file.truncate(content)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and make them durable."""
        try:
            with self.path.open("ab") as file:
                for record in records:
                    file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise output_failed(self.path, e) from e
