"""The folder of a search: its lock, the sums of the first merge, and the files with the results so far. Every file
appears whole."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, shown
from merge_tool.files import write_whole
from merge_tool.output.lock import FolderLock
from merge_tool.output.older import strangers
from merge_tool.sweeps.journal import JOURNAL
from merge_tool.sweeps.search_results import CHOSEN, FRONT, RESULT, TABLE, SearchReport
from merge_tool.sweeps.study import STUDY

_HIDDEN, _OWNER, _TESTS = ".search", "owner.txt", "test.json"


class SearchFolder:
    """OUT, made and locked. With `overwrite` the search in it is removed. Raises OutputError if OUT holds something
    else, or if another process works in it."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        path.mkdir(parents=True, exist_ok=True)
        is_ours = any((path / name).exists() for name in (_OWNER, STUDY, JOURNAL))
        if not is_ours and (others := strangers(path, [_HIDDEN], ())):
            raise OutputError(
                f"{shown(path)}: is not empty ({shown(others[0])}) and holds no search. Choose another folder."
            )
        (path / _HIDDEN).mkdir(exist_ok=True)
        self.path, self._lock = path, FolderLock(path / _HIDDEN)
        if overwrite:
            for name in (STUDY, f"{STUDY}-journal", CHOSEN, TABLE, RESULT, _TESTS):
                (path / name).unlink(missing_ok=True)
            for sums in path.glob("sums-*.json"):
                sums.unlink()
            shutil.rmtree(path / FRONT, ignore_errors=True)

    def __enter__(self) -> SearchFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.remove_with(self.path / _HIDDEN)

    def beat(self) -> None:
        """Show other machines that this search works."""
        self._lock.owner.beat()

    def owner(self) -> str:
        """A name for this OUT among the hosts of a study."""
        path = self.path / _OWNER
        if not path.exists():
            self._write(_OWNER, secrets.token_hex(8).encode())
        return path.read_text(encoding="ascii", errors="replace").strip()

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, [content], self.path / _HIDDEN / f"{Path(name).name}.part")

    # ---------------------------------------------------------------------------------------- sums

    def sums(self, facts: Mapping[str, Any]) -> Path | None:
        """The report of the first merge of a search with these facts, if its content matches the digest in its
        name."""
        for path in self.path.glob(f"{_stem(facts)}*.json"):
            if path.name == _sums_name(facts, path.read_bytes()):
                return path
            path.unlink()
        return None

    def keep_sums(self, facts: Mapping[str, Any], report: bytes) -> None:
        self._write(_sums_name(facts, report), report)

    # ------------------------------------------------------------------------------------- results

    def write_report(self, report: SearchReport, texts: Mapping[int, str]) -> None:
        """Table, front and chosen recipe; `texts` are the recipes of the front, by the candidates' numbers."""
        self._write(TABLE, report.as_csv().encode())
        self._write(RESULT, (json.dumps(report.as_json(), indent=1) + "\n").encode())
        if report.chosen is None:
            return
        front, names = self.path / FRONT, {f"candidate-{number}.yaml": text for number, text in texts.items()}
        front.mkdir(exist_ok=True)
        for path in front.glob("candidate-*.yaml"):
            if path.name not in names:
                path.unlink()
        for name, text in names.items():
            if not (front / name).exists() or (front / name).read_bytes() != text.encode():
                self._write(f"{FRONT}/{name}", text.encode())
        self._write(CHOSEN, texts[report.chosen].encode())

    def tests(self, command: Sequence[str]) -> dict[int, dict[str, float]]:
        """This command's scores on test data, for each candidate that it has scored."""
        return {one["candidate"]: one["scores"] for one in self._tests() if one["command"] == list(command)}

    def add_test(self, number: int, command: Sequence[str], scores: Mapping[str, float]) -> None:
        entry = {"candidate": number, "command": list(command), "scores": dict(scores)}
        self._write(_TESTS, (json.dumps([*self._tests(), entry], indent=1) + "\n").encode())

    def _tests(self) -> list[dict[str, Any]]:
        path = self.path / _TESTS
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
        except ValueError as e:
            raise OutputError(f"{shown(path)}: is damaged. Remove it; the chosen model is then tested again.") from e


def _stem(facts: Mapping[str, Any]) -> str:
    return f"sums-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}-"


def _sums_name(facts: Mapping[str, Any], report: bytes) -> str:
    return f"{_stem(facts)}{hashlib.sha256(report).hexdigest()[:32]}.json"
