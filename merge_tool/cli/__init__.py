"""The commands: parse the arguments, call, print. Never a tensor, an offset or a default value.

`slerp_merge` and `merge_tool` are the two entry points; only this folder imports click, tqdm and matplotlib.
"""

import os

_HAS_CHOICE = "OPENBLAS_NUM_THREADS" in os.environ
if not _HAS_CHOICE:  # numpy's BLAS starts a thread a core when it is loaded; we use none, and some boxes allow only two
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
from merge_tool.cli.commands import merge_tool, slerp_merge  # noqa: E402

if not _HAS_CHOICE:  # not for the programs that a sweep starts
    del os.environ["OPENBLAS_NUM_THREADS"]

__all__ = ["merge_tool", "slerp_merge"]
