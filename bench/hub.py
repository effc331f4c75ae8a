"""Two models of a Hub on this machine, merged by range: bytes, memory, disk and time, against `hf download` of both.

    python bench/hub.py [--megabytes 300] [--latency 0.1] [--rate 25] [--spool 5GB] [--memory 64MB]
    python bench/hub.py --to-hub --disk 300 [--megabytes 1100] ...
    python bench/hub.py --bucket [--megabytes 300] [--latency 0.1] [--shard 40MB]

The server (tests/hub_replica.py) waits `latency` seconds before each answer, and sends `rate` MB/s in all. Both arms
have the same server in one run: first the real `hf download` of both models, then the merge, which keeps nothing.

With --bucket both models lie in a bucket (tests/s3_replica.py, which only waits), and the output goes there.

With --to-hub the output goes to the same server, shard by shard, and all that the merge writes here lies on a disk of
`--disk` MB: a tmpfs that is mounted for it, or, where that is not allowed, a folder that is only watched. The bytes are
then compared with those of a merge of local folders.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import s3_replica
from checkpoints import save_model
from hub_replica import TOKEN, Replica, serve

HIDDEN, MODULES = 2048, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")


class Watched:
    """The processes that a command starts: the largest resident memory of each module, and the largest file without a
    name (the spool), in bytes."""

    def __init__(self, root: int) -> None:
        self.root, self.peaks, self.spool, self.over = root, dict[str, int](), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    fields = (process / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[1]) != self.root and int(process.name) != self.root:
                        continue
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    kinds = {"downloading": "downloading", "looking": "fetching", "uploading": "uploading"}
                    name = next((kind for kind, module in kinds.items() if module in words), "merging")
                    status = (process / "status").read_text()
                    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
                    self.peaks[name] = max(self.peaks.get(name, 0), peak)
                    for file in (process / "fd").iterdir() if name == "merging" else ():
                        if "(deleted)" in str(file.readlink()):
                            self.spool = max(self.spool, file.stat().st_blocks * 512)
                except (OSError, IndexError, ValueError):
                    continue

    def close(self) -> None:
        self.over.set()
        self.thread.join()


def make(folder: Path, seed: int, megabytes: int) -> None:
    rng = np.random.default_rng(seed)
    layers = max(1, megabytes * 10**6 // (len(MODULES) * HIDDEN * HIDDEN * 2))
    tensors = {
        f"model.layers.{layer}.{module}.weight": rng.standard_normal((HIDDEN, HIDDEN), np.float32).astype(
            ml_dtypes.bfloat16
        )
        for layer in range(layers)
        for module in MODULES
    }
    save_model(folder, tensors, shards=2, config={"num_hidden_layers": layers})


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str, Watched]:
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    watched = Watched(process.pid)
    printed, _ = process.communicate()
    watched.close()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - began, printed, watched


def measure(hub: Replica, place: Path, options: argparse.Namespace) -> None:
    nbytes = sum(path.stat().st_size for path in hub.root.rglob("*.safetensors"))
    hub.latency, hub.rate = options.latency, options.rate * 1e6
    environment = {**os.environ, **hub.environment(place / "home")}
    download = sum(
        timed([str(Path(sys.executable).with_name("hf")), "download", f"org/{name}", "--quiet"], environment)[0]
        for name in ("base", "ft")
    )
    hub.served.clear()
    hub.asked.clear()
    environment |= hub.environment(place / "empty")
    merge, printed, watched = timed(
        [
            *(sys.executable, "-m", "merge_tool", "merge", "org/base", "org/ft", str(place / "merged")),
            *("--stream", "--memory", options.memory, "--spool", options.spool, "--json"),
        ],
        environment,
    )
    report = json.loads(printed)
    served = sum(hub.weights().values())
    kept = sum(p.stat().st_size for p in (place / "empty").rglob("*") if p.is_file() and not p.is_symlink())
    print(f"inputs                  {nbytes / 1e6:,.0f} MB, {len(hub.asked):,} requests of the merge")
    print(f"bytes served / inputs   {served / nbytes:.4f}")
    print(f"peak of the merge       {report['peak_bytes'] / 1e6:.1f} MB, with --memory {options.memory}")
    for name in ("downloading", "looking"):
        print(f"peak of the process {name:12s} {watched.peaks.get(name, 0) / 1e6:.0f} MB")
    print(f"spool                   {watched.spool / 1e6:.0f} MB; left in the cache {kept / 1e6:.2f} MB")
    print(f"merge / hf download     {merge / download:.2f} ({merge:.0f} s, {download:.0f} s)")


class Disk:
    """A folder on a small disk of its own, if it can be mounted; and the most that was ever on it, in bytes."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir()
        self.folder, self.peak, self.over = folder, 0, threading.Event()
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        self.is_mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self.used())

    def used(self) -> int:
        if self.is_mounted:
            return shutil.disk_usage(self.folder).used
        try:
            return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        except OSError:
            return 0

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def measure_to_hub(hub: Replica, place: Path, options: argparse.Namespace) -> None:
    nbytes = sum(path.stat().st_size for path in hub.root.rglob("*.safetensors"))
    hub.latency, hub.rate = options.latency, options.rate * 1e6
    disk = Disk(place / "disk", options.disk)
    try:
        environment = {**os.environ, **hub.environment(disk.folder / "home", HF_TOKEN=TOKEN)}
        words = ["org/base", "org/ft", "hub:me/merged", "--t", "0.4", "--stream", "--memory", options.memory, "--json"]
        seconds, printed, watched = timed([sys.executable, "-m", "merge_tool", "merge", *words], environment)
        left = disk.used()
    finally:
        disk.close()
    report = json.loads(printed)
    merged = hub.root / "models/me/merged"
    hub.latency, hub.rate = 0.0, None
    limit = json.loads((merged / "merge_report.json").read_text())["options"].get("max_shard_bytes", 5 * 10**9)
    models, local = hub.root / "models/org", place / "local"
    words = [str(models / "base"), str(models / "ft"), str(local), "--t", "0.4", "--max-shard-size", str(limit)]
    timed([sys.executable, "-m", "merge_tool", "merge", *words, "--quiet"], {**os.environ})
    names = sorted(path.name for path in local.glob("model*"))
    same = all((local / name).read_bytes() == (merged / name).read_bytes() for name in names)
    uploaded, size = sum(hub.writes.uploaded.values()), sum(p.stat().st_size for p in merged.glob("*.safetensors"))
    print(f"inputs, output          {nbytes / 1e6:,.0f} MB, {size / 1e6:,.0f} MB in {report['num_shards']} shards")
    how = f"a tmpfs of {options.disk} MB" if disk.is_mounted else "watched; no disk could be mounted"
    print(f"disk at the peak        {disk.peak / 1e6:.0f} MB ({how}); {left / 1e6:.2f} MB left at the end")
    print(f"bytes served / inputs   {sum(hub.weights().values()) / nbytes:.4f}")
    print(f"bytes uploaded / output {uploaded / size:.4f}")
    print(f"the same weight files   {same} ({len(names)} files, beside a merge of local folders)")
    print(f"peak of the merge       {report['peak_bytes'] / 1e6:.1f} MB, with --memory {options.memory}")
    for name in ("downloading", "uploading", "looking"):
        print(f"peak of the process {name:12s} {watched.peaks.get(name, 0) / 1e6:.0f} MB")
    longer = nbytes / options.rate / 1e6
    print(f"time                    {seconds:.0f} s; the download alone takes {longer:.0f} s at {options.rate:g} MB/s")


def measure_bucket(place: Path, options: argparse.Namespace) -> None:
    models = place / "hub/models/org"
    with s3_replica.serve() as store:
        store.put_folder("bucket", "org", models)
        nbytes = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
        store.latency = options.latency
        environment = {**os.environ, **store.environment(), "HF_HOME": str(place / "home")}
        words = ["s3://bucket/org/base", "s3://bucket/org/ft", "s3://bucket/merged", "--t", "0.4", "--json"]
        words += ["--memory", options.memory, "--spool", options.spool, "--max-shard-size", options.shard]
        seconds, printed, watched = timed([sys.executable, "-m", "merge_tool", "merge", *words], environment)
        merged = store.contents("bucket", "merged")
    report, local = json.loads(printed), place / "local"
    words = [str(models / "base"), str(models / "ft"), str(local), "--t", "0.4", "--max-shard-size", options.shard]
    timed([sys.executable, "-m", "merge_tool", "merge", *words, "--quiet"], {**os.environ})
    same = all((local / name).read_bytes() == data for name, data in merged.items()) and len(merged) > 3
    size = sum(len(data) for name, data in merged.items() if name.endswith(".safetensors"))
    served = sum(count for key, count in store.served.items() if key.startswith("org/"))
    received = sum(count for key, count in store.received.items() if key.endswith(".safetensors"))
    print(f"inputs, output          {nbytes / 1e6:,.0f} MB, {size / 1e6:,.0f} MB in {report['num_shards']} shards")
    print(f"requests                {len(store.asked):,}")
    print(f"bytes served / inputs   {served / nbytes:.4f}")
    print(f"bytes uploaded / output {received / size:.4f}")
    print(f"the same files          {same} ({len(merged)} files, beside a merge of local folders)")
    print(f"peak of the merge       {report['peak_bytes'] / 1e6:.1f} MB, with --memory {options.memory}")
    for name in ("downloading", "uploading", "looking"):
        print(f"peak of the process {name:12s} {watched.peaks.get(name, 0) / 1e6:.0f} MB")
    print(f"time                    {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of each model")
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=25.0, help="MB/s: 25 are 200 Mbit/s")
    parser.add_argument("--spool", default="5GB")
    parser.add_argument("--memory", default="64MB")
    parser.add_argument("--to-hub", action="store_true", help="the output too goes to the server")
    parser.add_argument("--bucket", action="store_true", help="all of it in a bucket, instead of a Hub")
    parser.add_argument("--shard", default="40MB", help="the size of shards in a bucket")
    parser.add_argument("--disk", type=int, default=300, help="MB of the disk of a merge to the Hub")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        place = Path(folder).absolute()
        for seed, name in enumerate(("base", "ft")):
            make(place / "hub/models/org" / name, seed, options.megabytes)
        if options.bucket:
            measure_bucket(place, options)
        else:
            with serve(place / "hub") as hub:
                (measure_to_hub if options.to_hub else measure)(hub, place, options)


if __name__ == "__main__":
    main()
