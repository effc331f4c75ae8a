"""Which tensor of BASE each tensor of an adapter changes or replaces, by names and shapes.

Every tensor of the adapter must find its place: an adapter that is applied in part is another model. low_rank computes
the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint, FileTensor
from merge_tool.checkpoint.source import TensorSource
from merge_tool.checkpoint.strided import StridedTensor
from merge_tool.errors import MismatchError, counted, listed, shown
from merge_tool.models.heads import renamed
from merge_tool.models.lora_config import CONFIG, Settings
from merge_tool.models.lora_ends import ends_notice, find_ends
from merge_tool.models.lora_experts import match_experts, take_expert_modules
from merge_tool.models.lora_names import MAGNITUDE, OLD_TOKENS, TOKENS, AdapterTensor, parse_name
from merge_tool.models.low_rank import Factor, LowRankTensor
from merge_tool.models.renaming import Names
from merge_tool.models.rescaled import Factors, RescaledTensor
from merge_tool.models.token_rows import TokenRows

_ZERO_3 = "DeepSpeed saved it without gathering it: run zero_to_fp32.py, or save the adapter again"
_AND_SAVE = "(merge_and_unload, then save_pretrained)"


@dataclass(frozen=True)
class _Layer:
    """The factors of one layer, and the tensor that they change, seen as a matrix with as many rows as its first
    dimension."""

    module: str
    target: str
    a: AdapterTensor
    b: AdapterTensor
    ways: tuple[bool, ...]  # whether the product may be transposed: the ways that the shapes allow
    magnitude: AdapterTensor | None = None  # the lengths of rows (of columns, if transposed)


class Matcher:
    """Every tensor of the adapter, and the tensor of BASE that it changes or replaces."""

    def __init__(self, base: Checkpoint, name: str, settings: Settings, weights: Sequence[Checkpoint]) -> None:
        """`weights` are the adapter's own file and files of tensors that were trained beside it."""
        self.base, self.name, self.settings = base, name, settings
        self.names = Names(base.tensors)
        self.tensors = _parse_names(weights)
        self.ends = find_ends(base, self.names, settings, self.tensors)
        self.made: dict[str, TensorSource] = {}
        self.notices: list[str] = []
        self.homeless: list[str] = []
        self.unfit: list[str] = []

    def match(self) -> None:
        """Fill `made`. Raises MismatchError with all tensors that BASE lacks or that do not fit there."""
        modules: dict[str, dict[str, AdapterTensor]] = {}
        for part in self.tensors:
            if part.module in self.ends.skipped:
                continue
            if part.is_factor and part.factor != OLD_TOKENS:
                modules.setdefault(part.module, {})[part.factor] = part
            elif not part.is_factor:
                self._replace(part)
        self._begin_head()
        rows = {module: factors.pop(TOKENS) for module, factors in modules.items() if TOKENS in factors}
        modules = {module: factors for module, factors in modules.items() if factors}
        for stem, levels in take_expert_modules(modules, self.settings).items():
            self._add_experts(stem, levels)
        layers = [layer for module, factors in modules.items() if (layer := self._layer(module, factors))]
        default = self._is_transposed(layers)
        for layer in layers:
            self._add(layer, default)
        for module, factors in modules.items():
            if bias := factors.get("lora_B.bias"):
                self._add_bias(module, bias)
        for module, part in rows.items():
            self._replace_rows(module, part, with_factors=module in modules)
        self._copy_head()
        self._check()

    def _find(self, name: str) -> str | None:
        """The tensor of BASE, or of what the adapter makes of it, that a name of the adapter's means."""
        return name if name == self.ends.head else self.names.find(name)

    def _begin_head(self) -> None:
        """Where a tied head is a tensor of its own now: what it is before the adapter adds to it."""
        tie, head = self.ends.tie, self.ends.head
        if self.ends.skipped:
            self.notices.append(
                f"{self.name}: {listed(self.ends.skipped)} is left out, a copy of what {shown(tie and tie.embedding)} "
                f"has there; {self.base.name} ties the two."
            )
        if tie is None or head is None:
            return
        self.notices.append(ends_notice(self.name, self.base, self.ends))
        if head not in self.made and tie.copy is None:
            source = self._source(tie.embedding) if self.ends.follows else self.base.source(tie.embedding)
            self.made[head] = renamed(source, head)
        rows = self._info(head).shape[0], self._info(tie.embedding).shape[0]
        if rows[0] != rows[1]:
            self.unfit.append(
                f"{shown(head)} would have {rows[0]:,} rows, {shown(tie.embedding)} {rows[1]:,}: the adapter does not "
                "hold the other rows of the head"
            )

    def _copy_head(self) -> None:
        """Where the checkpoint has a copy of a tied matrix, the copy follows."""
        tie = self.ends.tie
        if tie is None or tie.copy is None or self.ends.head is not None or tie.copy in self.made:
            return
        if tie.embedding in self.made:
            self.made[tie.copy] = renamed(self.made[tie.embedding], tie.copy)

    def _check(self) -> None:
        problems = []
        if self.homeless:
            problems.append(f"no place there for {counted(len(self.homeless), 'tensor')}: {listed(self.homeless, 50)}")
        problems += self.unfit
        if problems:
            raise MismatchError(
                f"{self.name} is not an adapter of {self.base.name}, or not in a form that is read.\n  "
                + "\n  ".join(problems)
                + f"\nGive the model that it was trained on, or merge it with peft {_AND_SAVE}."
            )

    def _info(self, target: str) -> TensorInfo:
        return self.made[target].info if target in self.made else self.base.tensors[target]

    def _source(self, target: str) -> TensorSource:
        return self.made[target] if target in self.made else self.base.source(target)

    # ------------------------------------------------------------------------------ whole tensors

    def _replace(self, part: AdapterTensor) -> None:
        """A whole tensor of the adapter (modules_to_save, biases, resized embeddings) replaces BASE's."""
        info, target = part.info, self._find(part.target)
        if target is None:
            self.homeless.append(info.name)
        elif target in self.made:
            self.unfit.append(f"{shown(info.name)}: {shown(target)} has another value in the adapter already")
        elif 0 in info.shape and 0 not in self._info(target).shape:
            self.unfit.append(f"{shown(info.name)}: is empty; {_ZERO_3}")
        else:
            own = target if target in self.base.tensors or self.ends.tie is None else self.ends.tie.embedding
            old = self.base.tensors[own]
            if old.dtype != info.dtype and not {old.dtype, info.dtype} <= FLOAT_DTYPES:
                self.unfit.append(f"{shown(info.name)}: is {info.dtype}, {shown(target)} is {old.dtype}")
            if old.shape != info.shape:
                self.notices.append(
                    f"{self.name}: {shown(target)} is {list(info.shape)} there, {list(old.shape)} in {self.base.name}. "
                    "Side files are that model's; vocab_size in config.json follows."
                )
            source = part.source
            assert isinstance(source, FileTensor | StridedTensor)  # a file of weights has only these
            written_as = self.base.stored_dtype(own)
            self.made[target] = replace(source, info=replace(info, name=target), written_as=written_as)

    # ------------------------------------------------------------------------------------ factors

    def _layer(self, module: str, factors: Mapping[str, AdapterTensor]) -> _Layer | None:
        is_embedding = "lora_embedding_A" in factors or "lora_embedding_B" in factors
        keys = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        target = self._find(f"{module}.weight")
        if target is None:
            self.homeless += [part.name for part in factors.values()]
            return None
        if lacking := [key for key in keys if key not in factors]:
            self.unfit.append(f"{shown(module)}: has no {', '.join(lacking)}")
            return None
        if self.settings.rescales != (MAGNITUDE in factors) or (self.settings.rescales and "lora_B.bias" in factors):
            self.unfit.append(f"{shown(module)}: {self._why_not_rescaled(factors)}")
            return None
        a, b, w = factors[keys[0]].info, factors[keys[1]].info, self._info(target)
        is_odd = {a.dtype, b.dtype, w.dtype} - FLOAT_DTYPES
        ways = tuple(way for way in (False, True) if _fits(w.shape, a.shape, b.shape, transposed=way))
        ways = tuple(way for way in ways if way or not is_embedding)
        rank = self.settings.rank_of(module)
        if not ways or is_odd or a.shape[0] != rank:
            hint = f"; {_ZERO_3}" if (0,) in (a.shape, b.shape) else ""
            what = f"A {list(a.shape)} {a.dtype} and B {list(b.shape)} {b.dtype}, of rank {rank} by {CONFIG}"
            self.unfit.append(f"{shown(module)}: {what}, do not fit {shown(target)} {list(w.shape)} {w.dtype}{hint}")
            return None
        magnitude = factors.get(MAGNITUDE)
        if magnitude is not None and not (magnitude.info.numel == b.shape[0] and magnitude.info.dtype in FLOAT_DTYPES):
            what = f"{list(magnitude.info.shape)} {magnitude.info.dtype}"
            self.unfit.append(f"{shown(magnitude.name)}: is {what}, expected {b.shape[0]:,} numbers")
            return None
        return _Layer(
            module=module,
            target=target,
            a=factors[keys[0]],
            b=factors[keys[1]],
            ways=(True,) if is_embedding else ways,
            magnitude=magnitude,
        )

    def _why_not_rescaled(self, factors: Mapping[str, AdapterTensor]) -> str:
        if not self.settings.rescales:
            return f"has {MAGNITUDE}, but use_dora in {CONFIG} is false"
        return f"has no {MAGNITUDE}" if MAGNITUDE not in factors else "has lora_B.bias, which DoRA does not use"

    def _is_transposed(self, layers: Sequence[_Layer]) -> bool:
        """Whether products for square layers are transposed: as fan_in_fan_out says, unless the other layers' shapes
        contradict it."""
        default = self.settings.transposed
        seen = {layer.ways[0] for layer in layers if len(layer.ways) == 1 and layer.a.name.endswith(".weight")}
        square = [layer.module for layer in layers if len(layer.ways) == 2]
        denied = seen == {False} if default else True in seen
        if square and denied:
            self.unfit.append(
                f"{shown(square[0])}: is square, and fan_in_fan_out in {CONFIG} says {str(default).lower()} while "
                "other layers' shapes deny it; correct it there"
            )
        return default

    def _add(self, layer: _Layer, default: bool) -> None:
        transposed = layer.ways[0] if len(layer.ways) == 1 else default
        a, b, rank = layer.a.source, layer.b.source, layer.a.info.shape[0]
        inner = Factor(a, rank, a.info.numel // rank, by_rank=True)
        outer = Factor(b, rank, b.info.shape[0], by_rank=False)
        left, right = (inner, outer) if transposed else (outer, inner)
        self._make(layer.target, left, right, self.settings.scale_of(layer.module))
        if layer.magnitude is not None:
            direction = self.made[layer.target]
            assert isinstance(direction, LowRankTensor)
            factors = Factors(direction, layer.magnitude.source, of_rows=not transposed)
            self.made[layer.target] = RescaledTensor(info=direction.info, factors=factors)

    def _add_experts(self, stem: str, levels: list[dict[str, AdapterTensor]]) -> None:
        try:
            experts = dict(match_experts(self.base, self.names, self.settings, stem, levels))
        except ValueError as e:
            self.unfit.append(f"{shown(stem)}: {e}")
            return
        if twice := experts.keys() & self.made.keys():
            self.unfit.append(f"{shown(stem)}: {listed(twice)} has another value in the adapter already")
        self.made |= experts

    def _replace_rows(self, module: str, part: AdapterTensor, *, with_factors: bool) -> None:
        """Rows of some tokens, in place of the embedding's or head's."""
        target, tokens = self._find(f"{module}.weight"), self.settings.tokens_of(module)
        if target is None:
            self.homeless.append(part.name)
            return
        w, new = self._info(target), part.info
        if tokens is None:
            self.unfit.append(f"{shown(part.name)}: {CONFIG} does not name the tokens of its rows")
        elif with_factors:
            self.unfit.append(f"{shown(module)}: has both factors and rows of tokens; what peft computes is not read")
        elif len(w.shape) != 2 or new.shape != (len(tokens), w.shape[1]) or not {w.dtype, new.dtype} <= FLOAT_DTYPES:
            what = f"{list(new.shape)} {new.dtype}, for {counted(len(tokens), 'token')}"
            self.unfit.append(f"{shown(part.name)}: {what}, does not fit {shown(target)} {list(w.shape)} {w.dtype}")
        elif tokens and max(tokens) >= w.shape[0]:
            self.unfit.append(f"{shown(part.name)}: token {max(tokens):,} is beyond the {w.shape[0]:,} rows there")
        else:
            dtype = w.dtype if w.dtype == new.dtype else "F64" if "F64" in (w.dtype, new.dtype) else "F32"
            self.made[target] = TokenRows(
                info=TensorInfo(target, dtype, w.shape, 0),
                base=self._source(target),
                rows=part.source,
                places={token: place for place, token in enumerate(tokens)},
                also_read=(self.settings.file,),
            )

    def _add_bias(self, module: str, part: AdapterTensor) -> None:
        bias = part.info
        target = self.names.find(f"{module}.bias")
        if target is None:
            self.homeless.append(bias.name)
        elif self._info(target).shape != bias.shape or not {bias.dtype, self._info(target).dtype} <= FLOAT_DTYPES:
            self.unfit.append(f"{shown(bias.name)}: {list(bias.shape)} {bias.dtype} does not fit {shown(target)}")
        else:
            left = Factor(part.source, 1, bias.numel, by_rank=True)
            self._make(target, left, Factor(None, 1, 1, by_rank=True), self.settings.scale_of(module))

    def _make(self, target: str, left: Factor, right: Factor, scale: float) -> None:
        w = self._info(target)
        info = TensorInfo(target, "F64" if w.dtype == "F64" else "F32", w.shape, 0)
        self.made[target] = LowRankTensor(
            info=info, base=self._source(target), left=left, right=right, scale=scale, also_read=(self.settings.file,)
        )


def _parse_names(weights: Sequence[Checkpoint]) -> list[AdapterTensor]:
    """The tensors of all files. What was trained beside the adapter may repeat the modules that it saves whole."""
    own, *others = (
        [parse_name(checkpoint.source(name)) for name in sorted(checkpoint.tensors)] for checkpoint in weights
    )
    whole = {part.target for part in own if not part.is_factor}
    beside = [part for parts in others for part in parts]
    return own + [part for part in beside if ".modules_to_save." not in part.name or part.target not in whole]


def _fits(w: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *, transposed: bool) -> bool:
    """Whether B A (for convolutions: kernel by kernel), or if `transposed` its transpose, has the shape of W."""
    if len(a) < 2 or len(b) != len(a) or a[0] != b[1] or 0 in (*a, *b) or any(n != 1 for n in b[2:]):
        return False
    return w == ((a[1], b[0]) if transposed else (b[0], *a[1:])) and (not transposed or len(a) == 2)
