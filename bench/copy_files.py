"""What copy_file_range would spare a tensor that is only copied: seconds with it, as a share of those with pwrite.

    python bench/copy_files.py [--megabytes 1000] [--rounds 5]

Both read the file by the merge's chunks and hash it, as a merge must for SHA256SUMS; then one writes what it has read,
the other has the kernel copy the range. The ratio is the median over rounds, each arm once per round.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

CHUNK, SHIFT = 1 << 19, 104  # bytes; what a header puts before the data, which no block is aligned with


def seconds(source: Path, target: Path, *, by_kernel: bool) -> float:
    target.unlink(missing_ok=True)
    began, room, digest = time.monotonic(), bytearray(CHUNK), hashlib.sha256()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        for start in range(0, source.stat().st_size, CHUNK):
            count = os.preadv(read.fileno(), [room], start)
            digest.update(memoryview(room)[:count])
            done = 0
            while done < count:
                place = SHIFT + start + done
                if by_kernel:
                    done += os.copy_file_range(read.fileno(), write.fileno(), count - done, start + done, place)
                else:
                    done += os.pwrite(write.fileno(), memoryview(room)[done:count], place)
        os.fsync(write.fileno())
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        with source.open("wb") as file:
            for _ in range(asked.megabytes):
                file.write(os.urandom(1_000_000))
        seconds(source, target, by_kernel=False)  # what is in the page cache is there for both
        rounds = [[seconds(source, target, by_kernel=kernel) for kernel in (True, False)] for _ in range(asked.rounds)]
    ratio = statistics.median(kernel / ours for kernel, ours in rounds)
    print(f"copy_file_range / pwrite: {ratio:.2f} ({asked.megabytes} MB, {asked.rounds} rounds)")


if __name__ == "__main__":
    main()
