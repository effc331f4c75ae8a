"""`ModelsRecipe` + the models' tensor names -> one `Ask` per tensor of the output: what it is merged from, and with
which parameters. Names and numbers only; no table of architectures, every layer is known by the number in its names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from merge_tool.errors import MismatchError, RecipeError, listed, shown
from merge_tool.methods.steps import REQUIRED
from merge_tool.naming import comes_last
from merge_tool.recipes.models_recipe import PAIRS, ModelsRecipe, Module, Slice, Source, Terms, all_terms
from merge_tool.recipes.settings import MISSING, Settings, resolve
from merge_tool.recipes.stacks import Owners, Stacks
from merge_tool.renaming import Renaming
from merge_tool.schedule import meant, split_layer


@dataclass(frozen=True, slots=True)
class Ask:
    """One tensor of the output. `base` and `inputs` are (model's number, the tensor's name there), the inputs in the
    recipe's order; for slerp they are the two models, the one at t = 0 first, and `base` is None. `shared` holds the
    method's parameters, `each` those with a value per input; defaults are filled in. A tensor that is not merged has
    one input, the base's, and `kept` says why."""

    name: str
    base: tuple[int, str] | None
    inputs: tuple[tuple[int, str], ...]
    shared: Mapping[str, Any]
    each: Mapping[str, tuple[Any, ...]]
    kept: str = ""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which tensors are the base's as they are: of the output's names those that `unchosen` picks, for the reason
    `not_chosen`; for the reason `missing`, those that some model lacks and may lack. What the base lacks then is left
    out."""

    unchosen: Callable[[Sequence[str]], Collection[str]] = lambda names: ()
    not_chosen: str = ""
    missing: str = ""
    may_lack: Callable[[str], bool] = lambda name: False


def expand(
    recipe: ModelsRecipe,
    names: Sequence[Collection[str]],
    methods: Mapping[str, Terms],
    renamings: Mapping[int, Renaming] | None = None,
) -> list[Ask]:
    """As `expand_keeping`, with every tensor merged."""
    return expand_keeping(recipe, names, methods, renamings or {}, Keeping())[0]


def expand_keeping(
    recipe: ModelsRecipe,
    names: Sequence[Collection[str]],
    methods: Mapping[str, Terms],
    renamings: Mapping[int, Renaming],
    keeping: Keeping,
) -> tuple[list[Ask], list[str]]:
    """What is asked for every tensor of the output, with `names` of each model's tensors, the donor's order first; and
    the names that are left out.

    `renamings` say, by model, what it calls the tensors of `recipe.donor`, and which of its own have no place there.
    Raises MismatchError, all at once, for tensors that some of the models lack and layers that they do not have;
    RecipeError for stacks that cannot be told apart and for parameters that some tensors are left without.
    """
    tensors = _Tensors(recipe, names, renamings)
    values = _Values(recipe, all_terms(methods)[recipe.method], tensors.known)
    places = list(tensors.places())
    unchosen = frozenset(keeping.unchosen([place.name for place in places]))
    asks, left_out = [], []
    for place in places:
        may_lack = keeping.missing if keeping.may_lack(place.name) and tensors.lacks(place) else ""
        why = keeping.not_chosen if place.name in unchosen else may_lack
        kept = tensors.base_of(place) if why else None
        if not why:
            tensors.note_lacking(place)
            asks.append(values.ask(place))
        elif kept is not None:
            asks.append(Ask(place.name, None, (kept,), {}, {}, why))
        elif place.name not in unchosen:
            left_out.append(place.name)
    tensors.check()
    values.check()
    return asks, left_out


def unused_filters(recipe: ModelsRecipe, asks: Iterable[Ask]) -> Iterator[str]:
    """Warnings for filters that no tensor's name contains: written as globs or regular expressions, most often."""
    found = {name for ask in asks for name in (ask.name, *(name for _, name in ask.inputs))}
    settings = ((key, setting) for scope in recipe.scopes for key, setting in scope.items())
    filters = {choice.part: key for key, setting in settings for choice in setting.choices}
    for text, key in filters.items():
        if text is not None and not any(text in name for name in found):
            yield (
                f"The filter '{shown(text)}' of '{shown(key)}' is in no tensor's name.{meant(text, sorted(found))} A "
                "filter is a part of the name, no glob and no regular expression."
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the output before its parameters: `names` are those in the slice's sources, in their order, as the
    donor would call them."""

    name: str
    names: tuple[str, ...]
    position: float
    part: Slice
    module: Module


class _Known:
    """A model's tensors under the donor's names: no copy, where nothing is renamed."""

    def __init__(self, names: Collection[str], donor: Collection[str], renaming: Renaming) -> None:
        self._names = names if isinstance(names, (Set, Mapping)) else dict.fromkeys(names)
        self._renamed = renaming.ft_names
        self._hidden = {name for name in renaming.ft_names.values() if name not in donor} | renaming.copies.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._renamed or (name in self._names and name not in self._hidden)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._names if name not in self._hidden and name not in self._renamed)
        yield from self._renamed

    def own(self, name: str) -> str:
        """The model's own name for a tensor."""
        return self._renamed.get(name, name)


class _Tensors:
    """Which tensors there are, and what they are called in each source."""

    def __init__(
        self, recipe: ModelsRecipe, names: Sequence[Collection[str]], renamings: Mapping[int, Renaming]
    ) -> None:
        self._recipe = recipe
        donor = names[recipe.donor]
        self.known = [_Known(found, donor, renamings.get(k, Renaming())) for k, found in enumerate(names)]
        self._stacks = Stacks(dict.fromkeys(name for k in self._donor_first(recipe.sources) for name in self.known[k]))
        self._owners = None
        if recipe.modules[0].name is not None:
            self._owners = Owners(self._stacks, [module.name or "" for module in recipe.modules])
        self._rests: dict[tuple[int, str], dict[int, list[str]]] = {}
        self._ranges: dict[str, None] = {}
        self._lacking: dict[int, dict[str, None]] = {}

    def places(self) -> Iterator[_Place]:
        for module in self._recipe.modules:
            yield from self._module(module) if module.num_layers is None else self._sliced(module)

    def lacks(self, place: _Place) -> bool:
        """Whether some of its models have no such tensor."""
        return any(name not in self.known[s.model] for s, name in zip(place.part.sources, place.names, strict=True))

    def note_lacking(self, place: _Place) -> None:
        for source, name in zip(place.part.sources, place.names, strict=True):
            if name not in self.known[source.model]:
                self._lacking.setdefault(source.model, {})[name] = None

    def base_of(self, place: _Place) -> tuple[int, str] | None:
        """The tensor of the slice's base, else of the donor, else of the first source; None if that lacks it."""
        sources = place.part.sources
        of_donor = (k for k, source in enumerate(sources) if source.model == self._recipe.donor)
        number = place.part.base if place.part.base is not None else next(of_donor, 0)
        model, name = sources[number].model, place.names[number]
        return (model, self.known[model].own(name)) if name in self.known[model] else None

    def check(self) -> None:
        """Raise MismatchError for all that does not fit."""
        problems = list(self._ranges)
        for k, lacking in self._lacking.items():
            problems.append(f"{len(lacking):,} tensors are not in {self._shown(k)}: {listed(lacking)}")
        if problems:
            layers = "; ".join(filter(None, map(self._layers_of, self._donor_first(self._recipe.sources))))
            raise MismatchError(
                "The models do not fit together as the recipe says.\n  "
                + "\n  ".join(problems)
                + (f"\n(Layers: {layers}.)" if layers else "")
                + "\nAll models must be of one architecture; give `slices` where their numbers of layers differ. With "
                "--on-missing base, what some model lacks is the base's, and what the base lacks is left out."
            )

    def _module(self, module: Module) -> Iterator[_Place]:
        """All layers, as they are."""
        part = module.slices[0]
        for name in self._names(module, part):
            yield _Place(name, (name,) * len(part.sources), self._stacks.position(name), part, module)

    def _sliced(self, module: Module) -> Iterator[_Place]:
        """What is before the layers with the first slice's models, the layers, what is after them with the last's."""
        stack = self._stacks.only() if self._owners is None else self._owners.stack(module.name or "")
        yield from self._loose(module, stack, module.slices[0], last=False)
        number = 0
        for part in module.slices:
            has_layers = [self._has_layers(source, stack) for source in part.sources]
            if all(has_layers):
                yield from self._layers(module, stack, part, number)
            number += part.num_layers or 0
        yield from self._loose(module, stack, module.slices[-1], last=True)

    def _loose(self, module: Module, stack: str, part: Slice, *, last: bool) -> Iterator[_Place]:
        for name in self._names(module, part):
            if (split_layer(name) or ("",))[0] != stack and comes_last(name) is last:
                yield _Place(name, (name,) * len(part.sources), 0.0, part, module)

    def _layers(self, module: Module, stack: str, part: Slice, number: int) -> Iterator[_Place]:
        length = part.num_layers or 0
        for offset in range(length):
            layers = [(source.layers or (0, 0))[0] + offset for source in part.sources]
            rests: dict[str, None] = {}
            for source, layer in zip(part.sources, layers, strict=True):
                rests |= dict.fromkeys(self._layer(source.model, stack).get(layer, ()))
            position = offset / (length - 1) if length > 1 else 1.0
            for rest in rests:
                names = tuple(f"{stack}{layer}{rest}" for layer in layers)
                yield _Place(f"{stack}{number + offset}{rest}", names, position, part, module)

    def _names(self, module: Module, part: Slice) -> list[str]:
        """The names of a slice's sources that belong to the module, the donor's first."""
        found: dict[str, None] = {}
        for k in self._donor_first({source.model for source in part.sources}):
            found |= dict.fromkeys(self.known[k])
        return [name for name in found if self._owners is None or self._owners.owner(name) == module.name]

    def _layer(self, model: int, stack: str) -> dict[int, list[str]]:
        """What stands behind the number in a model's names, by layer."""
        if (model, stack) not in self._rests:
            rests: dict[int, list[str]] = {}
            for name in self.known[model]:
                if (found := split_layer(name)) and found[0] == stack:
                    rests.setdefault(found[1], []).append(name[len(stack) + len(str(found[1])) :])
            self._rests[model, stack] = rests
        return self._rests[model, stack]

    def _has_layers(self, source: Source, stack: str) -> bool:
        first, end = source.layers or (0, 0)
        count = max(self._layer(source.model, stack), default=-1) + 1
        if end > count:
            self._ranges[
                f"layer_range [{first}, {end}] of {self._shown(source.model)}: it has {count:,} layers in "
                f"{shown(stack)}, so the range ends at {count:,} at most"
            ] = None
        return end <= count

    def _layers_of(self, model: int) -> str:
        own = Stacks(iter(self.known[model]))
        counts = ", ".join(f"{own.num_layers(stack):,} in {shown(stack.rstrip('.'))}" for stack in own.of_layers[:3])
        return f"{self._shown(model)} has {counts}" if counts else ""

    def _donor_first(self, models: Iterable[int]) -> list[int]:
        return sorted(models, key=lambda k: (k != self._recipe.donor, k))

    def _shown(self, model: int) -> str:
        return shown(self._recipe.models[model])


class _Values:
    """Which parameters each tensor has, in one mapping for all that have the same."""

    def __init__(self, recipe: ModelsRecipe, terms: Terms, known: Sequence[_Known]) -> None:
        self._recipe = recipe
        self._terms = terms
        self._known = known
        self._shelf: dict[Any, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {}
        self._unset: dict[str, list[str]] = {}

    def ask(self, place: _Place) -> Ask:
        part = place.part
        order = self._order(part)
        sources = [(s.model, self._known[s.model].own(name)) for s, name in zip(part.sources, place.names, strict=True)]
        base = None if part.base is None or self._recipe.method in PAIRS else sources[part.base]
        return Ask(place.name, base, tuple(sources[k] for k in order), *self._parameters(place, order))

    def check(self) -> None:
        """Raise RecipeError for all tensors that a required parameter has no value for."""
        if self._unset:
            lines = [f"'{shown(key)}' of {len(names):,} tensors: {listed(names)}" for key, names in self._unset.items()]
            raise RecipeError(
                f"{self._recipe.method} needs values that the recipe's filters give to other tensors only.\n  "
                + "\n  ".join(lines)
                + "\nAdd an entry without a filter at the end: {value: ...}."
            )

    def _order(self, part: Slice) -> list[int]:
        """The places of a slice's inputs among its sources."""
        others = [k for k in range(len(part.sources)) if k != part.base]
        return [part.base, *others] if self._recipe.method in PAIRS and part.base is not None else others

    def _parameters(self, place: _Place, order: Sequence[int]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        scopes = [place.part.parameters, place.module.parameters, self._recipe.parameters]
        shared, each = {}, {}
        for key, default in self._terms.shared.items():
            shared[key] = self._value(key, default, scopes, place.name, place.position)
        for key, default in self._terms.each.items():
            own = [([place.part.sources[k].parameters, *scopes], place.names[k]) for k in order]
            each[key] = tuple(self._value(key, default, inner, name, place.position) for inner, name in own)
        return self._shelf.setdefault((*shared.values(), *each.values()), (shared, each))

    def _value(self, key: str, default: Any, scopes: Sequence[Settings], name: str, position: float) -> Any:
        value = resolve(key, scopes, name, position)
        if value is MISSING:
            value = default
            if default is REQUIRED:
                self._unset.setdefault(key, []).append(name)
        return value
