"""A merge by the workers of a Dask cluster that share a file system: python dask_merge.py BASE FT OUT [SCHEDULER]

The same as `slerp-merge BASE FT OUT --t 0.4 --executor dask:SCHEDULER`.
"""

from __future__ import annotations

import sys

from distributed import Client

from merge_tool import merge

if __name__ == "__main__":
    base, ft, out, *scheduler = sys.argv[1:]
    with Client(scheduler[0] if scheduler else None) as client:
        executor = client.get_executor(pure=False, retries=3)
        report = merge(base, ft, out, t=0.4, executor=executor, num_parts=16, memory_bytes=256_000_000, jobs=1)
    print(f"{report.outputs[0]}: {report.output_bytes:,} bytes")
