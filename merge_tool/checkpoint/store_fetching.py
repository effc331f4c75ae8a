"""In a process of its own: a model on an object store -> a folder here with its small files, and the headers of its
weights. No weights are read, except adapters, which are small."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from merge_tool.apart import answer
from merge_tool.checkpoint.folder import is_pickle, is_weight_file
from merge_tool.checkpoint.ranges import Start, fetch_headers
from merge_tool.checkpoint.source import Place
from merge_tool.checkpoint.stores import (
    explained,
    explaining,
    folder_url,
    library,
    open_store,
    patiently,
    sizes_of,
    status_of,
)
from merge_tool.checkpoint.wanted import can_wait, is_adapter_listing, is_small, module_weights
from merge_tool.checkpoint.weight_files import adapter_files, find_weights, unread_format, weight_map_files
from merge_tool.errors import FetchError, listed, reason, shown, sized
from merge_tool.files import leads_out

WORK = ".slerp-merge"  # where a merge into this folder keeps its receipts
_WAITS = (0.5, 1.0, 2.0)
_THREADS = 8
_MOST_SMALL_BYTES = 1_000_000_000  # of files that are no weights: tokenizers have some 10 MB
_PIECE_BYTES = 4_000_000


class _NotThere(FetchError):
    """There is no such object."""


def main() -> None:
    answer(lambda question: look_at_store(*question))


def look_at_store(url: str, folder: str, variant: str | None) -> tuple[dict[str, Any], list[bytes]]:
    """The fields of a Snapshot for a folder or a file at `url`, and headers. The small files, and weights that must be
    whole, are then in `folder`. Raises FetchError."""
    with explaining(url):
        if is_weight_file(url):
            parent, name = folder_url(url)
            return _look(parent, name, [_readable(url, name)], 0)
        sizes = _listing(url)
        names = sorted(sizes)
        here = Path(folder)
        _fetch_small(url, here, {name: sizes[name] for name in names if is_small(name)})
        wanted, is_adapter = _weights(url, here, names, variant)
        coming = [name for name in wanted if name in sizes and can_wait(name) and not is_adapter]
        whole = [name for name in wanted if name in sizes and name not in coming]
        if not is_adapter and (pickles := [name for name in whole if is_pickle(name)]):
            raise FetchError(_of_pickles(url, pickles))
        _fetch_all(url, here, whole)
        return _look(url, url, coming, sum(sizes[name] for name in whole))


def _look(url: str, what: str, coming: Sequence[str], fetched_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
    places = [Place(f"{url}/{name}", f"{url}/{name}") for name in coming]
    starts = fetch_headers(places, _start) if places else []
    found = [
        (name, start.size, start.etag, len(start.data), asdict(replace(place, sha256=start.sha256)))
        for name, start, place in zip(coming, starts, places, strict=True)
    ]
    return {"coming": found, "fetched_bytes": fetched_bytes}, [start.data for start in starts]


def _readable(url: str, name: str) -> str:
    """A file's name, if it is one of safetensors. Raises FetchError."""
    if is_pickle(name):
        raise FetchError(_of_pickles(url, [name]))
    if not name.endswith(".safetensors"):
        raise FetchError(f"{shown(url)}: {unread_format([name])}")
    return name


def _of_pickles(url: str, names: Sequence[str]) -> str:
    return (
        f"{shown(url)}: its weights are pickles ({listed(names)}), which are read whole, by torch, and cannot be "
        "read by range. Copy the folder to this disk and give that, or give a model in safetensors."
    )


def _listing(url: str) -> dict[str, int]:
    found = patiently(lambda: sizes_of(url), url, _WAITS)
    sizes = {name: size for name, size in found.items() if not leads_out(name)}
    if not sizes:
        raise FetchError(
            f"{shown(url)}: nothing is there. Check the spelling: it must be a folder or a .safetensors file."
        )
    if any(name.startswith(f"{WORK}/") for name in sizes):
        raise FetchError(
            f"{shown(url)}: holds an unfinished merge. Run that merge's command again: it continues. Then use it."
        )
    return sizes


def _weights(url: str, here: Path, names: Sequence[str], variant: str | None) -> tuple[list[str], bool]:
    """The files of weights that a merge reads (an adapter's, one file, the index's shards; with modules.json also those
    in sub-folders), and whether they are an adapter."""
    if is_adapter_listing(names) and (adapter := adapter_files(url, names)):
        return adapter, True
    files, index = find_weights(url, names, variant=variant, typed=url)
    if index is not None:
        if not (here / index).exists():  # of pickles
            _fetch_all(url, here, [index])
        try:
            files = weight_map_files(json.loads((here / index).read_bytes()))
        except (ValueError, OSError, RecursionError) as e:
            raise FetchError(f"{shown(url)}/{shown(index)}: is not an index of weights ({reason(e)}).") from e
    return files + (module_weights(names) if "modules.json" in names else []), False


# ------------------------------------------------------------------------------------------ bytes


def _start(place: Place, count: int) -> Start:
    """The first `count` bytes of an object, or all of a shorter one."""
    folder, name = folder_url(place.url)

    def ask() -> Start:
        try:
            found = library(folder).get(open_store(folder), name, options={"range": (0, count)})
        except Exception as e:
            if status_of(e) != 416:
                raise
            return Start(0, "", b"")
        data = bytes(found.bytes())
        if len(data) != min(count, found.meta["size"]):
            raise OSError(f"{len(data):,} bytes arrived, expected {min(count, found.meta['size']):,}")
        return Start(found.meta["size"], found.meta["e_tag"] or "", data, found.attributes.get("sha256", ""))

    with explaining(place.where):
        return patiently(ask, place.where, _WAITS)


def _fetch_small(url: str, here: Path, sizes: dict[str, int]) -> None:
    if (total := sum(sizes.values())) > _MOST_SMALL_BYTES:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))
        raise FetchError(
            f"{shown(url)}: besides weights it holds {sized(total)} of other files ({listed(largest, 3)}), which a "
            "merge would copy. Give a folder that holds the model alone."
        )
    _fetch_all(url, here, [name for name, size in sizes.items() if size])
    for name in (name for name, size in sizes.items() if not size):
        with contextlib.suppress(_NotThere):  # stands for a folder: its real name ends with a /
            _fetch(url, here / PurePosixPath(name), name)


def _fetch_all(url: str, here: Path, names: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: _fetch(url, here / PurePosixPath(name), name), names))


def _fetch(url: str, path: Path, name: str) -> None:
    """Download an object whole."""

    def once() -> None:
        found = library(url).get(open_store(url), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                file.write(piece)
        if (size := path.stat().st_size) != found.meta["size"]:
            raise OSError(f"{size:,} bytes arrived, expected {found.meta['size']:,}")

    with explaining(f"{url}/{name}"):
        try:
            patiently(once, f"{url}/{name}", _WAITS)
        except FileNotFoundError as e:
            raise _NotThere(explained(e, f"{url}/{name}")) from e
