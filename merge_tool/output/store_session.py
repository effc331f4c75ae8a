"""In the process that uploads: a folder of an object store as the output of a merge, beside the shards their receipts.

An object store shows every object at once. So that nobody takes half a model for a whole one, shards come without
configuration and index, which are uploaded last of all. Receipts lie below .slerp-merge/DIGEST/ until then; each is
there before its shard, so that a stray shard is known to be ours. Every object has its SHA-256 as metadata, which the
store keeps with the content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.checkpoint.source import sha256_of
from merge_tool.checkpoint.stores import library, open_store, patiently, sizes_of
from merge_tool.errors import OutputError, listed, shown
from merge_tool.models.side_files import REPORT, SUMS
from merge_tool.output.audit import check_file
from merge_tool.output.older import is_model_file, read_sums
from merge_tool.output.receipts import FOLDER, PLAN, receipt_name

T = TypeVar("T")
_PART_BYTES = 8_000_000
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS_AT_ONCE = 4
_THREADS = 8
_TRIES = 4  # of a part, by obstore
_SMALL_BYTES = 64_000_000
_DIGEST = "sha256"  # the metadata's name


class StoreSession:
    """A Session (uploading.py) with a folder of an object store."""

    def __init__(self, url: str, waits: Sequence[float]) -> None:
        self.url, self._waits = url, tuple(waits)
        self.digest = ""
        self._old: list[str] = []  # files of an older model, which the first shard replaces

    @property
    def _store(self) -> Any:
        return open_store(self.url)

    @property
    def _hidden(self) -> str:
        return f"{FOLDER}/{self.digest}/"

    # ------------------------------------------------------------------------------------------ looking

    def look(self) -> dict[str, Any]:
        return {"url": self.url, "is_there": True, "files": {name: (size, "") for name, size in self._shown().items()}}

    def _listing(self) -> dict[str, int]:
        return self._patiently(lambda: sizes_of(self.url))

    def _shown(self, listing: Mapping[str, int] | None = None) -> dict[str, int]:
        """What is there but drafts."""
        sizes = self._listing() if listing is None else listing
        begun = {name for several in _drafts(sizes).values() for name in several}
        return {name: size for name, size in sizes.items() if name not in begun and not name.startswith(f"{FOLDER}/")}

    def _found(self, name: str) -> tuple[int, str, float] | None:
        """The size of an object, its SHA-256 as it was uploaded, and the time; None if it is not there."""

        def once() -> tuple[int, str, float] | None:
            try:
                found = library(self.url).get(self._store, name, options={"head": True})
            except FileNotFoundError:
                return None
            return found.meta["size"], found.attributes.get(_DIGEST, ""), found.meta["last_modified"].timestamp()

        return self._patiently(once)

    def _found_all(self, names: Iterable[str]) -> dict[str, tuple[int, str, float]]:
        names = list(names)
        with ThreadPoolExecutor(_THREADS) as pool:
            return {name: one for name, one in zip(names, pool.map(self._found, names), strict=True) if one is not None}

    def _read(self, name: str) -> bytes:
        return self._patiently(lambda: bytes(library(self.url).get(self._store, name).bytes()))

    def stored(self, number: int | None, folder: str) -> dict[str, Any] | None:
        sizes, place = self._shown(), Path(folder)
        if not {REPORT, SUMS} <= sizes.keys():
            return None
        place.mkdir(parents=True, exist_ok=True)
        for name in (SUMS, REPORT):
            (place / name).write_bytes(self._read(name))
        sums = {**read_sums(place), SUMS: sha256_of(place / SUMS)}
        found = self._found_all(sums)
        for name, digest in sums.items():
            size, has, _ = found.get(name, (0, "", 0.0))
            if not has and 0 < size < _SMALL_BYTES:  # copied here by another program
                has = _sha256_of_bytes(self._read(name))
            if has != digest:
                return None
        files = {name: (found[name][0], digest, "") for name, digest in sums.items()}
        return {"files": files, "changed_at": max(at for _, _, at in found.values())}

    def draft(self, digest: str, overwrites: bool) -> dict[str, Any]:
        self.digest = digest
        drafts = _drafts(self._listing())
        if not overwrites and (others := sorted(drafts.keys() - {digest})):
            raise OutputError(
                f"{shown(self.url)}: holds an unfinished merge of another plan, or a push ({FOLDER}/{listed(others)}). "
                "Run that merge's command again, choose another folder, or give --overwrite."
            )
        if digest not in drafts:
            return {"number": None, "files": {}, "plan": None, "others": []}
        found = self._found_all(drafts[digest])
        files = {name: (size, has) for name, (size, has, _) in found.items()}
        files |= {receipt_name(name): (0, "") for name in found}
        plan = self.receipt(PLAN) if self._found(self._hidden + _short(PLAN)) is not None else ""
        return {"number": 0, "files": files, "plan": plan, "others": []}

    def receipt(self, name: str) -> str:
        return self._read(self._hidden + _short(name)).decode(errors="replace")

    # ------------------------------------------------------------------------------------------ writing

    def begin(self, private: bool, plan: str, is_new: bool, overwrites: bool) -> int | None:
        sizes = self._listing()
        before = self._shown(sizes)
        if not overwrites and (there := [name for name in before if is_weight_file(name)]):
            raise OutputError(
                f"{shown(self.url)}: has weights already ({listed(there)}). Choose another folder, or give --overwrite."
            )
        self._put(self._hidden + _short(PLAN), plan.encode())  # is writing allowed?
        if (found := self._found(self._hidden + _short(PLAN))) is None or found[1] != _sha256_of_bytes(plan.encode()):
            self._remove([self._hidden + _short(PLAN)])
            raise OutputError(
                f"{shown(self.url)}: the store does not keep the metadata of an object (x-amz-meta-sha256), by which a "
                "shard is known again. Merge into a folder, and copy that."
            )
        drafts = _drafts(sizes)
        for digest, names in drafts.items():
            if digest != self.digest or is_new:
                self._remove([name for name in names if name in sizes])
                self._remove([f"{FOLDER}/{digest}/{name}.json" for name in names])
            if digest != self.digest and f"{FOLDER}/{digest}/{_short(PLAN)}" in sizes:
                self._remove([f"{FOLDER}/{digest}/{_short(PLAN)}"])
        self._old = [name for name in before if is_model_file(name) or name == "config.json"]
        return None

    def _make_way(self, kept: Iterable[str] = ()) -> None:
        """Remove an older model, first what makes it one."""
        names, self._old = [name for name in self._old if name not in set(kept)], []
        self._remove(sorted(names, key=lambda name: (not name.endswith(".json"), name)))

    def shard(self, path: str, sha256: str, tensors: list[Any], receipt: str) -> None:
        """Another look at it before: by the safetensors library, and by its SHA-256."""
        file = Path(path)
        check_file(file, tensors, len(tensors))
        if sha256_of(file) != sha256:
            raise OutputError(
                f"{shown(file.name)}: was changed after it was written. Run the same command with --check-resumed."
            )
        self.add_weights(file.name, file, sha256, receipt)

    def add_weights(self, name: str, path: Path, sha256: str, receipt: str) -> None:
        """Upload a file of weights; its receipt is there before."""
        self._make_way()
        self._put(self._hidden + _short(receipt_name(name)), receipt.encode())
        self._upload(name, path, sha256)

    def finish(
        self, folder: str, sides: list[str], files: Mapping[str, Sequence[Any]], overwrites: bool, publishes: bool
    ) -> dict[str, Any]:
        expected = {name: (int(fields[0]), str(fields[1])) for name, fields in files.items()}
        before = self._shown()
        self._check([name for name in expected if name not in sides], expected)
        self._make_way(expected)
        for name in sorted(sides, key=_is_last):
            self._upload(name, Path(folder, name), expected[name][1])
        self._check(list(expected), expected)
        self.tidy()
        return {"others": sorted(name for name in self._shown() if name in before and name not in expected)}

    def _check(self, names: Sequence[str], expected: Mapping[str, tuple[int, str]]) -> None:
        """Raise OutputError unless these objects are what the merge wrote."""
        found = self._found_all(names)
        if wrong := [name for name in names if found.get(name, (0, ""))[:2] != expected[name]]:
            raise OutputError(
                f"{shown(self.url)}: {listed(wrong)} are not what the merge wrote. Does another program write there? "
                "Run the same command again: it continues."
            )

    def tidy(self) -> None:
        """Remove the receipts; the plan last."""
        names = [name for name in self._listing() if name.startswith(self._hidden)]
        self._remove(sorted(names, key=lambda name: name.endswith(f"/{_short(PLAN)}")))

    def drop(self) -> None:
        sizes = self._listing()
        self._remove([name for name in _drafts(sizes).get(self.digest, ()) if name in sizes])
        self.tidy()

    # ------------------------------------------------------------------------------------------ requests

    def _upload(self, name: str, path: Path, sha256: str) -> None:
        size = path.stat().st_size
        found = self._found(name)
        if found is not None and found[:2] == (size, sha256):
            return
        store = open_store(self.url, tries=_TRIES)
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        attributes = {_DIGEST: sha256}
        self._patiently(
            lambda: library(self.url).put(
                store, name, path, attributes=attributes, chunk_size=part, max_concurrency=_PARTS_AT_ONCE
            )
        )

    def _put(self, name: str, data: bytes) -> None:
        attributes = {_DIGEST: _sha256_of_bytes(data)}
        put = library(self.url).put
        self._patiently(lambda: put(self._store, name, data, attributes=attributes, use_multipart=False))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._patiently(lambda name=name: _deleted(self.url, self._store, name))  # type: ignore[misc]

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(action, self.url, self._waits, is_said=True)


def _deleted(url: str, store: Any, name: str) -> None:
    try:
        library(url).delete(store, name)
    except FileNotFoundError:  # by an earlier try, whose answer was lost
        return


def _drafts(names: Iterable[str]) -> dict[str, list[str]]:
    """The shards that each draft's receipts name, by its digest."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if len(parts) == 3 and parts[0] == FOLDER:
            shards = found.setdefault(parts[1], [])
            if parts[2] != _short(PLAN):
                shards.append(parts[2].removesuffix(".json"))
    return found


def _short(name: str) -> str:
    """A name in the draft without its folder."""
    return name.removeprefix(f"{FOLDER}/")


def _is_last(name: str) -> tuple[bool, bool]:
    """What makes a folder a model is uploaded last: the configuration, then the index."""
    return name.endswith(".index.json"), name == "config.json"


def _sha256_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
