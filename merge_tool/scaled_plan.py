"""`--dtype base` where BASE has 8-bit floats with scales: which tensors the output then has, and what each is made of.

Its tensors are BASE's as they are stored: codes and scales, merged in real values and quantised again; scales of
activations, copied. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from merge_tool.checkpoint.fp8 import Scaled, ScaledTensor
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import STORED_DTYPES, Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import RecipeError, listed, shown
from merge_tool.recipe import QUANTISE_LATER, Recipe


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a job writes a tensor in 8 bits, as `like`, which is BASE's: its codes, or (`is_scales`) their scales.

    `ft` is FT's, where it has the same grid and dtypes: a merge that is FT's may have its very bytes.
    """

    like: ScaledTensor
    ft: ScaledTensor | None
    is_scales: bool

    def stored(self, t: float, *, equal: bool) -> TensorSource | None:
        """What is handed on byte for byte at this t; None where codes and scales are made anew."""
        side = self.like if equal or t == 0 else self.ft if t == 1 else None
        return None if side is None else self.of(side)

    def of(self, side: ScaledTensor) -> TensorSource:
        return side.scales if self.is_scales else side.codes

    @property
    def note(self) -> str:
        return "scales of the merged values" if self.is_scales else ""

    @property
    def num_scales(self) -> int:
        return self.like.scales.info.numel


@dataclass(frozen=True)
class ScaledPlan:
    """BASE's format, which the output has."""

    base: Checkpoint
    scaled: Scaled

    @cached_property
    def weights(self) -> dict[str, str]:
        """The name of every tensor of codes or scales -> its weight's."""
        scales = {weight.scales.info.name: name for name, weight in self.scaled.made.items()}
        return {**{name: name for name in self.scaled.made}, **scales}

    def infos(self) -> Iterator[TensorInfo]:
        """Tensors of the output that are none of BASE's, as it is read, or are others there."""
        for weight in self.scaled.made.values():
            yield from (weight.codes.info, weight.scales.info)
        yield from (source.info for source in self.scaled.activations.values())

    def scaling(self, name: str, ft: TensorSource) -> Scaling:
        """How the codes or the scales called `name` are made of BASE's weight and FT's."""
        weight = self.weights[name]
        like = self.scaled.made[weight]
        return Scaling(like, ft if isinstance(ft, ScaledTensor) and _is_alike(like, ft) else None, name != weight)

    def kept(self, name: str) -> TensorSource:
        """BASE's codes or scales called `name`."""
        weight = self.weights[name]
        return Scaling(self.scaled.made[weight], None, name != weight).of(self.scaled.made[weight])

    def warnings(self) -> Iterator[str]:
        if names := list(self.scaled.activations):
            yield (
                f"{len(names):,} scales of activations are copied from {self.base.name}, which they were calibrated "
                f"for; the merge's own may differ: {listed(names)}."
            )


def plan_scaled(recipe: Recipe, base: Checkpoint, ft: Checkpoint) -> ScaledPlan | None:
    """BASE's format, if that is asked for and BASE has one.

    Raises RecipeError where the output cannot have it: weights that are made of more than BASE's codes, or a
    configuration that speaks of another format.
    """
    scaled = base.scaled
    if recipe.dtype != "base" or scaled is None:
        return None
    changed = [name for name, weight in scaled.made.items() if base.source(name) is not weight]
    if changed:
        raise RecipeError(
            f"dtype is 'base', and {base.name} has {len(changed):,} tensors in 8 bits with something added to them: "
            f"{listed(changed)}. {QUANTISE_LATER}"
        )
    for source in scaled.activations.values():
        if source.info.dtype not in STORED_DTYPES:
            what = f"{base.name} has {shown(source.info.name)} in {source.info.dtype}"
            raise RecipeError(f"dtype is 'base', and {what}, which is not written. Choose another dtype.")
    theirs = ft.scaled.settings if ft.scaled is not None else None
    if recipe.files_from == "ft" and theirs != scaled.settings:
        raise RecipeError(
            f"--files-from ft: config.json of {ft.name} does not speak of the 8 bits that {base.name} has and --dtype "
            "base writes. Take BASE's files, or another dtype."
        )
    return ScaledPlan(base, scaled)


def _is_alike(a: ScaledTensor, b: ScaledTensor) -> bool:
    dtypes = [(side.codes.info.dtype, side.scales.info.dtype) for side in (a, b)]
    return a.grid == b.grid and dtypes[0] == dtypes[1]


__all__ = ["ScaledPlan", "Scaling", "plan_scaled"]
