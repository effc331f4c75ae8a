"""A merge by the tasks of a Ray cluster whose nodes share a file system: python ray_merge.py BASE FT OUT [ADDRESS]

The same as `slerp-merge BASE FT OUT --t 0.4 --executor ray:ADDRESS`. A task whose node is lost is run again elsewhere.
"""

from __future__ import annotations

import sys

import ray

from merge_tool import merge
from merge_tool.hosts.engines import RayExecutor

if __name__ == "__main__":
    base, ft, out, *address = sys.argv[1:]
    ray.init(address=address[0] if address else None, log_to_driver=False)
    executor = RayExecutor(num_cpus=1, memory=256_000_000)
    report = merge(base, ft, out, t=0.4, executor=executor, num_parts=16, memory_bytes=256_000_000, jobs=1)
    print(f"{report.outputs[0]}: {report.output_bytes:,} bytes")
