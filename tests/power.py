"""A disk that forgets: what a power cut may leave of a folder, at every moment of a run in this process.

Every fsync of a file keeps its bytes of that moment, every fsync of a folder its names. A cut then leaves either only
what was synced (names as their folder was last synced, bytes as their file was), or, since a file system may write
names early, all names of the moment over the bytes that were synced.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Tree = dict[str, bytes]


class ForgetfulDisk:
    """Watches `root`; `on_moment(early, late)` gets both trees that a cut could leave, after every sync and rename."""

    def __init__(self, root: Path, on_moment: Callable[[Tree, Tree], None]) -> None:
        self.root, self.on_moment = root, on_moment
        self.lock = threading.RLock()  # a moment is one for all threads
        self.files: dict[int, bytes] = {}  # inode -> bytes, as synced
        self.folders: dict[int, dict[str, int]] = {}  # inode -> names, as synced
        self.kept: list[int] = []  # open, so that no inode number is used twice
        self.kinds: dict[int, bool] = {}  # inode -> is a folder
        self._sync_folder(os.open(root, os.O_RDONLY))

    def synced(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._sync_folder(os.dup(fd))
        else:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            self.kept.append(os.dup(fd))
            self.files[os.fstat(fd).st_ino] = path.read_bytes() if path.exists() else b""
        self.moment()

    def _sync_folder(self, fd: int) -> None:
        self.kept.append(fd)
        names = {}
        for entry in os.scandir(fd):
            names[entry.name] = entry.inode()
            self.kinds[entry.inode()] = entry.is_dir(follow_symlinks=False)
            if not self.kinds[entry.inode()]:
                self.kept.append(os.open(entry.name, os.O_RDONLY, dir_fd=fd))
        self.folders[os.fstat(fd).st_ino] = names

    def moment(self) -> None:
        self.on_moment(dict(self._early("", self.root.stat().st_ino)), dict(self._late()))

    def _early(self, prefix: str, inode: int) -> Iterator[tuple[str, bytes]]:
        """Only what was synced."""
        for name, number in self.folders.get(inode, {}).items():
            if self.kinds[number]:
                yield f"{prefix}{name}/", b""
                yield from self._early(f"{prefix}{name}/", number)
            else:
                yield f"{prefix}{name}", self.files.get(number, b"")

    def _late(self) -> Iterator[tuple[str, bytes]]:
        """Every name there is, over the bytes that were synced."""
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            yield (f"{name}/", b"") if path.is_dir() else (name, self.files.get(path.stat().st_ino, b""))

    def close(self) -> None:
        for fd in self.kept:
            os.close(fd)


@contextmanager
def watched(root: Path, on_moment: Callable[[Tree, Tree], None]) -> Iterator[None]:
    """Every fsync, rename and removal of this process below `root` becomes a moment."""
    disk = ForgetfulDisk(root, on_moment)
    real: dict[str, Any] = {name: getattr(os, name) for name in ("fsync", "fdatasync", "replace", "rename", "unlink")}

    def sync(name: str) -> Callable[[int], None]:
        def wrapped(fd: int) -> None:
            with disk.lock:
                real[name](fd)
                disk.synced(fd)

        return wrapped

    def move(name: str) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            with disk.lock:
                real[name](*args, **kwargs)
                disk.moment()

        return wrapped

    for name in real:
        setattr(os, name, sync(name) if "sync" in name else move(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        disk.close()


def lay_out(tree: Tree, root: Path) -> None:
    """Make a folder of what a cut left."""
    for name, content in sorted(tree.items()):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
