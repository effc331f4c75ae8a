"""A repository of the Hub, or a folder of a bucket, as a merge's output: what is there already, the draft of an earlier
run, what may be written.

Asks uploading.py, a process of its own, and decides. The shards go through HubFolder (hub_folder.py).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import OutputError, listed, output_failed
from merge_tool.models.side_files import REPORT
from merge_tool.output.complete import changed_side_files, check_room
from merge_tool.output.older import read_sums
from merge_tool.output.publishing import Publishing
from merge_tool.output.receipts import differences_of, draft_digest, shard_bytes_of
from merge_tool.output.report import head_differences, read_head, read_identity, report_head
from merge_tool.output.uploader import Uploader
from merge_tool.output.work_folder import plan_record
from merge_tool.plan.plan import digest_of
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.target import Target
from merge_tool.recipe.options import DEFAULT_MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft of a merge: its pull request's number (in a bucket 0), its files with size and digest, and its plan, if
    it has one.
    `why_not` says why its shards cannot be kept; it is empty if they can."""

    number: int | None = None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    plan: str | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """An output that is whole there: its report, its files as they must be, whether it is published, or else in which
    pull request it is."""

    report: Path
    files: dict[str, Any]
    number: int | None = None


class HubOutput:
    """The place of a target; what it shows is `main`. Raises OutputError at once where it is known that the user may
    not write there."""

    def __init__(self, target: Target, publishing: Publishing, asked_shard_bytes: int, *, overwrite: bool) -> None:
        self.target, self.publishing, self.overwrite = target, publishing, overwrite
        self.asked_shard_bytes = asked_shard_bytes
        self.draft, self.digest = Draft(), ""
        self.warnings: list[str] = []
        self._looked_at: tuple[dict[str, Any] | None] | None = None
        with ExitStack() as held:
            try:
                self._folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            except OSError as e:
                raise output_failed(Path(tempfile.gettempdir()), e) from e
            self.uploader = Uploader(target.repo)
            held.callback(self.uploader.close)
            found = self.uploader.ask("look")
            self.url, self.main = found["url"], found["files"]
            self._held = held.pop_all()

    def __enter__(self) -> HubOutput:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._held.close()

    # ------------------------------------------------------------------------- what is there already

    def check(self, prepared: Prepared) -> bool:
        """Whether main shows this merge already. Raises OutputError if it has other weights, or if the disk has no room
        for two shards. Before any weight is downloaded: by headers."""
        if self.published(prepared) is not None:
            return True
        check_room(prepared, overwrite=False)
        return False

    def published(self, prepared: Prepared) -> Stored | None:
        """This merge, if main shows it. Raises OutputError if main has other weights, unless they are replaced."""
        weights = [name for name in self.main if is_weight_file(name)]
        if not weights:
            return None
        folder = self._folder / "main"
        if self._looked_at is None:
            self._looked_at = (self.uploader.ask("stored", number=None, folder=str(folder)),)
        if (found := self._stored(prepared, folder, self._looked_at[0], None)) is not None or self.overwrite:
            return found
        parts = self._why_another(prepared, folder / REPORT)
        why = f"has weights already ({listed(weights)})" if not parts else f"holds another merge: {'; '.join(parts)}"
        raise OutputError(f"{self.target.name}: {why}. Choose another OUT, or give --overwrite.")

    def in_draft(self, prepared: Prepared) -> Stored | None:
        """This merge, if it is whole in the draft and only not published."""
        number = self.draft.number
        if number is None or self.draft.plan is not None:
            return None
        folder = self._folder / "draft"
        return self._stored(prepared, folder, self.uploader.ask("stored", number=number, folder=str(folder)), number)

    def _stored(
        self, prepared: Prepared, folder: Path, found: dict[str, Any] | None, number: int | None
    ) -> Stored | None:
        """An output that was `found`, if it is of this merge. Raises OutputError if inputs changed since, unless it is
        replaced."""
        try:
            is_this = found is not None and self._is_this(prepared, folder, found["changed_at"])
        except OutputError:
            if not self.overwrite:
                raise
            is_this = False
        return Stored(folder / REPORT, found["files"], number) if found is not None and is_this else None

    def _is_this(self, prepared: Prepared, folder: Path, changed_at: float) -> bool:
        """Whether an output's report is of this merge, perhaps with smaller shards, and newer than local inputs."""
        digest, samples = read_identity(folder / REPORT)
        most = read_head(folder / REPORT).get("options", {}).get("max_shard_bytes", DEFAULT_MAX_SHARD_BYTES)
        is_smaller = isinstance(most, int) and most <= self.asked_shard_bytes
        facts = {**prepared.plan.facts_of(0), **({"max_shard_bytes": most} if is_smaller else {})}
        if digest != digest_of(facts) or (prepared.samples and samples != prepared.samples):
            return False
        if changed := changed_side_files(prepared, read_sums(folder)):
            raise OutputError(
                f"{self.target.name}: holds this merge, but {listed(changed)} changed since. Give --overwrite to merge "
                "again."
            )
        if later := [name for name, seconds in _times(prepared) if seconds > changed_at]:
            raise OutputError(
                f"{self.target.name}: holds this merge, but {listed(later)} changed since, or the clocks differ: sizes "
                "and samples are as they were, times are later than the merge's. --overwrite merges again."
            )
        return True

    def _why_another(self, prepared: Prepared, report: Path) -> list[str]:
        head = read_head(report)
        return head_differences([head], [report_head(prepared.plan, 0, prepared.samples)]) if head else []

    # ---------------------------------------------------------------------------------------- the draft

    def find_draft(self, prepared: Prepared) -> int | None:
        """Look for the draft of this merge. Returns the size of its shards if that is not the planned one: then plan
        with that size, and look again."""
        record = self.record(prepared)
        self.digest = draft_digest(record, self.asked_shard_bytes)
        found = self.uploader.ask("draft", digest=self.digest, overwrites=self.overwrite)
        self.warnings = [f"{self.target.name}: {text}" for text in found["others"]]
        files = {name: (size, digest) for name, (size, digest) in found["files"].items()}
        most, plan = shard_bytes_of(found["plan"]), found["plan"]
        if plan is not None and most not in (None, record["facts"]["max_shard_bytes"]):
            return most
        why_not = "" if plan is None else differences_of(plan, record)
        if why_not:
            pull = f" (pull request {found['number']})" if found["number"] else ""
            self.warnings.append(f"{self.target.name}: the shards of the draft{pull} are made again: {why_not}.")
        self.draft = Draft(found["number"], files, plan, why_not)
        return None

    def record(self, prepared: Prepared) -> dict[str, Any]:
        """What identifies this merge, on any machine."""
        return plan_record(prepared.plan, prepared.samples, overwrite=True, is_shared=True)

    def publish_stored(self, stored: Stored) -> dict[str, Any]:
        """Publish an output that is whole in the draft; the fields of a MergeReport that say where it is then. A draft
        that a run left open after its output was published is closed."""
        if stored.number is not None:
            self.finish(self._folder, [], stored.files)
        elif self.draft.number is not None:
            self.uploader.ask("tidy")
        is_published = stored.number is None or self.publishing.publishes
        return {"pull_request": stored.number, "is_published": is_published}

    def drop(self) -> None:
        """Close the draft, by a process of its own: ours may be uploading still."""
        self.uploader.close()
        uploader = Uploader(self.target.repo)
        try:
            with contextlib.suppress(OutputError):
                uploader.ask("look")
                uploader.ask("draft", digest=self.digest, overwrites=True)
                uploader.ask("drop")
        finally:
            uploader.close()

    def finish(self, folder: Path, sides: list[str], files: dict[str, Any]) -> list[str]:
        """Complete the draft, compare every file, and publish. Returns what else the repository has."""
        publishing = {"overwrites": self.overwrite, "publishes": self.publishing.publishes}
        answer = self.uploader.ask("finish", folder=str(folder), sides=sides, files=files, **publishing)
        others: list[str] = answer["others"]
        return others


def _times(prepared: Prepared) -> Iterator[tuple[str, float]]:
    """The inputs' files, and when each was changed last, in seconds since 1970; of those that a commit of the Hub names
    nothing."""
    record = plan_record(prepared.plan, (), overwrite=True)
    for name, nanoseconds in record["modified"].items():
        if name not in record["commits"] and nanoseconds > 0:
            yield name, nanoseconds / 1e9
