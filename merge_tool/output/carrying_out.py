"""Run a plan into a work folder: note what an earlier run has finished, report progress, and word errors for users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from merge_tool.errors import DataError, RecipeError, counted, sized
from merge_tool.models.inputs import Inputs
from merge_tool.output.merge_report import Watch
from merge_tool.plan.prepare import Prepared
from merge_tool.run.run import Sink, progress_bytes, run_plan

if TYPE_CHECKING:
    from merge_tool.output.known import EarlierFindings

FLUSH_BYTES = 8_000_000  # under memory pressure, at most so many bytes of a shard stay in the system's cache
MAY_SHARE = (
    "The unfinished merge in OUT was begun on another machine, in another container, or before a restart, and has not "
    "changed for a while. This run continues it, and first checks the SHA-256 of its finished shards."
)


class Work(Sink, Protocol):
    """A WorkFolder, or a HubFolder."""

    done_shards: frozenset[int]

    def beat(self) -> None: ...

    def discard(self) -> None: ...


def read_ahead(inputs: Inputs, prepared: Prepared, work: Work) -> None:
    """Begin to download the weights that are read by range, in the order in which the run will read them."""
    if inputs.is_streamed:
        from merge_tool.run.read_order import read_order  # most merges do not need it

        inputs.read_ahead(read_order(prepared.plan, prepared.layout, work.done_shards))


def say_what_is_done(prepared: Prepared, work: Work, watch: Watch) -> None:
    """A note about the shards that an earlier run has finished."""
    plan, skip = prepared.plan, work.done_shards
    if skip and watch.on_note is not None:
        done, all_bytes = progress_bytes(plan) - progress_bytes(plan, skip), progress_bytes(plan)
        number = counted(len(plan.shards), "shard")
        watch.on_note(
            f"Continuing: an earlier run finished {len(skip):,} of {number} ({sized(done)} of "
            f"{sized(all_bytes)} read and written)."
        )


def carry_out(prepared: Prepared, work: Work, watch: Watch, known: EarlierFindings | None = None) -> None:
    """Merge all shards that an earlier run has not finished. `known` gives findings of an earlier merge, so that their
    tensors are not summed again."""
    plan, skip = prepared.plan, work.done_shards
    if watch.on_start is not None:
        watch.on_start(progress_bytes(plan, skip))
    if len(skip) == len(plan.shards):
        return

    def on_progress(nbytes: int, tensor: str) -> None:
        work.beat()
        if watch.on_progress is not None:
            watch.on_progress(nbytes, tensor)

    try:
        for _ in run_plan(plan, work, prepared.layout, skip=skip, on_progress=on_progress, known=known):
            pass
    except DataError:
        work.discard()
        raise
    except MemoryError as e:
        raise RecipeError(
            f"The system has less memory left than the budget of {prepared.budget:,} bytes allows ({e}). "
            "Give a smaller --memory or fewer --jobs, then run the same command: it continues."
        ) from e
