"""Merge two checkpoints from Python, and look at what was found: merge_in_python.py BASE FT OUT."""

import sys

from merge_tool import MergeToolError, merge

base, ft, out = sys.argv[1:]
try:
    report = merge(base, ft, out, t=0.4, memory_bytes=128_000_000, on_warning=print)
except MergeToolError as error:
    sys.exit(f"Nothing was merged: {error}")

print(f"{report.summary.num_tensors} tensors in {report.seconds:.1f} s")
widest = max(report.tensors, key=lambda tensor: tensor.get("angle_degrees") or 0)
print(f"furthest apart: {widest['name']}, {widest['angle_degrees']:.2f} degrees")
