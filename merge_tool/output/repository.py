"""In a process of its own: a repository of the Hub, its pull requests, and what goes wrong with them.

Nothing becomes visible before `publish`: everything goes to a pull request, whose tree (path, size, SHA-256 of every
large file) is the journal. A request that fails for a passing reason (a busy server, a broken line) is made again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from merge_tool.checkpoint.fetching import explained
from merge_tool.errors import OutputError, listed, shown

T = TypeVar("T")
Tree = Mapping[str, tuple[int, str]]  # path -> size, and SHA-256 of a large file, git's digest of a small one
_OURS = re.compile(r"slerp-merge ([0-9a-f]{16})")
_PASSING = frozenset({408, 412, 429, 500, 502, 503, 504})
_BROKEN = frozenset({"TransportError", "ConnectionError", "Timeout", "TimeoutException", "RemoteProtocolError"})
WAITS = (1.0, 4.0, 15.0, 60.0)  # seconds before each further try
_LONGEST_WAIT = 330.0  # the Hub counts requests in windows of five minutes
_LOGIN = "`hf auth login` or HF_TOKEN (with write permission)"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a file must be: its size and SHA-256; for a file on this disk also git's digest."""

    size: int
    sha256: str
    git: str = ""

    def is_found(self, found: tuple[int, str] | None) -> bool:
        return found is not None and found[0] == self.size and found[1] in (self.sha256, self.git)


def expected_of(path: Path, sha256: str) -> Expected:
    """What the copy of a local file must be on the Hub."""
    return Expected(path.stat().st_size, sha256, git_digest(path))


def git_digest(path: Path) -> str:
    """Git's digest of a file; an empty text for a large file, which the Hub lists with its SHA-256."""
    size = path.stat().st_size
    if size > 64_000_000:
        return ""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def title_of(digest: str) -> str:
    """The title of an output's pull request; `digest`, 16 digits, identifies the output."""
    return f"slerp-merge {digest}"


class Repository:
    """A repository. `number` is that of our pull request, once there is one; `user` is who we are, after `look`."""

    def __init__(self, repo: str, waits: Sequence[float] = WAITS) -> None:
        from huggingface_hub import HfApi

        self.repo, self._waits = repo, tuple(waits)
        self.api: Any = HfApi()
        self.number: int | None = None
        self.user = ""

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    @property
    def revision(self) -> str:
        return "main" if self.number is None else f"refs/pr/{self.number}"

    # ------------------------------------------------------------------------------------- looking

    def look(self) -> bool:
        """Whether the repository exists; if not, the user may create it. Raises OutputError if it is already clear that
        the user may not write there."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        me = self.api.whoami()  # first: so an unreachable Hub is reported before anything else
        self.user = str(me.get("name"))
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OutputError(f"{self.repo}: your token may only read. Give one with write permission by {_LOGIN}.")
        try:
            info = self._patiently(lambda: self.api.repo_info(self.repo))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._check_namespace(me)
            return False
        if info.id != self.repo:
            raise OutputError(f"{self.repo}: is called {shown(info.id)} on the Hub. Write hub:{shown(info.id)}.")
        # Before huggingface_hub 1 this checks reading only; missing write access is found when the draft is opened.
        may = {"write": True} if "write" in signature(self.api.auth_check).parameters else {}
        self._patiently(lambda: self.api.auth_check(self.repo, **may))
        return True

    def _check_namespace(self, me: Mapping[str, Any]) -> None:
        owner, orgs = self.repo.partition("/")[0], {org["name"]: org for org in me.get("orgs") or ()}
        if owner == me.get("name") or (owner in orgs and orgs[owner].get("roleInOrg") != "read"):
            return
        yours = listed([me.get("name"), *orgs], 10)
        raise OutputError(
            f"{self.repo}: is not there, and you may not make it: {shown(owner)} is neither your name nor an "
            f"organisation in which you may write ({yours}). Check the name, or give another token by {_LOGIN}."
        )

    def create(self, *, private: bool) -> None:
        self._patiently(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))

    def tree(self, revision: str) -> dict[str, tuple[int, str]]:
        """The size and the digest of every file at a revision: SHA-256 of large files, git's digest of small files."""
        from huggingface_hub.hf_api import RepoFile  # where older versions have it, too

        entries = self._patiently(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision)))
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: (file.size, file.lfs.sha256 if file.lfs is not None else file.blob_id) for file in files}

    def download(self, name: str, revision: str, folder: Path) -> Path:
        """A small file, in `folder`."""
        found = self._patiently(
            lambda: self.api.hf_hub_download(self.repo, name, revision=revision, local_dir=folder, force_download=True)
        )
        return Path(found)

    def changed_at(self, revision: str) -> float:
        """The time of a revision's last commit, in seconds since 1970."""
        commits = self._patiently(lambda: self.api.list_repo_commits(self.repo, revision=revision))
        return float(max(commit.created_at.timestamp() for commit in commits))

    # -------------------------------------------------------------------------------- pull requests

    def open_ones(self) -> list[Any]:
        """Our pull requests, by their title, that are neither merged nor closed."""
        # All are listed: the Hub does not promise that drafts count as open.
        listing = self._patiently(
            lambda: list(self.api.get_repo_discussions(self.repo, discussion_type="pull_request"))
        )
        return [one for one in listing if one.status in ("open", "draft") and _OURS.fullmatch(one.title)]

    def find_draft(self, digest: str, author: str | None = None) -> int | None:
        """Our pull request of an earlier run, if it is still open; with `author` only that user's pull requests."""
        drafts = [one for one in self.open_ones() if one.title == title_of(digest)]
        return next((one.num for one in drafts if author is None or one.author == author), None)

    def commit(
        self,
        adds: Callable[[], list[Any]],
        gone: Iterable[str],
        message: str,
        *,
        digest: str,
        author: str | None = None,
    ) -> None:
        """Add files to our pull request and remove the files in `gone`; the first commit makes the pull request. `adds`
        gives the operations anew at each try."""
        from huggingface_hub import CommitOperationDelete

        names = list(gone)

        def once() -> None:
            operations = [*adds(), *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in names)]
            if self.number is None:
                self.number = self.find_draft(digest, author)  # a try whose answer was lost may have made it
            if self.number is not None:
                self.api.create_commit(self.repo, operations, commit_message=message, revision=self.revision)
                return
            info = self.api.create_commit(self.repo, operations, commit_message=title_of(digest), create_pr=True)
            if info.pr_num is None:
                raise OutputError(f"{self.repo}: the Hub made no pull request. Nothing was published.")
            self.number = info.pr_num

        self._patiently(once)

    def check_strangers(self, before: Tree, ours: Iterable[str], gone: Iterable[str]) -> None:
        """Raise OutputError if our pull request changes other files than `ours`: other people may write to it."""
        tree, lost = self.tree(self.revision), set(gone)
        expected = {name: found for name, found in before.items() if name not in lost}
        names = {*tree, *expected} - {*ours}
        if others := sorted(name for name in names if tree.get(name) != expected.get(name)):
            raise OutputError(
                f"{self.repo}: pull request {self.number} also changes {listed(others)}, or main changed "
                "meanwhile. Close that pull request, then run the same command again. Nothing was published."
            )

    def publish(self, files: Mapping[str, Expected], digest: str) -> None:
        """Merge our pull request, and close this user's other pull requests for the same output. Raises OutputError if
        main then lacks a file."""
        if self.api.get_discussion_details(self.repo, self.number).status == "draft":
            self.api.change_discussion_status(self.repo, self.number, "open")
        self.api.merge_pull_request(self.repo, self.number)
        if wrong := lacking(files, self.tree("main")):
            raise OutputError(f"{self.repo}: pull request {self.number} was merged, but main lacks {listed(wrong)}.")
        self.close_drafts(digest)

    def close_drafts(self, digest: str) -> None:
        """Close the pull requests that earlier runs of this user left open for the same output."""
        for one in self.open_ones():
            if one.title == title_of(digest) and one.author == self.user:
                self.api.change_discussion_status(self.repo, one.num, "closed")

    def _patiently(self, action: Callable[[], T]) -> T:
        """The result of a request that may be made twice; passing failures are tried again."""
        for wait in self._waits:
            try:
                return action()
            except Exception as e:
                if (seconds := _seconds(e, wait)) is None:
                    raise
                print(f"{self.repo}: {_first_line(e)}: tried again in {seconds:.0f} s", file=sys.stderr)
                time.sleep(seconds)
        return action()


def other_files(before: Tree, files: Iterable[str], gone: Iterable[str]) -> list[str]:
    """The files that a repository keeps beside an output, without the Hub's own files."""
    return sorted(before.keys() - {*files, *gone, ".gitattributes"})


def lacking(files: Mapping[str, Expected], tree: Tree) -> list[str]:
    """The files that a tree lacks, or has with another size or content."""
    return [name for name, file in files.items() if not file.is_found(tree.get(name))]


# ------------------------------------------------------------------------------------------ what went wrong


@contextmanager
def explaining(repo: str) -> Iterator[None]:
    """Turn every error inside into an OutputError. No progress bars without a terminal."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except OutputError:
        raise
    except Exception as e:  # several libraries' errors, which differ between versions; each means: not done
        raise OutputError(_why(e, repo)) from e


def _chain(error: BaseException) -> list[BaseException]:
    errors: list[BaseException] = []
    while error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__ or error
    return errors


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}


def _response(error: BaseException) -> Any:
    """The server's answer that an error is about; None if there was none."""
    return next((e.response for e in _chain(error) if getattr(e, "response", None) is not None), None)  # type: ignore[attr-defined]


def _seconds(error: Exception, wait: float) -> float | None:
    """The seconds to wait before another try; None if the request is not tried again."""
    if (response := _response(error)) is None:
        is_broken = bool(_kinds(error) & _BROKEN) and "OfflineModeIsEnabled" not in _kinds(error)
        return wait if is_broken else None
    if response.status_code not in _PASSING:
        return None
    try:
        asked = float(response.headers.get("Retry-After", ""))
    except ValueError:
        asked = 0.0
    return min(max(wait, asked), _LONGEST_WAIT)


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown(re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", text), 200)


def _why(error: Exception, repo: str) -> str:
    """One sentence about the problem and one about the next step."""
    kinds, response = _kinds(error), _response(error)
    status = getattr(response, "status_code", None)
    if "LocalTokenNotFoundError" in kinds:
        return f"{repo}: writing needs a token. Give it by {_LOGIN}."
    if "OfflineModeIsEnabled" in kinds:
        return f"{repo}: HF_HUB_OFFLINE forbids to write to the Hub. Unset it, or give a folder as OUT."
    if status == 401:
        return (
            f"{repo}: the Hub does not let you write there (it answers 401: it does not know the token). Give a valid "
            f"token by {_LOGIN}."
        )
    if status in (402, 403, 413):
        said = next((text for e in _chain(error) if (text := getattr(e, "server_message", None))), None)
        says = f", and says: {shown(said, 300)}" if said else ""
        return (
            f"{repo}: the Hub does not let you write there (it answers {status}{says}). Check the name and what your "
            f"account may store, and give your token by {_LOGIN}."
        )
    if status == 409:
        return f"{repo}: was changed by somebody else at the same time. Run the same command again: it continues."
    if kinds & _BROKEN and response is None:
        from huggingface_hub import constants

        return (
            f"{repo}: {constants.ENDPOINT} cannot be reached ({_first_line(_chain(error)[-1])}). Check the connection, "
            "then run the same command: it continues."
        )
    return shown(explained(error, repo, None), 1000)
