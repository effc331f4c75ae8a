"""A file system of our own in user space: a folder shown at a second place, with the oddities that drivers have.

    python fuse_disk.py FOLDER PLACE [ODDITY ...]

Speaks the kernel's protocol on /dev/fuse (7.31), so it needs no library; it needs root. `disk` is for tests. Oddities:

    ignores-case     any spelling of a name finds it (exFAT, macOS, NTFS); names keep the spelling they were made with
    two-inodes       every spelling has an inode of its own (exfat-fuse, ciopfs)
    new-inodes       a file has another inode number whenever it is asked for (sshfs, mergerfs)
    no-sizes         the disk says that it has 0 bytes, 0 of them free
    no-folder-sync   fsync of a folder fails with EINVAL
    largest=N        a file of more than N bytes fails with EFBIG (FAT32: 4 GiB)
    no-signs         names with any of :?*<>|" fail with EINVAL (exFAT, NTFS)
"""

# ruff: noqa: A003, PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH120, PTH208
from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

DRIVERS: dict[Path, subprocess.Popen[bytes]] = {}  # by the places where their disks are


@contextmanager
def disk(folder: Path, place: Path, *oddities: str) -> Iterator[Path]:
    """Shows `folder` at `place`; skips the test where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    if not os.access("/dev/fuse", os.W_OK) or os.geteuid() or shutil.which("umount") is None:
        pytest.skip("this user may not mount a file system of its own")
    driver = subprocess.Popen([sys.executable, __file__, folder, place, *oddities], stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 20
        while not place.is_mount() and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if not place.is_mount():
            pytest.skip("this user may not mount a file system of its own")
        DRIVERS[place] = driver
        yield place
    finally:
        DRIVERS.pop(place, None)
        subprocess.run(["umount", "-l", place], capture_output=True)
        driver.kill()
        driver.communicate()


class Refused(OSError):
    pass


class Driver:
    """Answers the kernel. A node is a path as it was spelled; `real` finds the file behind it."""

    def __init__(self, root: str, oddities: list[str]) -> None:
        self.root, self.oddities = root, frozenset(oddities)
        self.largest = next((int(word.partition("=")[2]) for word in oddities if word.startswith("largest=")), None)
        self.paths: dict[int, str] = {1: ""}
        self.nodes: dict[str, int] = {"": 1}
        self.next_node, self.next_inode = 2, 1 << 20

    # ------------------------------------------------------------------------------------------ names

    def real(self, path: str) -> str:
        if "ignores-case" not in self.oddities:
            return f"{self.root}{path}"
        found = self.root
        for name in filter(None, path.split("/")):
            if not os.path.lexists(f"{found}/{name}"):
                with suppress(OSError):
                    name = next((n for n in os.listdir(found) if n.casefold() == name.casefold()), name)
            found = f"{found}/{name}"
        return found

    def node(self, path: str) -> int:
        key = path if "two-inodes" in self.oddities else self.real(path).removeprefix(self.root)
        if key not in self.nodes:
            self.nodes[key] = self.next_node
            self.paths[self.next_node] = key
            self.next_node += 1
        return self.nodes[key]

    def child(self, node: int, name: bytes) -> str:
        text = os.fsdecode(name)
        if "no-signs" in self.oddities and set(text) & set(':?*<>|"'):
            raise Refused(errno.EINVAL, "")
        return f"{self.paths[node]}/{text}"

    def moved(self, old: str, new: str) -> None:
        """Every node at or below `old` is at or below `new` now."""
        here = self.real(old).removeprefix(self.root)
        for path in list(self.paths.values()):
            if path in (new, self.real(new).removeprefix(self.root)) or path.startswith(f"{new}/"):
                self.nodes.pop(path, None)
        for node, path in list(self.paths.items()):
            for before in {old, here}:
                if path == before or path.startswith(f"{before}/"):
                    self.nodes.pop(path, None)
                    self.paths[node] = f"{new}{path[len(before) :]}"
                    self.nodes[self.paths[node]] = node
                    break

    # ---------------------------------------------------------------------------------------- answers

    def attributes(self, node: int, fd: int | None = None) -> bytes:
        s = os.lstat(self.real(self.paths[node])) if fd is None else os.fstat(fd)
        inode = node
        if "new-inodes" in self.oddities and stat.S_ISREG(s.st_mode):
            self.next_inode += 1
            inode = self.next_inode
        times = [divmod(ns, 10**9) for ns in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
        return struct.pack(
            "<6Q10I", inode, s.st_size, s.st_blocks, *(t[0] for t in times), *(t[1] for t in times),
            s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def entry(self, path: str) -> bytes:
        os.lstat(self.real(path))
        node = self.node(path)
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def init(self, node: int, data: bytes) -> bytes:
        readahead = struct.unpack_from("<4I", data)[2]
        return struct.pack("<4I2H2I2H8I", 7, 31, readahead, 0, 12, 9, 131_072, 1, 32, 0, *[0] * 8)

    def lookup(self, node: int, data: bytes) -> bytes:
        return self.entry(self.child(node, data[:-1]))

    def getattr(self, node: int, data: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0) + self.attributes(node)

    def readlink(self, node: int, data: bytes) -> bytes:
        return os.fsencode(os.readlink(self.real(self.paths[node])))

    def setattr(self, node: int, data: bytes) -> bytes:
        valid, _, fh, size, _, atime, mtime, _, atimens, mtimens, _, mode = struct.unpack_from("<2I6Q4I", data)
        path = self.real(self.paths[node])
        if valid & 8:
            self.check_size(size)
            os.truncate(fh if valid & 64 else path, size)
        if valid & 1:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & (16 | 32):
            now, s = time.time_ns(), os.stat(path)
            a = now if valid & 128 else atime * 10**9 + atimens if valid & 16 else s.st_atime_ns
            m = now if valid & 256 else mtime * 10**9 + mtimens if valid & 32 else s.st_mtime_ns
            os.utime(path, ns=(a, m))
        return self.getattr(node, data)

    def check_size(self, size: int) -> None:
        if self.largest is not None and size > self.largest:
            raise Refused(errno.EFBIG, "")

    def mkdir(self, node: int, data: bytes) -> bytes:
        mode = struct.unpack_from("<I", data)[0]
        path = self.child(node, data[8:-1])
        os.mkdir(self.real(path), mode)
        return self.entry(path)

    def unlink(self, node: int, data: bytes) -> bytes:
        path = self.child(node, data[:-1])
        os.unlink(self.real(path))
        self.nodes.pop(path, None)
        return b""

    def rmdir(self, node: int, data: bytes) -> bytes:
        path = self.child(node, data[:-1])
        os.rmdir(self.real(path))
        self.nodes.pop(path, None)
        return b""

    def rename(self, node: int, data: bytes, skip: int = 8) -> bytes:
        other = struct.unpack_from("<Q", data)[0]
        old, new = data[skip:-1].split(b"\0")
        source, target = self.child(node, old), self.child(other, new)
        real = self.real(source), self.real(target)
        if "ignores-case" in self.oddities and real[1] == real[0]:
            real = real[0], f"{os.path.dirname(real[1])}/{os.fsdecode(new)}"
        os.rename(*real)
        self.moved(source, target)
        return b""

    def rename2(self, node: int, data: bytes) -> bytes:
        return self.rename(node, data, 16)

    def open(self, node: int, data: bytes) -> bytes:
        flags = struct.unpack_from("<I", data)[0]
        fd = os.open(self.real(self.paths[node]), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND))
        return struct.pack("<Q2I", fd, 0, 0)

    def create(self, node: int, data: bytes) -> bytes:
        flags, mode = struct.unpack_from("<2I", data)
        path = self.child(node, data[16:-1])
        fd = os.open(self.real(path), (flags | os.O_CREAT) & ~os.O_APPEND, mode)
        return self.entry(path) + struct.pack("<Q2I", fd, 0, 0)

    def read(self, node: int, data: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("<2QI", data)
        return os.pread(fh, size, offset)

    def write(self, node: int, data: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("<2QI", data)
        self.check_size(offset + size)
        return struct.pack("<2I", os.pwrite(fh, data[40 : 40 + size], offset), 0)

    def statfs(self, node: int, data: bytes) -> bytes:
        s = os.statvfs(self.root)
        sizes = [0] * 5 if "no-sizes" in self.oddities else [s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree]
        return struct.pack("<5Q4I24x", *sizes, s.f_bsize, 255, s.f_frsize, 0)

    def release(self, node: int, data: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", data)[0])
        return b""

    def fsync(self, node: int, data: bytes) -> bytes:
        return b""

    def opendir(self, node: int, data: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0)

    def fsyncdir(self, node: int, data: bytes) -> bytes:
        if "no-folder-sync" in self.oddities:
            raise Refused(errno.EINVAL, "")
        return b""

    def readdir(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", data)
        found = b""
        for number, name in enumerate([".", "..", *sorted(os.listdir(self.real(self.paths[node])))]):
            raw = os.fsencode(name)
            one = struct.pack("<2Q2I", 1, number + 1, len(raw), 0) + raw + bytes(-len(raw) % 8)
            if number >= offset and len(found) + len(one) <= size:
                found += one
            elif number >= offset:
                break
        return found

    ANSWERS: ClassVar[dict[int, Callable[[Driver, int, bytes], bytes]]] = {
        1: lookup, 3: getattr, 4: setattr, 5: readlink, 9: mkdir, 10: unlink, 11: rmdir, 12: rename, 14: open, 15: read,
        16: write, 17: statfs, 18: release, 20: fsync, 25: fsync, 26: init, 27: opendir, 28: readdir, 29: fsync,
        30: fsyncdir, 35: create, 45: rename2,
    }  # fmt: skip

    def serve(self, fuse: int) -> None:
        while True:
            try:
                request = os.read(fuse, 1 << 20)
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, code, unique, node = struct.unpack_from("<2I2Q", request)
            if code in (2, 36, 42):  # forget, interrupt: no answer
                continue
            error, answer = -errno.ENOSYS, b""
            if code in self.ANSWERS:
                try:
                    error, answer = 0, self.ANSWERS[code](self, node, request[40:])
                except OSError as e:
                    error = -(e.errno or errno.EIO)
                except KeyError:
                    error = -errno.ESTALE
            with suppress(OSError):
                os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


def main() -> None:
    root, place, *oddities = sys.argv[1:]
    fuse = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    if libc.mount(b"odd", os.fsencode(place), b"fuse.odd", 0, options):
        sys.exit(os.strerror(ctypes.get_errno()))
    Driver(root, oddities).serve(fuse)


if __name__ == "__main__":
    main()
