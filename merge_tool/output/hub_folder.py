"""The sink of a merge whose output is on the Hub or in a bucket: shards wait in a work folder, at most two at a time.

While shard k is merged, shard k - 1 is uploaded; then its file here is removed. Only shard k itself waits for the
opening of k + 1, so whoever opens a shard waits for an upload, never for itself (no deadlock).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.errors import counted, output_failed, shown, sized
from merge_tool.output.hub_output import HubOutput
from merge_tool.output.receipts import plan_text, read_receipt, receipt_name, receipt_text
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan.plan import ShardPlan
from merge_tool.plan.prepare import Prepared
from merge_tool.run.findings import Findings, from_record
from merge_tool.run.run import ShardDone

MOST_HERE = 2  # shards on this disk at a time


class HubFolder:
    """The shards of one merge on their way to the Hub or a bucket. `done_shards` are in the draft, or here from an
    earlier run.

    `on_note(message)` is called from the thread that uploads. Raises OutputError, also for what went wrong in that
    thread, at the next call.
    """

    is_publishing = False

    def __init__(self, folder: WorkFolder, hub: HubOutput, on_note: Callable[[str], None] | None) -> None:
        self.folder, self.hub, self.plan = folder, hub, folder.plan
        self.done_shards: frozenset[int] = frozenset()
        self.number: int | None = hub.draft.number
        self.uploaded_bytes = 0
        self._on_note = on_note or (lambda message: None)
        self._plan_text = ""
        self._sides: dict[str, tuple[int, str]] = {}
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[ShardDone] = deque()
        self._num_here = 0
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._upload_all, daemon=True)

    def __enter__(self) -> HubFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.hub.uploader.close()  # a shard that is on its way is given up
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(5)

    # --------------------------------------------------------------------------- starting and resuming

    def begin(self, prepared: Prepared) -> None:
        """Continue the draft of an earlier run, or make one: before a weight is read, so that a repository that may
        not be written to is found now."""
        self.folder.begin(overwrite=True)
        local, draft, hub = self.folder.done_shards, self.hub.draft, self.hub
        is_new = draft.plan is None or bool(draft.why_not)
        self._plan_text = plan_text(hub.record(prepared)) if is_new or draft.plan is None else draft.plan
        place = {"private": hub.publishing.private, "overwrites": hub.overwrite}
        self.number = hub.uploader.ask("begin", plan=self._plan_text, is_new=is_new, **place)
        recorded = {r["number"]: r["sha256"][0] for r in self.folder.journal.records("shard")}
        shards = () if is_new else self.plan.shards
        kept = frozenset(shard.number for shard in shards if self._is_kept(shard, recorded.get(shard.number)))
        for number in sorted(local & kept):
            self._remove(self.plan.shards[number])
        self.done_shards = kept | local
        self._waiting.extend(self._found(number) for number in sorted(local - kept))
        self._num_here = len(self._waiting)
        self._thread.start()

    def _is_kept(self, shard: ShardPlan, recorded: str | None) -> bool:
        """Whether the draft has a shard, by the SHA-256 and size that were `recorded` here or in its receipt; what was
        found of its tensors is then in the journal."""
        there = self.hub.draft.files
        found, receipt = there.get(shard.file_name), receipt_name(shard.file_name)
        if found is None or receipt not in there or found[0] != shard.size:
            return False
        if recorded == found[1]:
            return True
        stored = read_receipt(self.hub.uploader.ask("receipt", name=receipt), self._plan_text, shard)
        if stored is None or stored.sha256 != found[1]:
            return False
        self.folder.adopt(shard, [self._path(shard)], [stored.sha256], stored.findings)
        return True

    def _found(self, number: int) -> ShardDone:
        """A shard that an earlier run finished here, as the journal has it."""
        shard, digest, findings = self.plan.shards[number], "", Findings()
        numbers = {job.number for job in shard.jobs}
        for record in self.folder.journal.records():
            if record.get("record") == "tensor" and record["number"] in numbers:
                findings.add(record["number"], from_record(record))
            if record.get("record") == "shard" and record["number"] == number:
                digest = record["sha256"][0]
        return ShardDone(shard, (digest,), findings)

    # ------------------------------------------------------------------------------------------ the sink

    def open_shard(self, shard: ShardPlan, header: bytearray) -> list[ShardWriter]:
        self._await(lambda: self._num_here < MOST_HERE)
        with self._changed:
            self._num_here += 1
        return self.folder.open_shard(shard, header)

    def finish_shard(self, done: ShardDone, writers: list[ShardWriter]) -> None:
        self.folder.finish_shard(done, writers)
        with self._changed:
            self._waiting.append(done)
            self._changed.notify_all()

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait; with a time limit a turn, so that a signal is seen on every system."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._error is not None or condition(), timeout=1.0):
                pass
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def beat(self) -> None:
        """Show other machines that this run works. Raises OutputError once an upload has failed."""
        self._check()
        self.folder.beat()

    def await_uploads(self) -> None:
        """Return once every shard is in the draft."""
        if left := len(self._waiting):
            self._on_note(f"Merged; {counted(left, 'shard is', 'shards are')} still to upload.")
        self._await(lambda: not self._waiting)

    # ------------------------------------------------------------------------- the thread that uploads

    def _upload_all(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                    if self._closing:
                        return
                    done = self._waiting[0]
                self._upload(done)
                with self._changed:
                    self._waiting.popleft()
                    self._num_here -= 1
                    self._changed.notify_all()
        except BaseException as e:  # noqa: BLE001 - raised by the threads that merge
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _upload(self, done: ShardDone) -> None:
        shard = done.shard
        self.hub.uploader.ask(
            "shard",
            path=str(self._path(shard).absolute()),
            sha256=done.sha256[0],
            tensors=[(job.out.name, job.out.shape, job.out.dtype) for job in shard.jobs],
            receipt=receipt_text(self._plan_text, shard, done.sha256[0], done.findings),
        )
        self._remove(shard)
        self.uploaded_bytes += shard.size
        self._on_note(f"{shown(shard.file_name)}: uploaded, {sized(shard.size)}")

    def _path(self, shard: ShardPlan) -> Path:
        return self.folder.folder(self.plan.labels[0]) / shard.file_name

    def _remove(self, shard: ShardPlan) -> None:
        try:
            self._path(shard).unlink(missing_ok=True)
        except OSError as e:
            raise output_failed(self._path(shard), e) from e

    # ---------------------------------------------------------------------- other files, and publishing

    def findings(self) -> Findings:
        return self.folder.findings()

    def digests(self) -> dict[int, list[str]]:
        return self.folder.digests()

    def add(self, label: str, name: str, chunks: Iterable[bytes]) -> str:
        """Write one file of the output beside the weights; returns its SHA-256."""
        digest = self.folder.add(label, name, chunks)
        size = (self.folder.folder(label) / name).stat().st_size
        self._sides[name] = size, digest
        return digest

    def publish(self) -> list[str]:
        """Complete the draft, compare every file of it with what was written here, publish it, and remove the work
        folder. Returns what else the repository has."""
        digests, files = self.folder.digests(), dict[str, Any](self._sides)
        for shard in self.plan.shards:
            files[shard.file_name] = shard.size, digests[shard.number][0]
        others = self.hub.finish(self.folder.folder(self.plan.labels[0]).absolute(), list(self._sides), files)
        remove_work(self.folder)
        return others

    def discard(self) -> None:
        """After an error in the data: nothing here or in the draft is worth keeping."""
        remove_work(self.folder)
        self.hub.drop()


def remove_work(folder: WorkFolder) -> None:
    """Remove the folder where shards waited, and those above it that the merge made, as far as they are empty."""
    folder.discard()
    path = folder.target.path
    with contextlib.suppress(OSError):  # something else is in it
        path.rmdir()
        if path.parent.name == "slerp-merge":
            path.parent.rmdir()
