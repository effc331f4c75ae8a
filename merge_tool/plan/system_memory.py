"""The memory that this process holds, and what the system has left: Linux, macOS, Windows. All sizes in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Resident memory of this process now; its peak so far on systems without that figure."""
    if resident := _status_field("VmRSS:"):
        return resident
    if sys.platform == "win32":
        return windows_process(_kernel32())[0]
    if sys.platform == "darwin" and (resident := mac_resident(ctypes.CDLL(None))):
        return resident
    return peak_bytes()


def give_back_free_memory() -> None:
    """Give the system the pages that malloc holds free, which glibc keeps: 2 MB after planning 8,000 tensors."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc has no such call
            ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> int:
    """Peak resident memory of this process so far (VmHWM; Windows: PeakWorkingSetSize; elsewhere ru_maxrss)."""
    if peak := _status_field("VmHWM:"):
        return peak
    if sys.platform == "win32":
        return windows_process(_kernel32())[1]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_field(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def available_bytes() -> int | None:
    """Memory that can be allocated without swapping: the machine's, or its cgroup's if that is less."""
    if sys.platform == "win32":
        return windows_available(_kernel32())
    if sys.platform == "darwin":
        return mac_available(ctypes.CDLL(None))
    return min([*_machine_available(), *_cgroup_available()], default=None)


def _machine_available() -> Iterable[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _cgroup_available() -> Iterable[int]:
    """Limit minus use of this process's cgroups, v1 and v2, and of their parents."""
    for folder, limit_file, used_file in _cgroup_files():
        limit, used = _read_int(folder / limit_file), _read_int(folder / used_file)
        if limit is not None and used is not None and limit < 1 << 60:
            yield max(0, limit - used + _read_stat(folder / "memory.stat"))


def _cgroup_files() -> Iterable[tuple[Path, str, str]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, files = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = mount / name.lstrip("/")
        while folder.is_relative_to(mount):
            yield folder, *files
            folder = folder.parent


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _read_stat(path: Path) -> int:
    """Page cache that the kernel may drop: clean and not mapped."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return sum(int(value) for key, value in rows if key in {"inactive_file", "total_inactive_file"})
    except (OSError, ValueError):
        return 0


def under_pressure(budget: int) -> bool:
    """Whether dirty pages should be flushed early, because the budget leaves little memory for the page cache."""
    available = available_bytes()
    return available is not None and available < budget + 256_000_000


# ------------------------------------------------------------------------------------- Windows, macOS


class ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS"""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 6),
    ]


class SystemMemory(ctypes.Structure):
    """MEMORYSTATUSEX"""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    ]


class TaskMemory(ctypes.Structure):
    """mach_task_basic_info"""

    _fields_ = [
        ("virtual_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("resident_size_max", ctypes.c_uint64),
        ("rest", ctypes.c_int32 * 6),
    ]


class HostMemory(ctypes.Structure):
    """vm_statistics64: pages"""

    _fields_ = [
        ("free_count", ctypes.c_uint32),
        ("active_count", ctypes.c_uint32),
        ("inactive_count", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 61),
    ]


_TASK_BASIC_INFO, _HOST_VM_INFO64 = 20, 4  # flavors of mach


def _kernel32() -> Any:
    return ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]


def windows_process(kernel32: Any) -> tuple[int, int]:
    """The resident memory of this process on Windows, and its peak; zeros if Windows does not say."""
    counters = ProcessMemory(cb=ctypes.sizeof(ProcessMemory))
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    if not kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        return 0, 0
    return counters.WorkingSetSize, counters.PeakWorkingSetSize


def windows_available(kernel32: Any) -> int | None:
    counters = SystemMemory(dwLength=ctypes.sizeof(SystemMemory))
    return counters.ullAvailPhys if kernel32.GlobalMemoryStatusEx(ctypes.byref(counters)) else None


def mac_resident(libc: Any) -> int:
    """The resident memory of this process on macOS; 0 if macOS does not say."""
    counters, count = TaskMemory(), ctypes.c_uint32(ctypes.sizeof(TaskMemory) // 4)
    refused = libc.task_info(libc.mach_task_self(), _TASK_BASIC_INFO, ctypes.byref(counters), ctypes.byref(count))
    return 0 if refused else counters.resident_size


def mac_available(libc: Any) -> int | None:
    """Free and inactive pages: what macOS gives without swapping."""
    counters, count = HostMemory(), ctypes.c_uint32(ctypes.sizeof(HostMemory) // 4)
    if libc.host_statistics64(libc.mach_host_self(), _HOST_VM_INFO64, ctypes.byref(counters), ctypes.byref(count)):
        return None
    return int((counters.free_count + counters.inactive_count) * libc.getpagesize())
