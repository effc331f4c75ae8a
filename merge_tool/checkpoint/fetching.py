"""In a process of its own: a model of the Hub -> its folder in the Hub's cache, or the reason why it cannot be fetched.

huggingface_hub does the work: cache, token, endpoint, offline mode, progress bars, continuing a broken download. Only
files that a merge reads or copies are fetched: no pickled weights if there are safetensors. No weights are read.
"""

from __future__ import annotations

import glob
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from merge_tool.apart import answer
from merge_tool.checkpoint.folder import is_pickle
from merge_tool.checkpoint.ranges import can_ask, fetch_headers
from merge_tool.checkpoint.source import Place
from merge_tool.checkpoint.wanted import UNWANTED, can_wait, is_adapter_listing, module_weights
from merge_tool.checkpoint.weight_files import adapter_files, find_weights, weight_map_files
from merge_tool.errors import CheckpointError, FetchError, listed, reason, shown
from merge_tool.files import leads_out


def main() -> None:
    """Carry out the request. Returns the answer, and the bytes of headers that follow it."""
    kinds: dict[str, Callable[..., tuple[Any, Sequence[bytes]]]] = {
        "look": look_ahead, "url": look_at_url, "fetch": lambda *request: (fetch(*request), ()),
    }  # fmt: skip
    answer(lambda request: kinds[request[0]](*request[1:]))


def fetch(repo: str, revision: str | None = None, commit: str | None = None, variant: str | None = None) -> str:
    """The snapshot folder of `repo` with all files that a merge needs: the small files, then the weights that they
    name, of a `variant`. `commit` is the commit that `revision` meant when the model was planned. Raises FetchError.
    """
    with _explaining(repo, revision):
        folder, _, wanted = _fetch_small(repo, commit or revision, variant)
        return _download(repo, folder.name, wanted)


def look_ahead(
    repo: str, revision: str | None = None, by_range: bool = False, variant: str | None = None
) -> tuple[dict[str, Any], list[bytes]]:
    """As `fetch`, but only the headers of safetensors that are not in the cache: the fields of a Snapshot, and the
    headers. With `by_range`, weights that can only be fetched whole are refused."""
    with _explaining(repo, revision):
        folder, listing, wanted = _fetch_small(repo, revision, variant)
        lacking = [name for name in _lacking(folder, wanted) if name in listing]
        may_wait = can_ask() and not is_adapter_listing(listing)
        coming = [name for name in lacking if may_wait and can_wait(name)]
        whole = sorted({*lacking} - {*coming})
        if by_range and (pickles := [name for name in whole if is_pickle(name)]):
            raise FetchError(
                f"{repo}: its weights are pickles ({listed(pickles)}), which are read whole, by torch, and cannot be "
                "read by range. Give --no-stream, or another model in safetensors."
            )
        if whole:
            _download(repo, folder.name, whole)
        places = [_place(repo, folder.name, name) for name in coming]
        starts = fetch_headers(places)
    answer = {
        "folder": str(folder),
        "coming": [
            (name, start.size, start.etag, len(start.data), asdict(place))
            for name, start, place in zip(coming, starts, places, strict=True)
        ],
        "cached_bytes": sum((folder / name).stat().st_size for name in wanted if (folder / name).is_file()),
        "fetched_bytes": sum((folder / name).stat().st_size for name in whole),
        "begun_bytes": _begun_bytes(folder) if coming else 0,
    }
    return answer, [start.data for start in starts]


def look_at_url(url: str) -> tuple[dict[str, Any], list[bytes]]:
    """As `look_ahead`, for one file of safetensors at an address."""
    place = Place(url.partition("?")[0], url)
    with _explaining(place.where, None):
        (start,) = fetch_headers([place])
    name = PurePosixPath(place.where).name
    return {"coming": [(name, start.size, start.etag, len(start.data), asdict(place))]}, [start.data]


def _place(repo: str, commit: str, name: str) -> Place:
    from huggingface_hub import hf_hub_url

    return Place(f"{repo}/{name}", hf_hub_url(repo, name, revision=commit), repo, commit)


@contextmanager
def _explaining(repo: str, revision: str | None) -> Iterator[None]:
    """Turn every error inside into a FetchError. No progress bars without a terminal; no warning for a repository that
    has only weights."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub._snapshot_download").addFilter(_is_news)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:  # several libraries' errors, which differ between versions; each means: cannot be fetched
        raise FetchError(explained(e, repo, revision)) from e


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No files matched")


def _fetch_small(repo: str, revision: str | None, variant: str | None) -> tuple[Path, list[str], list[str]]:
    """The snapshot folder without the weights, the files of the repository, and the names of the weights to fetch."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=UNWANTED))
    listing, error = _listing(repo, folder.name, folder)
    if error is not None and not listing:  # empty: made below by a run that then failed
        raise error
    wanted = _weights(repo, folder, listing, folder.name, variant)
    if error is not None and _lacking(folder, wanted):
        raise error  # fail at once: the library would try to fetch them for half a minute
    folder.mkdir(parents=True, exist_ok=True)  # a repository without small files has none yet
    return folder, listing, wanted


def _lacking(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).exists()]


def _download(repo: str, commit: str, names: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in names])


def _begun_bytes(folder: Path) -> int:
    """Bytes of broken downloads that older versions of the library keep and continue. Newer versions start again, under
    other names."""
    blobs = folder.parent.parent / "blobs"
    return sum(p.stat().st_size for p in blobs.glob("*.incomplete") if p.name.count(".") == 1)


def _listing(repo: str, commit: str, folder: Path) -> tuple[list[str], Exception | None]:
    """The files of the repository. If the Hub cannot be reached: the files that were fetched before, and the reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Not list_repo_files: it tries for half a minute if no server answers.
        names = (file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings or [])
        return sorted(name for name in names if not leads_out(name)), None
    except Exception as e:
        if isinstance(e, HfHubHTTPError):
            raise
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), e


def _weights(repo: str, folder: Path, listing: Sequence[str], commit: str, variant: str | None) -> list[str]:
    """The weights a merge reads: one file or the index's shards; with modules.json also those of sub-folders."""
    if is_adapter_listing(listing) and (adapter := adapter_files(repo, listing, of_hub=True)):
        return adapter
    files, index = find_weights(repo, listing, of_hub=True, variant=variant)
    if index:
        files = _indexed_files(repo, folder, index, commit)
    if "modules.json" in listing:
        files += module_weights(listing)
    return files


def _indexed_files(repo: str, folder: Path, index: str, commit: str) -> list[str]:
    from huggingface_hub import snapshot_download

    if not (folder / index).exists():  # an index of pickles is fetched only if it is needed
        snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(index)])
    try:
        return weight_map_files(json.loads((folder / index).read_bytes()))
    except (ValueError, OSError, RecursionError) as e:
        raise FetchError(f"{repo}/{index}: is not an index of weights ({reason(e)}).") from e


# ------------------------------------------------------------------------------------------ what went wrong


def explained(error: Exception, repo: str, revision: str | None) -> str:
    """One sentence about the problem and one about the next step. `repo` may be an address."""
    from huggingface_hub import constants

    if "://" in repo:
        return f"{repo}: cannot be read ({_root(error)}). Check the address and the connection, then run it again."
    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    name = repo if revision is None else f"{repo}@{shown(revision)}"
    local = f"{name}: is not a local path, and"
    page = f"{constants.ENDPOINT}/{repo}"
    login = "`hf auth login` or HF_TOKEN"
    if "GatedRepoError" in kinds:
        return f"{name}: is gated on the Hub. Ask for access at {page}, then give your token by {login}."
    if "RevisionNotFoundError" in kinds:
        return f"{name}: the Hub has {repo}, but no revision {shown(revision)} of it. {page}/tree/main lists them."
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{local} the Hub shows you no such model. Check the spelling; if it is private, "
            f"give your token by {login}."
        )
    if "HFValidationError" in kinds:
        return f"{local} it is not a valid model id of the Hub ({_first_line(error)})."
    if _is_offline():
        return (
            f"{local} it is not fully in the Hub's cache; HF_HUB_OFFLINE prevents downloading it. "
            "Unset HF_HUB_OFFLINE, or give a local folder."
        )
    if "LocalEntryNotFoundError" in kinds or kinds & {"ConnectError", "ConnectionError", "TimeoutException"}:
        return (
            f"{local} {constants.ENDPOINT} cannot be reached to fetch it ({_root(error)}). Check the connection "
            "and run the same command again, or give a local folder."
        )
    return f"{name}: cannot be fetched ({_root(error)}). Correct that, then run the same command: it continues."


def _is_offline() -> bool:
    from huggingface_hub import constants

    offline: bool = constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE
    return offline


def _chain(error: BaseException) -> list[BaseException]:
    errors: list[BaseException] = []
    while error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__ or error
    return errors


def _root(error: Exception) -> str:
    """The message of the deepest cause that has a message."""
    texts = [_first_line(e) for e in _chain(error) if str(e).strip()]
    return texts[-1] if texts else type(error).__name__


def _first_line(error: Any) -> str:
    """The first line of a message, without what follows a ? in addresses: it may be a signature."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown(re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line))
