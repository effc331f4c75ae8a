"""The SLERP of the previous and the new weights after a cycle, by merge_tool's streaming merge.

It is computed in float32 or better and rounded once, to the type that was trained. With t near 1 it takes back a
hundredth of what the training did, so in bfloat16 most weights round to the new ones again; `taken_back` counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from merge_tool import MergeToolError, merge
from train.checkpoint import TensorFiles
from train.errors import TrainError


def average(previous: str, new: Path, out: Path, t: float, dtype: str, max_shard_bytes: int) -> Iterator[str]:
    """Write `out`, whole or not at all: share `t` of `new`. A killed one goes on. Yields what the user must know.

    Raises TrainError.
    """
    part = out.with_name(f".{out.name}")
    try:
        merge(previous, new, part, t, files_from="ft", dtype=dtype, max_shard_bytes=max_shard_bytes)
    except MergeToolError as e:
        raise TrainError(f"The SLERP of {previous} and {new} failed: {e}") from e
    share = taken_back(new, part)
    yield f"{out}: SLERP at t = {t}, in float32, rounded once; {share:.1%} of the weights differ from the new ones."
    if share < 0.5 and t < 1:
        yield (
            f"Warning: the merge moves most weights by less than half a step of {dtype}, so they are the new ones "
            "unchanged. dtype: float32 keeps such moves; a lower merge_t makes them larger."
        )
    part.rename(out)


def taken_back(new: Path, averaged: Path) -> float:
    """The share of values in which `averaged` differs from `new`; a tensor at a time."""
    before, after = TensorFiles(new, "model"), TensorFiles(averaged, "model")
    pairs = ((before.read(name), after.read(name)) for name in before.names())
    counts = [(int((a.to(b.dtype) != b).sum()), a.numel()) for a, b in pairs]
    return sum(n for n, _ in counts) / sum(n for _, n in counts)
