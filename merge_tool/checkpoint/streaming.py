"""The choices how weights that are not here are read, for the command line and Python. Imports next to nothing."""

from __future__ import annotations

from dataclasses import dataclass

from merge_tool.errors import RecipeError

DOWNLOADS = 4  # ranges in flight, if the user says nothing
MOST_SPOOL_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Streaming:
    """How weights that are not here are read: by range if `stream`, from the Hub's cache if not; None: by range only
    if the disk lacks the room. `downloads` ranges are in flight; `spool_bytes` bounds what is kept of them on disk
    (None: a quarter of the free disk, at most 5 GB). Raises RecipeError for values out of range."""

    stream: bool | None = None
    downloads: int = DOWNLOADS
    spool_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.downloads <= 64:
            raise RecipeError(f"--downloads is {self.downloads}, expected 1 to 64.")

    def spool_slots(self, block_bytes: int, num_models: int, free: int | None) -> int:
        """The blocks that the spool holds; never so few that blocks would be thrown away before they are read."""
        nbytes = self.spool_bytes
        if nbytes is None:
            nbytes = MOST_SPOOL_BYTES if free is None else min(MOST_SPOOL_BYTES, free // 4)
        return max(self.downloads + 2 * num_models + 2, nbytes // block_bytes)
