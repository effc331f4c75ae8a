"""`Recipe`: the request for a merge of any number of models, made from two paths and options (pair.py) or a YAML file
(mergekit.py). Frozen; contains nothing that only the models' files show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_tool.errors import RecipeError, shown
from merge_tool.recipe.model_ref import ModelRef, Place
from merge_tool.recipe.options import OUTPUT_DTYPES, Options
from merge_tool.recipe.settings import Setting, Settings


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a slice, by number. `layers` is [first, end); None means all layers."""

    model: int
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output and their sources. `base` is the index of the base model among the sources; None if there is
    none or the method ignores it."""

    sources: tuple[Source, ...]
    base: int | None
    parameters: Settings

    @property
    def num_layers(self) -> int | None:
        """The number of output layers in this slice; None means as many as the models have."""
        layers = self.sources[0].layers
        return layers[1] - layers[0] if layers else None


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of layers and the tensors that belong to it. `name` is its name in `modules`; None means the whole
    model. A module that is not sliced has one slice: all layers."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Settings

    @property
    def num_layers(self) -> int | None:
        """The number of layers in all slices; None means as many as the models have."""
        lengths = [part.num_layers for part in self.slices]
        return sum(length or 0 for length in lengths) if lengths[0] is not None else None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Where the embedding of a token comes from: `kind` is "model" (the token's row in `model`), "model_token" (the row
    of `token` or `token_id` in `model`), "zero", or "default" (as for unnamed tokens). `force`: also in models that
    have the token."""

    kind: str
    model: int | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The output's vocabulary: `source` is "union", "base" or a model's number; `tokens` has the tokens that the recipe
    names."""

    source: str | int
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One of the outputs of a merge: its sub-folder (empty if it is the only output), and the parameters that replace
    the recipe's: for all models, and for single models. `words` are the same in JSON: {"t": 0.3}."""

    label: str = ""
    words: Mapping[str, Any] = field(default_factory=dict)
    parameters: Settings = field(default_factory=dict)
    of_models: Mapping[int, Settings] = field(default_factory=dict)

    def all_settings(self) -> Iterator[Setting]:
        for scope in (*self.of_models.values(), self.parameters):
            yield from scope.values()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge of any number of models, as asked.

    `models` are all models that are named, in the order of the text; `names` are their names in the report. `base` is
    the number of base_model. `outputs` differ in parameters only, and are made in one pass. `text` is the recipe's
    text, if it has one, `where` its file's name and `folder` that file's folder; otherwise `words` has in JSON what the
    recipe was made from. If it `is_strict`, a pattern that matches no tensor is an error, and so are vocabularies that
    differ; published recipes need leniency there. `places` are where the text names models; `lent_patterns` the
    patterns of --only and --exclude that came with it, perhaps from a stranger. `rows_option` is this recipe's option
    for rows by token, for messages. `warnings` name keys without effect, and why.
    """

    models: tuple[ModelRef, ...]
    names: tuple[str, ...]
    base: int | None
    method: str
    modules: tuple[Module, ...]
    parameters: Settings
    outputs: tuple[Output, ...] = (Output(),)
    options: Options = field(default_factory=Options)
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    text: str = ""
    where: str = "the recipe"
    folder: str | None = None
    words: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False
    names_of: Mapping[int, Mapping[str, str]] = field(default_factory=dict)  # by model: its names -> the first's
    places: tuple[Place, ...] = ()
    lent_patterns: tuple[str, ...] = ()
    rows_option: str = "tokenizer_source: union (or base, or a model)"
    warnings: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """The model whose names, shapes and dtypes the output's tensors have: base_model, else the first one listed."""
        return 0 if self.base is None else self.base

    @property
    def donor(self) -> int:
        """The number of the model whose configuration and tokenizer are copied. Raises RecipeError for an unknown
        name."""
        if (number := self.number_of(wanted := self.options.files_from)) is None:
            raise RecipeError(f"--files-from is '{shown(wanted)}', expected one of: {', '.join(self.known_models)}.")
        return number

    def number_of(self, text: str) -> int | None:
        """The number of the model that an option's value names: base, ft, or a model as the recipe names it."""
        if text == "base":
            return self.first
        named = [k for k, ref in enumerate(self.models) if text in (str(ref), self.names[k])]
        return named[0] if len(named) == 1 else None

    def plain_options(self) -> Options:
        """The options with models by their names in the report, not by the user's paths."""
        changed: dict[str, Any] = {}
        for key in ("files_from", "chat_template"):
            text = getattr(self.options, key)
            if text is not None and text not in ("base", *self.names) and (number := self.number_of(text)) is not None:
                changed[key] = self.names[number]
        return replace(self.options, **changed)

    @property
    def known_models(self) -> list[str]:
        return list(dict.fromkeys(("base", *self.names, *map(shown, self.models))))

    @property
    def num_layers(self) -> int | None:
        """The new num_hidden_layers for config.json; None if unchanged. (For modules with names, `modules` has the
        layers.)"""
        return self.modules[0].num_layers if self.modules[0].name is None else None

    @property
    def sources(self) -> frozenset[int]:
        """The models whose tensors are merged; other models only lend a configuration or a tokenizer."""
        return frozenset(source.model for m in self.modules for part in m.slices for source in part.sources)

    def scopes(self) -> Iterator[Settings]:
        """All scopes in which parameters are set, the innermost first."""
        for output in self.outputs:
            yield from (*output.of_models.values(), output.parameters)
        for module in self.modules:
            for part in module.slices:
                yield from (*(source.parameters for source in part.sources), part.parameters)
            yield module.parameters
        yield self.parameters

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(output.label for output in self.outputs)

    @property
    def dtype_code(self) -> str | None:
        """The code of the dtype of all floats in the output; None if each tensor has its own."""
        return None if self.options.dtype is None else OUTPUT_DTYPES[self.options.dtype]


def label_of(words: Mapping[str, Any]) -> str:
    """The sub-folder of an output with these values: t-0.3."""
    return "-".join(f"{key}-{label_t(value)}" for key, value in words.items())


def label_t(t: float | bool | str) -> str:
    """The shortest text that reads back as `t`: 0.3, 1, 1e-05, true."""
    if isinstance(t, bool):
        return str(t).lower()
    return repr(t).removesuffix(".0") if isinstance(t, float) else str(t)
