"""`merge-tool` with output files of any size: tests make many small ones, which a user is refused."""

from __future__ import annotations

from merge_tool.cli import merge_tool, options

options.LEAST_SHARD_BYTES = 1

if __name__ == "__main__":
    merge_tool()
