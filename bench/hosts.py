"""A merge on many hosts: what sharing it costs, how it scales here, and how far it would scale elsewhere.

    python bench/hosts.py [--layers 1] [--folder DIR] [--rounds 3]
    python bench/hosts.py --simulate-only

Measures in one run, forwards and backwards, on a pair of StableLM 3B's shape:

    alone        slerp-merge with one thread
    shared, 1    plan, one worker with one thread, finish
    shared, 2    plan, two workers at once with one thread each, finish

then takes the rates of `shared, 1` for a simulation of the workers (discrete events: a worker starts, takes a part,
shares the storage with all others that are busy, takes the next one), holds it against `shared, 2`, and predicts a pair
of 1.3 TB models on 1 to 256 hosts. A simulated host has the measured arithmetic of one core times `cores`, its own
network, and a share of the storage.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from merge import make_model

from merge_tool.hosts.pieces import Piece, share_out

TOOL = [sys.executable, "-m", "merge_tool"]


# ------------------------------------------------------------------------------------------ simulation


@dataclass(frozen=True)
class Fleet:
    """Hosts that share a storage. Rates are bytes read and written a second; `start` is a worker's start in seconds."""

    hosts: int
    host_rate: float  # of a host alone: the least of its arithmetic and its network
    storage_rate: float  # of all hosts together
    start: float
    serial: float  # plan and finish, on one host


def simulate(parts: list[list[float]], fleet: Fleet) -> float:
    """Seconds until the last worker is done and the merge is finished. `parts` are bytes to move, by worker."""
    now, starting = 0.0, {host: fleet.start for host, share in enumerate(parts) if share}
    queues = {host: list(share) for host, share in enumerate(parts) if share}
    moving: dict[int, float] = {}
    while starting or moving:
        rate = min(fleet.host_rate, fleet.storage_rate / len(moving)) if moving else 0.0
        step = min([*starting.values(), *(left / rate for left in moving.values())])
        now += step
        moving = {host: left - rate * step for host, left in moving.items()}
        starting = {host: left - step for host, left in starting.items()}
        for host in [host for host, left in moving.items() if left <= 1e-3]:
            del moving[host]
            if queues[host]:
                moving[host] = queues[host].pop(0)
        for host in [host for host, left in starting.items() if left <= 1e-9]:
            del starting[host]
            moving[host] = queues[host].pop(0)
    return now + fleet.serial


def by_worker(sizes: list[int], hosts: int) -> list[list[float]]:
    """Shards of these sizes (bytes to read), shared out as a plan does; a third more is written than is read of one."""
    pieces = [Piece(k, 0, 1, size) for k, size in enumerate(sizes)]
    return [[1.5 * pieces[number].read_bytes for number in share] for share in share_out(pieces, hosts)]


def predict(core_rate: float, start: float, serial: float) -> None:
    shards = [10_000_000_000] * 260  # 1.3 TB a parent in 5 GB shards: 10 GB to read each
    print("\nsimulated: a pair of 1.3 TB models, 260 shards of 5 GB, 8 cores a host, one worker a host")
    settings = {
        "shared storage 5 GB/s, network 1.25 GB/s a host": (5e9, 1.25e9),
        "shared storage 50 GB/s, network 3 GB/s a host": (50e9, 3e9),
        "own disks or the Hub, network 0.125 GB/s a host": (1e15, 0.125e9),
    }
    for name, (storage, network) in settings.items():
        print(f"\n{name}\n{'hosts':>7}{'minutes':>10}{'speed-up':>10}{'of ideal':>10}")
        first = 0.0
        for hosts in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            fleet = Fleet(hosts, min(8 * core_rate, network), storage, start, serial)
            seconds = simulate(by_worker(shards, hosts), fleet)
            first = first or seconds
            print(f"{hosts:7}{seconds / 60:10.1f}{first / seconds:10.1f}{first / seconds / hosts:10.0%}")


# ------------------------------------------------------------------------------------------ measurement


def run(*words: str) -> None:
    subprocess.run([*TOOL, *words, "-q"], check=True, capture_output=True)


def alone(base: Path, ft: Path, out: Path) -> float:
    started = time.monotonic()
    run("merge", str(base), str(ft), str(out), "-j", "1", "--max-shard-size", "100MB")
    return time.monotonic() - started


def shared(base: Path, ft: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds for plan, work and finish, and of these for the work."""
    plan = out.with_suffix(".json")
    started = time.monotonic()
    sizes = ["--max-shard-size", "100MB", "--parts", str(workers)]
    run("plan", str(base), str(ft), str(out), *sizes, "-o", str(plan))
    begun = time.monotonic()
    command = [*TOOL, "work", str(plan), "-j", "1", "-q", "--of", str(workers), "--part"]
    running = [subprocess.Popen([*command, str(number)]) for number in range(workers)]
    for one in running:
        if one.wait():
            raise SystemExit("a worker failed")
    worked = time.monotonic() - begun
    run("finish", str(plan), "-j", "1")
    return time.monotonic() - started, worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=3, help="each forwards and backwards")
    parser.add_argument("--simulate-only", action="store_true", help="with 300 MB/s a core, as measured once")
    args = parser.parse_args()
    if args.simulate_only:
        predict(3e8, 1.0, 5.0)
        return
    folder = args.folder.absolute() / f"hosts-{args.layers}"
    base, ft, out = folder / "base", folder / "ft", folder / "out"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(base, args.layers, num_shards=2, seed=1)
        make_model(ft, args.layers, num_shards=3, seed=2)
        (folder / "made").touch()
    walls: dict[str, list[float]] = {"alone": [], "shared, 1": [], "shared, 2": []}
    works: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for name in [*walls, *reversed(walls)]:
            shutil.rmtree(out, ignore_errors=True)
            if name == "alone":
                walls[name].append(alone(base, ft, out))
            else:
                workers = int(name[-1])
                wall, work = shared(base, ft, out, workers)
                walls[name].append(wall)
                works[workers].append(work)
    shutil.rmtree(out, ignore_errors=True)
    medians = {name: statistics.median(seconds) for name, seconds in walls.items()}
    for name, seconds in medians.items():
        print(f"{name:12}{seconds:7.2f} s{seconds / medians['alone']:7.2f} of alone")
    moved = 1.5 * sum(p.stat().st_size for side in (base, ft) for p in side.glob("*.safetensors"))
    one, two = (statistics.median(works[workers]) for workers in (1, 2))
    start = 0.6
    rate = moved / (one - start)
    predicted = simulate([[moved / 2], [moved / 2]], Fleet(2, rate, 1e15, start, 0.0))
    print(f"\na core moves {rate / 1e6:.0f} MB/s; two workers: {two:.2f} s measured, {predicted:.2f} s simulated")
    predict(rate, start, medians["shared, 1"] - one)


if __name__ == "__main__":
    main()
