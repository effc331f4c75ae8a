"""The output: lock, work folder, journal, publishing. No tensor's values are seen here.

Work happens in OUT/.slerp-merge/ (for a one-file output, OUT.partial/ beside it). Each finished shard is recorded in
the synced journal, so the same command continues after a kill. Publishing renames everything into place, the index (or
the only weights file) last: so OUT looks like a model only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from merge_tool.checkpoint.source import ByteSource, sha256_of
from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.errors import OutputError, listed, output_failed, shown
from merge_tool.files import is_part_of_run, part_path, patiently, remove_tree, rename_synced, sync_file, sync_folder
from merge_tool.models.side_files import SYSTEM_FILES
from merge_tool.output.audit import check_with_library
from merge_tool.output.folders import FILES, make_folders, refuse_foreign, remove_empty, remove_folders
from merge_tool.output.journal import Journal, inside
from merge_tool.output.lock import FolderLock
from merge_tool.output.marks import check_marks, check_names
from merge_tool.output.older import is_model_file, older_labels, outdated, strangers
from merge_tool.output.owner import OWNER
from merge_tool.plan.plan import MergePlan, ShardPlan, differences
from merge_tool.plan.target import Target
from merge_tool.run.findings import Findings, from_record, to_record
from merge_tool.run.run import ShardDone

_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")  # in the path of a file in the Hub's cache

# ------------------------------------------------------------------------------------------ the work


class WorkFolder:
    """The work folder of one merge, locked by this process from creation to `close`. Raises OutputError if the folder
    shows up in `inputs`, or if the disk cannot hold the outputs' files, `names`.

    The sink of `run_plan`: keeps the finished shards and the findings. `done_shards` are the shards that an earlier run
    finished: its journal names them, and their size is right; with `check_resumed` also their SHA-256.
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
        names: Sequence[str] = (),
        is_shared: bool = False,
    ) -> None:
        self.check_resumed, self.is_shared = check_resumed, is_shared
        self.target, self.plan, self.samples, self.flush_bytes = target, plan, samples, flush_bytes
        self.path = target.work
        self.journal = Journal(self.path / "journal.jsonl")
        self.done_shards: frozenset[int] = frozenset()
        self.is_publishing = False
        self.is_durable = True  # whether the file system can make names durable
        self._finishing = threading.Lock()
        refuse_foreign(self.path)
        self._made = make_folders(self.path)
        try:
            self._lock = FolderLock(self.path)
            self._owner = self._lock.owner
            self.may_share = self._owner.may_share
            self.check_resumed |= self.may_share
            self._check_place(inputs, names)
        except BaseException:
            remove_folders(self._made)
            raise

    def _check_place(self, inputs: Iterable[Path], names: Sequence[str]) -> None:
        """Raise OutputError if a file that was just made here shows up in an input (OUT is that input by another name),
        or if the disk cannot hold the outputs' names."""
        try:
            check_marks(self._lock, self.target, self.plan.labels, names, inputs)
            if not self.target.is_file:
                parts = [part_path(Path(shard.file_name), self._owner.run).name for shard in self.plan.shards]
                check_names(self.path / "names", self.plan.labels, [*names, *parts])
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
        return self.path / FILES / label

    # --------------------------------------------------------------------- starting and resuming

    def begin(self, *, overwrite: bool) -> bool:
        """Continue an earlier run of the same merge, or start anew. Returns whether an earlier run is continued.

        Raises OutputError if the work belongs to another merge, unless `overwrite`: the error names the differences.
        Raises it also if the work was begun with --overwrite, and --overwrite is not given again.
        """
        stored = next(self.journal.records(), None)
        if stored is not None and stored.get("record") != "plan":
            stored = None
        ours = plan_record(self.plan, self.samples, overwrite=overwrite, is_shared=self.is_shared)
        same = stored is not None and is_same_merge(stored, ours)
        if stored is not None and not same and not overwrite and not self._is_same_but_for_shards(stored, ours):
            raise OutputError(
                f"{shown(self.path)}: holds an unfinished merge that differs from this one: "
                f"{record_differences(stored, ours)}. Finish that merge, or give --overwrite to start anew."
            )
        if stored is not None and same and stored.get("overwrite") and not overwrite:
            raise OutputError(
                f"{shown(self.target.path)}: this merge was begun with --overwrite and is half done. Give --overwrite "
                "again."
            )
        if same and (lost := self._lost()) is not None:
            if not overwrite:
                raise OutputError(
                    f"{shown(self.target.path)}: was half published, and {shown(lost)} has disappeared since. "
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
            # otherwise a power cut could leave a journal without the folders that it names
            folders = (self.path / FILES, self.path, *(made.parent for made in self._made))
            self.is_durable = False not in [sync_folder(folder) for folder in folders]
            self.done_shards = frozenset(self._recover())
            for part in [path for path in (self.path / FILES).rglob("*.part") if is_part_of_run(path.name)]:
                part.unlink(missing_ok=True)
        except OSError as e:
            raise output_failed(self.path, e) from e
        return same

    def _is_same_but_for_shards(self, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
        """Whether only the size of shards differs, and no shard is finished. Then starting anew loses nothing (a disk
        may need smaller files)."""
        then, now = dict(stored.get("facts", {})), dict(ours["facts"])
        alike = all(stored.get(key) == ours[key] for key in ("modified", "samples"))
        alike = alike and {**then, "max_shard_bytes": 0} == {**now, "max_shard_bytes": 0}
        return alike and not stored.get("overwrite") and next(islice(self.journal.records(), 1, None), None) is None

    def is_half_published(self) -> bool:
        """Whether an earlier run of the same merge ended while it published."""
        ours = plan_record(self.plan, self.samples, overwrite=False)
        stored = next(self.journal.records(), {})
        return is_same_merge(stored, ours) and self.journal.publishing() is not None

    def _lost(self) -> str | None:
        """A file of a half published model that is neither in the work folder nor in OUT: continuing would publish a
        model without it."""
        moves = self.journal.publishing() or {"files": {}}
        for label, names in moves["files"].items():
            for name in names:
                if not (self.folder(label) / name).exists() and not (self._final(label) / name).exists():
                    return name
        return None

    def _leftover(self, stored: Mapping[str, Any] | None) -> dict[str, list[str]]:
        """Files that an abandoned publishing may already have moved into OUT."""
        left: dict[str, list[str]] = inside(self.journal.path, (stored or {}).get("leftover", {}))
        return left | (self.journal.publishing() or {"files": {}})["files"]

    def _wipe(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            elif entry.name not in (FolderLock.NAME, OWNER):
                entry.unlink()

    def _recover(self) -> Iterator[int]:
        """Shards whose record and files are all there; a rename that a crash prevented is done now."""
        recorded: dict[int, list[str]] = {}
        runs: dict[int, str] = {}
        for record in self.journal.records():
            if record.get("record") == "shard":
                recorded[record["number"]], runs[record["number"]] = record["sha256"], record.get("run", "")
            self.is_publishing |= record.get("record") == "publish"
        for shard in self.plan.shards:
            if (digests := recorded.get(shard.number)) is None:
                continue
            places = zip(self.plan.labels, digests, strict=True)
            if not all(self._settle(shard, label, runs[shard.number], digest) for label, digest in places):
                continue
            if self.check_resumed and not self._has_digests(shard, digests):
                if self.is_publishing:
                    raise OutputError(
                        f"{shown(self.target.path)}: was half published, and {shown(shard.file_name)} was damaged "
                        "since. Remove the folder and merge again."
                    )
                continue
            yield shard.number

    def _has_digests(self, shard: ShardPlan, expected: list[str]) -> bool:
        """Whether a shard's files have the recorded digests, in the work folder or where publishing has moved them."""
        places = ((self.folder(label), self._final(label)) for label in self.plan.labels)
        paths = [(a if (a / shard.file_name).exists() else b) / shard.file_name for a, b in places]
        return [sha256_of(path) for path in paths] == expected

    def _final(self, label: str) -> Path:
        """The folder that an output's files are moved to."""
        return self.target.path.parent if self.target.is_file else self.target.path / label

    def _settle(self, shard: ShardPlan, label: str, run: str, digest: str) -> bool:
        """Whether a recorded shard is there. If its run ended before the rename, the part is renamed now, if its size
        and digest are right: only that run wrote into its own part."""
        path = self.folder(label) / shard.file_name
        part = part_path(path, run)
        if not path.exists() and part.exists() and part.stat().st_size == shard.size and sha256_of(part) == digest:
            rename_synced(part, path)
        return self.is_publishing or (path.exists() and path.stat().st_size == shard.size)

    # ----------------------------------------------------------------------------------- the sink

    def open_shard(self, shard: ShardPlan, header: bytearray) -> list[ShardWriter]:
        return [
            ShardWriter(self.folder(label) / shard.file_name, header, run=self._owner.run, flush_bytes=self.flush_bytes)
            for label in self.plan.labels
        ]

    def finish_shard(self, done: ShardDone, writers: list[ShardWriter]) -> None:
        """Record a shard whose files are synced, then give them their names."""
        self._record(done)
        for writer in writers:
            writer.publish()

    def _record(self, done: ShardDone) -> None:
        tensors = ({"record": "tensor", "number": n, **to_record(done.findings[n])} for n in sorted(done.findings))
        last = {"record": "shard", "number": done.shard.number, "sha256": list(done.sha256), "run": self._owner.run}
        self._owner.confirm()
        with self._finishing:
            self.journal.append(chain(tensors, [last]))

    def adopt(self, shard: ShardPlan, files: Sequence[Path], sha256: Sequence[str], findings: Findings) -> None:
        """Record a shard that other processes have made and synced. `files` are its files, one for each output; some
        may be here already."""
        for label, path in zip(self.plan.labels, files, strict=True):
            if path != (own := self.folder(label) / shard.file_name):
                rename_synced(path, own)
        self._record(ShardDone(shard, tuple(sha256), findings))
        self.done_shards |= {shard.number}

    def findings(self) -> Findings:
        """The findings of this run and earlier ones, from the journal."""
        findings = Findings()
        self.digests()  # all shards are there
        for record in self.journal.records("tensor"):
            findings.add(record["number"], from_record(record))
        return findings

    def digests(self) -> dict[int, list[str]]:
        """The SHA-256 of every finished shard, one for each output."""
        digests = {record["number"]: record["sha256"] for record in self.journal.records("shard")}
        if len(digests) < len(self.plan.shards):
            raise self._replaced()
        return digests

    def _replaced(self) -> OutputError:
        """The error for a journal that lacks this run's records."""
        self._owner.confirm()
        return OutputError(
            f"{shown(self.journal.path)}: was replaced or removed while this run was working. Run the same command: it "
            "continues where it stopped."
        )

    def beat(self) -> None:
        """Show other machines that this run works. Raises OutputError once another run has taken the folder."""
        self._owner.beat()

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
                sync_file(file.fileno())
        except OSError as e:
            raise output_failed(path, e) from e
        return digest.hexdigest()

    # --------------------------------------------------------------------------------- publishing

    def publish(self, *, check_bytes: int) -> list[str]:
        """Move everything into place, the file that makes it a model last, and remove the work folder.

        Before that, the safetensors library audits each weight file, if that takes at most `check_bytes` of memory.
        Returns the other files in OUT, which belong neither to the new model nor to an older one.
        """
        try:
            self._owner.confirm()
            if not self.is_publishing:
                check_with_library([self.folder(label) for label in self.plan.labels], self.plan, check_bytes)
                for label in self.plan.labels:
                    for folder in {self.folder(label), *(p for p in self.folder(label).rglob("*") if p.is_dir())}:
                        sync_folder(folder)
                self.journal.append([{"record": "publish", **self._moves()}])
            moves = self.journal.publishing()
            if moves is None:
                raise self._replaced()
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

    def _moves(self) -> dict[str, dict[str, list[str]]]:
        """The files of older models to remove, and each output's new files in the order of their moves."""
        files, remove = {}, {}
        last = self.plan.index_name if len(self.plan.shards) > 1 else self.plan.shards[0].file_name
        for label in self.plan.labels:
            folder = self.folder(label)
            files_there = (p for p in folder.rglob("*") if not p.is_dir() and not _is_no_output(p.name))
            names = [path.relative_to(folder).as_posix() for path in files_there]
            files[label] = sorted(names, key=lambda name: (name == last, not is_model_file(name), name))
        if not self.target.is_file:
            leftover = next(self.journal.records(), {}).get("leftover", {})
            for label in {*older_labels(self.target.path), *self.plan.labels, *leftover}:
                remove[label] = [*outdated(self.target.path / label), *leftover.get(label, ())]
        return {"files": files, "remove": remove}

    def _remove_outdated(self, label: str, names: list[str], new: frozenset[str]) -> None:
        folder = self.target.path / label
        folder.mkdir(exist_ok=True)
        for name in names:
            if name not in new or (self.folder(label) / name).exists():  # otherwise it is the new file already
                patiently(partial((folder / name).unlink, missing_ok=True))
                if "/" in name:
                    remove_empty((folder / name).parent, folder)
        sync_folder(folder)
        if label not in self.plan.labels and label:
            remove_empty(folder, self.target.path)

    def _move(self, label: str, names: list[str]) -> None:
        target = self._final(label)
        for index, name in enumerate(names):
            if index == len(names) - 1:
                for folder in {target / parent for name in names for parent in PurePosixPath(name).parents}:
                    sync_folder(folder)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (self.folder(label) / name).exists():
                patiently(partial((self.folder(label) / name).replace, target / name))
        sync_folder(target)

    def _remove_work(self) -> None:
        self._lock.remove_with(self.path)
        if self.target.is_file:
            sync_folder(self.target.path.parent)
        else:
            sync_folder(self.target.path)

    def discard(self) -> None:
        """Leave OUT as it was before this merge, after an error in the data: nothing here is worth keeping."""
        with contextlib.suppress(OSError):
            self._lock.remove_with(self.path)
        remove_folders(self._made)


def plan_record(plan: MergePlan, samples: Sequence[str], *, overwrite: bool, is_shared: bool = False) -> dict[str, Any]:
    """What identifies a merge, for the first line of its journal: the facts that decide the output's bytes, and the
    time of every input file. If hosts share the merge, files in the Hub's cache are identified by their commit, because
    each host has downloaded them at another time."""
    files = {f"{side}/{file.name}": file for side, several in _inputs(plan).items() for file in several}
    commits = {name: match[1] for name, file in files.items() if (match := _COMMIT.search(str(file.path)))}
    return {
        "record": "plan",
        "facts": json.loads(json.dumps(dict(plan.facts))),
        "modified": {name: file.mtime_ns for name, file in files.items()},
        "commits": commits,
        "shared": is_shared,
        "samples": list(samples),
        "overwrite": overwrite,
    }


def _inputs(plan: MergePlan) -> dict[str, list[ByteSource]]:
    sides: dict[str, dict[int, ByteSource]] = {side: {} for side in plan.recipe.names}
    for job in plan.jobs():
        for side, source in zip(job.sides, job.sources, strict=True):
            for file in source.files:
                sides[plan.recipe.names[side]].setdefault(id(file), file)
    return {side: list(files.values()) for side, files in sides.items()}


def _changed(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The input files that differ from the stored record. A file of the Hub is identified by its commit if hosts share
    the merge, or if a run has read it by range (its time is then a made-up negative number)."""
    then, now = (record.get("modified", {}) for record in (stored, ours))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    commits, known = stored.get("commits", {}), ours["commits"]
    by_commit = (name for name in names if name in known and known[name] == commits.get(name))
    same = {n for n in by_commit if stored.get("shared") or min(then.get(n, 0), now.get(n, 0)) < 0}
    return [name for name in names if name not in same]


def is_same_merge(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two records are of the same merge. A merge that was planned from headers alone has no samples."""
    same_samples = stored.get("samples") in ([], ours["samples"])
    return stored.get("facts") == ours["facts"] and same_samples and not _changed(stored, ours)


def _is_no_output(name: str) -> bool:
    """Whether a file in the work folder is a system's file, or an unfinished file of another run."""
    return SYSTEM_FILES.fullmatch(name) is not None or is_part_of_run(name)


def record_differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The differences between two records in words; empty if they are of the same merge."""
    if is_same_merge(stored, ours):
        return ""
    parts = differences(stored.get("facts", {}), ours["facts"])
    if not parts:
        changed = listed(_changed(stored, ours)) or "the inputs"
        parts = [
            f"{changed} changed since" + (", or the clocks differ" if stored["samples"] == ours["samples"] else "")
        ]
    return shown("; ".join(parts), 600)
