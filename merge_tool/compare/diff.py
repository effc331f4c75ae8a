"""How far apart two checkpoints are: every tensor's angle, norms and relative change, then by layer and by module.

Streamed tile by tile, with the same sums as a merge, so the angles are a merge's to the last bit. Any two checkpoints
can be compared: tensors that only one has, or whose shape or type differs, are listed and are no error.
"""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from merge_tool.arrays import FLOAT_DTYPES, NUMPY_DTYPES, TILE, Array, first_nonfinite, same_values
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.compare.files import SettingDiff, setting_diffs, tokenizer_diffs
from merge_tool.errors import MismatchError, RecipeError, counted, listed, shown
from merge_tool.methods.inner import PairSums, Scratch, is_finite, pair_angle, sharpen, sum_tile, total
from merge_tool.models.inputs import Inputs
from merge_tool.models.lora import open_models
from merge_tool.models.naming import natural_key
from merge_tool.plan.limits import LEAST_BYTES
from merge_tool.plan.memory import default_budget, default_jobs
from merge_tool.plan.system_memory import resident_bytes
from merge_tool.progress import Progress
from merge_tool.recipe.options import OUTPUT_DTYPES, STOP_BASE_OR_FT, check_choice
from merge_tool.run.buffers import cannot_start
from merge_tool.run.findings import median

_WORKER_BYTES = Scratch.NBYTES + 2 * 8 * TILE
_RESERVE_BYTES = 8_000_000  # threads' stacks, malloc's overhead, the results


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of both: angle in degrees, norms, |y| / |x|, |y - x| / |x|; None if there is none.

    `layer` is the first number in the name, `module` the name with `*` in its place. `note` says why figures are
    missing (integers, NaN), or that the bytes are equal.
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    dtype_base: str
    dtype_ft: str
    equal: bool
    angle_degrees: float | None = None
    norm_base: float | None = None
    norm_ft: float | None = None
    norm_ratio: float | None = None
    relative_change: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """Several tensors together: their angles in degrees, and norms as if they were one tensor."""

    name: str
    num_tensors: int
    num_equal: int
    median_degrees: float | None
    largest_degrees: float | None
    norm_ratio: float | None
    relative_change: float | None


@dataclass(frozen=True)
class Diff:
    """Two checkpoints compared. `unlike` are tensors whose shapes or types differ, so that they cannot be compared;
    `settings` the keys of configuration files that differ, `tokenizers` the differences between tokenizers in words."""

    names: tuple[str, str]
    tensors: tuple[TensorDiff, ...]
    only_base: tuple[str, ...] = ()
    only_ft: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    layers: tuple[GroupDiff, ...] = field(default=())
    modules: tuple[GroupDiff, ...] = field(default=())
    settings: tuple[SettingDiff, ...] = ()
    tokenizers: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["base"], content["ft"] = content.pop("names")
        return content

    def __repr__(self) -> str:
        equal = sum(tensor.equal for tensor in self.tensors)
        angles = [tensor.angle_degrees for tensor in self.tensors if tensor.angle_degrees is not None]
        what = (
            f"{' and '.join(map(shown, self.names))}: {counted(len(self.tensors), 'tensor')} compared, {equal:,} equal"
        )
        angle = f"; angles: median {median(angles):.3g}, largest {max(angles):.3g} degrees" if angles else ""
        rest = {"only in the first": self.only_base, "only in the second": self.only_ft, "unlike": self.unlike}
        more = "".join(f"; {len(names):,} {where}" for where, names in rest.items() if names)
        settings = f"; {counted(len(self.settings), 'setting differs', 'settings differ')}" if self.settings else ""
        return "\n".join([f"{what}{angle}{more}{settings}", *self.tokenizers])


@dataclass(frozen=True)
class DiffPlan:
    """What a comparison would read: `nbytes` of both checkpoints together, `download_bytes` of them from the Hub."""

    names: tuple[str, str]
    num_tensors: int
    nbytes: int
    download_bytes: int
    only_base: tuple[str, ...]
    only_ft: tuple[str, ...]
    unlike: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["base"], content["ft"] = content.pop("names")
        return content


def diff(
    base: str | Path,
    ft: str | Path,
    *,
    on_missing: str = "ft",
    dtype: str | None = None,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: str = "auto",
) -> Diff:
    """Compare every tensor of `base` with `ft`'s of the same name, in at most `memory_bytes` of resident memory, and
    the models' configurations and tokenizers.

    `on_missing`: tensors that one model lacks are an error ("error"), or listed: those of BASE ("base"), or of both
    ("ft"). With a `dtype` the floats of both are rounded to it first; "base": to BASE's types. `progress` is as in
    `merge`. Raises CheckpointError if a checkpoint cannot be read, MismatchError for missing tensors; RecipeError for
    an unknown choice, or if the memory does not suffice.
    """
    budget = _checked_budget(memory_bytes, jobs)
    with Inputs([base, ft]) as inputs:
        inputs.fetch()
        two = _Two.open(inputs, (str(base), str(ft)), on_missing, dtype, budget)
    names, models = two.names, two.models
    reading = max((model.source(name).extra_bytes(TILE) for model in models for name in names), default=0)
    each = _WORKER_BYTES + reading + (2 * 8 * TILE if dtype is not None else 0)
    with Progress(progress) as shown_progress:
        shown_progress.start(two.nbytes)
        compared = list(_compare_all(two, _workers(budget, jobs or default_jobs(), each), shown_progress))
    return Diff(
        names=two.called,
        tensors=tuple(tensor for tensor, _ in compared),
        only_base=two.only_base,
        only_ft=two.only_ft,
        unlike=two.unlike,
        notices=tuple(notice for model in models for notice in model.notices),
        layers=tuple(_groups(compared, lambda t: "outside layers" if t.layer is None else f"layer {t.layer}")),
        modules=tuple(_groups(compared, lambda t: t.module)),
        settings=tuple(setting_diffs(*models)),
        tokenizers=tuple(tokenizer_diffs(*models)),
    )


def plan_diff(
    base: str | Path,
    ft: str | Path,
    *,
    on_missing: str = "ft",
    dtype: str | None = None,
    memory_bytes: int | None = None,
    jobs: int | None = None,
) -> DiffPlan:
    """What `diff` with these arguments would read, from headers alone. Raises the errors that it begins with."""
    budget = _checked_budget(memory_bytes, jobs)
    with Inputs([base, ft]) as inputs:
        two = _Two.open(inputs, (str(base), str(ft)), on_missing, dtype, budget)
        download = inputs.download.nbytes
        return DiffPlan(two.called, len(two.names), two.nbytes, download, two.only_base, two.only_ft, two.unlike)


def _checked_budget(memory_bytes: int | None, jobs: int | None) -> int:
    budget = default_budget(resident_bytes()) if memory_bytes is None else memory_bytes
    if budget < LEAST_BYTES:
        raise RecipeError(f"The memory budget is {budget:,} bytes, expected at least {LEAST_BYTES // 10**6}MB.")
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected at least 1.")
    return budget


@dataclass(frozen=True)
class _Two:
    """Two opened checkpoints: the names of the tensors to compare, and those that cannot be."""

    models: tuple[Checkpoint, Checkpoint]
    called: tuple[str, str]
    names: tuple[str, ...]
    only_base: tuple[str, ...]
    only_ft: tuple[str, ...]
    unlike: tuple[str, ...]
    dtype: str | None

    @classmethod
    def open(cls, inputs: Inputs, given: tuple[str, str], on_missing: str, dtype: str | None, budget: int) -> _Two:
        check_choice("on_missing", on_missing, STOP_BASE_OR_FT)
        if dtype is not None:
            check_choice("dtype", dtype, OUTPUT_DTYPES)
        most = max(4_000_000, (budget - resident_bytes()) // 3)
        first, second = open_models(inputs.refs, coming=inputs.coming, max_header_bytes=most, mergeable=False)
        called = (first.name, second.name) if first.name != second.name else given
        a, b = first.tensors, second.tensors
        only_base, only_ft = (tuple(_natural(x.keys() - y.keys())) for x, y in ((a, b), (b, a)))
        if on_missing == "error" and (only_base or only_ft):
            lacking = [(called[1], only_base), (called[0], only_ft)]
            parts = [f"{shown(who)} lacks {counted(len(n), 'tensor')}: {listed(n)}." for who, n in lacking if n]
            raise MismatchError(f"{' '.join(parts)} Give --on-missing ft to compare the others.")
        shared = _natural(a.keys() & b.keys())
        return cls(
            models=(first, second),
            called=called,
            names=tuple(name for name in shared if _comparable(a[name], b[name])),
            only_base=only_base,
            only_ft=only_ft if on_missing == "ft" else (),
            unlike=tuple(
                f"{n}: {a[n].dtype} {list(a[n].shape)}, {b[n].dtype} {list(b[n].shape)}"
                for n in shared
                if not _comparable(a[n], b[n])
            ),
            dtype=dtype,
        )

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return sum(model.tensors[name].nbytes for model in self.models for name in self.names)

    def rounded_to(self, name: str) -> Any:
        """The numpy dtype to which the floats of a tensor are rounded; None if they are compared as they are."""
        dtypes = [model.tensors[name].dtype for model in self.models]
        if self.dtype is None or not {*dtypes} <= FLOAT_DTYPES:
            return None
        return NUMPY_DTYPES[OUTPUT_DTYPES[self.dtype] or dtypes[0]]


def _natural(names: Iterable[str]) -> list[str]:
    return sorted(sorted(names), key=natural_key)


def _comparable(a: TensorInfo, b: TensorInfo) -> bool:
    if a.shape != b.shape or not {a.dtype, b.dtype} <= NUMPY_DTYPES.keys():
        return False
    return a.dtype == b.dtype or {a.dtype, b.dtype} <= FLOAT_DTYPES


def _workers(budget: int, jobs: int, each: int) -> int:
    room = budget - resident_bytes() - _RESERVE_BYTES
    if room < each:
        needed = -(-(resident_bytes() + _RESERVE_BYTES + each) // 1_000_000)
        raise RecipeError(f"This comparison needs more memory than {budget:,} bytes. Give --memory {needed}MB or more.")
    return min(jobs, room // each)


# --------------------------------------------------------------------------------------------- tensors

_TRIES, _PATIENCE = 10, 0.05  # to start the only thread; seconds between them
_Compared: TypeAlias = "tuple[TensorDiff, PairSums | None]"
Tiles: TypeAlias = Callable[[], Iterable[tuple[Array, Array]]]


class _Memory:
    """One worker's memory: scratch, and a tile of each side."""

    def __init__(self) -> None:
        self.scratch = Scratch(np.zeros(Scratch.NBYTES, np.uint8))
        self.tiles = np.zeros((2, 8 * TILE), np.uint8)


def _compare_all(two: _Two, workers: int, progress: Progress) -> Iterator[_Compared]:
    free: queue.SimpleQueue[_Memory] = queue.SimpleQueue()
    for _ in range(workers):
        free.put(_Memory())
    stop = threading.Event()

    def work(name: str) -> _Compared:
        memory = free.get()
        try:
            return _compare(two, name, memory, stop)
        finally:
            progress.advance(sum(model.tensors[name].nbytes for model in two.models), name)
            free.put(memory)

    pool, compared = _started(workers, work, two.names)
    with pool:
        try:
            yield from compared
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _started(
    workers: int, work: Callable[[str], _Compared], names: Sequence[str]
) -> tuple[ThreadPoolExecutor, Iterator[_Compared]]:
    """A pool that compares all, with fewer threads if the system starts no more. Raises WorkerError if it starts
    none."""
    tries = _TRIES
    while True:
        pool = ThreadPoolExecutor(workers)
        try:
            return pool, pool.map(work, names)
        except RuntimeError as e:
            pool.shutdown(cancel_futures=True)
            tries -= workers == 1
            if not tries:
                raise cannot_start(e) from e
            workers = max(1, workers // 2)
            time.sleep(_PATIENCE)  # the system counts a thread for a moment after its end


def _compare(two: _Two, name: str, memory: _Memory, stop: threading.Event) -> _Compared:
    a, b = (model.tensors[name] for model in two.models)
    with ExitStack() as opened:
        for model in two.models:
            source = model.source(name)
            source.acquire()
            opened.callback(source.release)
        with np.errstate(all="ignore"):  # the result notes values that are not finite; numpy need not warn
            equal, sums = _sums(a, b, partial(_tiles, two, name, memory, stop), memory.scratch)
    return _describe(name, a, b, equal, sums), sums


def _sums(a: TensorInfo, b: TensorInfo, tiles: Tiles, scratch: Scratch) -> tuple[bool, PairSums | None]:
    """Whether the bytes are equal, and the sums: None for integers and for tensors with values that are not finite."""
    is_float = a.dtype in FLOAT_DTYPES
    equal, parts = True, [(0.0, 0.0, 0.0)]
    for x, y in tiles():
        equal = equal and same_values(x, y)
        if is_float:
            parts.append(sum_tile(x, y, 1.0, scratch))
    xx, xd, dd = (total(column) for column in zip(*parts, strict=True))
    sums = PairSums(xx, xd, dd)
    if not is_float or (not is_finite(sums) and any(first_nonfinite(values) is not None for values in _both(tiles()))):
        return equal, None
    if not equal:
        sums = sharpen(sums, tiles, has_float64="F64" in (a.dtype, b.dtype), scratch=scratch)
    return equal, sums


def _both(tiles: Iterable[tuple[Array, Array]]) -> Iterator[Array]:
    for x, y in tiles:
        yield from (x, y)


def _tiles(two: _Two, name: str, memory: _Memory, stop: threading.Event) -> Iterator[tuple[Array, Array]]:
    """The tensor of both, tile by tile, in buffers that the next tile overwrites."""
    infos = [model.tensors[name] for model in two.models]
    dtypes = [NUMPY_DTYPES[info.dtype] for info in infos]
    sources = [model.source(name) for model in two.models]
    rounded = two.rounded_to(name)
    for start in range(0, infos[0].numel, TILE):
        if stop.is_set():
            return
        length = min(TILE, infos[0].numel - start)
        pair = [memory.tiles[k, : length * d.itemsize].view(d) for k, d in enumerate(dtypes)]
        for source, values in zip(sources, pair, strict=True):
            source.read_into(start, values)
            source.forget(start, start + length)
        if rounded is not None:
            pair = [values.astype(rounded) for values in pair]
        yield pair[0], pair[1]


def _describe(name: str, a: TensorInfo, b: TensorInfo, equal: bool, sums: PairSums | None) -> TensorDiff:
    layer, module = split_layer(name)
    described = partial(
        TensorDiff,
        name=name,
        layer=layer,
        module=module,
        shape=a.shape,
        dtype_base=a.dtype,
        dtype_ft=b.dtype,
        equal=equal,
    )
    if sums is None:
        is_float = a.dtype in FLOAT_DTYPES
        note = "holds NaN or infinity" if is_float else "equal" if equal else "integers that differ"
        return described(note=note)
    angle = pair_angle(sums)
    n0, n1 = (norm / sums.scale for norm in sums.norms)
    return described(
        angle_degrees=None if angle is None else math.degrees(angle.theta),
        norm_base=_finite(n0),
        norm_ft=_finite(n1),
        norm_ratio=_finite(n1 / n0) if n0 else None,
        relative_change=_finite(math.sqrt(sums.dd / sums.xx)) if sums.xx else None,
        note="equal" if equal else "zero norm" if angle is None else "",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def split_layer(name: str) -> tuple[int | None, str]:
    """The first number in a tensor's name, and the name with `*` for every number.

    >>> split_layer("model.layers.3.mlp.experts.7.w1.weight")
    (3, 'model.layers.*.mlp.experts.*.w1.weight')
    """
    parts = name.split(".")
    layer = next((int(part) for part in parts if re.fullmatch(r"[0-9]{1,9}", part)), None)
    return layer, ".".join("*" if re.fullmatch(r"[0-9]{1,9}", part) else part for part in parts)


# ---------------------------------------------------------------------------------------------- groups


def _groups(compared: Sequence[_Compared], key: Any) -> Iterator[GroupDiff]:
    groups: dict[str, list[_Compared]] = {}
    for item in compared:
        groups.setdefault(key(item[0]), []).append(item)
    for name in sorted(groups, key=lambda name: (name == "outside layers", natural_key(name))):
        yield _group(name, groups[name])


def _group(name: str, compared: Sequence[_Compared]) -> GroupDiff:
    angles = [tensor.angle_degrees for tensor, _ in compared if tensor.angle_degrees is not None]
    sums = [s for _, s in compared if s is not None and s.scale == 1.0]
    rows = [(s.xx, s.norms[1] ** 2, s.dd) for s in sums] or [(0.0, 0.0, 0.0)]
    xx, yy, dd = (total(column) for column in zip(*rows, strict=True))
    return GroupDiff(
        name=name,
        num_tensors=len(compared),
        num_equal=sum(tensor.equal for tensor, _ in compared),
        median_degrees=median(angles) if angles else None,
        largest_degrees=max(angles, default=None),
        norm_ratio=_finite(math.sqrt(yy / xx)) if xx else None,
        relative_change=_finite(math.sqrt(dd / xx)) if xx else None,
    )
