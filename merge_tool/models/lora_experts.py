"""LoRA on the parameters of experts (`target_parameters`): which factors belong to which weights.

peft sees the experts of a layer as two parameters [experts, out, in], one around the other; a checkpoint stores them
so, transposed, or as a weight for each expert. Expert e's change is B_e A_e: A_e are rows of A, B_e is every so many
columns of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from merge_tool.arrays import FLOAT_DTYPES, Array
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.errors import shown
from merge_tool.models.experts import Pieces
from merge_tool.models.lora_config import EXPERT_PARAMETERS, Settings
from merge_tool.models.lora_names import AdapterTensor
from merge_tool.models.low_rank import Factor, LowRankTensor
from merge_tool.models.renaming import Names

_WRAPPED = ".base_layer"  # what peft puts behind a module's name for the parameter that it wraps first
_OF_ONE = {  # for a parameter: the weights of one expert that it consists of, row after row
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_FOLDERS = ("mlp", "block_sparse_moe", "feed_forward")  # what layers call the module that has the experts
_TRANSPOSED = {"gpt_oss"}  # model_type of classes whose parameters are [experts, in, out]
_Factors = Mapping[str, AdapterTensor]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the checkpoint: a parameter's rows from `first_row` on, of one expert; or all of all experts."""

    name: str
    expert: int | None
    first_row: int


@dataclass(frozen=True, slots=True)
class _Parameter:
    """The parameter of all experts, as peft sees it but for `shape`, which is that of the checkpoint."""

    name: str
    parts: tuple[_Part, ...]
    experts: int
    shape: tuple[int, int]

    def ways(self, factors: _Factors, rank: int) -> tuple[bool, ...]:
        """Whether the product may be transposed: the ways that the shapes allow."""
        a, b = (factors[f"lora_{side}.weight"].info.shape for side in "AB")
        ranks = rank * self.experts
        fit = [
            (a, b) == ((ranks, self.shape[1]), (self.shape[0], ranks)),
            (a, b) == ((ranks, self.shape[0]), (self.shape[1], ranks)),
        ]
        is_fused = self.parts[0].expert is None
        return tuple(way for way in (False, True) if fit[way] and (is_fused or not way))


@dataclass(frozen=True, slots=True)
class ExpertsTensor:
    """A TensorSource [experts, rows, columns]: `base` plus the product of each expert's factors."""

    info: TensorInfo
    base: TensorSource
    change: _Change

    @property
    def stored_dtype(self) -> str:
        return self.base.stored_dtype

    @property
    def where(self) -> str:
        return self._expert(0).where

    @property
    def files(self) -> tuple[ByteSource, ...]:
        return self._expert(0).files

    @property
    def _size(self) -> int:
        return self.info.shape[1] * self.info.shape[2]

    def _expert(self, number: int) -> LowRankTensor:
        info = TensorInfo(self.info.name, self.info.dtype, self.info.shape[1:], 0)
        stored = TensorInfo(self.info.name, self.base.info.dtype, info.shape, 0)
        base = Pieces(stored, ((self.base, number * self._size, self._size),))
        return self.change.of(number, 0, info, base)

    def acquire(self) -> None:
        self._expert(0).acquire()

    def release(self) -> None:
        self._expert(0).release()

    def prefetch(self, start: int, stop: int) -> None:
        self.base.prefetch(start, stop)

    def forget(self, start: int, stop: int) -> None:
        self.base.forget(start, stop)

    def read_into(self, start: int, values: Array) -> None:
        done = 0
        while done < len(values):
            expert, begin = divmod(start + done, self._size)
            count = min(len(values) - done, self._size - begin)
            self._expert(expert).read_into(begin, values[done : done + count])
            done += count

    def extra_bytes(self, count: int) -> int:
        return self._expert(0).extra_bytes(count)


@dataclass(frozen=True, slots=True)
class _Change:
    """The factors of all experts of one parameter."""

    a: TensorSource
    b: TensorSource
    experts: int
    rank: int
    scale: float
    transposed: bool
    also_read: tuple[ByteSource, ...]

    def of(self, expert: int, first_row: int, info: TensorInfo, base: TensorSource) -> LowRankTensor:
        """`base`, a matrix of one expert, with its change; the rows of B from `first_row` on belong to it."""
        width = self.a.info.shape[1]
        rows = info.shape[1] if self.transposed else info.shape[0]
        inner = Factor(self.a, self.rank, width, by_rank=True, offset=expert * self.rank * width)
        outer = Factor(
            self.b,
            self.rank,
            rows,
            by_rank=False,
            offset=first_row * self.rank * self.experts,
            side_by_side=self.experts,
            column=expert,
        )
        left, right = (inner, outer) if self.transposed else (outer, inner)
        return LowRankTensor(info=info, base=base, left=left, right=right, scale=self.scale, also_read=self.also_read)


def take_expert_modules(
    modules: dict[str, dict[str, AdapterTensor]], settings: Settings
) -> dict[str, list[dict[str, AdapterTensor]]]:
    """Take the modules of experts out of `modules`: by the module's name, the factors of each parameter, the one that
    peft wraps first in front."""
    taken: dict[str, list[dict[str, AdapterTensor]]] = {}
    for module in sorted(modules, key=len, reverse=True):
        stem = module
        while stem.endswith(_WRAPPED):
            stem = stem.removesuffix(_WRAPPED)
        if any(settings.targets(f"{stem}.{name}") for name in EXPERT_PARAMETERS):
            taken.setdefault(stem, []).append(modules.pop(module))
    return taken


def match_experts(
    base: Checkpoint, names: Names, settings: Settings, stem: str, levels: Sequence[_Factors]
) -> Iterator[tuple[str, TensorSource]]:
    """The tensors of BASE that the experts of one module are, with their changes. Raises ValueError, with the reason,
    where shapes or names do not fit."""
    wanted = [name for name in EXPERT_PARAMETERS if settings.targets(f"{stem}.{name}")]
    if len(levels) != len(wanted) or any(f.keys() != {"lora_A.weight", "lora_B.weight"} for f in levels):
        raise ValueError(f"has other factors than A and B for {' and '.join(wanted)}")
    parameters = [_find(base, names, stem, name) for name in wanted]
    dtypes = {part.info.dtype for factors in levels for part in factors.values()}
    dtypes |= {base.tensors[part.name].dtype for parameter in parameters for part in parameter.parts}
    if not dtypes <= FLOAT_DTYPES:
        raise ValueError(f"has {', '.join(sorted(dtypes - FLOAT_DTYPES))}")
    ranks = [settings.rank_of(f"{stem}.{name}") for name in wanted]
    for order in permutations(range(len(levels))):
        ways = [p.ways(levels[k], r) for p, k, r in zip(parameters, order, ranks, strict=True)]
        both = [way for way in (False, True) if all(way in of_one for of_one in ways)]
        if both:
            break
    else:
        shapes = [[list(part.info.shape) for part in factors.values()] for factors in levels]
        raise ValueError(f"factors {shapes} do not fit {[[p.experts, *p.shape] for p in parameters]} of rank {ranks}")
    if len(both) > 1:
        kind = (base.config or {}).get("model_type")
        if kind not in _TRANSPOSED:
            raise ValueError("is square, and whether its class has it transposed is not known here")
        both = [True]
    for parameter, k, rank in zip(parameters, order, ranks, strict=True):
        change = _Change(
            a=levels[k]["lora_A.weight"].source,
            b=levels[k]["lora_B.weight"].source,
            experts=parameter.experts,
            rank=rank,
            scale=settings.scale_of(f"{stem}.{parameter.name}"),
            transposed=both[0],
            also_read=(settings.file,),
        )
        for part in parameter.parts:
            w = base.tensors[part.name]
            info, source = (
                TensorInfo(part.name, "F64" if w.dtype == "F64" else "F32", w.shape, 0),
                base.source(part.name),
            )
            if part.expert is None:
                yield part.name, ExpertsTensor(info=info, base=source, change=change)
            else:
                yield part.name, change.of(part.expert, part.first_row, info, source)


def _find(base: Checkpoint, names: Names, stem: str, parameter: str) -> _Parameter:
    """The tensors of BASE that a parameter is. Raises ValueError where there are none."""
    fused = names.find(f"{stem}.{parameter}")
    if fused is not None and len(shape := base.tensors[fused].shape) == 3:
        return _Parameter(parameter, (_Part(fused, None, 0),), shape[0], (shape[1], shape[2]))
    for folder in _FOLDERS:
        module = ".".join(folder if word in _FOLDERS else word for word in stem.split("."))
        for words in _OF_ONE[parameter]:
            if matrices := _of_each(base, names, module, parameter, words):
                return matrices
    raise ValueError(f"no place there for {shown(parameter)}: neither one tensor of all experts nor one for each")


def _of_each(base: Checkpoint, names: Names, module: str, parameter: str, words: tuple[str, ...]) -> _Parameter | None:
    parts: list[_Part] = []
    expert, shape = 0, (0, 0)
    while all(weights := [names.find(f"{module}.{expert}.{word}.weight") for word in words]):
        shapes = {base.tensors[name].shape for name in weights if name is not None}
        if len(shapes) > 1 or len(one := shapes.pop()) != 2 or (expert and one[0] * len(words) != shape[0]):
            raise ValueError(f"{shown(weights[0])}: has another shape than the other experts")
        parts += [_Part(name, expert, number * one[0]) for number, name in enumerate(weights) if name is not None]
        expert, shape = expert + 1, (one[0] * len(words), one[1])
    return _Parameter(parameter, tuple(parts), expert, shape) if parts else None
