"""`ModelsRecipe`: a merge of any number of models as a recipe asks for it. Frozen; says nothing of what the models
hold, and nothing of the language it was written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from merge_tool.methods.steps import REQUIRED
from merge_tool.recipes.model_ref import ModelRef
from merge_tool.recipes.settings import Settings

PAIRS = frozenset({"slerp"})  # the base is the first of two inputs, not what the inputs are compared with


class Terms(Protocol):
    """What a recipe must know of a method: as in StepsMethod, whose terms these are."""

    @property
    def shared(self) -> Mapping[str, Any]: ...
    @property
    def each(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> tuple[int, int]: ...
    @property
    def base(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PairTerms:
    """The terms of SLERP, which is no StepsMethod."""

    shared: Mapping[str, Any] = field(default_factory=lambda: {"t": REQUIRED})
    each: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[int, int] = (1, 1)
    base: str = "required"


def all_terms(methods: Mapping[str, Terms]) -> dict[str, Terms]:
    """The terms of `methods` and of slerp."""
    return {"slerp": PairTerms(), **methods}


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a slice, by number. `layers` is [first, end); None is all of them."""

    model: int
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output and what they are merged from. `base` is the place of the base model among the sources,
    None if there is none or the method ignores it."""

    sources: tuple[Source, ...]
    base: int | None
    parameters: Settings

    @property
    def num_layers(self) -> int | None:
        """How many layers of the output this is; None if the models' own number."""
        layers = self.sources[0].layers
        return layers[1] - layers[0] if layers else None


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of layers and what belongs to it. `name` is its name in `modules`; None is the whole model. A module
    that is not sliced has one slice: all layers, as they are."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Settings

    @property
    def num_layers(self) -> int | None:
        """How many layers the slices make; None if the models' own number."""
        lengths = [part.num_layers for part in self.slices]
        return sum(length or 0 for length in lengths) if lengths[0] is not None else None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Where the embedding of a token comes from: `kind` is "model" (the token's own row there), "model_token" (the row
    of `token` or `token_id` there), "zero", or "default" (as if it were not named). `force`: in all models, even those
    that have the token."""

    kind: str
    model: int | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerAsk:
    """The output's vocabulary: `source` is "union", "base" or a model's number; `tokens` are those given by name."""

    source: str | int
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class ModelsRecipe:
    """A merge of any number of models, as asked.

    `models` are all that are named, each once, in the order of the text; `base` is the number of base_model. `dtype` is
    what every input is cast to as it is read, `out_dtype` what the output is written in: float32, float16, bfloat16 or
    float64, None if not asked. `text` is the recipe as given, `where` its file's name. `warnings` name what has no
    effect, and why.
    """

    models: tuple[ModelRef, ...]
    base: int | None
    method: str
    modules: tuple[Module, ...]
    parameters: Settings
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerAsk | None = None
    chat_template: str | None = None
    text: str = ""
    where: str = "the recipe"
    warnings: tuple[str, ...] = ()

    @property
    def scopes(self) -> Iterator[Settings]:
        """All places in which the recipe sets parameters."""
        yield self.parameters
        for module in self.modules:
            yield module.parameters
            for part in module.slices:
                yield from (part.parameters, *(source.parameters for source in part.sources))

    @property
    def donor(self) -> int:
        """The model whose configuration and tokenizer are copied: base_model, else the first one listed."""
        return 0 if self.base is None else self.base

    @property
    def num_layers(self) -> int | None:
        """What config.json's num_hidden_layers must become; None if unchanged. (The layers of a module that has a name
        are that module's: see `modules`.)"""
        return self.modules[0].num_layers if self.modules[0].name is None else None

    @property
    def sources(self) -> frozenset[int]:
        """The models whose tensors are merged; the others lend a configuration or a tokenizer."""
        return frozenset(source.model for m in self.modules for part in m.slices for source in part.sources)
