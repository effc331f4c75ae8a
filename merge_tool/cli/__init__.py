"""The commands: parse the arguments, call, print. Never a tensor, an offset or a default value.

`slerp_merge` and `merge_tool` are the two entry points, each imported when it is first used; only this folder imports
click, tqdm and matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_tool.cli.commands import merge_tool
    from merge_tool.cli.merging import slerp_merge

__all__ = ["merge_tool", "slerp_merge"]
_HOMES = {"merge_tool": "merge_tool.cli.commands", "slerp_merge": "merge_tool.cli.merging"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
