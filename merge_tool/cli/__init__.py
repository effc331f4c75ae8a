"""The commands: parse the arguments, call, print. Never a tensor, an offset or a default value.

`slerp_merge` and `merge_tool` are the two entry points; only this folder imports click, tqdm and matplotlib.
"""

from merge_tool.cli.commands import merge_tool, slerp_merge

__all__ = ["merge_tool", "slerp_merge"]
