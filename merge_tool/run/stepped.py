"""Any number of tensors by a method's steps: its passes, then its combine, tile by tile in float64.

Outputs share what is read. Each set of parameters has passes of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from merge_tool.arrays import Array, decode, same_values
from merge_tool.errors import DataError, shown
from merge_tool.methods.inner import Scratch
from merge_tool.methods.passes import Running, begin_steps, check_combine, check_merged, start_pass
from merge_tool.methods.steps import FLAT, ColumnSums, Combine, MergeSpec, Method, Pass, Steps, Tile, tile_elements
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.run.findings import Finding, Results, keep_results
from merge_tool.run.values import Chunks, check_finite, converted, stored


class Stepped:
    """One tensor's merge in all outputs."""

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        self.job = job
        distinct = list(dict.fromkeys(job.values))
        self.of_output = [distinct.index(values) for values in job.values]
        specs = [job.spec(plan.seed, job.values.index(values)) for values in distinct]
        self.granularity = plan.method.granularity(specs[0])
        self.tile = tile_elements(specs[0], self.granularity)
        num_tiles = -(-specs[0].numel // self.tile) or 1
        self.keeps_equal = all(map(plan.method.copies_equal, specs))
        self.differs = threading.Event()  # set by any thread, never cleared
        self.is_checked = False
        self.finding = Finding()
        self.ways = [_Way(plan.method, one, job.out.name, num_tiles) for one in specs]

    @property
    def needs_chunks(self) -> bool:
        return not self.finding.equal and any(way.running is not None for way in self.ways)

    @property
    def in_order(self) -> bool:
        return any(way.running is not None and way.running.in_order for way in self.ways)

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        for begin in range(0, max(len(inputs[0]), 1), self.tile):
            parts = [x[begin : begin + self.tile] for x in inputs]
            if not self.differs.is_set() and not all(same_values(parts[0], other) for other in parts[1:]):
                self.differs.set()
            for way in self.ways:
                if way.running is not None:
                    way.add((start + begin) // self.tile, self._decoded(start + begin, parts))

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        self.is_checked = True
        if self.keeps_equal and not self.differs.is_set():
            self.resume(Finding(equal=True))
            return
        for way in self.ways:
            way.settle()
        if not self.needs_chunks:
            passes = keep_results([way.results for way in self.ways])
            self.finding = Finding(passes=passes)

    def resume(self, finding: Finding) -> bool:
        """Continue from the results of the passes; false if they are not known."""
        self.finding, self.is_checked = finding, True
        if finding.equal:
            for way in self.ways:
                way.close()
            return True
        passes = finding.passes if isinstance(finding.passes, list) else [[] for _ in self.ways]
        if len(passes) != len(self.ways):
            return False
        return all(way.resume(results) for way, results in zip(self.ways, passes, strict=True))

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        if self.finding.equal:
            return converted(self.job, start, inputs[0], out)
        way = self.ways[self.of_output[output]]
        for begin in range(0, len(out), self.tile):
            cut = slice(begin, begin + self.tile)
            merged = way.merged(self._decoded(start + begin, [x[cut] for x in inputs]))
            stored(self.job, start + begin, merged, out[cut])
        return out

    def _decoded(self, start: int, parts: Sequence[Array]) -> Tile:
        """A tile as the method sees it, in memory that it may write to. Values are checked once, in the first pass over
        them."""
        columns = self.ways[0].spec.columns
        shape = (-1,) if self.granularity == FLAT else (-1, columns)
        if not self.is_checked:
            check_finite(self.job, start, parts)
        wide = [decode(values, np.empty(len(values))) for values in parts]
        shaped = [values.reshape(shape) if values.size else values for values in wide]
        base = shaped.pop(0) if self.job.has_base else None
        return Tile(start, base, shaped, self.ways[0].spec.key)


class _Way:
    """A method's passes and its combine for one set of parameters. Its errors name the tensor."""

    def __init__(self, method: Method, spec: MergeSpec, name: str, num_tiles: int) -> None:
        self.spec, self.name, self.num_tiles = spec, name, num_tiles
        self.steps: Steps = begin_steps(method, spec)
        self.running: Running | None = None
        self.combine: Combine | None = None
        self.results: list[Any] = []
        self.request: Pass | None = None
        self._advance(lambda: next(self.steps))

    def _advance(self, step: Callable[[], Pass]) -> None:
        """Take the method's next pass, or its combine. Its ValueError becomes the user's DataError."""
        try:
            self.request = step()
            self.running = start_pass(self.request, self.spec, self.num_tiles)
        except StopIteration as e:
            self.running, self.combine = None, self._checked(partial(check_combine, e.value))
        except ValueError as e:
            raise DataError(f"{shown(self.name)}: {e}") from e

    def _checked(self, ask: Callable[[], Any]) -> Any:
        """A method's answer; its errors name the tensor."""
        try:
            return ask()
        except ValueError as e:
            raise DataError(f"{shown(self.name)}: {e}") from e

    def add(self, number: int, tile: Tile) -> None:
        assert self.running is not None
        self._checked(partial(self.running.add, number, tile))

    def settle(self) -> None:
        running = self.running
        if running is not None and not self._checked(running.settle):
            self.results.append(running.result)
            self._advance(lambda: self.steps.send(running.result))

    def resume(self, results: Results) -> bool:
        """Give the method the stored results of its passes; false unless it then needs no other pass."""
        for result in results if isinstance(results, list) else ():
            if self.running is None:
                return False
            answer = np.array(result) if isinstance(self.request, ColumnSums) else result
            self._advance(partial(self.steps.send, answer))
        return self.running is None

    def close(self) -> None:
        self.steps.close()
        self.running = None

    def merged(self, tile: Tile) -> Array:
        combine = self.combine
        assert combine is not None
        merged: Array = self._checked(lambda: check_merged(combine(tile), tile)).reshape(-1)
        return merged
