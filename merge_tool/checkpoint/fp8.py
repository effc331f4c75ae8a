"""8-bit floats with scales, as in DeepSeek-V3 and compressed-tensors, read as real values while the merge streams.

A weight is codes (F8_E4M3) times scales; a scale belongs to the whole tensor, a row, or a block of rows and columns.
Only the scales of the rows being read are in memory. A checkpoint is refused if names, shapes and config are ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from merge_tool.arrays import FLOAT8_DTYPES, FLOAT8_TABLES, SCALE_DTYPES, Array
from merge_tool.checkpoint.grid import Grid
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import ByteSource, TensorSource
from merge_tool.checkpoint.sub_configs import is_sub_config, sub_configs
from merge_tool.errors import CheckpointError, counted, listed, shown

SCALES = ("_scale_inv", "_scale")  # suffixes that make the name of the scales from the weight's name
ACTIVATION_SCALES = (".input_scale", ".output_scale", ".activation_scale", ".q_scale", ".k_scale", ".v_scale")
_USUAL_BLOCK = (128, 128)
_PIECE = 65_536  # elements decoded at a time


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A TensorSource: float32, the codes times their scales, each product rounded once."""

    info: TensorInfo
    codes: TensorSource
    scales: TensorSource
    grid: Grid

    @property
    def stored_dtype(self) -> str:
        return "BF16"

    @property
    def where(self) -> str:
        return self.codes.where

    @property
    def files(self) -> Sequence[ByteSource]:
        return (*self.codes.files, *(file for file in self.scales.files if file not in self.codes.files))

    def read_into(self, start: int, values: Array) -> None:
        table, codes = FLOAT8_TABLES[FLOAT8_DTYPES[self.codes.info.dtype]], np.empty(min(_PIECE, len(values)), np.uint8)
        for done in range(0, len(values), _PIECE):
            part = values[done : done + _PIECE]
            self.codes.read_into(start + done, codes[: len(part)])
            np.take(table, codes[: len(part)], out=part, mode="clip")
            self._scale(start + done, part)

    def _scale(self, start: int, values: Array) -> None:
        """Multiply the elements from `start` on with their scales."""
        for patch in self.grid.patches(start, start + len(values)):
            part = values[patch.cut].reshape(patch.shape)
            scales = self._read_scales(*patch.scale_rows)[:, patch.scales_cut[1]]
            with np.errstate(over="ignore", invalid="ignore"):  # the reader of the values refuses infinity and NaN
                part *= patch.spread(scales)

    def _read_scales(self, first: int, last: int) -> Array:
        columns = self.grid.scale_columns
        raw = np.empty((last - first) * columns, SCALE_DTYPES[self.scales.info.dtype])
        self.scales.read_into(first * columns, raw)
        return raw.astype(np.float32).reshape(last - first, columns)

    def acquire(self) -> None:
        self.codes.acquire()
        self.scales.acquire()

    def release(self) -> None:
        self.scales.release()
        self.codes.release()

    def prefetch(self, start: int, stop: int) -> None:
        self.codes.prefetch(start, stop)
        if start == 0:
            self.scales.prefetch(0, self.scales.info.numel)

    def forget(self, start: int, stop: int) -> None:
        self.codes.forget(start, stop)

    def extra_bytes(self, count: int) -> int:
        """Memory for a piece: its codes, their indices in the table, its scales in float32, the scales spread to all
        columns, and the index of each row's scales."""
        wide = 4 * self.grid.columns * (2 + _PIECE // self.grid.columns // self.grid.block[0])
        return 13 * min(count, _PIECE) + 2 * wide + 32 * (2 + min(count, _PIECE) // self.grid.columns)


# ------------------------------------------------------------------------------------------ what has scales


@dataclass(frozen=True, slots=True)
class Scaled:
    """Weights stored as 8-bit codes with scales. Their scales, and the scales of activations, are then not listed as
    tensors. `settings` is quantization_config.
    """

    made: Mapping[str, ScaledTensor]
    activations: Mapping[str, TensorSource]
    settings: Mapping[str, Any] | None

    @property
    def left_out(self) -> frozenset[str]:
        return frozenset({*(weight.scales.info.name for weight in self.made.values()), *self.activations})

    def notices(self, name: str) -> Iterator[str]:
        yield (
            f"{name}: {counted(len(self.made), 'weight is', 'weights are')} 8-bit floats with "
            "scales, read as real values."
        )
        if self.activations:
            yield (
                f"{name}: {len(self.activations):,} scales of activations are not merged (only an output in BASE's 8 "
                f"bits has any, BASE's): {listed(self.activations)}."
            )


def find_scaled(name: str, config: Mapping[str, Any] | None, sources: Mapping[str, TensorSource]) -> Scaled | None:
    """The scaled weights of the checkpoint called `name`; None if it has none or is in another quantised format.

    Raises CheckpointError where scales and codes do not fit each other.
    """
    settings = quantization_of(config)
    if settings is not None and not _is_readable(settings):
        return None
    weights = dict(_pairs(sources))
    if not weights:
        return None
    block = _block_of(name, settings)
    grids: dict[Grid, Grid] = {}  # thousands of weights share a few settings
    made = {
        weight: ScaledTensor(
            replace(sources[weight].info, dtype="F32", offset=0),
            sources[weight],
            sources[scales],
            grids.setdefault(grid := _grid(name, sources[weight].info, sources[scales].info, block), grid),
        )
        for weight, scales in weights.items()
    }
    if bare := [n for n, s in sources.items() if s.info.dtype in FLOAT8_DTYPES and n not in made]:
        raise CheckpointError(
            f"{name}: {counted(len(bare), 'tensor')} of 8-bit floats without scales, {len(made):,} with scales: "
            f"{listed(bare)}. "
            "Fetch it again, or merge the original weights."
        )
    return Scaled(made, {n: s for n, s in sources.items() if n.endswith(ACTIVATION_SCALES)}, settings)


def quantization_of(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The first quantization_config in a model's config.json: its own, or a part's."""
    for _, part in sub_configs(config or {}):
        if settings := part.get("quantization_config"):
            return settings if isinstance(settings, dict) else {}
    return None


def without_quantization(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """config.json for a checkpoint that is read as real values: no quantization_config."""
    if config is None:
        return None
    inner = {key: without_quantization(value) if is_sub_config(key, value) else value for key, value in config.items()}
    return {key: value for key, value in inner.items() if key != "quantization_config"}


def _is_readable(settings: Mapping[str, Any]) -> bool:
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return settings.get("format") in ("float-quantized", "naive-quantized")
    return method in ("fp8", "fbgemm_fp8")


def _pairs(sources: Mapping[str, TensorSource]) -> Iterator[tuple[str, str]]:
    """(weight, its scales), by their names and dtypes."""
    for scales, source in sources.items():
        weight = next((scales.removesuffix(end) for end in SCALES if scales.endswith(end)), None)
        if weight is not None and weight in sources and _may_scale(sources[weight].info, source.info):
            yield weight, scales


def _may_scale(weight: TensorInfo, scales: TensorInfo) -> bool:
    return weight.dtype in FLOAT8_DTYPES and scales.dtype in SCALE_DTYPES


def _block_of(name: str, settings: Mapping[str, Any] | None) -> tuple[int, int]:
    block = (settings or {}).get("weight_block_size")
    for weights in _weight_settings(settings or {}):
        block = block or weights.get("block_structure")
    if block is None:
        return _USUAL_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in block):
        raise CheckpointError(f"{name}/config.json: its weight_block_size is {shown(block)}, expected two sizes.")
    return block[0], block[1]


def _weight_settings(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of weights in compressed-tensors' format, one for each group of layers."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            yield group["weights"]


def _grid(name: str, weight: TensorInfo, scales: TensorInfo, block: tuple[int, int]) -> Grid:
    lead, (rows, columns) = weight.shape[:-2], (1, 1, *weight.shape)[-2:]
    if weight.numel == 0 or scales.numel == 1:
        rows = max(1, prod(lead) * rows)
        return Grid(rows, max(1, columns), (rows, max(1, columns)))
    for sizes in ((rows, columns), (1, columns), block):
        grid = Grid(rows, columns, sizes)
        shape = (*lead, grid.scale_rows, grid.scale_columns)
        if scales.shape == shape or (grid.scale_columns == 1 and scales.shape == shape[:-1]):
            return grid
    raise CheckpointError(
        f"{name}: tensor '{shown(scales.name)}' has shape {list(scales.shape)}, which scales neither the whole of "
        f"'{shown(weight.name)}' {list(weight.shape)}, nor its rows, nor its blocks of {block[0]} x {block[1]}."
    )
