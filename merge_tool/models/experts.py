"""Mixtures of experts in two layouts: a tensor for each expert, or all experts of a layer in one. A model in the other
layout is read in that of the first model, expert by expert; nothing is converted on disk.

Only the layout in which the parts lie behind each other is known: gate_up [experts, 2 x inner, hidden], gate before up,
and down [experts, hidden, inner], as transformers 5 has it. Transposed and interleaved experts do not match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate

from merge_tool.arrays import Array
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.errors import counted
from merge_tool.models.heads import renamed
from merge_tool.models.naming import own_name

_MODULE = r"(?P<module>.*(?:mlp|block_sparse_moe|feed_forward))\.experts\."
_SINGLE = re.compile(_MODULE + r"(?P<expert>[0-9]{1,4})\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_FUSED = re.compile(_MODULE + r"(?P<part>gate_up_proj|down_proj)(?:\.weight)?")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


@dataclass(frozen=True, slots=True)
class Pieces:
    """A TensorSource of ranges of others, behind each other: (source, first element, number of elements)."""

    info: TensorInfo
    pieces: tuple[tuple[TensorSource, int, int], ...]

    @property
    def stored_dtype(self) -> str:
        return self.pieces[0][0].stored_dtype

    @property
    def where(self) -> str:
        return self.pieces[0][0].where

    @property
    def files(self) -> Sequence[ByteSource]:
        return list(dict.fromkeys(file for source, _, _ in self.pieces for file in source.files))

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[TensorSource, int, int, int]]:
        """(source, its elements [first, end), where they are behind `start`)."""
        for (source, first, count), end in zip(self.pieces, accumulate(n for _, _, n in self.pieces), strict=True):
            low, high = max(start, end - count), min(stop, end)
            if low < high:
                shift = first - (end - count)
                yield source, low + shift, high + shift, low - start

    def read_into(self, start: int, values: Array) -> None:
        for source, first, end, position in self._ranges(start, start + len(values)):
            source.read_into(first, values[position : position + end - first])

    def acquire(self) -> None:
        with ExitStack() as opened:
            for source, _, _ in self.pieces:
                source.acquire()
                opened.callback(source.release)
            opened.pop_all()

    def release(self) -> None:
        for source, _, _ in self.pieces:
            source.release()

    def prefetch(self, start: int, stop: int) -> None:
        for source, first, end, _ in self._ranges(start, stop):
            source.prefetch(first, end)

    def forget(self, start: int, stop: int) -> None:
        for source, first, end, _ in self._ranges(start, stop):
            source.forget(first, end)

    def extra_bytes(self, count: int) -> int:
        return max(source.extra_bytes(min(count, number)) for source, _, number in self.pieces)


@dataclass(slots=True)
class _Layer:
    """The experts of one layer: names by part; of single experts by (expert, part). `module` is what they belong to."""

    module: str
    single: dict[tuple[int, str], str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)


def in_layout_of(first: Checkpoint, model: Checkpoint) -> Checkpoint:
    """The model with its experts, and what else is in their modules, under the names and in the layout of `first`."""
    ours, theirs = _layers(first), _layers(model)
    made: dict[str, TensorSource] = {}
    gone: set[str] = set()
    for key in ours.keys() & theirs.keys():
        here, there = ours[key], theirs[key]
        if here.fused and there.single and not there.fused:
            parts = _fuse(first, here, model, there)
        elif here.single and there.fused and not there.single:
            parts = _split(first, here, model, there)
        else:
            continue
        if parts:
            made |= parts | _renamed_rest(here, model, there)
            gone |= {name for name in model.tensors if name.startswith(f"{there.module}.")}
    if not made:
        return model
    layout = "one by one" if any(layer.single for layer in theirs.values()) else "all in one tensor"
    notice = (
        f"Experts are stored {layout} in {model.name}, and in the other way in {first.name}: they are matched expert "
        f"by expert in {counted(len(ours), 'layer')}. The output has {first.name}'s layout."
    )
    return model.with_made(model.name, (), made, (*model.notices, notice), without=gone - made.keys())


def _layers(model: Checkpoint) -> dict[str, _Layer]:
    """The layers with experts, by the name of what the experts' module belongs to."""
    layers: dict[str, _Layer] = {}
    for name in model.tensors:
        if match := _SINGLE.fullmatch(name):
            layer = layers.setdefault(_key(match["module"]), _Layer(match["module"]))
            layer.single[int(match["expert"]), _PARTS[match["part"]]] = name
        elif match := _FUSED.fullmatch(name):
            layers.setdefault(_key(match["module"]), _Layer(match["module"])).fused[match["part"]] = name
    return layers


def _key(module: str) -> str:
    return own_name(module.rpartition(".")[0])


def _sizes(single: Checkpoint, layer: _Layer) -> tuple[int, int, int] | None:
    """(experts, inner, hidden) of experts stored one by one; None unless all have all parts, alike."""
    count = len(layer.single) // 3
    if not count or set(layer.single) != {(e, part) for e in range(count) for part in ("gate", "up", "down")}:
        return None
    infos = {key: single.tensors[name] for key, name in layer.single.items()}
    gate = infos[0, "gate"].shape
    if len(gate) != 2 or len({info.dtype for info in infos.values()}) > 1:
        return None
    is_alike = all(info.shape == (gate[::-1] if part == "down" else gate) for (_, part), info in infos.items())
    return (count, *gate) if is_alike else None


def _fits(fused: Checkpoint, layer: _Layer, sizes: tuple[int, int, int] | None) -> bool:
    if sizes is None or layer.fused.keys() != {"gate_up_proj", "down_proj"}:
        return False
    experts, inner, hidden = sizes
    gate_up, down = (fused.tensors[layer.fused[part]].shape for part in ("gate_up_proj", "down_proj"))
    return gate_up == (experts, 2 * inner, hidden) and down == (experts, hidden, inner)


def _fuse(first: Checkpoint, here: _Layer, model: Checkpoint, there: _Layer) -> dict[str, TensorSource]:
    """The model's single experts as the tensors that the first has; nothing if they do not fit."""
    if not _fits(first, here, sizes := _sizes(model, there)):
        return {}
    assert sizes is not None
    made: dict[str, TensorSource] = {}
    for part, single in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        sources = [model.source(there.single[expert, one]) for expert in range(sizes[0]) for one in single]
        name = here.fused[part]
        info = TensorInfo(name, sources[0].info.dtype, first.tensors[name].shape, 0)
        made[name] = Pieces(info, tuple((source, 0, source.info.numel) for source in sources))
    return made


def _split(first: Checkpoint, here: _Layer, model: Checkpoint, there: _Layer) -> dict[str, TensorSource]:
    """The model's fused experts as the tensors that the first has; nothing if they do not fit."""
    if not _fits(model, there, sizes := _sizes(first, here)):
        return {}
    assert sizes is not None
    _, inner, hidden = sizes
    size = inner * hidden
    gate_up, down = (model.source(there.fused[part]) for part in ("gate_up_proj", "down_proj"))
    made: dict[str, TensorSource] = {}
    for (expert, part), name in here.single.items():
        source = down if part == "down" else gate_up
        start = expert * size if part == "down" else (2 * expert + (part == "up")) * size
        made[name] = Pieces(TensorInfo(name, source.info.dtype, first.tensors[name].shape, 0), ((source, start, size),))
    return made


def _renamed_rest(here: _Layer, model: Checkpoint, there: _Layer) -> dict[str, TensorSource]:
    """What else is in the module (the router and the like), under the first's name of the module."""
    experts = {*there.single.values(), *there.fused.values()}
    rest = [n for n in model.tensors if n.startswith(f"{there.module}.") and n not in experts]
    names = {name: f"{here.module}{name.removeprefix(there.module)}" for name in rest}
    return {new: renamed(model.source(name), new) for name, new in names.items()}
