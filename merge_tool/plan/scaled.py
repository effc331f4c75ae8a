"""`--dtype base` where BASE has 8-bit floats with scales: the output's tensors, and the sources of each.

The output has BASE's stored tensors: codes and scales, which are merged in real values and quantised again, and scales
of activations, which are copied. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from merge_tool.arrays import STORED_DTYPES
from merge_tool.checkpoint.fp8 import Scaled, ScaledTensor
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import RecipeError, counted, listed, shown
from merge_tool.methods.steps import Method
from merge_tool.recipe.options import QUANTISE_LATER
from merge_tool.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Scaling:
    """How two jobs write a weight in 8 bits, its codes and its scales, in the format of `like`, BASE's weight.

    `other` is the second model's weight, if it has the same grid and dtypes: if the merge equals it, its bytes are
    copied.
    """

    like: ScaledTensor
    other: ScaledTensor | None

    def copied(self, side: int | None) -> ScaledTensor | None:
        """The codes and scales to copy byte for byte, if the result is one of the two weights."""
        return None if side is None else (self.like, self.other)[side]

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
        """The name of every tensor of codes or scales -> the name of its weight."""
        scales = {weight.scales.info.name: name for name, weight in self.scaled.made.items()}
        return {**{name: name for name in self.scaled.made}, **scales}

    def infos(self) -> Iterator[TensorInfo]:
        """The stored tensors (codes and scales) that replace or join BASE's dequantised view in the output."""
        for weight in self.scaled.made.values():
            yield from (weight.codes.info, weight.scales.info)
        yield from (source.info for source in self.scaled.activations.values())

    def scaling(self, weight: str, other: TensorSource) -> Scaling:
        """How codes and scales of BASE's `weight`, merged with another, are written."""
        like = self.scaled.made[weight]
        return Scaling(like, other if isinstance(other, ScaledTensor) and _is_alike(like, other) else None)

    def kept(self, name: str) -> TensorSource:
        """BASE's codes or scales called `name`."""
        weight = self.scaled.made[self.weights[name]]
        return weight.codes if name == weight.info.name else weight.scales

    def warnings(self) -> Iterator[str]:
        if names := list(self.scaled.activations):
            yield (
                f"{len(names):,} scales of activations are copied from {self.base.name}, which they were calibrated "
                f"for; the merge's own may differ: {listed(names)}."
            )


def plan_scaled(recipe: Recipe, method: Method, models: Sequence[Checkpoint]) -> ScaledPlan | None:
    """BASE's format, if the recipe's dtype is `base` and BASE has 8-bit floats with scales.

    Raises RecipeError if the output cannot have that format: a merge of more than two weights, weights computed from
    more than BASE's codes, or a configuration with another format.
    """
    base, donor = models[recipe.first], models[recipe.donor]
    scaled = base.scaled
    if recipe.options.dtype != "base" or scaled is None:
        return None
    part = recipe.modules[0].slices[0]
    is_pair = len(recipe.modules) == len(recipe.modules[0].slices) == 1 and part.sources[0].layers is None
    has_base = part.base is not None and method.base != "first"
    if not is_pair or not method.is_weighted(len(part.sources), has_base=has_base):
        raise RecipeError(
            f"dtype is 'base', and {base.name} has 8-bit floats with scales, which are written for slerp and linear of "
            f"two whole models only. {QUANTISE_LATER}"
        )
    changed = [name for name, weight in scaled.made.items() if base.source(name) is not weight]
    if changed:
        raise RecipeError(
            f"dtype is 'base', and {base.name} has {counted(len(changed), 'tensor')} in 8 bits with something "
            "added to them: "
            f"{listed(changed)}. Only BASE's own codes are quantised again. Write bfloat16 (the default), and quantise "
            "OUT afterwards."
        )
    for source in scaled.activations.values():
        if source.info.dtype not in STORED_DTYPES:
            what = f"{base.name} has {shown(source.info.name)} in {source.info.dtype}"
            raise RecipeError(f"dtype is 'base', and {what}, which is not written. Choose another dtype.")
    theirs = donor.scaled.settings if donor.scaled is not None else None
    if donor is not base and theirs != scaled.settings:
        raise RecipeError(
            f"--files-from {shown(recipe.options.files_from)}: config.json of {donor.name} does not describe the 8 "
            f"bits that {base.name} has and --dtype base writes. Take BASE's files, or another dtype."
        )
    return ScaledPlan(base, scaled)


def _is_alike(a: ScaledTensor, b: ScaledTensor) -> bool:
    dtypes = [(side.codes.info.dtype, side.scales.info.dtype) for side in (a, b)]
    return a.grid == b.grid and dtypes[0] == dtypes[1]
