"""Recipe + the models' tensor names -> for each tensor of the output: its sources and its parameters.

Works on names and numbers only. There is no table of architectures: the number in a tensor's name is its layer. There
are no lists: everything about a tensor follows from its name, so 100,000 tensors take no memory beside the plan itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any, NamedTuple

from merge_tool.errors import RecipeError, counted, listed, shown
from merge_tool.methods.steps import REQUIRED, Method
from merge_tool.models.naming import comes_last
from merge_tool.models.renaming import Renaming
from merge_tool.plan.plan import Values
from merge_tool.plan.stacks import Owners, Stacks, is_beside, split_layer
from merge_tool.recipe.recipe import Module, Output, Recipe, Slice, Source
from merge_tool.recipe.settings import Choice, Settings, find_choice


class OutputTensor(NamedTuple):
    """A tensor of the output: its slice (`part`) and module, and its `position` along the layers. `names` are its names
    in the slice's sources, in their order, as the first model names tensors. `is_behind` marks tensors behind the
    layers: a final norm and a head."""

    name: str
    names: tuple[str, ...]
    position: float
    part: Slice
    module: Module
    is_behind: bool = False


class _Names:
    """A model's tensors under the first model's names; nothing is copied if nothing is renamed."""

    def __init__(self, names: Collection[str], first: Collection[str], renaming: Renaming) -> None:
        self._names = names if isinstance(names, (Set, Mapping)) else dict.fromkeys(names)
        self._renamed = renaming.ft_names
        self._hidden = {name for name in renaming.ft_names.values() if name not in first} | renaming.copies.keys()

    def __contains__(self, name: str) -> bool:
        return (name in self._names and name not in self._hidden) or name in self._renamed

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._names if name not in self._hidden and name not in self._renamed)
        yield from self._renamed

    def own(self, name: str) -> str:
        """The model's own name for a tensor."""
        return self._renamed.get(name, name)


class Expansion:
    """All tensors that a recipe asks for, by name.

    `names` are each model's tensors. `renamings` has, by model, its names for the first model's tensors, and the
    `copies` that the first model does not store. `num_layers` are the language models' numbers of layers by
    config.json: layers beyond that lie outside the stack. `lone_head` is the first model's only name for the matrix
    that is embedding and head. `range_problems` are messages about layers that models lack.
    Raises RecipeError for ambiguous stacks.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        names: Sequence[Collection[str]],
        renamings: Mapping[int, Renaming] | None = None,
        num_layers: Sequence[int | None] = (),
        lone_head: str | None = None,
    ) -> None:
        self._num_layers, self._lone_head = num_layers or [None] * len(names), lone_head
        self._recipe, self._method = recipe, method
        first = names[recipe.first]
        self.known = [_Names(own, first, (renamings or {}).get(k, Renaming())) for k, own in enumerate(names)]
        self.copies = [name for renaming in (renamings or {}).values() for name in renaming.copies]
        self._by_name = {module.name or "": module for module in recipe.modules}
        self._whole = recipe.modules[0]
        self._owners: Owners | None = None
        self._stacks: dict[int, Stacks] = {}  # by model: the layers along which lists of values run
        self._sliced: dict[str, tuple[str, list[int]]] = {}  # module -> its stack, the first layer of each slice
        self._depths: dict[tuple[int, str], int] = {}  # by model and stack
        self._numbers: dict[int, tuple[tuple[int, int], ...]] = {}  # by slice: (index among its sources, model)
        self._all_stacks: list[str] = []
        self.range_problems: list[str] = []
        if recipe.modules[0].name is not None or any(module.num_layers is not None for module in recipe.modules):
            self._find_stacks()
        self._values = _Values(recipe, method)

    def _find_stacks(self) -> None:
        sources = self._first_before(self._recipe.sources)
        stacks = Stacks(dict.fromkeys(name for k in sources for name in self.known[k]), self._common_num_layers())
        self._all_stacks = stacks.of_layers
        if self._recipe.modules[0].name is not None:
            self._owners = Owners(stacks, list(self._by_name))
        for name, module in self._by_name.items():
            if module.num_layers is not None:
                stack = stacks.only() if self._owners is None else self._owners.stack(name)
                self._sliced[name] = stack, [0, *accumulate(part.num_layers or 0 for part in module.slices)]
                self._check_ranges(module, stack)

    def _position(self, name: str, part: Slice) -> float:
        """A tensor's position along the layers of the slice's first model."""
        lead = self._first_before({source.model for source in part.sources})[0]
        if lead not in self._stacks:
            self._stacks[lead] = self._stacks_of(lead)
        return self._stacks[lead].position(name)

    def _common_num_layers(self) -> int | None:
        """The largest number of layers in the sources' config.json; None if one of them does not have it."""
        counts = [self._num_layers[k] for k in self._recipe.sources]
        return None if None in counts else max(count for count in counts if count is not None)

    def _stacks_of(self, number: int) -> Stacks:
        return Stacks(iter(self.known[number]), self._num_layers[number])

    def depth(self, number: int, stack: str) -> int:
        """The number of a model's layers in a stack, without layers that lie outside it."""
        key = number, stack
        if key not in self._depths:
            extra = self._stacks_of(number).extra
            count = max(_rests(self.known[number], stack), default=-1) + 1
            self._depths[key] = count - (extra[1] if extra is not None and extra[0] == stack else 0)
        return self._depths[key]

    def beyond(self) -> Iterator[tuple[int, str, int]]:
        """(model, stack, number of layers that lie outside it by the model's config.json). Empty for recipes without
        slices and without values along the layers: for them layers do not matter."""
        if self._sliced or self._values.lie_along_layers:
            for number in self._first_before(self._recipe.sources):
                if (extra := self._stacks_of(number).extra) is not None:
                    yield number, *extra

    @property
    def sliced_stacks(self) -> frozenset[str]:
        """The stacks that are made of slices."""
        return frozenset(stack for stack, _ in self._sliced.values())

    # ------------------------------------------------------------------------------------- which there are

    def names(self) -> Iterator[str]:
        """Every name of the output, each once."""
        for module in self._recipe.modules:
            if module.num_layers is None:
                yield from self._names_in(module, module.slices[0])
                continue
            stack, _ = self._sliced[module.name or ""]
            for part, last in ((module.slices[0], False), (module.slices[-1], True)):
                for name in self._names_in(module, part):
                    if (split_layer(name) or ("",))[0] != stack and self._comes_last(name) is last:
                        yield name
            yield from self._layer_names(module, stack)
            yield from self._names_behind(module, stack)

    def _comes_last(self, name: str) -> bool:
        return comes_last(name) and name != self._lone_head

    def _names_behind(self, module: Module, stack: str) -> Iterator[str]:
        """The last slice's tensors in layers outside the stack, numbered behind the output's layers."""
        names, total = dict[str, None](), module.num_layers or 0
        for k in self._first_before({source.model for source in module.slices[-1].sources}):
            depth = self.depth(k, stack)
            for layer, rests in sorted(_rests(self.known[k], stack).items()):
                if layer >= depth:
                    names.update(dict.fromkeys(f"{stack}{total + layer - depth}{rest}" for rest in rests))
        yield from names

    def _layer_names(self, module: Module, stack: str) -> Iterator[str]:
        rests = {k: _rests(self.known[k], stack) for part in module.slices for k in {s.model for s in part.sources}}
        number = 0
        for part in module.slices:
            for offset in range(part.num_layers or 0):
                layers = ((s.model, (s.layers or (0, 0))[0] + offset) for s in part.sources)
                for rest in dict.fromkeys(rest for k, layer in layers for rest in rests[k].get(layer, ())):
                    yield f"{stack}{number + offset}{rest}"
            number += part.num_layers or 0

    def _names_in(self, module: Module, part: Slice) -> Iterator[str]:
        """The tensor names of a slice's sources that belong to the module, starting with the first model's."""
        before: list[_Names] = []
        for k in self._first_before({source.model for source in part.sources}):
            new: Iterable[str] = self.known[k]
            for other in before:
                new = [name for name in new if name not in other]
            yield from (name for name in new if self._owners is None or self._owners.owner(name) == module.name)
            before.append(self.known[k])

    def _check_ranges(self, module: Module, stack: str) -> None:
        for source in (source for part in module.slices for source in part.sources):
            first, end = source.layers or (0, 0)
            count = self.depth(source.model, stack)
            if end > count:
                more = max(_rests(self.known[source.model], stack), default=-1) + 1 - count
                beyond = f" (by its config.json; {counted(more, 'more')} outside the stack)" if more else ""
                problem = (
                    f"layer_range [{first}, {end}] of {shown(self._recipe.models[source.model])}: it has {count:,} "
                    f"layers in {shown(stack)}{beyond}, so the range ends at {count:,} at most"
                )
                self.range_problems += [problem] if problem not in self.range_problems else []

    # -------------------------------------------------------------------------------------- what each is

    def tensor(self, name: str) -> OutputTensor:
        """A tensor of the output, by its name."""
        module = self._by_name[self._owners.owner(name)] if self._owners is not None else self._whole
        if (module.name or "") not in self._sliced:
            part = module.slices[0]
            position = self._position(name, part) if self._values.lie_along_layers else 0.0
            names = (name,) * len(part.sources)
            behind = self._values.grow and split_layer(name) is None and self._comes_last(name)
            return OutputTensor(name, names, position, part, module, is_behind=behind)
        layer = split_layer(name)
        stack, starts = self._sliced[module.name or ""]
        if layer is None or layer[0] != stack:
            behind = self._comes_last(name)
            part = module.slices[-1 if behind else 0]
            return OutputTensor(name, (name,) * len(part.sources), 0.0, part, module, is_behind=behind)
        if layer[1] >= starts[-1]:
            part, rest = module.slices[-1], name[len(stack) + len(str(layer[1])) :]
            depths = (self.depth(source.model, stack) for source in part.sources)
            names = tuple(f"{stack}{depth + layer[1] - starts[-1]}{rest}" for depth in depths)
            return OutputTensor(name=name, names=names, position=0.0, part=part, module=module)
        number = bisect_right(starts, layer[1]) - 1
        part, offset = module.slices[number], layer[1] - starts[number]
        rest = name[len(stack) + len(str(layer[1])) :]
        names = tuple(f"{stack}{(source.layers or (0, 0))[0] + offset}{rest}" for source in part.sources)
        length = part.num_layers or 0
        position = offset / (length - 1) if length > 1 else 1.0
        return OutputTensor(name=name, names=names, position=position, part=part, module=module)

    def has_base(self, tensor: OutputTensor) -> bool:
        """Whether the method compares the inputs with a base; the base is then the first of `sources`."""
        return tensor.part.base is not None and self._method.base != "first"

    def sources(self, tensor: OutputTensor) -> tuple[tuple[int, str], ...]:
        """(model, the tensor's own name there): the base if the method has one, then the inputs in their order."""
        key = id(tensor.part)
        if key not in self._numbers:
            base, order = tensor.part.base, _order(self._method, tensor.part)
            numbers = [base, *order] if base is not None and self.has_base(tensor) else order
            self._numbers[key] = tuple((number, tensor.part.sources[number].model) for number in numbers)
        return tuple((model, self.known[model].own(tensor.names[number])) for number, model in self._numbers[key])

    def base_of(self, tensor: OutputTensor) -> tuple[int, str] | None:
        """The tensor in the slice's base; without a base in the first model, or else in the first source. None if that
        model lacks it."""
        sources = tensor.part.sources
        of_first = (k for k, source in enumerate(sources) if source.model == self._recipe.first)
        number = tensor.part.base if tensor.part.base is not None else next(of_first, 0)
        model, name = sources[number].model, tensor.names[number]
        return (model, self.known[model].own(name)) if name in self.known[model] else None

    def origin(self, tensor: OutputTensor) -> tuple[int, str]:
        """The tensor in `base_of`, or else in the first source that has it."""
        if (base := self.base_of(tensor)) is not None:
            return base
        pairs = zip(tensor.part.sources, tensor.names, strict=True)
        return next(
            (source.model, self.known[source.model].own(name))
            for source, name in pairs
            if name in self.known[source.model]
        )

    def lacking(self, tensor: OutputTensor) -> list[int]:
        """The models of the tensor's slice that lack the tensor."""
        pairs = zip(tensor.part.sources, tensor.names, strict=True)
        return [source.model for source, name in pairs if name not in self.known[source.model]]

    def values(self, tensor: OutputTensor) -> tuple[Values, ...]:
        """The parameters of a tensor in each output."""
        return self._values.of(tensor)

    @property
    def num_scheduled(self) -> int:
        """The number of tensors so far whose parameters are set by a pattern or along the layers."""
        return self._values.num_scheduled

    def _first_before(self, models: Iterable[int]) -> list[int]:
        return sorted(models, key=lambda k: (k != self._recipe.first, k))

    # ------------------------------------------------------------------------------------------ checks

    @property
    def lacks_values(self) -> bool:
        """Whether a tensor so far lacks a required parameter."""
        return bool(self._values.unset)

    def check_values(self) -> None:
        """Raise RecipeError that names all tensors without a value for a required parameter."""
        if unset := self._values.unset:
            lines = [
                f"'{shown(key)}' of {counted(len(names), 'tensor')}: {listed(names)}" for key, names in unset.items()
            ]
            raise RecipeError(
                f"{self._recipe.method} needs values that the recipe's filters give to other tensors only.\n  "
                + "\n  ".join(lines)
                + "\nAdd an entry without a filter at the end: {value: ...}."
            )

    def idle_choices(self) -> Iterator[tuple[str, Choice]]:
        """(parameter, choice) of every pattern that gave no tensor its value."""
        for scope in self._recipe.scopes():
            for key, setting in scope.items():
                for choice in setting.choices:
                    if choice.pattern is not None and choice not in self._values.used:
                        yield key, choice

    def stacked_layers(self) -> dict[str, tuple[int, ...]]:
        """For each stack of slices, and each of its layers in the output, the layer of its first source; without the
        stacks whose layers are the donor's in their order."""
        stacked = dict[str, tuple[int, ...]]()
        for name, (stack, _) in self._sliced.items():
            origin = list[int]()
            for part in self._by_name[name].slices:
                number = part.base if part.base is not None else _order(self._method, part)[0]
                first, end = part.sources[number].layers or (0, 0)
                origin += range(first, end)
            if origin != list(range(self.depth(self._recipe.donor, stack))):
                stacked[stack] = tuple(origin)
        return stacked

    def language_stack(self) -> str | None:
        """The stack that config.json's number of layers speaks of: of slices, no part beside the language model, and no
        decoder beside an encoder."""
        stacks = [stack for stack in self.sliced_stacks if not is_beside(stack)]
        has_encoder = any("encoder." in stack for stack in self._all_stacks)
        stacks = [stack for stack in stacks if not (has_encoder and "decoder." in stack)]
        counts = Counter(layer[0] for name in self.names() if (layer := split_layer(name))) if len(stacks) > 1 else {}
        return max(sorted(stacks), key=lambda stack: counts.get(stack, 0), default=None)


def _order(method: Method, part: Slice) -> list[int]:
    """The indices of a slice's inputs among its sources."""
    others = [k for k in range(len(part.sources)) if k != part.base]
    return [part.base, *others] if method.base == "first" and part.base is not None else others


def _rests(names: Iterable[str], stack: str) -> dict[int, list[str]]:
    """The rest of each tensor name behind the layer's number, by layer, for the names of a stack."""
    rests: dict[int, list[str]] = {}
    for name in names:
        if (layer := split_layer(name)) and layer[0] == stack:
            rests.setdefault(layer[1], []).append(name[len(stack) + len(str(layer[1])) :])
    return rests


class _Values:
    """Each tensor's parameters; tensors with equal parameters share one object."""

    def __init__(self, recipe: Recipe, method: Method) -> None:
        self._recipe, self._method = recipe, method
        self._shelf: dict[Any, Values] = {}
        self._tuples: dict[tuple[int, ...], tuple[Values, ...]] = {}
        self._constant: dict[int, tuple[Values, ...] | None] = {}  # by slice, if all its settings are constants
        self.unset: dict[str, dict[str, None]] = {}
        self.used: set[Choice] = set()
        self.num_scheduled = 0
        settings = [setting for scope in recipe.scopes() for setting in scope.values()]
        self.lie_along_layers = any(len(choice.values) > 1 for setting in settings for choice in setting.choices)
        self.grow = any(choice.grow for setting in settings for choice in setting.choices)

    def of(self, tensor: OutputTensor) -> tuple[Values, ...]:
        key = id(tensor.part)
        if key not in self._constant:
            is_constant = all(setting.is_constant for scope in self._all_scopes(tensor) for setting in scope.values())
            self._constant[key] = self._make(tensor)[0] if is_constant else None
        if (constant := self._constant[key]) is not None:
            return constant
        values, is_scheduled = self._make(tensor)
        self.num_scheduled += is_scheduled
        return values

    def _make(self, tensor: OutputTensor) -> tuple[tuple[Values, ...], bool]:
        choices: list[Choice] = []
        made = tuple(self._values(tensor, output, choices) for output in self._recipe.outputs)
        self.used.update(choice for choice in choices if choice.pattern is not None)
        is_scheduled = any(choice.pattern or len(choice.values) > 1 for choice in choices)
        return self._tuples.setdefault(tuple(map(id, made)), made), is_scheduled

    def _all_scopes(self, tensor: OutputTensor) -> Iterator[Settings]:
        for output in self._recipe.outputs:
            for source in tensor.part.sources:
                yield from self._scopes_of(tensor, output, source)

    def _scopes_of(self, tensor: OutputTensor, output: Output, source: Source | None) -> list[Settings]:
        """The settings that apply, the innermost first: for one source, or for all."""
        outer = [tensor.part.parameters, tensor.module.parameters, self._recipe.parameters]
        if source is None:
            return [output.parameters, *outer]
        return [output.of_models.get(source.model, {}), output.parameters, source.parameters, *outer]

    def _values(self, tensor: OutputTensor, output: Output, choices: list[Choice]) -> Values:
        shared, each = {}, {}
        scopes = self._scopes_of(tensor, output, None)
        for key, default in self._method.shared.items():
            shared[key] = self._value(key, default, scopes, tensor.name, tensor, choices)
        inputs = [(tensor.part.sources[k], tensor.names[k]) for k in _order(self._method, tensor.part)]
        for key, default in self._method.each.items():
            each[key] = tuple(
                self._value(key, default, self._scopes_of(tensor, output, source), name, tensor, choices)
                for source, name in inputs
            )
        return self._shelf.setdefault((*shared.values(), *each.values()), Values(shared, each))

    def _value(
        self, key: str, default: Any, scopes: Sequence[Settings], name: str, of: OutputTensor, choices: list[Choice]
    ) -> Any:
        choice = find_choice(key, scopes, name)
        if choice is not None:
            choices.append(choice)
            return choice.at(1.0 if choice.grow and of.is_behind else of.position)
        if default is REQUIRED:
            self.unset.setdefault(key, {})[name] = None
        return default
