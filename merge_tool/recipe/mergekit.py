"""mergekit's YAML -> `Recipe`: every error that the text alone shows is raised here, with its line.

Follows the format's rules as docs/mergekit.md states them. mergekit ignores unknown keys; here an unknown key is an
error, and a known key without effect a warning. Opens no checkpoint; `expand` is the next step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, reason, shown
from merge_tool.methods.steps import REQUIRED, Method
from merge_tool.recipe.mergekit_models import NamedModels
from merge_tool.recipe.mergekit_parameters import INERT, Parameters, parse_values
from merge_tool.recipe.mergekit_tokenizer import parse_tokenizer
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.options import Options, as_json
from merge_tool.recipe.recipe import Module, Recipe, Slice, Source
from merge_tool.recipe.settings import Settings
from merge_tool.recipe.templates import TEMPLATES
from merge_tool.recipe.yaml_edit import OWN
from merge_tool.recipe.yaml_text import Fields, Text, Value, kind, nearest, parse_yaml, plain_value

DTYPES = ("float32", "float16", "bfloat16", "float64")
TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source",
    "tokenizer", "chat_template", OWN,
)  # fmt: skip
_UNUSED = {
    **INERT,
    "name": "nothing in the output is called by it",
    "pad_to_multiple_of": "mergekit does not read it there; it belongs into `tokenizer:`",
    "residual_weight": "mergekit reads it, too, and never uses it",
    "override_architecture": "tensors are matched by their names, whatever the architecture",
}
_PLACES = {
    **dict.fromkeys(TOP, "it belongs at the top of the recipe"),
    "layer_range": "it belongs into slices[].sources",
    "sources": "it belongs into slices",
    "revision": "write model: PATH@REVISION",
    "out_path": "the output is named on the command line",
}
_OTHERS = {
    "experts": "a mixture-of-experts recipe (mergekit-moe), which is not a merge of equal models",
    "gate_mode": "a mixture-of-experts recipe (mergekit-moe), which is not a merge of equal models",
    "stages": "a list of merges (mergekit-multi); run them one after another",
    "genome": "a search of mergekit-evolve; run its best recipe instead",
}
_MODEL = re.compile(r"base|model-\d+")
_LARGEST_RECIPE = 1_000_000  # bytes
_KINDS = ("models", "slices", "modules")
_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64", "half": "float16"}


def read_recipe(
    recipe: str | Path | Mapping[str, Any],
    methods: Mapping[str, Method],
    *,
    extrapolate: bool = False,
    values: Sequence[str] | Mapping[str, Any] = (),
    models_dir: str | Path | None = None,
    **options: Any,
) -> Recipe:
    """The recipe of a YAML file or an equal mapping. `options` are the fields of Options; they and `values` replace the
    recipe's. In `models_dir` its models are looked up by name, as in parse_recipe. Raises RecipeError."""
    text, where = recipe_text(recipe)
    parsed = parse_recipe(
        text,
        where,
        methods,
        extrapolate=extrapolate,
        values=values,
        options=make_options(**options),
        given=frozenset(options),
        models_dir=models_dir,
    )
    return parsed if isinstance(recipe, Mapping) else replace(parsed, folder=str(Path(recipe).parent))


def parse_recipe(
    text: str,
    where: str,
    methods: Mapping[str, Method],
    *,
    extrapolate: bool = False,
    values: Sequence[str] | Mapping[str, Any] = (),
    options: Options | None = None,
    given: Collection[str] | None = None,
    models_dir: str | Path | None = None,
) -> Recipe:
    """The recipe in `text` (of the file `where`); `methods` are the known methods.

    Under the key `merge_tool` a published recipe has options; those of `options` that are `given` (by default, those
    that are not the default) count before them. With `models_dir` the models are paths in that folder.

    `values` are parameters for all tensors that replace the recipe's: NAME=VALUE[,VALUE...], or a mapping. Each of
    several values makes an output.

    Raises RecipeError for unknown keys, wrong types, values out of range, too few or too many models, missing
    parameters: with the file, the line, and what would be right.
    """
    options = options or Options()
    if models_dir is not None and not Path(models_dir).is_dir():
        raise RecipeError(f"--models-dir {shown(models_dir)}: is not a folder.")
    parser = _Parser(
        where=where,
        methods=methods,
        extrapolate=extrapolate,
        values=values,
        options=options,
        given=as_json(options).keys() if given is None else given,
        models_dir="" if models_dir is None else str(models_dir),
    )
    return parser.recipe(text)


class _Parser:
    def __init__(
        self,
        where: str,
        methods: Mapping[str, Method],
        extrapolate: bool,
        values: Sequence[str] | Mapping[str, Any],
        options: Options,
        given: Collection[str],
        models_dir: str,
    ) -> None:
        self._methods, self._options, self._values = methods, options, parse_values(values)
        self._given = given
        parameters = {key for method in self._methods.values() for key in (*method.shared, *method.each)}
        self._text = Text(where, _UNUSED, {**dict.fromkeys(parameters, "it belongs under `parameters:`"), **_PLACES})
        self._models = NamedModels(self._text, models_dir)
        self._extrapolate = extrapolate
        self._lent_patterns: tuple[str, ...] = ()

    def recipe(self, text: str) -> Recipe:
        """Raises RecipeError with all errors of the text at once, as far as one does not hide another."""
        top, attempt = parse_yaml(self._text, text), self._text.attempt
        self._check_program(self._text.mapping(top, "the recipe"))
        fields = self._text.fields(top, "the recipe", TOP)
        name = self._method_name(top, fields)
        attempt(self._read_own, fields, instead=None)
        base = attempt(self._models.optional_ref, fields, "base_model", instead=None)
        if base is not None and self._is_alone(fields, base) and self._methods[name].base in ("required", "optional"):
            self._text.warnings.setdefault(
                f"{self._text.where}: {name} of base_model alone is base_model: the output is {shown(base)} as it is"
                f"{', with the adapter in it' if base.lora else ''}."
            )
            name = "passthrough"
        self._name, self._method = name, self._methods[name]
        self._parameters = Parameters(self._text, name, self._methods, self._extrapolate)
        nothing: Settings = {}
        parameters = attempt(self._parameters.parse, fields.get("parameters"), "parameters", instead=nothing)
        no_modules: tuple[Module, ...] = ()
        modules = attempt(self._modules, top, fields, base, parameters, instead=no_modules)
        parameters_of_all = Parameters(Text("--set"), name, self._methods, self._extrapolate)
        base_number = self._models.number(base) if base else None
        outputs = parameters_of_all.outputs(self._values, _listed_models(fields, modules), base_number)
        tokenizer = attempt(parse_tokenizer, self._text, self._models, fields, has_base=base is not None, instead=None)
        dtype, out_dtype = (attempt(self._dtype, fields, key, instead=None) for key in ("dtype", "out_dtype"))
        chat_template = attempt(self._chat_template, fields, instead=None)
        self._text.check()
        models = self._models.refs  # the warnings are complete only now
        recipe = Recipe(
            models=models,
            names=tuple(f"model-{number}" for number in range(1, len(models) + 1)),
            base=base_number,
            method=name,
            modules=modules,
            parameters=parameters,
            outputs=outputs,
            options=replace(self._options, dtype=self._options.dtype or out_dtype or dtype),
            tokenizer=tokenizer,
            chat_template=chat_template,
            text=text,
            where=self._text.where,
            places=self._models.places,
            lent_patterns=self._lent_patterns,
            warnings=tuple(self._text.warnings),
        )
        return replace(recipe, options=recipe.plain_options())

    def _read_own(self, fields: Fields) -> None:
        """Options and values of a published recipe: what the command line gives comes before them."""
        if (value := fields.get(OWN)) is None or value.plain is None:
            return
        known = [*(f.name for f in fields_of(Options)), "set", "extrapolate"]
        own = {key: plain_value(item) for key, item in self._text.fields(value, OWN, known).items()}
        try:
            lent = {key: own[key] for key in own if key not in {*self._given, "set", "extrapolate"}}
            for key in ("only", "exclude", "ids"):
                if not isinstance(lent.get(key, []), list) or not all(isinstance(x, str) for x in lent.get(key, [])):
                    raise RecipeError(f"{key} is no list of texts.")
            defaults = as_json(Options(), all_of_them=True)
            wrong = [k for k, v in lent.items() if not _is_like(v, defaults[k])]
            if not _is_no_file(lent.get("chat_template")):
                wrong.append("chat_template")
            if wrong:
                raise RecipeError(f"{wrong[0]} is {shown(lent[wrong[0]])}, which is no value for it.")
            self._lent_patterns = (*lent.get("only", ()), *lent.get("exclude", ()))
            self._options = replace(self._options, **lent)
            texts = own.get("set", [])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise RecipeError("set is no list of NAME=VALUE.")
            self._values = {**parse_values(texts), **self._values}
            self._extrapolate = self._extrapolate or own.get("extrapolate") is True
        except RecipeError as e:
            raise self._text.error(value.line, f"{OWN}: {e}") from e

    def _is_alone(self, fields: Fields, base: ModelRef) -> bool:
        """Whether base_model is the only model that is listed."""
        items = fields["models"].plain if "models" in fields else None
        if not isinstance(items, tuple) or not items:
            return False
        refs = [item.plain.get("model") if isinstance(item.plain, Mapping) else None for item in items]
        return all(ref is not None and isinstance(ref.plain, str) and self._models.ref(ref) == base for ref in refs)

    # What the whole is

    def _check_program(self, fields: Fields) -> None:
        for key, what in _OTHERS.items():
            if key in fields:
                raise self._text.error(fields[key].key_line, f"'{key}' belongs to {what}.")
        if "method" in fields and "merge_method" not in fields:
            raise self._text.error(
                fields["method"].key_line,
                "'method' is the key of mlx-lm's recipes, whose lists mean other values along the layers. For "
                "mergekit's rules write merge_method, `- model: PATH` for each model, and base_model: the first one.",
            )

    def _method_name(self, top: Value, fields: Fields) -> str:
        if "merge_method" not in fields:
            raise self._text.error(top.line, f"there is no merge_method, expected one of: {self._known_methods}.")
        name = self._text.string(value := fields["merge_method"], "merge_method")
        if name not in self._methods:
            meant = nearest(name, self._methods.keys())
            raise self._text.error(
                value.line, f"merge_method is '{shown(name)}'{meant}, expected one of: {self._known_methods}."
            )
        return name

    @property
    def _known_methods(self) -> str:
        return ", ".join(sorted(self._methods))

    def _modules(self, top: Value, fields: Fields, base: ModelRef | None, parameters: Settings) -> tuple[Module, ...]:
        kinds = [key for key in _KINDS if key in fields and fields[key].plain is not None]
        if len(kinds) != 1:
            has = " and ".join(kinds) or "no model"
            raise self._text.error(top.line, f"the recipe has {has}, expected exactly one of: {', '.join(_KINDS)}.")
        if kinds != ["modules"]:
            return (self._module(None, fields, base, [parameters]),)
        modules = []
        for name, value in self._text.mapping(fields["modules"], "modules").items():
            what = f"the module '{shown(name)}'"
            inside = self._text.fields(value, what, ("models", "slices", "parameters"))
            inside = {key: part for key, part in inside.items() if part.plain is not None}
            if ("models" in inside) == ("slices" in inside):
                raise self._text.error(value.line, f"{what} needs either models or slices.")
            modules.append(self._module(name, inside, base, [parameters]))
        if not modules:
            raise self._text.error(fields["modules"].line, "modules is empty, expected NAME: {models: ...}.")
        return tuple(modules)

    def _module(self, name: str | None, fields: Fields, base: ModelRef | None, outer: list[Settings]) -> Module:
        own = self._parameters.parse(fields.get("parameters"), "parameters") if name is not None else {}
        scopes = [own, *outer]
        if "models" in fields and fields["models"].plain is not None:
            return Module(name, (self._all_layers(fields["models"], base, scopes),), own)
        slices = self._text.items(fields["slices"], "slices")
        parts = [self._text.attempt(self._slice, value, base, scopes, instead=None) for value in slices]
        module = Module(name, tuple(part for part in parts if part is not None), own)
        if None not in parts and module.num_layers == 0:
            raise self._text.error(slices[0].line, "the slices have no layers at all, expected one layer or more.")
        return module

    # Slices and their sources

    def _all_layers(self, value: Value, base: ModelRef | None, scopes: list[Settings]) -> Slice:
        """`models`: one slice of all layers; base_model is one of its sources even if it is not listed."""
        refs: list[ModelRef] = []
        sources: list[Source] = []
        for item in self._text.items(value, "models"):
            if (entry := self._text.attempt(self._listed, item, base, scopes, instead=None)) is not None:
                refs.append(entry[0])
                sources.append(Source(self._models.number(entry[0]), None, entry[1]))
        self._text.check()
        if base and base not in refs:
            refs.append(base)
            sources.append(Source(self._models.number(base), None, {}))
        return self._checked_slice(value, refs, sources, base, {}, scopes)

    def _listed(self, item: Value, base: ModelRef | None, scopes: list[Settings]) -> tuple[ModelRef, Settings]:
        if isinstance(item.plain, str):
            raise self._text.error(item.line, f"a model is {kind(item)}, expected `- model: {shown(item.plain)}`.")
        return self._source(self._entry(item, "an entry of models", ("model", "parameters")), base, scopes)

    def _slice(self, value: Value, base: ModelRef | None, scopes: list[Settings]) -> Slice:
        fields = self._text.fields(value, "an entry of slices", ("sources", "base_model", "parameters"))
        if "sources" not in fields:
            raise self._text.error(value.line, "an entry of slices has no sources, expected a list of models.")
        base = self._models.optional_ref(fields, "base_model") or base
        own = self._parameters.parse(fields.get("parameters"), "a slice's parameters")
        refs: list[ModelRef] = []
        sources: list[Source] = []
        for item in self._text.items(fields["sources"], "sources"):
            inside = self._entry(item, "an entry of sources", ("model", "layer_range", "parameters"))
            ref, settings = self._source(inside, base, [own, *scopes])
            refs.append(ref)
            sources.append(Source(self._models.number(ref), self._layers(item, inside), settings))
        self._check_lengths(value, sources)
        return self._checked_slice(value, refs, sources, base, own, scopes)

    def _entry(self, value: Value, what: str, known: tuple[str, ...]) -> Fields:
        fields = self._text.fields(value, what, known)
        if "model" not in fields:
            raise self._text.error(value.line, f"{what} has no model, expected `model: PATH`.")
        return fields

    def _source(self, fields: Fields, base: ModelRef | None, scopes: Sequence[Settings]) -> tuple[ModelRef, Settings]:
        ref = self._models.ref(fields["model"])
        parameters = fields.get("parameters")
        settings = self._parameters.parse(parameters, f"the parameters of {shown(ref)}", of_model=scopes)
        if settings and parameters and ref == base and self._method.base != "none":
            self._text.warn(parameters.key_line, "parameters", f"{shown(ref)} is base_model, which has none of its own")
        return ref, settings

    def _layers(self, item: Value, fields: Fields) -> tuple[int, int]:
        expected = "expected [first, end]: two whole numbers from 0 on, the end not included"
        if (value := fields.get("layer_range")) is None:
            raise self._text.error(item.line, f"an entry of sources has no layer_range, {expected}.")
        plain = [part.plain for part in value.plain] if isinstance(value.plain, tuple) else []
        if len(plain) != 2 or not all(type(n) is int and n >= 0 for n in plain) or plain[0] > plain[1]:
            raise self._text.error(value.line, f"layer_range is {_list_text(value)}, {expected}.")
        return plain[0], plain[1]

    def _check_lengths(self, value: Value, sources: Sequence[Source]) -> None:
        ranges = [source.layers for source in sources if source.layers]
        if len({end - first for first, end in ranges}) > 1:
            texts = ", ".join(f"[{first}, {end}]" for first, end in ranges)
            raise self._text.error(value.line, f"the sources of a slice have layers {texts}, expected equally many.")

    def _checked_slice(
        self, value: Value, refs: list[ModelRef], sources: list[Source], base: ModelRef | None, own: Settings,
        scopes: list[Settings],
    ) -> Slice:  # fmt: skip
        base_index = refs.index(base) if base in refs and base and self._method.base != "none" else None
        self._check_base(value, refs, base_index, base)
        self._check_count(value, len(refs), base_index)
        part = Slice(tuple(sources), base_index, own)
        self._check_required(value, part, refs, [own, *scopes])
        return part

    def _check_base(
        self, value: Value, refs: Sequence[ModelRef], base_index: int | None, base: ModelRef | None
    ) -> None:
        if base_index is not None or self._method.base == "none" or (self._method.base == "optional" and base is None):
            return
        if base is None:
            which = "the one at t = 0" if self._method.base == "first" else "the one that the others are compared with"
            raise self._text.error(value.line, f"{self._name} needs base_model: one of the models, {which}.")
        first = shown(refs[0])
        way = (
            f"Write base_model: {first}, the source that t = 0 stands for (a slice may have a base_model of its own)."
            if self._method.base == "first"
            else f"Add it as a source: {{model: {shown(base)}, layer_range: [first, end]}}."
        )
        raise self._text.error(
            value.line,
            f"base_model {shown(base)} is not among the sources of the slice, which must give its layers. {way}",
        )

    def _check_count(self, value: Value, count: int, base: int | None) -> None:
        fewest, most = self._method.inputs
        is_apart = base is not None and self._method.base != "first"
        number = count - is_apart
        if fewest <= number <= most:
            return
        wanted = (
            f"exactly {fewest}" if fewest == most else f"at least {fewest}" if number < fewest else f"at most {most}"
        )
        noun = "model" if wanted.endswith(" 1") else "models"
        beside = " beside base_model" if is_apart else ""
        also = " with base_model, which is one of them" if beside == "" and base == count - 1 and number > most else ""
        raise self._text.error(value.line, f"{self._name} merges {wanted} {noun}{beside}, found {number}{also}.")

    def _check_required(self, value: Value, part: Slice, refs: list[ModelRef], scopes: list[Settings]) -> None:
        keys = {key for scope in (*scopes, self._values) for key in scope}
        for key, default in self._method.shared.items():
            if default is REQUIRED and key not in keys:
                raise self._text.error(value.line, f"{self._name} needs a '{key}': put it into `parameters:`.")
        for key, default in self._method.each.items():
            lacking = [
                ref
                for index, (source, ref) in enumerate(zip(part.sources, refs, strict=True))
                if default is REQUIRED and index != part.base and key not in keys and key not in source.parameters
            ]
            if lacking:
                raise self._text.error(
                    value.line,
                    f"{self._name} needs a '{key}' for {', '.join(map(shown, lacking))}: put it into the parameters "
                    "of the model, or into the recipe's for all.",
                )

    # Values

    def _dtype(self, fields: Fields, key: str) -> str | None:
        text = self._text.optional_string(fields, key)
        if text is None:
            return None
        name = text.removeprefix("torch.")
        if name not in DTYPES:
            close = f" (did you mean '{_DTYPE_NAMES[name]}'?)" if name in _DTYPE_NAMES else nearest(name, DTYPES)
            raise self._text.error(
                fields[key].line, f"{key} is '{shown(text)}'{close}, expected one of: {', '.join(DTYPES)}."
            )
        return name

    def _chat_template(self, fields: Fields) -> str | None:
        template = self._text.optional_string(fields, "chat_template")
        if template is None or template in ("auto", *TEMPLATES) or "{" in template:
            return template
        raise self._text.error(
            fields["chat_template"].line,
            f"chat_template is '{shown(template)}'{nearest(template, TEMPLATES.keys())}, expected auto, one of "
            f"{', '.join(TEMPLATES)}, or a template in Jinja.",
        )


def _listed_models(fields: Fields, modules: Sequence[Module]) -> list[int]:
    """The numbers of the entries of the recipe's `models`."""
    entries = fields["models"].plain if "models" in fields else None
    if not isinstance(entries, tuple) or not modules or not modules[0].slices:
        return []
    return [source.model for source in modules[0].slices[0].sources][: len(entries)]


def make_options(**options: Any) -> Options:
    """Options from a mapping. Raises RecipeError for an unknown name."""
    known = [f.name for f in fields_of(Options)]
    if unknown := sorted(options.keys() - set(known)):
        raise RecipeError(f"Unknown option {shown(unknown[0])}. The options are: {', '.join(sorted(known))}.")
    return Options(**options)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value of YAML may be an option's, by the default of that option."""
    return isinstance(value, str) if default is None else type(value) is type(default)


def _is_no_file(template: Any) -> bool:
    """Whether a chat template of a published recipe names no file here: it is a text, a known name or a model."""
    text = template or "auto"
    return "{" in text or text in ("auto", *TEMPLATES) or _MODEL.fullmatch(text) is not None


def _list_text(value: Value) -> Any:
    if isinstance(value.plain, tuple) and all(not isinstance(v.plain, (tuple, Mapping)) for v in value.plain):
        return f"[{', '.join(shown(v.text, 20) for v in value.plain[:5])}]"
    return kind(value)


def recipe_text(recipe: str | Path | Mapping[str, Any]) -> tuple[str, str]:
    """The recipe as YAML, and its name for messages."""
    if isinstance(recipe, Mapping):
        import yaml

        try:
            return yaml.safe_dump(dict(recipe), sort_keys=False), "the recipe"
        except yaml.YAMLError as e:
            raise RecipeError(f"The recipe holds what YAML cannot: {shown(e)}. Give texts, numbers and lists.") from e
    path = Path(recipe)
    try:
        if path.stat().st_size > _LARGEST_RECIPE:
            raise RecipeError(
                f"{shown(path)}: has {path.stat().st_size:,} bytes, at most {_LARGEST_RECIPE:,} are read."
            )
        return path.read_text(encoding="utf-8"), path.name
    except IsADirectoryError as e:
        raise RecipeError(
            f"{shown(path)}: is a folder, expected a recipe, a file with YAML. Two models: slerp-merge BASE FT OUT."
        ) from e
    except (OSError, ValueError) as e:
        raise RecipeError(f"{shown(path)}: cannot be read ({reason(e)}).") from e
