"""In a process of its own: finished files -> a repository of the Hub, which shows all of them at once, or none.

Everything goes to a pull request: one commit for each file of weights, one for the rest. Its tree, which names the
SHA-256 of every large file, is the journal: the same command finds the pull request by its title, also from another
machine, keeps what is right in it, and continues. Merging it is the one visible step.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_tool.apart import answer
from merge_tool.checkpoint.fetching import explained
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import OutputError, listed, shown, sized
from merge_tool.output.older import is_model_file

_TITLE = "slerp-merge {digest}"
_OURS = re.compile(r"slerp-merge ([0-9a-f]{16})")


@dataclass(frozen=True)
class Request:
    """What to push where. `sums` has every file's SHA-256; `digest` stands for the whole output."""

    folder: str
    repo: str
    sums: Mapping[str, str]
    digest: str
    is_private: bool = False
    publishes: bool = True
    overwrites: bool = False


@dataclass(slots=True)
class Pushed:
    """What was done: the pull request's number (None if nothing had to be done), the bytes uploaded, the files that
    were there already, and whether the repository shows the output now."""

    number: int | None = None
    uploaded_bytes: int = 0
    kept_files: int = 0
    is_published: bool = False
    url: str = ""
    others: list[str] = field(default_factory=list)


def main() -> None:
    answer(lambda question: (push(Request(**question)), ()))


def push(request: Request) -> dict[str, Any]:
    """Push the files; the fields of a Pushed. Raises OutputError."""
    with _explaining(request.repo):
        pushed = _Push(request).run()
    return {name: getattr(pushed, name) for name in Pushed.__slots__}


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except OutputError:
        raise
    except Exception as e:  # several libraries' errors, which differ between versions; each means: not pushed
        raise OutputError(_why(e, repo)) from e


class _Push:
    def __init__(self, request: Request) -> None:
        from huggingface_hub import HfApi

        self.request, self.repo, self.api = request, request.repo, HfApi()
        self.folder = Path(request.folder)
        self.pushed = Pushed(url=f"{self.api.endpoint}/{request.repo}")

    def run(self) -> Pushed:
        self._check_access()
        before = self._tree("main")
        if self._lacking(before) == []:
            self.pushed.is_published, self.pushed.kept_files = True, len(self.request.sums)
            self._close_drafts()
            return self.pushed
        old = [name for name in before if is_model_file(name) and name not in self.request.sums]
        if not self.request.overwrites and (there := [name for name in before if is_weight_file(name)]):
            raise OutputError(
                f"{self.repo}: has weights already ({listed(there)}). Choose another repository, or give --overwrite."
            )
        self.pushed.number = self._draft()
        revision = None if self.pushed.number is None else f"refs/pr/{self.pushed.number}"
        lacking = self._lacking(before if revision is None else self._tree(revision))
        self.pushed.kept_files = len(self.request.sums) - len(lacking)
        weights = [name for name in lacking if is_weight_file(name)]
        for name in weights:
            self._commit([name], [], f"Add {name}")
        rest = [name for name in lacking if name not in weights]
        gone = [name for name in old if self.pushed.number is None or name in self._tree(self._revision)]
        if rest or gone:
            self._commit(rest, gone, "Add the other files of the merge")
        self._check_strangers(before, gone)
        if wrong := self._lacking(self._tree(self._revision)):
            raise OutputError(
                f"{self.repo}: after the upload, {listed(wrong)} in pull request {self.pushed.number} "
                "are not the files of this folder. Nothing was published. Run the same command again."
            )
        if self.request.publishes:
            self._publish()
        self.pushed.others = sorted(name for name in before if name not in self.request.sums and name not in old)
        return self.pushed

    def _check_strangers(self, before: Mapping[str, tuple[int, str]], gone: list[str]) -> None:
        """Raise OutputError if the pull request would change anything else: others may write to it, too."""
        tree = self._tree(self._revision)
        expected = {name: digest for name, digest in before.items() if name not in gone}
        names = {*tree, *expected} - {*self.request.sums}
        if others := sorted(name for name in names if tree.get(name) != expected.get(name)):
            raise OutputError(
                f"{self.repo}: pull request {self.pushed.number} also changes {listed(others)}, or main changed "
                "meanwhile. Close that pull request, then run the same command again. Nothing was published."
            )

    @property
    def _revision(self) -> str:
        return f"refs/pr/{self.pushed.number}"

    # --------------------------------------------------------------------------------------- the Hub

    def _check_access(self) -> None:
        """Make the repository if it is not there; find out whether we may write, before anything is uploaded."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self.api.repo_info(self.repo)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo, private=self.request.is_private, exist_ok=True)
        self.api.auth_check(self.repo, write=True)

    def _tree(self, revision: str) -> dict[str, tuple[int, str]]:
        """The size and the digest of every file at a revision: SHA-256 of large files, git's of small ones."""
        from huggingface_hub import RepoFile

        entries = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: (file.size, file.lfs.sha256 if file.lfs is not None else file.blob_id) for file in files}

    def _lacking(self, tree: Mapping[str, tuple[int, str]]) -> list[str]:
        """The files that are not in the tree, or not as they are here."""
        return [name for name in self.request.sums if not self._is_right(name, tree.get(name))]

    def _is_right(self, name: str, found: tuple[int, str] | None) -> bool:
        path = self.folder / name
        if found is None or found[0] != path.stat().st_size:
            return False
        return found[1] == self.request.sums[name] or (len(found[1]) == 40 and found[1] == _git_digest(path))

    def _draft(self) -> int | None:
        """Our pull request of an earlier run, if it is still open."""
        drafts = [one for one in self._open_ones() if one.title == _TITLE.format(digest=self.request.digest)]
        return drafts[0].num if drafts else None

    def _open_ones(self) -> list[Any]:
        """Our pull requests that are neither merged nor closed."""
        found = self.api.get_repo_discussions(self.repo, discussion_type="pull_request", discussion_status="open")
        return [one for one in found if one.status in ("open", "draft") and _OURS.fullmatch(one.title)]

    def _commit(self, names: list[str], gone: list[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(self.folder / name)) for name in names]
        deletes = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone]
        if self.pushed.number is None:
            title = _TITLE.format(digest=self.request.digest)
            info = self.api.create_commit(self.repo, [*adds, *deletes], commit_message=title, create_pr=True)
            if info.pr_num is None:
                raise OutputError(f"{self.repo}: the Hub made no pull request. Nothing was published.")
            self.pushed.number = info.pr_num
        else:
            self.api.create_commit(self.repo, [*adds, *deletes], commit_message=message, revision=self._revision)
        for name in names:
            nbytes = (self.folder / name).stat().st_size
            self.pushed.uploaded_bytes += nbytes
            print(f"{name}: uploaded, {sized(nbytes)}", file=sys.stderr)

    def _publish(self) -> None:
        number = self.pushed.number
        assert number is not None
        if self.api.get_discussion_details(self.repo, number).status == "draft":
            self.api.change_discussion_status(self.repo, number, "open")
        self.api.merge_pull_request(self.repo, number)
        if wrong := self._lacking(self._tree("main")):
            raise OutputError(f"{self.repo}: pull request {number} was merged, but main lacks {listed(wrong)}.")
        self.pushed.is_published = True
        self._close_drafts()

    def _close_drafts(self) -> None:
        """Close what earlier runs of the same push left open."""
        for one in self._open_ones():
            if one.title == _TITLE.format(digest=self.request.digest):
                self.api.change_discussion_status(self.repo, one.num, "closed")


def _git_digest(path: Path) -> str:
    """What git calls a file of this content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _why(error: Exception, repo: str) -> str:
    """One sentence about the problem and one about the next step."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "`hf auth login` or HF_TOKEN (with write permission)"
    if status in (401, 403):
        return (
            f"{repo}: the Hub does not let you write there (it answers {status}). Check the name, and give your token "
            f"by {login}."
        )
    if status == 409:
        return f"{repo}: was changed by somebody else at the same time. Run the same command again: it continues."
    if "LocalTokenNotFoundError" in {kind.__name__ for kind in type(error).__mro__}:
        return f"{repo}: writing needs a token. Give it by {login}."
    return shown(explained(error, repo, None), 1000)
