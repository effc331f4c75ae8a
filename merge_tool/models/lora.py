"""PEFT LoRA adapters: a model and an adapter folder -> one Checkpoint, whose tensors are computed as they are read.

`MODEL+ADAPTER` names such a model; an adapter folder alone, as FT, is applied to BASE. An adapter's configuration and
names are checked here, before a weight is read; low_rank computes the sums. An adapter whose effect is not W + scale *
B A is refused by name: applied in part, it would be another model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_tool.arrays import FLOAT_DTYPES
from merge_tool.checkpoint.folder import ADAPTER_WEIGHTS, Folder, distinct_names, meant_path
from merge_tool.checkpoint.header import MAX_HEADER_BYTES, TensorInfo
from merge_tool.checkpoint.hub import hub_id, local_path
from merge_tool.checkpoint.reader import Checkpoint, CheckpointFile, FileTensor, open_local, open_one_file
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.checkpoint.strided import StridedTensor
from merge_tool.errors import CheckpointError, MismatchError, counted, listed, reason, shown
from merge_tool.models.heads import renamed, untied_config
from merge_tool.models.lora_config import CONFIG, Settings, read_settings
from merge_tool.models.lora_ends import ends_notice, find_ends
from merge_tool.models.lora_names import AdapterTensor, parse_name
from merge_tool.models.low_rank import Factor, LowRankTensor
from merge_tool.models.renaming import Names

Coming = Mapping[Path, Mapping[str, ByteSource]]  # by folder, the weights that are still to be fetched
NOTHING: Coming = {}

_AND_SAVE = "(merge_and_unload, then save_pretrained)"


# ---------------------------------------------------------------------------------------------- names


def parts(ref: str | Path) -> tuple[str, ...]:
    """A model and the adapters that follow it: `MODEL+ADAPTER` is two parts. A path that exists is one part, even with
    a + in its name. Texts, because their form says whether they are local: a Path has no `./` and no last `/`."""
    text = str(ref)
    if os.path.lexists(text):
        return (text,)
    for plus in reversed([match.start() for match in re.finditer(r"\+", text)]):
        model, adapter = text[:plus], text[plus + 1 :]
        if _may_exist(adapter) and _may_exist((before := parts(model))[0]) and _may_exist(before[-1]):
            return (*before, adapter)
    return (text,)


def _may_exist(ref: str | Path) -> bool:
    return str(ref) != "" and (os.path.lexists(ref) or hub_id(ref) is not None)


def known_parts(ref: str | Path) -> tuple[str, ...]:
    """As `parts`. Raises CheckpointError for a name with a + that is neither one existing path nor several."""
    paths = parts(ref)
    if len(paths) == 1 and "+" in str(ref) and not _may_exist(ref):
        raise CheckpointError(
            f"{shown(ref)}: no such file or folder, and no MODEL+ADAPTER whose parts exist.{meant_path(lacking(ref))}"
        )
    return paths


def lacking(ref: str | Path) -> str:
    """The first part of a MODEL+ADAPTER that is not there; the whole text if all are."""
    return next((part for part in str(ref).split("+") if part and not _may_exist(part)), str(ref))


def local_parts(ref: str | Path) -> tuple[Path, ...]:
    """As `parts`; fetches models and adapters of the Hub. Raises FetchError."""
    return tuple(local_path(part) for part in known_parts(ref))


def is_adapter(path: Path, coming: Coming = NOTHING) -> bool:
    """Whether a folder holds an adapter and no model."""
    names = ("model.safetensors", "model.safetensors.index.json")
    have = coming.get(path, {})
    has_config = os.path.isfile(path / CONFIG)  # noqa: PTH113 - which raises where a name is too long
    return has_config and not any(name in have or os.path.lexists(path / name) for name in names)


# ---------------------------------------------------------------------------------------------- opening


def open_model(
    ref: str | Path,
    *,
    coming: Coming = NOTHING,
    max_header_bytes: int = MAX_HEADER_BYTES,
    mergeable: bool = True,
    as_stored: bool = False,
    names: Mapping[Path, str] | None = None,
) -> Checkpoint:
    """As open_checkpoint, for `MODEL+ADAPTER`, too. `coming` has by name the weights that are still to be fetched;
    `names` how models and adapters are called in messages, where that is not by their folder's name."""
    model, *adapters = local_parts(ref)
    if adapters and is_adapter(model, coming):
        raise CheckpointError(f"{shown(model.name)}: is an adapter, expected a model before the +: MODEL+ADAPTER.")
    as_stored = as_stored and not adapters
    have, names = coming.get(model, {}), names or distinct_names((model, *adapters))
    checkpoint = open_local(
        model,
        have,
        name=names.get(model, ""),
        max_header_bytes=max_header_bytes,
        mergeable=mergeable,
        as_stored=as_stored,
    )
    for adapter in adapters:
        checkpoint = apply_adapter(checkpoint, adapter, name=names.get(adapter, ""), max_header_bytes=max_header_bytes)
    return checkpoint


def open_models(
    refs: Sequence[str | Path],
    *,
    coming: Coming = NOTHING,
    max_header_bytes: int = MAX_HEADER_BYTES,
    mergeable: bool = True,
) -> list[Checkpoint]:
    """BASE and the others; an adapter folder alone is applied to BASE. If all are adapter folders, they are opened as
    adapters."""
    paths = [local_parts(ref) for ref in refs]
    names = distinct_names(path for several in paths for path in several)
    alone = [len(path) == 1 and is_adapter(path[0], coming) for path in paths]
    files = [len(path) == 1 and path[0].is_file() and path[0].name in ADAPTER_WEIGHTS for path in paths]
    if any(files) and not all(files):  # two files of adapters are merged like any two files
        file = paths[files.index(True)][0]
        raise CheckpointError(f"{shown(file)}: is the file of an adapter. Give its folder: {shown(file.parent)}.")
    if alone[0] and not all(alone):
        other = shown(names[paths[alone.index(False)][0]])
        raise CheckpointError(
            f"{shown(names[paths[0][0]])}: BASE is an adapter, but {other} is a model. Give MODEL+ADAPTER for BASE."
        )
    models: list[Checkpoint] = []
    for ref, path, is_alone in zip(refs, paths, alone, strict=True):
        if is_alone and not alone[0]:
            models.append(apply_adapter(models[0], path[0], name=names[path[0]], max_header_bytes=max_header_bytes))
        else:
            models.append(
                open_model(ref, coming=coming, max_header_bytes=max_header_bytes, mergeable=mergeable, names=names)
            )
    if alone[0]:
        notice = (
            f"{' and '.join(model.name for model in models)} are adapters: their factors are merged one by one, which "
        )
        notice += "is not the merge of the models. To merge the models, give MODEL+ADAPTER for each."
        models[0] = models[0].with_notices((*models[0].notices, notice))
    _drop_repeated(models)
    return models


def _drop_repeated(models: list[Checkpoint]) -> None:
    """Drop warnings that an earlier model has already given: two inputs may share a base or an adapter."""
    seen: set[str] = set()
    for k, model in enumerate(models):
        if not seen.isdisjoint(model.notices):
            models[k] = model.with_notices(tuple(notice for notice in model.notices if notice not in seen))
        seen.update(model.notices)


def apply_adapter(
    base: Checkpoint, path: Path, *, name: str = "", max_header_bytes: int = MAX_HEADER_BYTES
) -> Checkpoint:
    """`base` with the adapter of the folder at `path`.

    Raises CheckpointError for a folder that is no LoRA adapter or cannot be merged, MismatchError with every tensor of
    the adapter that does not fit `base`.
    """
    try:
        folder = Folder(path, name)
        settings = read_settings(folder)
        weights = open_one_file(folder, settings.weights, max_header_bytes=max_header_bytes)
    except OSError as e:
        raise CheckpointError(f"{shown(path)}: cannot be read ({reason(e)}).") from e
    if not weights.tensors:
        raise CheckpointError(f"{weights.name}: holds no tensors.")
    matched = _Matcher(base, folder.name, settings, weights)
    matched.match()
    prefix = "adapter"
    while any(file.file_name == f"{prefix}/{CONFIG}" for file in base.files):
        prefix += "+"  # one adapter upon another
    files = (
        replace(weights.files[0], file_name=f"{prefix}/{settings.weights}"),
        CheckpointFile(f"{prefix}/{CONFIG}", settings.file, settings.sha256),
    )
    notices = (*base.notices, *weights.notices, *_notices(base, folder, settings), *matched.notices)
    brought = folder if folder.has("tokenizer.json") else None
    config = untied_config(base.config) if matched.ends.head is not None and base.config is not None else None
    return base.with_made(f"{base.name}+{folder.name}", files, matched.made, notices, brought, config)


def _notices(base: Checkpoint, folder: Folder, settings: Settings) -> Iterator[str]:
    trained_on = settings.base_name
    if trained_on and trained_on.rstrip("/").rpartition("/")[2].lower() != base.name.rpartition("/")[2].lower():
        yield f"{folder.name} was trained on {shown(trained_on)}, says its {CONFIG}; it is applied to {base.name}."
    if settings.unknown:
        yield f"{folder.name}/{CONFIG}: settings that are not known here are ignored: {listed(settings.unknown)}."


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Layer:
    """The factors of one layer, and the tensor that they change, seen as a matrix with as many rows as its first
    dimension."""

    module: str
    target: str
    a: TensorInfo
    b: TensorInfo
    ways: tuple[bool, ...]  # whether the product may be transposed: the ways that the shapes allow


class _Matcher:
    """Every tensor of the adapter, and the tensor of BASE that it changes or replaces."""

    def __init__(self, base: Checkpoint, name: str, settings: Settings, weights: Checkpoint) -> None:
        self.base, self.name, self.settings, self.weights = base, name, settings, weights
        self.names = Names(base.tensors)
        self.tensors = [parse_name(info) for _, info in sorted(weights.tensors.items())]
        self.ends = find_ends(base, self.names, settings, self.tensors)
        self.made: dict[str, TensorSource] = {}
        self.notices: list[str] = []
        self.homeless: list[str] = []
        self.unfit: list[str] = []

    def match(self) -> None:
        """Fill `made`. Raises MismatchError with all tensors that BASE lacks or that do not fit there."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        for part in self.tensors:
            if part.module in self.ends.skipped:
                continue
            if part.is_factor:
                modules.setdefault(part.module, {})[part.factor] = part.info
            else:
                self._replace(part)
        self._begin_head()
        layers = [layer for module, factors in modules.items() if (layer := self._layer(module, factors))]
        default = self._is_transposed(layers)
        for layer in layers:
            self._add(layer, default)
        for module, factors in modules.items():
            if bias := factors.get("lora_B.bias"):
                self._add_bias(module, bias)
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
        if target is None or target in self.made:
            self.homeless.append(info.name)
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
            source = self.weights.source(info.name)
            assert isinstance(source, FileTensor | StridedTensor)  # a file of weights has only these
            written_as = self.base.stored_dtype(own)
            self.made[target] = replace(source, info=replace(info, name=target), written_as=written_as)

    # ------------------------------------------------------------------------------------ factors

    def _layer(self, module: str, factors: Mapping[str, TensorInfo]) -> _Layer | None:
        is_embedding = "lora_embedding_A" in factors or "lora_embedding_B" in factors
        keys = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        target = self._find(f"{module}.weight")
        if target is None:
            self.homeless += [info.name for info in factors.values()]
            return None
        if lacking := [key for key in keys if key not in factors]:
            self.unfit.append(f"{shown(module)}: has no {', '.join(lacking)}")
            return None
        a, b, w = factors[keys[0]], factors[keys[1]], self._info(target)
        is_odd = {a.dtype, b.dtype, w.dtype} - FLOAT_DTYPES
        ways = tuple(way for way in (False, True) if _fits(w.shape, a.shape, b.shape, transposed=way))
        ways = tuple(way for way in ways if way or not is_embedding)
        rank = self.settings.rank_of(module)
        if not ways or is_odd or a.shape[0] != rank:
            what = f"A {list(a.shape)} {a.dtype} and B {list(b.shape)} {b.dtype}, of rank {rank} by {CONFIG}"
            self.unfit.append(f"{shown(module)}: {what}, do not fit {shown(target)} {list(w.shape)} {w.dtype}")
            return None
        return _Layer(module=module, target=target, a=a, b=b, ways=(True,) if is_embedding else ways)

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
        rank = layer.a.shape[0]
        a, b = (self.weights.source(info.name) for info in (layer.a, layer.b))
        inner = Factor(a, rank, layer.a.numel // rank, by_rank=True)
        outer = Factor(b, rank, layer.b.shape[0], by_rank=False)
        left, right = (inner, outer) if transposed else (outer, inner)
        self._make(layer.target, left, right, self.settings.scale_of(layer.module))

    def _add_bias(self, module: str, bias: TensorInfo) -> None:
        target = self.names.find(f"{module}.bias")
        if target is None:
            self.homeless.append(bias.name)
        elif self._info(target).shape != bias.shape or not {bias.dtype, self._info(target).dtype} <= FLOAT_DTYPES:
            self.unfit.append(f"{shown(bias.name)}: {list(bias.shape)} {bias.dtype} does not fit {shown(target)}")
        else:
            left = Factor(self.weights.source(bias.name), 1, bias.numel, by_rank=True)
            self._make(target, left, Factor(None, 1, 1, by_rank=True), self.settings.scale_of(module))

    def _make(self, target: str, left: Factor, right: Factor, scale: float) -> None:
        w = self._info(target)
        info = TensorInfo(target, "F64" if w.dtype == "F64" else "F32", w.shape, 0)
        self.made[target] = LowRankTensor(
            info=info, base=self._source(target), left=left, right=right, scale=scale, also_read=(self.settings.file,)
        )


def _fits(w: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *, transposed: bool) -> bool:
    """Whether B A (for convolutions: kernel by kernel), or if `transposed` its transpose, has the shape of W."""
    if len(a) < 2 or len(b) != len(a) or a[0] != b[1] or 0 in (*a, *b) or any(n != 1 for n in b[2:]):
        return False
    return w == ((a[1], b[0]) if transposed else (b[0], *a[1:])) and (not transposed or len(a) == 2)
