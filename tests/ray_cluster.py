"""Merges on a Ray cluster of two nodes on this machine: python ray_cluster.py BASE FT FOLDER

By the example, by name, and with a node that is lost in the middle. A program of its own: Ray leaves threads and
warnings behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
import ray

import merge_tool
from merge_tool.hosts.engines import RayExecutor

EXAMPLE = Path(__file__).parents[1] / "examples" / "hosts" / "ray_merge.py"
HOST = "127.0.0.1"


def node(*options: str) -> subprocess.Popen[bytes]:
    """A node of its own, in its own process group."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={HOST}"]
    return subprocess.Popen([*command, "--num-cpus=1", *options], start_new_session=True, stdout=subprocess.DEVNULL)


def lose(one: subprocess.Popen[bytes]) -> None:
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()


def main() -> None:
    base, ft, folder = sys.argv[1:]
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    address = f"{HOST}:{port}"
    head = node("--head", f"--port={port}", "--include-dashboard=false")
    while socket.socket().connect_ex((HOST, port)):
        time.sleep(0.2)
    second = node(f"--address={address}")
    try:
        merge_in_three_ways(base, ft, Path(folder), address, second)
    finally:
        lose(head)


def merge_in_three_ways(base: str, ft: str, folder: Path, address: str, second: subprocess.Popen[bytes]) -> None:
    subprocess.run([sys.executable, str(EXAMPLE), base, ft, f"{folder}/example/out", address], check=True)
    words = [base, ft, f"{folder}/named/out", "--t", "0.4", "--executor", f"ray:{address}", "-j", "1"]
    subprocess.run([sys.executable, "-m", "merge_tool", "merge", *words], check=True)

    ray.init(address=address, log_to_driver=False)
    while len(ray.nodes()) < 2:
        time.sleep(0.2)
    out = folder / "lost" / "out"

    def watch() -> None:
        while not any((out / ".slerp-merge" / "parts").rglob("*.done.json")):  # the work has begun
            time.sleep(0.02)
        lose(second)

    watcher = threading.Thread(target=watch)
    watcher.start()
    executor = RayExecutor(num_cpus=1, memory=100_000_000)
    merge_tool.merge(base, ft, out, t=0.4, executor=executor, num_parts=12, max_shard_bytes=20_000)
    watcher.join()
    ray.shutdown()


if __name__ == "__main__":
    main()
