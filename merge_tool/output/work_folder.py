"""The output: lock, work folder, journal, publishing. Never a tensor's values.

Work happens in OUT/.slerp-merge/ (for a one-file output, OUT.partial/ beside it). What is finished there is
recorded, synced, in the journal, so that the same command continues after a kill. Publishing renames everything
into place, the index (or the only weights file) last: at no moment does OUT look like a model while it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from merge_tool.checkpoint.source import ByteSource, sha256_of
from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.errors import OutputError, listed, output_failed, shown
from merge_tool.files import part_path, rename_synced, sync_folder
from merge_tool.output.journal import Journal
from merge_tool.output.lock import FolderLock
from merge_tool.output.marks import MARK, check_marks
from merge_tool.output.older import is_model_file, older_labels, outdated, strangers
from merge_tool.plan.plan import MergePlan, ShardPlan, differences
from merge_tool.plan.target import Target
from merge_tool.run.findings import Findings, from_record, to_record
from merge_tool.run.run import ShardDone

_OWN_ENTRIES = frozenset({"lock", "journal.jsonl", "files", MARK})
_LIBRARY_BYTES = 2_000  # bytes that the safetensors library holds for each tensor of an open file, at most


# ------------------------------------------------------------------------------------------ the work


class WorkFolder:
    """The work folder of one merge, locked by this process from creation to `close`. It must not show up in `inputs`,
    and the folders that the outputs' files, `names`, go into must be able to take them.

    The sink of `run_plan`: keeps the finished shards and the findings. `done_shards` are the shards that an earlier run
    finished: those that its journal names, with their size, and with `check_resumed` their SHA-256.
    """

    def __init__(
        self,
        target: Target,
        plan: MergePlan,
        *,
        samples: tuple[str, ...] = (),
        flush_bytes: int | None = None,
        check_resumed: bool = False,
        inputs: Iterable[Path] = (),
        names: Iterable[str] = (),
    ) -> None:
        self.check_resumed = check_resumed
        self.target, self.plan, self.samples, self.flush_bytes = target, plan, samples, flush_bytes
        self.path = target.work
        self.journal = Journal(self.path / "journal.jsonl")
        self.done_shards: frozenset[int] = frozenset()
        self.is_publishing = False
        self._finishing = threading.Lock()
        _refuse_foreign(self.path)
        self._made = _make_folders(self.path)
        try:
            self._lock = FolderLock(self.path)
            self._check_inputs(inputs, names)
        except BaseException:
            _remove_folders(self._made)
            raise

    def _check_inputs(self, inputs: Iterable[Path], names: Iterable[str]) -> None:
        """Raise OutputError if what was just made here shows up in an input: OUT is that input by another name."""
        try:
            check_marks(self._lock, self.target, self.plan.labels, names, inputs)
        except BaseException:
            try:
                if self.path in self._made:
                    self._lock.remove_with(self.path)
            finally:
                self._lock.release()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._lock.release()

    def folder(self, label: str) -> Path:
        return self.path / "files" / label

    # --------------------------------------------------------------------- starting and resuming

    def begin(self, *, overwrite: bool) -> bool:
        """Continue an earlier run of the same merge, or start anew. Returns whether an earlier run is continued.

        Raises OutputError when the work is another merge's, naming what differs, unless `overwrite`; and when it
        was begun with --overwrite, which must then be given again.
        """
        stored = next(self.journal.records(), None)
        if stored is not None and stored.get("record") != "plan":
            stored = None
        ours = self._plan_record(overwrite)
        same = stored is not None and all(stored.get(key) == ours[key] for key in ("facts", "modified", "samples"))
        if stored is not None and not same and not overwrite:
            raise OutputError(
                f"{shown(self.path)}: holds an unfinished merge that differs from this one: "
                f"{_differences(stored, ours)}. Finish that one, or give --overwrite to start anew."
            )
        if stored is not None and same and stored.get("overwrite") and not overwrite:
            raise OutputError(
                f"{shown(self.target.path)}: this merge was begun with --overwrite and is half done. Give it again."
            )
        if same and (lost := self._lost()) is not None:
            if not overwrite:
                raise OutputError(
                    f"{shown(self.target.path)}: was half published, and {shown(lost)} is gone since. "
                    "Give --overwrite to start anew."
                )
            same = False
        try:
            if not same:
                ours["leftover"] = self._leftover(stored)
                self._wipe()
                self.journal.append([ours])
            self.journal.trim()
            for label in self.plan.labels:
                self.folder(label).mkdir(parents=True, exist_ok=True)
            for folder in (self.path / "files", self.path, *(made.parent for made in self._made)):
                sync_folder(folder)  # else a power cut could leave a journal without the folders that it names
            self.done_shards = frozenset(self._recover())
        except OSError as e:
            raise output_failed(self.path, e) from e
        return same

    def _lost(self) -> str | None:
        """A file of a half published model that is neither here nor there any more: going on would publish the rest."""
        moves: dict[str, list[str]] = next(
            (r["files"] for r in self.journal.records() if r.get("record") == "publish"), {}
        )
        for label, names in moves.items():
            for name in names:
                if not (self.folder(label) / name).exists() and not (self._final(label) / name).exists():
                    return name
        return None

    def _leftover(self, stored: Mapping[str, Any] | None) -> dict[str, list[str]]:
        """Files that a publishing which is now given up may have moved into OUT already."""
        left: dict[str, list[str]] = dict((stored or {}).get("leftover", {}))
        for record in self.journal.records():
            if record.get("record") == "publish":
                left |= record["files"]
        return left

    def _plan_record(self, overwrite: bool) -> dict[str, Any]:
        changed = {
            f"{side}/{job_file.name}": job_file.mtime_ns for side, files in self._inputs().items() for job_file in files
        }
        return {
            "record": "plan",
            "facts": dict(self.plan.facts),
            "modified": changed,
            "samples": list(self.samples),
            "overwrite": overwrite,
        }

    def _inputs(self) -> dict[str, list[ByteSource]]:
        sides: dict[str, dict[int, ByteSource]] = {side: {} for side in self.plan.recipe.names}
        for job in self.plan.jobs():
            for side, source in zip(job.sides, job.sources, strict=True):
                for file in source.files:
                    sides[self.plan.recipe.names[side]].setdefault(id(file), file)
        return {side: list(files.values()) for side, files in sides.items()}

    def _wipe(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != FolderLock.NAME:
                entry.unlink()

    def _recover(self) -> Iterator[int]:
        """Shards whose record and files are all there; a rename that a crash prevented is made up for."""
        recorded: dict[int, list[str]] = {}
        for record in self.journal.records():
            if record.get("record") == "shard":
                recorded[record["number"]] = record["sha256"]
            self.is_publishing |= record.get("record") == "publish"
        for shard in self.plan.shards:
            if shard.number not in recorded or not all(self._settle(shard, label) for label in self.plan.labels):
                continue
            if self.check_resumed and not self._has_digests(shard, recorded[shard.number]):
                if self.is_publishing:
                    raise OutputError(
                        f"{shown(self.target.path)}: was half published, and {shown(shard.file_name)} is damaged "
                        "since. Remove the folder and merge again."
                    )
                continue
            yield shard.number

    def _has_digests(self, shard: ShardPlan, expected: list[str]) -> bool:
        """Whether a shard's files are as they were recorded, wherever publishing has moved them."""
        places = ((self.folder(label), self._final(label)) for label in self.plan.labels)
        paths = [(a if (a / shard.file_name).exists() else b) / shard.file_name for a, b in places]
        return [sha256_of(path) for path in paths] == expected

    def _final(self, label: str) -> Path:
        """The folder that an output's files are moved to."""
        return self.target.path.parent if self.target.is_file else self.target.path / label

    def _settle(self, shard: ShardPlan, label: str) -> bool:
        path = self.folder(label) / shard.file_name
        part = part_path(path)
        if not path.exists() and part.exists() and part.stat().st_size == shard.size:
            rename_synced(part, path)
        return self.is_publishing or (path.exists() and path.stat().st_size == shard.size)

    # ----------------------------------------------------------------------------------- the sink

    def open_shard(self, shard: ShardPlan, header: bytearray) -> list[ShardWriter]:
        return [
            ShardWriter(self.folder(label) / shard.file_name, header, flush_bytes=self.flush_bytes)
            for label in self.plan.labels
        ]

    def finish_shard(self, done: ShardDone, writers: list[ShardWriter]) -> None:
        """Record a shard whose files are synced, then give them their names."""
        tensors = ({"record": "tensor", "number": n, **to_record(done.findings[n])} for n in sorted(done.findings))
        last = {"record": "shard", "number": done.shard.number, "sha256": list(done.sha256)}
        with self._finishing:
            self.journal.append(chain(tensors, [last]))
        for writer in writers:
            writer.publish()

    def findings(self) -> Findings:
        """The findings of this run and earlier ones, from the journal."""
        findings = Findings()
        for record in self.journal.records():
            if record.get("record") == "tensor":
                findings.add(record["number"], from_record(record))
        return findings

    def digests(self) -> dict[int, list[str]]:
        """The SHA-256 of every finished shard, one an output."""
        return {r["number"]: r["sha256"] for r in self.journal.records() if r.get("record") == "shard"}

    # --------------------------------------------------------------------------------- side files

    def add(self, label: str, name: str, chunks: Iterable[bytes]) -> str:
        """Write one file into the work folder, synced, with a mode that follows the umask; returns its SHA-256."""
        path, digest = self.folder(label) / name, hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise output_failed(path, e) from e
        return digest.hexdigest()

    # --------------------------------------------------------------------------------- publishing

    def publish(self, *, check_bytes: int) -> list[str]:
        """Move everything into place, the file that makes it a model last, and remove the work folder.

        Before that the safetensors library audits each weight file, if that takes at most `check_bytes` of memory.
        Returns what else lies in OUT: files that are neither the new model's nor an older one's.
        """
        try:
            if not self.is_publishing:
                self._check_with_library(check_bytes // _LIBRARY_BYTES)
                for label in self.plan.labels:
                    for folder in {self.folder(label), *(p for p in self.folder(label).rglob("*") if p.is_dir())}:
                        sync_folder(folder)
                self.journal.append([{"record": "publish", **self._moves()}])
            moves = next(r for r in self.journal.records() if r.get("record") == "publish")
            for label, names in moves["remove"].items():
                self._remove_outdated(label, names, frozenset(moves["files"].get(label, ())))
            for label in self.plan.labels:
                self._move(label, moves["files"][label])
            self._remove_work()
            if self.target.is_file:
                return []
            return strangers(self.target.path, self.plan.labels, moves["files"].get("", ()))
        except OSError as e:
            raise output_failed(Path(e.filename) if isinstance(e.filename, str) else self.path, e) from e

    def _check_with_library(self, most_tensors: int) -> None:
        """Open weight files with the safetensors library: an audit of names, shapes and types by other code."""
        from safetensors import safe_open

        for label in self.plan.labels:
            for shard in self.plan.shards:
                if len(shard.jobs) > most_tensors:
                    continue
                with safe_open(str(self.folder(label) / shard.file_name), framework="numpy") as weights:
                    names = set(weights.keys())
                    slices = ((job, weights.get_slice(job.out.name)) for job in shard.jobs if job.out.name in names)
                    good = sum((tuple(s.get_shape()), s.get_dtype()) == (j.out.shape, j.out.dtype) for j, s in slices)
                if good != len(shard.jobs) or len(names) != good:
                    raise OutputError(
                        f"{shown(shard.file_name)}: safetensors itself finds {good:,} of {len(shard.jobs):,} tensors "
                        "as they were planned. This is a bug; please report it. Nothing was published."
                    )

    def _moves(self) -> dict[str, dict[str, list[str]]]:
        """The files of older models to remove, and each output's new ones in the order of their moves."""
        files, remove = {}, {}
        last = self.plan.index_name if len(self.plan.shards) > 1 else self.plan.shards[0].file_name
        for label in self.plan.labels:
            folder = self.folder(label)
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]
            files[label] = sorted(names, key=lambda name: (name == last, not is_model_file(name), name))
        if not self.target.is_file:
            leftover = next(self.journal.records()).get("leftover", {})
            for label in {*older_labels(self.target.path), *self.plan.labels, *leftover}:
                remove[label] = [*outdated(self.target.path / label), *leftover.get(label, ())]
        return {"files": files, "remove": remove}

    def _remove_outdated(self, label: str, names: list[str], new: frozenset[str]) -> None:
        folder = self.target.path / label
        folder.mkdir(exist_ok=True)
        for name in names:
            if name not in new or (self.folder(label) / name).exists():  # else it is the new one already
                (folder / name).unlink(missing_ok=True)
                if "/" in name:
                    _remove_empty((folder / name).parent, folder)
        sync_folder(folder)
        if label not in self.plan.labels and label:
            _remove_empty(folder, self.target.path)

    def _move(self, label: str, names: list[str]) -> None:
        target = self._final(label)
        for index, name in enumerate(names):
            if index == len(names) - 1:
                for folder in {target / parent for name in names for parent in PurePosixPath(name).parents}:
                    sync_folder(folder)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (self.folder(label) / name).exists():
                (self.folder(label) / name).replace(target / name)
        sync_folder(target)

    def _remove_work(self) -> None:
        self._lock.remove_with(self.path)
        if self.target.is_file:
            sync_folder(self.target.path.parent)
        else:
            sync_folder(self.target.path)

    def discard(self) -> None:
        """Leave OUT as it was before this merge: after an error in the data, nothing here is worth keeping."""
        with contextlib.suppress(OSError):
            self._lock.remove_with(self.path)
        _remove_folders(self._made)


def _refuse_foreign(work: Path) -> None:
    """Raise OutputError unless `work` is missing or looks like a work folder of ours: nothing else is wiped."""
    what = None
    if work.is_symlink():
        what = "is a link"
    elif work.exists() and not work.is_dir():
        what = "is a file"
    elif work.is_dir() and (others := {entry.name for entry in work.iterdir()} - _OWN_ENTRIES):
        what = f"holds files that are not ours ({listed(sorted(others))})"
    if what:
        raise OutputError(f"{shown(work)}: {what}; the work of a merge goes there. Move it away.")


def _remove_empty(folder: Path, stop: Path) -> None:
    """Remove a folder and those above it, below `stop`, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != stop:
            folder.rmdir()
            folder = folder.parent


def _differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    parts = differences(stored.get("facts", {}), ours["facts"])
    if not parts:
        times = ours["modified"]
        parts = [f"{listed(k for k in times if stored.get('modified', {}).get(k) != times[k])} changed since"]
    return shown("; ".join(parts), 600)


def _make_folders(path: Path) -> list[Path]:
    """Create `path` and what is missing above it; returns what was created, deepest first."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    except OSError as e:
        raise output_failed(missing[0] if missing else path, e) from e
    return missing


def _remove_folders(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()
