"""A model of the Hugging Face Hub by its id -> the folder in the Hub's cache that holds it.

The library does the work (cache, token, endpoint, offline mode, progress bars, continuing a broken download), in a
process of its own: it takes 15 MB to import and more to download, which the merge's memory budget keeps for itself.
Only what a merge reads or copies is fetched: no pickled weights where there are safetensors, and none are looked at.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from merge_tool.checkpoint.folder import WEIGHT_SUFFIXES, find_weights, is_weight_file, weight_map_files
from merge_tool.errors import CheckpointError, FetchError, shown

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
# Never part of a merge, and often larger than the model: other formats, checkpoints of its training, originals.
_UNWANTED = [
    *(f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)),
    *("original/*", "*checkpoint-*/*", "*optimizer.*", "*scheduler.*", "*rng_state*", "*trainer_state.json"),
    *("*.bin.index.json", "*.tfevents.*", ".git*"),
]
_START = (  # the same search path as ours: the current folder, which may be a stranger's, is not put in front
    "import sys, os; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "
    "from merge_tool.checkpoint.hub import main; main()"
)
_REFUSED = 3  # exit code: the message is on stdout


def hub_id(ref: str | Path) -> tuple[str, str | None] | None:
    """(`org/name`, revision or None) when `ref` is a hub id and nothing local is called so, else None.

    >>> hub_id("euclaise/Memphis-CoT-3B@main")
    ('euclaise/Memphis-CoT-3B', 'main')
    >>> hub_id("runs/model.safetensors") is None
    True
    """
    text = ref.as_posix() if isinstance(ref, PurePath) else ref
    found = _HUB_ID.fullmatch(text)
    if found is None or is_weight_file(found[1]) or os.path.lexists(text):
        return None
    return found[1], found[2]


def local_path(ref: str | Path) -> Path:
    """`ref` as a path; a hub id becomes the folder of the Hub's cache that holds it, fetched if it is not there yet.

    Raises FetchError when it cannot be had: gated, missing, offline, no such revision.
    """
    asked = hub_id(ref)
    return Path(ref) if asked is None else _fetch_apart(*asked)


def _fetch_apart(repo: str, revision: str | None) -> Path:
    """`fetch` in a process of its own, with our standard error for its progress bars."""
    command = [sys.executable, "-c", _START, os.pathsep.join(sys.path), repo, *([revision] if revision else [])]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    except OSError as e:
        raise FetchError(f"{shown(repo)}: Python cannot be started to fetch it ({e.strerror}).") from e
    text = done.stdout.decode(errors="replace").rstrip("\r\n")
    if done.returncode == 0:
        return Path(json.loads(text.splitlines()[-1]))
    if done.returncode == _REFUSED:
        raise FetchError(json.loads(text.splitlines()[-1]))
    if done.returncode == 130:
        raise KeyboardInterrupt
    raise FetchError(
        f"{shown(repo)}: fetching it ended with code {done.returncode}; its last words are above. "
        "Run the same command again: it continues."
    )


def main() -> None:
    """Fetch `REPO [REVISION]` and print the folder, or what was wrong, as JSON on the last line."""
    try:
        answer, code = fetch(sys.argv[1], *sys.argv[2:]), 0
    except CheckpointError as e:
        answer, code = str(e), _REFUSED
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(answer))
    sys.exit(code)


def fetch(repo: str, revision: str | None = None) -> str:
    """The snapshot folder of `repo`, with all a merge needs. In two steps: the small files, then the weights
    that these name. Raises FetchError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(repo, revision=revision, ignore_patterns=_UNWANTED)
        commit = Path(folder).name
        wanted = _weights(repo, Path(folder), _listing(repo, commit, Path(folder)), commit)
        patterns = [glob.escape(name) for name in wanted]
        return snapshot_download(repo, revision=commit, allow_patterns=patterns)
    except CheckpointError:
        raise
    except Exception as e:  # of several libraries, which differ between versions; all mean: it cannot be had
        raise FetchError(_explained(e, repo, revision)) from e


def _listing(repo: str, commit: str, folder: Path) -> list[str]:
    """The files of the repository; where the Hub cannot be reached, those that were fetched before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # list_repo_files would do, but tries for half a minute when nobody answers.
        return sorted(file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings or [])
    except Exception as e:
        if isinstance(e, HfHubHTTPError):
            raise
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _weights(repo: str, folder: Path, listing: Sequence[str], commit: str) -> list[str]:
    """The weights a merge reads: one file or the index's shards; with modules.json also those of sub-folders."""
    single, index = find_weights(repo, [name for name in listing if "/" not in name])
    found = [single] if single else []
    if index:
        found = _indexed_files(repo, folder, index, commit)
    if "modules.json" in listing:
        found += _module_weights(listing)
    return found


def _indexed_files(repo: str, folder: Path, index: str, commit: str) -> list[str]:
    from huggingface_hub import snapshot_download

    if not (folder / index).exists():  # of pickles: not fetched until it is needed
        snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(index)])
    try:
        return weight_map_files(json.loads((folder / index).read_bytes()))
    except (ValueError, OSError) as e:
        raise FetchError(f"{repo}/{index}: is not an index of weights ({shown(e)}).") from e


def _module_weights(listing: Sequence[str]) -> list[str]:
    """The weights in sub-folders, pickled ones only where a folder has no others."""
    safetensors = [name for name in listing if "/" in name and name.endswith(".safetensors")]
    have = {PurePosixPath(name).parent for name in safetensors}
    pickles = [name for name in listing if "/" in name and PurePosixPath(name).name == "pytorch_model.bin"]
    return safetensors + [name for name in pickles if PurePosixPath(name).parent not in have]


# ------------------------------------------------------------------------------------------ what went wrong


def _explained(error: Exception, repo: str, revision: str | None) -> str:
    """One sentence about what happened and one about what to do."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    name = repo if revision is None else f"{repo}@{shown(revision)}"
    local = f"Nothing here is called {name}, and"
    page = f"{constants.ENDPOINT}/{repo}"
    login = "`hf auth login` or HF_TOKEN"
    if "GatedRepoError" in kinds:
        return f"{name}: is gated on the Hub. Ask for access at {page}, then give your token by {login}."
    if "RevisionNotFoundError" in kinds:
        return f"{name}: the Hub has {repo}, but no revision {shown(revision)} of it. {page}/tree/main lists them."
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{local} the Hub has no such model that you may see. Check the spelling; if it is private, "
            f"give your token by {login}."
        )
    if "HFValidationError" in kinds:
        return f"{local} it cannot be a model's id on the Hub ({_first_line(error)})."
    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        return (
            f"{local} the Hub's cache does not hold all of it, while HF_HUB_OFFLINE forbids to fetch it. "
            "Unset HF_HUB_OFFLINE, or give a local folder."
        )
    if "LocalEntryNotFoundError" in kinds or kinds & {"ConnectError", "ConnectionError", "TimeoutException"}:
        return (
            f"{local} {constants.ENDPOINT} cannot be reached to fetch it ({_root(error)}). Check the connection "
            "and run the same command again, or give a local folder."
        )
    return f"{name}: cannot be fetched ({_root(error)}). Mend that, then run the same command: it continues."


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__ or error
    return found


def _root(error: Exception) -> str:
    """What the deepest cause that says something says."""
    texts = [_first_line(e) for e in _chain(error) if str(e).strip()]
    return texts[-1] if texts else type(error).__name__


def _first_line(error: Any) -> str:
    return shown(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
