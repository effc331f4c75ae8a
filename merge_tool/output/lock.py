"""A lock: only one process works in a work folder. The system releases the lock when its process ends.

Some file systems do not enforce locks; there a record replaces the lock (owner.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
from pathlib import Path

from merge_tool.errors import OutputError, output_failed, shown
from merge_tool.files import patiently, remove_tree
from merge_tool.output.owner import OWNER, Owner

# The errors of file systems without locks
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY})
_LOCKED_BYTE = 1 << 30  # byte to lock on Windows: behind the file's content


class FolderLock:
    """The lock of a work folder, held from creation to `release`. Raises OutputError while another process has it."""

    NAME = "lock"

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.NAME
        self._fd = -1
        self._name: socket.socket | None = None  # holds the lock if the file system cannot
        self._owner: Owner | None = None
        while self._fd < 0:
            try:
                fd = os.open(self.path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
            except OSError as e:
                raise output_failed(self.path, e) from e
            try:
                self._name = lock_file(fd)
                if self._is_there(fd):  # else the process that finished has removed it
                    self._fd = fd
            except FileNotFoundError:
                folder.mkdir(exist_ok=True)
            except BlockingIOError as e:
                raise OutputError(
                    f"{shown(folder.parent)}: another merge is writing here. Wait for it, or choose another folder."
                ) from e
            except OSError as e:
                raise output_failed(self.path, e) from e
            finally:
                if self._fd != fd:
                    os.close(fd)
        try:
            self._owner = Owner(folder)
        except BaseException:
            self.release()
            raise

    def _is_there(self, fd: int) -> bool:
        """Whether the open file is still the file at the lock's path. If the inodes differ, the contents decide: some
        drivers give a file a new inode number at each call."""
        if os.fstat(fd).st_ino == self.path.stat().st_ino:
            return True
        mark = _write_mark(fd)
        return self.path.read_bytes() == mark

    @property
    def owner(self) -> Owner:
        assert self._owner is not None
        return self._owner

    def mark(self) -> bytes:
        """Write unique bytes into the lock file and return them: a path that shows them is this file."""
        try:
            return _write_mark(self._fd)
        except OSError as e:
            raise output_failed(self.path, e) from e

    def release(self) -> None:
        try:
            if self._owner is not None:
                self._owner.release()
        finally:
            if self._fd >= 0:
                with contextlib.suppress(OSError):  # closing drops the lock even if this fails
                    os.close(self._fd)
                self._fd = -1
            if self._name is not None:
                self._name.close()
                self._name = None

    def remove_with(self, folder: Path) -> None:
        """Remove the folder and all in it, the lock last."""
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            elif entry != self.path and entry.name not in ("journal.jsonl", OWNER):
                entry.unlink()
        (folder / "journal.jsonl").unlink(missing_ok=True)
        (folder / OWNER).unlink(missing_ok=True)
        if os.name == "nt":
            self.release()
        patiently(lambda: self.path.unlink(missing_ok=True))
        self.release()
        patiently(folder.rmdir)


def new_mark() -> bytes:
    """Bytes that no file has yet."""
    return secrets.token_hex(16).encode()


def _write_mark(fd: int) -> bytes:
    mark = new_mark()
    if os.fstat(fd).st_size > len(mark):
        os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, mark)
    return mark


def lock_file(fd: int) -> socket.socket | None:
    """Lock the file. Raises BlockingIOError if another process has the lock.

    The lock is a flock; a record lock if the file system has no flock; a socket's name in the kernel if it has neither.
    (The name works on Linux only, between processes of this machine. Elsewhere only the owner's record is left.) The
    caller keeps the returned socket."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)  # on Windows no process can read a locked byte
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as e:
            raise BlockingIOError(*e.args) from e
        return None
    import fcntl

    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except (BlockingIOError, PermissionError) as e:
            raise BlockingIOError(*e.args) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
    if sys.platform != "linux":
        return None
    return _claim_name(os.fstat(fd))


def _claim_name(status: os.stat_result) -> socket.socket:
    """A socket bound to a name made of the file's device and inode. The system closes it when the process ends."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0slerp-merge-{status.st_dev}-{status.st_ino}")
    except OSError as e:
        name.close()
        if e.errno == errno.EADDRINUSE:
            raise BlockingIOError(*e.args) from e
        raise
    return name
