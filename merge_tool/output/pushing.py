"""In a separate process: finished files -> a repository of the Hub, which shows all of them at once, or none.

Everything goes to a pull request: one commit for each file of weights, one for the rest. Its tree, which names the
SHA-256 of every large file, is the journal: the same command finds the pull request by its title, also from another
machine, keeps the right files in it, and continues. Only the last step is visible: merging the pull request.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_tool.apart import answer
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import OutputError, listed, sized
from merge_tool.output.older import is_model_file
from merge_tool.output.repository import Repository, Tree, expected_of, explaining, lacking, other_files


@dataclass(frozen=True)
class Request:
    """A folder and the repository to push it to. `sums` has every file's SHA-256; `digest` identifies the output."""

    folder: str
    repo: str
    sums: Mapping[str, str]
    digest: str
    is_private: bool = False
    publishes: bool = True
    overwrites: bool = False


@dataclass(slots=True)
class Pushed:
    """The result: the pull request's number (None if nothing had to be done), the uploaded bytes, the number of files
    that were there already, and whether the repository now shows the output."""

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
    with explaining(request.repo):
        pushed = _Push(request).run()
    return {name: getattr(pushed, name) for name in Pushed.__slots__}


def check_replaceable(repo: str, before: Tree, files: Iterable[str], *, overwrites: bool) -> list[str]:
    """The files of an older model that the new model replaces. Raises OutputError if the repository has weights, unless
    the push `overwrites` them."""
    new = set(files)
    if not overwrites and (there := [name for name in before if is_weight_file(name)]):
        raise OutputError(
            f"{repo}: has weights already ({listed(there)}). Choose another repository, or give --overwrite."
        )
    return [name for name in before if is_model_file(name) and name not in new]


class _Push:
    def __init__(self, request: Request) -> None:
        self.request, self.hub = request, Repository(request.repo)
        self.folder = Path(request.folder)
        self.files = {name: expected_of(self.folder / name, digest) for name, digest in request.sums.items()}
        self.pushed = Pushed(url=self.hub.url)

    def run(self) -> Pushed:
        request, hub, pushed = self.request, self.hub, self.pushed
        if not hub.look():
            hub.create(private=request.is_private)
        before = hub.tree("main")
        if not lacking(self.files, before):
            pushed.is_published, pushed.kept_files = True, len(self.files)
            hub.close_drafts(request.digest)
            return pushed
        old = check_replaceable(hub.repo, before, self.files, overwrites=request.overwrites)
        hub.number = hub.find_draft(request.digest)
        missing = lacking(self.files, before if hub.number is None else hub.tree(hub.revision))
        pushed.kept_files = len(self.files) - len(missing)
        weights = [name for name in missing if is_weight_file(name)]
        for name in weights:
            self._commit([name], [], f"Add {name}")
        rest = [name for name in missing if name not in weights]
        gone = [name for name in old if hub.number is None or name in hub.tree(hub.revision)]
        if rest or gone:
            self._commit(rest, gone, "Add the other files of the merge")
        pushed.number = hub.number
        hub.check_strangers(before, self.files, gone)
        if wrong := lacking(self.files, hub.tree(hub.revision)):
            raise OutputError(
                f"{hub.repo}: after the upload, {listed(wrong)} in pull request {hub.number} "
                "are not the files of this folder. Nothing was published. Run the same command again."
            )
        if request.publishes:
            hub.publish(self.files, request.digest)
            pushed.is_published = True
        pushed.others = other_files(before, self.files, old)
        return pushed

    def _commit(self, names: list[str], gone: list[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        def adds() -> list[Any]:
            return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(self.folder / name)) for name in names]

        self.hub.commit(adds, gone, message, digest=self.request.digest)
        for name in names:
            self.pushed.uploaded_bytes += self.files[name].size
            print(f"{name}: uploaded, {sized(self.files[name].size)}", file=sys.stderr)
