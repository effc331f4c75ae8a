"""LoRA files of image models, as kohya's tools and diffusers write them: a model and such a file -> one Checkpoint.

Names say the component and its module (lora_unet_down_blocks_0_..., unet.down_blocks.0....), alpha lies beside the
factors or in the file's metadata. Each change for a component that the model has must find its place there; changes for
other components are told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from merge_tool.arrays import FLOAT_DTYPES, NUMPY_DTYPES, Array, decode
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint, open_local, open_one_file
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import CheckpointError, MismatchError, counted, listed, shown
from merge_tool.models.experts import Pieces
from merge_tool.models.image_names import Place, Places, find_places
from merge_tool.models.lora_config import adapter_prefix, by_pattern
from merge_tool.models.low_rank import Factor, LowRankTensor
from merge_tool.models.rescaled import Factors, RescaledTensor

FILE = "pytorch_lora_weights.safetensors"  # what diffusers calls it in a folder
_ENDS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}  # fmt: skip
_REFUSED = (  # what is no product of two factors, or not of these alone
    (re.compile(r"\.hada_"), "LoHa"), (re.compile(r"\.lokr_"), "LoKr"), (re.compile(r"\.oft_"), "OFT"),
    (re.compile(r"\.lora_mid\."), "LoCon with a core"), (re.compile(r"\.dora_scale$"), "DoRA of LyCORIS"),
    (re.compile(r"\.lora_B\.bias$|\.lora_up\.bias$"), "biases of LoRA"), (re.compile(r"\.diff(_b)?$"), "differences"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"), (re.compile(r"\.[wb]_norm$"), "norms"),
    (re.compile(r"\.on_input$"), "IA3"), (re.compile(r"\.scalar$"), "trained scales"),
)  # fmt: skip
_KOHYA = re.compile(r"lora_(unet|transformer|te[123]?)_([^.]+)")
_DOTTED = re.compile(r"(?:base_model\.model\.)?(unet|transformer|diffusion_model|text_encoder(?:_[23])?)\.(.+)")
_COMPONENTS = {"": "unet", "transformer": "unet", "diffusion_model": "unet", "te": "te1", "text_encoder": "te1",
               "text_encoder_2": "te2", "text_encoder_3": "te3"}  # fmt: skip
_IN_WORDS = {"unet": "the UNet or transformer", "te1": "the first text encoder", "te2": "the second text encoder",
             "te3": "the third text encoder"}  # fmt: skip


_Fits = Mapping[str, Mapping[str, Place]]  # by component and module


@dataclass(slots=True)
class _Change:
    """The tensors of one module's change, by kind. `module` is its name there, `flat` that with _ for dots."""

    word: str  # the component, as the file calls it
    module: str
    parts: dict[str, TensorSource] = field(default_factory=dict)

    @property
    def component(self) -> str:
        return _COMPONENTS.get(self.word, self.word)

    @property
    def flat(self) -> str:
        return self.module.replace(".", "_")

    @property
    def rank(self) -> int:
        return self.parts["down"].info.shape[0]


def is_lora_file(file: Checkpoint) -> bool:
    """Whether a file holds nothing but factors and what belongs to them."""
    return all(_kind(name) or _refused(name) for name in file.tensors)


def find_lora_file(path: Path) -> Path | None:
    """The LoRA file that a path means: the file itself, or diffusers' own in a folder that has no other weights."""
    if path.is_file():
        return path
    return path / FILE if path.is_dir() and (path / FILE).is_file() else None


def open_lora_file(path: Path, name: str, max_header_bytes: int) -> Checkpoint:
    """The file of factors. Raises CheckpointError for a file that holds anything else."""
    if path.name == FILE:
        file = open_one_file(Folder(path.parent, name), FILE, max_header_bytes=max_header_bytes)
    else:
        file = open_local(path, {}, name=name, max_header_bytes=max_header_bytes, mergeable=False)
    if not is_lora_file(file):
        odd = sorted(name for name in file.tensors if not (_kind(name) or _refused(name)))
        raise CheckpointError(
            f"{file.name}: is no LoRA file of an image model: it has {listed(odd)}. Behind the + stands an adapter's "
            "folder, or a file of kohya's or diffusers' LoRA."
        )
    return file


def _kind(name: str) -> str | None:
    return next((kind for end, kind in _ENDS.items() if name.endswith(end)), None)


def _refused(name: str) -> str | None:
    return next((what for pattern, what in _REFUSED if pattern.search(name)), None)


def apply_file(base: Checkpoint, file: Checkpoint) -> Checkpoint:
    """`base` with the changes of a LoRA file. Raises MismatchError with all that have no place or do not fit."""
    changes = _changes(file)
    scales = _Scales(file)
    places = find_places(base.tensors)
    by_component: dict[str, list[_Change]] = {}
    for change in changes:
        by_component.setdefault(change.component, []).append(change)
    fits = {
        part: {change.module: place for change in group if (place := _place(base, places, part, change))}
        for part, group in by_component.items()
    }
    whole = [part for part, group in by_component.items() if len(fits[part]) == len(group)]
    problems = [*_homeless(places, by_component, fits, whole), *_twice(fits, whole)]
    if places.is_one and len(whole) > 1:
        problems.append(f"{listed(whole)} would all fit: which of them {base.name} is cannot be told")
    if problems:
        raise MismatchError(
            f"{file.name} is not a LoRA of {base.name}, or its names do not say clearly where it belongs.\n  "
            + "\n  ".join(problems)
            + "\nGive the component's folder or file that it was made for; or load both with diffusers (fuse_lora), "
            "save that, and give it."
        )
    made: dict[str, TensorSource] = {}
    thirds: dict[str, dict[int, LowRankTensor]] = {}
    for part in whole:
        for change in by_component[part]:
            place = fits[part][change.module]
            if place.third is not None:
                thirds.setdefault(place.tensor, {})[place.third] = _third(base, place, change, scales.of(change))
            else:
                made[place.tensor] = _changed(base.source(place.tensor), change, scales.of(change))
    made |= {name: _joined(base.source(name), parts) for name, parts in thirds.items()}
    prefix = adapter_prefix(base)
    files = tuple(replace(one, file_name=f"{prefix}/{Path(one.file_name).name}") for one in file.files)
    notices = (*base.notices, *file.notices, *_notices(base, file, by_component, whole))
    return base.with_made(f"{base.name}+{file.name}", files, made, notices)


def _notices(
    base: Checkpoint, file: Checkpoint, by_component: Mapping[str, list[_Change]], whole: list[str]
) -> Iterator[str]:
    for part, group in by_component.items():
        if part not in whole:
            yield (
                f"{file.name}: {counted(len(group), 'change')} for {_IN_WORDS[part]} ({shown(group[0].module)} and so "
                f"on) belong to another component than {base.name}. Merge the file into that, too."
            )


def _homeless(
    places: Places, by_component: Mapping[str, list[_Change]], fits: _Fits, whole: Sequence[str]
) -> Iterator[str]:
    """The changes that belong to the model and have no place there."""
    for part, group in by_component.items():
        if part in whole:
            continue
        named = any(places.find(part, change.flat) for change in group)
        if places.is_one:  # two text encoders have the same names, and other shapes
            is_elsewhere = bool(whole) and (not named or whole[0].startswith("te"))
        else:
            is_elsewhere = part not in places.of
        if not is_elsewhere:
            lacking = [change.module for change in group if change.module not in fits[part]]
            what = "no place, or another shape, for" if named else "no place for"
            yield f"{what} {counted(len(lacking), 'module')} of {_IN_WORDS[part]}: {listed(lacking, 20)}"
    if not whole and not places.is_one and not by_component.keys() & places.of.keys():
        yield "it changes other components only"


def _twice(fits: _Fits, whole: Sequence[str]) -> Iterator[str]:
    targets: dict[Place, str] = {}
    for part in whole:
        for module, place in fits[part].items():
            if place in targets:
                yield f"{shown(module)} and {shown(targets[place])} both change {shown(place.tensor)}"
            targets[place] = module


# ------------------------------------------------------------------------------------------- the file


def _changes(file: Checkpoint) -> list[_Change]:
    """The changes of all modules. Raises MismatchError for what is no product of two factors."""
    changes: dict[tuple[str, str], _Change] = {}
    odd: dict[str, str] = {}
    for name in sorted(file.tensors):
        if (kind := _kind(name)) is None:
            odd.setdefault(_refused(name) or "tensors of another kind", name)
            continue
        end = next(end for end, kind in _ENDS.items() if name.endswith(end))
        word, module = _split(name.removesuffix(end))
        change = changes.setdefault((word, module), _Change(word, module))
        if kind in change.parts:
            raise MismatchError(f"{file.name}: has two factors of one kind for {shown(module)}: {shown(name)}.")
        change.parts[kind] = file.source(name)
    if odd:
        found = listed(f"{what} ({shown(name)})" for what, name in odd.items())
        raise MismatchError(
            f"{file.name}: has {found}; only products of two factors (LoRA) are read. Load it with diffusers or "
            "kohya's tools, merge it there, and give that model."
        )
    for change in changes.values():
        _check(file, change)
    return list(changes.values())


def _check(file: Checkpoint, change: _Change) -> None:
    if lacking := {"down", "up"} - change.parts.keys():
        raise MismatchError(f"{file.name}: {shown(change.module)} has no {' and '.join(sorted(lacking))} factor.")
    down, up = (change.parts[kind].info for kind in ("down", "up"))
    fit = min(len(down.shape), len(up.shape)) >= 2 and down.shape[0] == up.shape[1] and 0 not in down.shape + up.shape
    are_floats = {part.info.dtype for part in change.parts.values()} <= FLOAT_DTYPES
    if not fit or not are_floats or any(n != 1 for n in up.shape[2:]):
        raise MismatchError(
            f"{file.name}: {shown(change.module)} has factors {list(down.shape)} {down.dtype} and {list(up.shape)} "
            f"{up.dtype}, which have no product."
        )


def _split(stem: str) -> tuple[str, str]:
    """(the component's word, the module) of the name of a change."""
    if found := _KOHYA.fullmatch(stem):
        return found[1], found[2]
    word, module = (found[1], found[2]) if (found := _DOTTED.fullmatch(stem)) else ("", stem)
    module = module.replace(".processor.", ".")
    return word, f"{module}.0" if module.endswith(".to_out") else module


class _Scales:
    """alpha / rank of each change: alpha beside the factors, else in diffusers' metadata, else the rank."""

    def __init__(self, file: Checkpoint) -> None:
        self.name = file.name
        try:
            found = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            found = {}
        self.settings: Mapping[str, Any] = found if isinstance(found, dict) else {}

    def of(self, change: _Change) -> float:
        if (alpha := change.parts.get("alpha")) is not None:
            return _value(alpha) / change.rank
        if not change.word:
            raise MismatchError(
                f"{self.name}: {shown(change.module)} has no alpha, and its name no component (unet., transformer. and "
                "so on): by what the change is multiplied is not known. If the file is peft's, give its folder with "
                "adapter_config.json."
            )
        settings = {k.partition(".")[2]: v for k, v in self.settings.items() if k.partition(".")[0] == change.word}
        value = by_pattern(settings.get("alpha_pattern") or {}, change.module, settings.get("lora_alpha", change.rank))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{shown(change.module)}: lora_alpha in the file's metadata is '{shown(value)}'.")
        return float(value) / (math.sqrt(change.rank) if settings.get("use_rslora") else change.rank)


def _value(source: TensorSource) -> float:
    """The only element of a tensor. Raises CheckpointError if it has several, or one that is not finite."""
    stored: Array = np.empty(1, NUMPY_DTYPES[source.info.dtype])
    if source.info.numel == 1:
        source.acquire()
        try:
            source.read_into(0, stored)
        finally:
            source.release()
        if math.isfinite(value := float(decode(stored, np.empty(1))[0])):
            return value
    raise CheckpointError(f"{shown(source.info.name)}: is no finite number.")


# ----------------------------------------------------------------------------------------- the sums


def _place(base: Checkpoint, places: Places, part: str, change: _Change) -> Place | None:
    """The place of a change, if its shape fits there."""
    place = places.find(part, change.flat)
    if place is None:
        return None
    w, down, up = base.tensors[place.tensor], change.parts["down"].info.shape, change.parts["up"].info.shape
    shape = w.shape if place.third is None else (w.shape[0] // 3, *w.shape[1:])
    magnitude = change.parts.get("magnitude")
    if magnitude is not None and (place.third is not None or magnitude.info.numel != up[0]):
        return None
    return place if _stripped(shape) == _stripped((up[0], *down[1:])) and w.dtype in FLOAT_DTYPES else None


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones of a convolution's 1x1 kernel, which the same layer has not where it is linear."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def _changed(base: TensorSource, change: _Change, scale: float) -> TensorSource:
    down, up = change.parts["down"], change.parts["up"]
    dtype = "F64" if base.info.dtype == "F64" else "F32"
    tensor = LowRankTensor(
        info=TensorInfo(base.info.name, dtype, base.info.shape, 0),
        base=base,
        left=Factor(up, change.rank, up.info.shape[0], by_rank=False),
        right=Factor(down, change.rank, down.info.numel // change.rank, by_rank=True),
        scale=scale,
    )
    if (magnitude := change.parts.get("magnitude")) is None:
        return tensor
    return RescaledTensor(info=tensor.info, factors=Factors(tensor, magnitude, of_rows=True))


def _third(base: Checkpoint, place: Place, change: _Change, scale: float) -> LowRankTensor:
    """One part of the rows of a tensor, with its change."""
    assert place.third is not None
    source = base.source(place.tensor)
    rows, columns = source.info.shape[0] // 3, source.info.shape[1]
    info = TensorInfo(place.tensor, source.info.dtype, (rows, columns), 0)
    part = Pieces(info, ((source, place.third * rows * columns, rows * columns),))
    changed = _changed(part, change, scale)
    assert isinstance(changed, LowRankTensor)
    return changed


def _joined(base: TensorSource, parts: Mapping[int, LowRankTensor]) -> TensorSource:
    """The tensor of three parts, of which some have a change."""
    size, some = base.info.numel // 3, next(iter(parts.values()))
    info = replace(some.info, shape=base.info.shape)
    stored = TensorInfo(base.info.name, base.info.dtype, some.info.shape, 0)
    plain = [replace(some, base=Pieces(stored, ((base, k * size, size),)), scale=0.0) for k in range(3)]
    return Pieces(info, tuple((parts.get(k, plain[k]), 0, size) for k in range(3)))
