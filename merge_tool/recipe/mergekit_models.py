"""The models that a recipe's text names, each once, numbered; and every place in the text that names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merge_tool.errors import RecipeError
from merge_tool.recipe.model_ref import ModelRef, Place, located, parse_ref, split_revision
from merge_tool.recipe.yaml_text import Fields, Text, Value

_LEAD = "model:"  # before a tokenizer_source, as mergekit wrote it once


class NamedModels:
    """Models in the order in which the text first names them. `folder`: where names are looked up (--models-dir)."""

    def __init__(self, text: Text, folder: str = "") -> None:
        self._text = text
        self._folder = folder
        self._numbers: dict[ModelRef, int] = {}
        self._places: dict[Place, None] = {}

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        return tuple(self._numbers)

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(self._places)

    def number(self, ref: ModelRef) -> int:
        return self._numbers.setdefault(ref, len(self._numbers))

    def ref(self, value: Value) -> ModelRef:
        """A model as text, or as a mapping: {model: {path, revision}, lora: {path, revision}}."""
        try:
            if isinstance(value.plain, Mapping):
                return self._from_mapping(value)
            return self._noted(value, parse_ref(self._text.string(value, "a model"), self._folder))
        except RecipeError as e:
            if str(e).startswith(self._text.start):
                raise
            raise self._text.error(value.line, str(e)) from e

    def ref_of_tokenizer(self, value: Value) -> ModelRef:
        """As `ref`; also `model:NAME`."""
        if not isinstance(value.plain, str) or not value.plain.startswith(_LEAD):
            return self.ref(value)
        ref = self.ref(replace(value, plain=value.plain.removeprefix(_LEAD).strip(), end=0))
        self._places.setdefault(Place(value.end, ref, _LEAD))
        return ref

    def optional_ref(self, fields: Fields, key: str) -> ModelRef | None:
        """None where the key is absent or null."""
        value = fields.get(key)
        return None if value is None or value.plain is None else self.ref(value)

    def _noted(self, value: Value, ref: ModelRef) -> ModelRef:
        if value.end:
            self._places.setdefault(Place(value.end, ref))
        return ref

    def _from_mapping(self, value: Value) -> ModelRef:
        fields = self._text.fields(value, "a model", ("model", "lora"))
        if "model" not in fields:
            raise self._text.error(value.line, "a model is a mapping without `model: {path: ...}`.")
        path, revision = self._path(fields["model"])
        lora = fields.get("lora")
        return ModelRef(path, revision, *((None, None) if lora is None or lora.plain is None else self._path(lora)))

    def _path(self, value: Value) -> tuple[str, str | None]:
        if not isinstance(value.plain, Mapping):
            path, revision = split_revision(self._text.string(value, "a path"), self._folder)
            self._noted(value, ModelRef(path, revision))
            return path, revision
        fields = self._text.fields(value, "a model", ("path", "revision"))
        if "path" not in fields:
            raise self._text.error(value.line, "a model has no path.")
        path = located(self._text.string(fields["path"], "a path"), self._folder)
        self._noted(fields["path"], ModelRef(path))
        return path, self._text.optional_string(fields, "revision")
