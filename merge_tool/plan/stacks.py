"""The stacks of layers, and which tensor belongs to which stack: known only from the numbers in tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from merge_tool.checkpoint.sub_configs import is_of_text
from merge_tool.errors import RecipeError, counted, listed, shown

_LAYER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")
_OTHER_STACK = re.compile(r"(?:^|\.)(?:mtp|encoder|decoder)(?:\.|$)|(?:^|\.)(?:experts|adapters?)\.$")
_FEWEST_TENSORS = 3  # tensors in a layer: a Sequential's `0.weight`, `0.bias`, `2.weight` are no layers


def split_layer(name: str) -> tuple[str, int] | None:
    """A tensor's stack and layer: the text before the first number in its name, and that number.

    >>> split_layer("model.layers.3.mlp.experts.7.w1.weight"), split_layer("lm_head.weight")
    (('model.layers.', 3), None)
    """
    match = _LAYER.search(name)
    return (name[: match.start()], int(match[0])) if match else None


class Stacks:
    """The stacks in some models' tensor names, each with its number of layers. A stack of *layers* is numbered from 0
    without gaps and has at least three tensors in each layer, if any stack has; a projector's `mlp.0` is no layer.

    `num_layers` is the language model's number of layers by config.json. Further layers in the names of its stack (a
    layer that predicts further tokens) lie outside the stack: `extra` has the stack and the number of such layers."""

    def __init__(self, names: Iterable[str], num_layers: int | None = None) -> None:
        counts: dict[str, dict[int, int]] = {}
        for stack, layer in filter(None, map(split_layer, names)):
            layers = counts.setdefault(stack, {})
            layers[layer] = layers.get(layer, 0) + 1
        self.extra: tuple[str, int] | None = None
        own = _language_stack(counts)
        if own is not None and num_layers and (more := max(counts[own]) + 1 - num_layers) > 0:
            self.extra = own, more
            counts[own] = {layer: count for layer, count in counts[own].items() if layer < num_layers}
        self._last = {stack: max(layers) for stack, layers in counts.items()}
        whole = {stack: layers for stack, layers in counts.items() if len(layers) == max(layers) + 1}
        full = [stack for stack, layers in whole.items() if min(layers.values()) >= _FEWEST_TENSORS]
        self.of_layers = full or list(whole)

    def num_layers(self, stack: str) -> int:
        return self._last.get(stack, -1) + 1

    @property
    def in_words(self) -> str:
        """The number of layers in words; empty if there are none."""
        if len(self.of_layers) == 1:
            return counted(self.num_layers(self.of_layers[0]), "layer")
        return ", ".join(
            f"{counted(self.num_layers(stack), 'layer')} in {shown(stack.rstrip('.'))}" for stack in self.of_layers[:3]
        )

    def position(self, name: str) -> float:
        """A tensor's position in its stack: 0 for the first layer and outside stacks, 1 for the last layer, or the only
        one."""
        layer = split_layer(name)
        if layer is None or (self.extra is not None and layer[0] == self.extra[0] and layer[1] > self._last[layer[0]]):
            return 0.0
        return layer[1] / last if (last := self._last.get(layer[0], 0)) else 1.0

    def only(self) -> str:
        """The only stack of layers. Raises RecipeError, naming the stacks, if there are several or none."""
        if len(self.of_layers) != 1:
            shown_stacks = f"{len(self.of_layers):,} stacks: {listed(self.of_layers)}" if self.of_layers else "none"
            hint = "" if not self.of_layers else (
                f" Say which is meant: modules: {{{shown(self.of_layers[0].rstrip('.'))}: {{slices: ...}}, ...}}, "
                "with an entry for each."
            )  # fmt: skip
            raise RecipeError(
                f"`slices` needs the one stack of numbered layers, but the tensors' names show {shown_stacks}.{hint}"
            )
        return self.of_layers[0]

    def called(self, name: str) -> list[str]:
        """The stacks of layers that a module's name means: the stack's name contains the module's words in their
        order."""
        return [stack for stack in self.of_layers if f".{name}." in f".{stack}"]


def is_beside(stack: str) -> bool:
    """Whether a stack belongs to a part beside the language model, such as a vision tower.

    >>> [is_beside(stack) for stack in ("model.visual.blocks.", "model.layers.", "encoder.block.")]
    [True, False, False]
    """
    return not is_of_text(tuple(word for word in stack.split(".") if word != "encoder"))


def _language_stack(counts: Mapping[str, Mapping[int, int]]) -> str | None:
    """The stack of the language model: the only stack of layers, without stacks of parts such as a vision tower. None
    if there are several (an encoder and a decoder)."""
    deep = [stack for stack, layers in counts.items() if len(layers) > 1 and min(layers.values()) >= _FEWEST_TENSORS]
    own = [stack for stack in deep or counts if not (_OTHER_STACK.search(stack) or is_beside(stack))]
    return own[0] if len(own) == 1 else None


class Owners:
    """Which module each tensor belongs to. A layer's tensor belongs to the module named like its stack. Any other
    tensor belongs to the module whose stack's name has the longest common beginning with the tensor's name, the first
    one if several have. The only module of a model with one stack may have any name (mergekit writes `default`)."""

    def __init__(self, stacks: Stacks, modules: Sequence[str]) -> None:
        alone = len(modules) == len(stacks.of_layers) == 1
        self._stacks_of = {name: stacks.of_layers if alone else stacks.called(name) for name in modules}
        self._of = {stack: name for name, own in self._stacks_of.items() for stack in own}
        known = f"the stacks of layers are: {listed(stacks.of_layers) or 'none'}"
        for name, own in self._stacks_of.items():
            if not own:
                raise RecipeError(f"No tensor belongs to the module '{shown(name)}'; {known}.")
        if sum(map(len, self._stacks_of.values())) != len(self._of):
            raise RecipeError(f"Two of the modules ({listed(modules)}) mean the same stack; {known}.")
        if left := [stack for stack in stacks.of_layers if stack not in self._of]:
            raise RecipeError(f"`modules` does not say how to merge {listed(left)}; name each stack, or use `models`.")

    def stack(self, name: str) -> str:
        """The only stack of a module. Raises RecipeError if it has several."""
        if len(own := self._stacks_of[name]) > 1:
            raise RecipeError(f"The module '{shown(name)}' has slices but means several stacks: {listed(own)}.")
        return own[0]

    def owner(self, name: str) -> str:
        layer = split_layer(name)
        if layer is not None and layer[0] in self._of:
            return self._of[layer[0]]
        return max(self._stacks_of, key=lambda module: max(_alike(name, s) for s in self._stacks_of[module]))


def _alike(name: str, stack: str) -> int:
    """The number of words in two names' common beginning."""
    words = zip(name.split("."), stack.split("."), strict=False)
    return next((k for k, (a, b) in enumerate(words) if a != b), min(name.count("."), stack.count(".")))
