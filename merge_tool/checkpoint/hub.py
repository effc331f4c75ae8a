"""A model of the Hugging Face Hub by its id -> its folder in the Hub's cache, with or without its weights.

huggingface_hub does the work (fetching.py), in a process of its own: importing it takes 15 MB, downloading more, and
the merge needs that memory. For weights that are not in the cache, `look` fetches only the headers, which are enough
for a plan. They go into an unnamed temporary file, which the system removes however this process ends. A file of
safetensors at an address (https://...) is looked at in the same way, and so is a model on an object store.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

from merge_tool.apart import ask
from merge_tool.checkpoint.addresses import is_address, is_store, store_path, store_url
from merge_tool.checkpoint.folder import is_there, is_weight_file, meant_path, nearest_path, snapshot_of
from merge_tool.checkpoint.source import ComingFile, Place
from merge_tool.errors import CheckpointError, FetchError, reason, shown

_AT_HUB, _AT_STORE = "merge_tool.checkpoint.fetching", "merge_tool.checkpoint.store_fetching"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)


def hub_id(ref: str | Path) -> tuple[str, str | None] | None:
    """(`org/name`, revision or None) if `ref` is a hub id and no local path has that name, else None.

    A path typed wrong is no id: not if its first folder is there (`runs/bse` beside `runs/`), or one of nearly that
    name has the rest (`rnus/base` beside `runs/base`), unless a revision says that the Hub is meant; and `./name` and
    `folder/name/` have another form.

    >>> hub_id("euclaise/Memphis-CoT-3B@main")
    ('euclaise/Memphis-CoT-3B', 'main')
    >>> hub_id("runs/model.safetensors") is None
    True
    """
    text = ref.as_posix() if isinstance(ref, PurePath) else ref
    match = _HUB_ID.fullmatch(text)
    if match is None or is_weight_file(match[1]) or is_there(text) or is_there(match[1]):
        return None
    if match[2] is None and (is_there(match[1].partition("/")[0]) or nearest_path(match[1]) is not None):
        return None
    return match[1], match[2]


def local_path(ref: str | Path) -> Path:
    """`ref` as a path. A hub id becomes its folder in the Hub's cache; a model that is not in the cache is fetched
    first. Raises CheckpointError for a local path that is not there; FetchError for models that cannot be
    fetched: gated, missing, offline, no such revision.
    """
    repo = hub_id(ref)
    if repo is None and is_address(ref):
        raise FetchError(not_read_here(ref))
    return _there(ref) if repo is None else _fetch_whole(*repo)


def not_read_here(ref: str | Path) -> str:
    """The message for a model at an address where none is read."""
    where = f"{str(ref).partition('://')[0]}://... is an address" if "@" in str(ref) else str(ref).partition("?")[0]
    return (
        f"{shown(where)}: models at an address are read by range, which only merges in one process, averages and "
        "inspect do. Copy it to this disk, then give that path."
    )


def _there(ref: str | Path) -> Path:
    """A local path that is there. Raises CheckpointError: later a Path would not show that it was local by its form."""
    if not is_there(ref):
        raise CheckpointError(f"{shown(ref)}: no such file or folder.{meant(ref)}")
    return snapshot_of(Path(ref))


def meant(ref: str | Path) -> str:
    """As `meant_path`, and for a path with the form of an id: how to say that the Hub is meant."""
    text = str(ref)
    match = _HUB_ID.fullmatch(text)
    is_of_form = match is not None and match[2] is None and not is_weight_file(text)
    return meant_path(text) + (f" A model of the Hub is {shown(text)}@main." if is_of_form else "")


@dataclass(frozen=True)
class Snapshot:
    """A model's folder, and by name the weights that are still to be fetched into it; their headers can be read until
    `close`. For a model of the Hub: `cached_bytes` of weights are in the cache, `fetched_bytes` of these were fetched
    for planning, and `begun_bytes` of the others were left by an interrupted download, which continues."""

    folder: Path
    coming: Mapping[str, ComingFile] = field(default_factory=dict)
    cached_bytes: int = 0
    fetched_bytes: int = 0
    begun_bytes: int = 0
    repo: tuple[str, str | None] | None = None
    variant: str | None = None
    held: IO[bytes] | None = None
    address: str = ""  # which has no cache; `made` is then a folder for it, with its small files
    made: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pinned(self) -> str:
        """The model's absolute path, its address, or its id at the commit."""
        path = self.address or str(self.folder.absolute())
        return path if self.repo is None else f"{self.repo[0]}@{self.folder.name}"

    def close(self) -> None:
        if self.held is not None:
            self.held.close()
        if self.made is not None:
            self.made.cleanup()

    def fetch(self) -> None:
        """Fetch the remaining weights, from the commit whose headers were read. Raises FetchError."""
        if self.coming and self.repo is not None:
            _fetch_whole(*self.repo, commit=self.folder.name, variant=self.variant)


def look(ref: str | Path, *, by_range: bool = False, variant: str | None = None) -> Snapshot:
    """As `local_path`, but only the headers of safetensors that are not in the cache are fetched; pickles and adapters
    are fetched whole, but with `by_range` pickles are refused. `variant` chooses among files (fp16). The caller closes
    the Snapshot."""
    if is_address(ref):
        return _look_at(str(ref), variant)
    repo = hub_id(ref)
    if repo is None:
        return Snapshot(_there(ref))
    held = _unnamed_file(repo[0])
    try:
        answer = _ask(held, _AT_HUB, "look", *repo, by_range, variant)
        cached, fetched, begun = (int(answer[f"{what}_bytes"]) for what in ("cached", "fetched", "begun"))
        return Snapshot(
            folder=Path(answer["folder"]),
            coming=_coming(answer, Path(answer["folder"]), held),
            cached_bytes=cached,
            fetched_bytes=fetched,
            begun_bytes=begun,
            repo=repo,
            variant=variant,
            held=held,
        )
    except BaseException:
        held.close()
        raise


def _look_at(address: str, variant: str | None) -> Snapshot:
    """A model at an address. A folder is made for it, named like it; of a bucket's folder it gets the small files."""
    name = store_url(address) if is_store(address) else address.partition("?")[0]
    path = store_path(name) if is_store(name) else PurePosixPath(PurePosixPath(name).name)
    held = _unnamed_file(name)
    try:
        made = tempfile.TemporaryDirectory(prefix="slerp-merge-", ignore_cleanup_errors=True)
    except OSError as e:
        held.close()
        raise FetchError(f"{shown(name)}: no temporary folder can be made for it ({reason(e)}).") from e
    try:
        folder = Path(made.name, path.with_suffix("") if is_weight_file(path.name) else path)
        folder.mkdir(parents=True)
        if is_store(address):
            answer = _ask(held, _AT_STORE, name, str(folder), variant)
        else:
            answer = _ask(held, _AT_HUB, "url", address)
        coming, fetched = _coming(answer, folder, held), int(answer.get("fetched_bytes", 0))
        return Snapshot(folder, coming, fetched, fetched, variant=variant, held=held, address=address, made=made)
    except BaseException:
        held.close()
        made.cleanup()
        raise


def _coming(answer: Any, folder: Path, held: IO[bytes]) -> dict[str, ComingFile]:
    """The files that are to be fetched into a folder, whose headers are in `held` from its position on."""
    coming, offset = {}, held.tell()
    for name, size, etag, length, place in answer["coming"]:
        coming[name] = ComingFile(
            folder / name, place["where"], size, held, offset, length, etag=etag, place=Place(**place)
        )
        offset += length
    return coming


def _fetch_whole(repo: str, revision: str | None, commit: str | None = None, variant: str | None = None) -> Path:
    with _unnamed_file(repo) as held:
        return Path(_ask(held, _AT_HUB, "fetch", repo, revision, commit, variant))


def _unnamed_file(repo: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as e:
        raise FetchError(f"{shown(repo)}: no temporary file can be made to fetch it ({reason(e)}).") from e


def _ask(held: IO[bytes], module: str, *request: str | bool | None) -> Any:
    """The answer of a module's main, in a process of its own. It shows progress bars on our standard error. The bytes
    that follow the answer go into `held`, from its position on."""
    value, _ = ask(
        module,
        request,
        what=shown(request[module == _AT_HUB]),
        error=FetchError,
        hint="Its last words are above. Run the same command again: it continues.",
        into=held,
    )
    return value
