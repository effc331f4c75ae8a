"""In a process of its own, beside a merge: finished shards -> a draft pull request, each with its receipt.

A receipt is a small file: size, SHA-256 and what the merge found of the shard's tensors. So the same command, also on
another machine, keeps the shards of the draft that are what their receipts say. The last commit removes the receipts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.source import sha256_of
from merge_tool.errors import OutputError, listed, shown
from merge_tool.models.side_files import REPORT, SUMS
from merge_tool.output.audit import check_file
from merge_tool.output.older import read_sums
from merge_tool.output.pushing import check_replaceable
from merge_tool.output.receipts import FOLDER, PLAN, receipt_name
from merge_tool.output.repository import Expected, Repository, expected_of, git_digest, lacking, other_files

_SMALL_BYTES = 64_000_000  # files that are not large on the Hub are smaller


class HubSession:
    """A Session (uploading.py) with a repository."""

    def __init__(self, repo: str, waits: Sequence[float]) -> None:
        self.hub = Repository(repo, waits)
        self.digest, self.is_there = "", True

    def look(self) -> dict[str, Any]:
        """Whether there is such a repository, and its files; refuses who may not write there."""
        self.is_there = self.hub.look()
        return {"url": self.hub.url, "is_there": self.is_there, "files": self._tree("main") if self.is_there else {}}

    def stored(self, number: int | None, folder: str) -> dict[str, Any] | None:
        """An output that is whole at main, or in a pull request: its files as they must be, the time of its last
        commit. Its report and sums are then in `folder`. None for anything else."""
        revision = "main" if number is None else f"refs/pr/{number}"
        tree, place, files = self._tree(revision), Path(folder), dict[str, Expected]()
        if not {REPORT, SUMS} <= tree.keys():
            return None
        for name in (SUMS, REPORT):
            self.hub.download(name, revision, place)
        sums = {**read_sums(place), SUMS: sha256_of(place / SUMS)}
        for name, digest in sums.items():
            size, found = tree.get(name, (0, ""))
            git = ""
            if len(found) == 40 and size < _SMALL_BYTES:  # no SHA-256 there: it is made here
                path = self.hub.download(name, revision, place)
                git = git_digest(path) if sha256_of(path) == digest else ""
            files[name] = Expected(size, digest, git)
        if not lacking(files, tree):
            return {"files": _plain(files), "changed_at": self.hub.changed_at(revision)}
        return None

    def draft(self, digest: str, overwrites: bool) -> dict[str, Any]:
        """The draft that this user opened for the merge of this digest, its tree and plan; and other drafts of ours."""
        self.digest = digest
        ours = self.hub.open_ones() if self.is_there else []
        self.hub.number = self.hub.find_draft(digest, self.hub.user) if ours else None
        tree = self._tree(self.hub.revision) if self.hub.number is not None else {}
        others = [
            f"pull request {one.num} of {shown(one.author)} is the draft of another merge, or of another user, and is "
            "left alone. Close it if it is not needed."
            for one in ours
            if one.num != self.hub.number
        ]
        plan = self.receipt(PLAN) if PLAN in tree else None
        return {"number": self.hub.number, "files": tree, "plan": plan, "others": others}

    def receipt(self, name: str) -> str:
        """The text of a file of the draft; an empty one for what is no text."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = self.hub.download(name, self.hub.revision, Path(folder))
            return path.read_text(encoding="utf-8", errors="replace")

    def begin(self, private: bool, plan: str, is_new: bool, overwrites: bool) -> int | None:
        """Make what is missing of the repository and the draft; returns the draft's number. If it `is_new`, the draft
        holds nothing but the plan then."""
        if not self.is_there:
            self.hub.create(private=private)
            self.is_there = True
        if is_new:
            before = self._tree("main")
            there = self._tree(self.hub.revision) if self.hub.number is not None else {}
            gone = [name for name in there if name != PLAN and before.get(name) != there[name]]
            self._commit({PLAN: plan.encode()}, [name for name in gone if name not in before], "Begin a merge")
        return self.hub.number

    def shard(self, path: str, sha256: str, tensors: list[Any], receipt: str) -> None:
        """Upload a finished shard with its receipt, in one commit. Another look at it before: by the safetensors
        library, and by its SHA-256."""
        file = Path(path)
        check_file(file, tensors, len(tensors))
        if sha256_of(file) != sha256:
            raise OutputError(
                f"{shown(file.name)}: was changed after it was written. Run the same command with --check-resumed."
            )
        self._commit({file.name: file, receipt_name(file.name): receipt.encode()}, [], f"Add {file.name}")

    def finish(
        self, folder: str, sides: list[str], files: Mapping[str, Sequence[Any]], overwrites: bool, publishes: bool
    ) -> dict[str, Any]:
        """Complete the draft: the other files are added, receipts and an older model are removed. Compare every file
        with what the merge wrote, then publish."""
        before, hub = self._tree("main"), self.hub
        expected = {name: Expected(*fields) for name, fields in files.items()}
        expected |= {name: expected_of(Path(folder, name), expected[name].sha256) for name in sides}
        old = check_replaceable(hub.repo, before, expected, overwrites=overwrites)
        tree = self._tree(hub.revision)
        gone = [name for name in tree if name.startswith(f"{FOLDER}/") or name in old]
        adds = {name: Path(folder, name) for name in lacking({name: expected[name] for name in sides}, tree)}
        if adds or gone:
            self._commit(adds, gone, "Add the other files of the merge")
        hub.check_strangers(before, expected, old)
        if wrong := lacking(expected, self._tree(hub.revision)):
            raise OutputError(
                f"{hub.repo}: {listed(wrong)} in pull request {hub.number} are not what the merge wrote. Nothing was "
                "published. Close that pull request, then run the same command again."
            )
        if publishes:
            hub.publish(expected, self.digest)
        return {"others": other_files(before, expected, old)}

    def drop(self) -> None:
        """Close the draft: there is nothing to continue."""
        self.hub.close_drafts(self.digest)

    tidy = drop

    def _tree(self, revision: str) -> dict[str, tuple[int, str]]:
        return self.hub.tree(revision)

    def _commit(self, files: Mapping[str, Path | bytes], gone: Iterable[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        def adds() -> list[Any]:
            contents = {name: str(one) if isinstance(one, Path) else one for name, one in files.items()}
            return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=one) for name, one in contents.items()]

        self.hub.commit(adds, gone, message, digest=self.digest, author=self.hub.user)


def _plain(files: Mapping[str, Expected]) -> dict[str, tuple[int, str, str]]:
    return {name: (file.size, file.sha256, file.git) for name, file in files.items()}
