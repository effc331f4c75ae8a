"""Merges on a Ray cluster of two nodes on this machine: python ray_cluster.py BASE FT FOLDER

By the example, by name, and with a node that is lost in the middle. A program of its own: Ray leaves threads and
warnings behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
from ray.cluster_utils import Cluster

import merge_tool
from merge_tool.hosts.engines import RayExecutor

EXAMPLE = Path(__file__).parents[1] / "examples" / "hosts" / "ray_merge.py"
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}


def main() -> None:
    base, ft, folder = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    lost = cluster.add_node(**NODE)
    subprocess.run([sys.executable, str(EXAMPLE), base, ft, f"{folder}/example/out", cluster.address], check=True)
    words = [base, ft, f"{folder}/named/out", "--t", "0.4", "--executor", f"ray:{cluster.address}", "-j", "1"]
    subprocess.run([sys.executable, "-m", "merge_tool", "merge", *words], check=True)

    ray.init(address=cluster.address, log_to_driver=False)
    out = Path(folder, "lost", "out")

    def lose() -> None:
        while not any((out / ".slerp-merge" / "parts").glob("*.done.json")):  # the work has begun
            time.sleep(0.02)
        cluster.remove_node(lost, allow_graceful=False)

    killer = threading.Thread(target=lose)
    killer.start()
    executor = RayExecutor(num_cpus=1, memory=100_000_000)
    merge_tool.merge(base, ft, out, t=0.4, executor=executor, num_parts=12, max_shard_bytes=20_000)
    killer.join()
    assert len([node for node in ray.nodes() if node["Alive"]]) == 1, "no node was lost"
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
