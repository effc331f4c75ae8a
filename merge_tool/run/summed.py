"""Any number of tensors by coefficients that are known before a weight is read: one input at a time is read and added
to the sum of each output, so memory does not depend on the number of inputs. In float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, Array, decode, first_nonfinite
from merge_tool.methods.inner import Scratch
from merge_tool.methods.steps import TILE
from merge_tool.plan.memory import SUM_BLOCK
from merge_tool.plan.plan import MergePlan, TensorJob
from merge_tool.run.buffers import WorkerMemory
from merge_tool.run.findings import Finding
from merge_tool.run.values import Chunks, check_finite_one, stored


class Summed:
    """sum_i c_i x_i in all outputs; outputs with the same coefficients share a sum."""

    tile, needs_chunks, in_order = TILE, False, False

    def __init__(self, plan: MergePlan, job: TensorJob) -> None:
        assert plan.method.coefficients is not None
        self.job, self.finding = job, Finding()
        distinct = list(dict.fromkeys(job.values))
        self.of_output = [distinct.index(values) for values in job.values]
        specs = [job.spec(plan.seed, job.values.index(values)) for values in distinct]
        self.coefficients = [plan.method.coefficients(spec) for spec in specs]
        self.first = [next((i for i, c in enumerate(row) if c), -1) for row in self.coefficients]

    def add(self, start: int, inputs: Sequence[Array], scratch: Scratch) -> None:
        """Never called: no pass is needed."""

    def settle(self, chunks: Chunks, scratch: Scratch) -> None:
        """Never called: no pass is needed."""

    def resume(self, finding: Finding) -> bool:
        return True

    def add_up(self, start: int, stop: int, worker: WorkerMemory) -> tuple[Array, Array]:
        """The sums [distinct outputs, elements] of the elements [start, stop), and the array for an output. Every input
        is read once."""
        room, sums, out = worker.sums(self.job, stop - start, len(self.coefficients))
        sums[[row for row, first in enumerate(self.first) if first < 0]] = 0.0
        for number, source in enumerate(self.job.sources):
            if not any(row[number] for row in self.coefficients):
                continue
            dtype = NUMPY_DTYPES[source.info.dtype]
            values = room[: (stop - start) * dtype.itemsize].view(dtype)
            source.read_into(start, values)
            self._add(number, start, values, sums)
            source.forget(start, stop)
        return sums, out

    def _add(self, number: int, start: int, values: Array, sums: Array) -> None:
        """In blocks that stay in the processor's cache. A coefficient of 0 is not added: a window's result has the same
        bits as an average of its models alone."""
        rows = [(row, c[number], self.first[row] == number) for row, c in enumerate(self.coefficients) if c[number]]
        wide, term = np.empty(min(SUM_BLOCK, len(values))), np.empty(min(SUM_BLOCK, len(values)))
        for cut in _blocks(len(values)):
            part = decode(values[cut], wide[: cut.stop - cut.start])
            for row, c, is_first in rows:
                if is_first:
                    np.multiply(part, c, out=sums[row, cut])
                else:
                    product = np.multiply(part, c, out=term[: len(part)])
                    np.add(sums[row, cut], product, out=sums[row, cut])

    def merged(self, output: int, start: int, sums: Array, out: Array) -> Array:
        """The elements from `start` on of an output. Raises DataError, for an input's value that is not finite with its
        place: looked for only here, since any makes the sum so."""
        row = sums[self.of_output[output]]
        for cut in _blocks(len(row)):
            if (index := first_nonfinite(row[cut])) is not None:
                self._check_inputs(start + cut.start + index)
            stored(self.job, start + cut.start, row[cut], out[cut])
        return out

    def _check_inputs(self, element: int) -> None:
        for source in self.job.sources:
            value = np.empty(1, NUMPY_DTYPES[source.info.dtype])
            source.read_into(element, value)
            check_finite_one(source, element, value)

    def merge(self, output: int, start: int, inputs: Sequence[Array], out: Array, scratch: Scratch) -> Array:
        """As any work: of inputs that were read before. `add_up` reads them itself."""
        sums = np.zeros((len(self.coefficients), len(out)))
        for number, values in enumerate(inputs):
            self._add(number, start, values, sums)
        return self.merged(output, start, sums, out)


def _blocks(length: int) -> Iterator[slice]:
    for begin in range(0, length, SUM_BLOCK):
        yield slice(begin, min(begin + SUM_BLOCK, length))
