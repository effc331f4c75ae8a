"""The models that a recipe's text names, each once, numbered."""

from __future__ import annotations

from collections.abc import Mapping

from merge_tool.errors import RecipeError
from merge_tool.recipe.model_ref import ModelRef, parse_ref, split_revision
from merge_tool.recipe.yaml_text import Fields, Text, Value


class NamedModels:
    """Models in the order in which the text first names them."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._numbers: dict[ModelRef, int] = {}

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        return tuple(self._numbers)

    def number(self, ref: ModelRef) -> int:
        return self._numbers.setdefault(ref, len(self._numbers))

    def ref(self, value: Value) -> ModelRef:
        """A model as text, or as a mapping: {model: {path, revision}, lora: {path, revision}}."""
        try:
            if isinstance(value.plain, Mapping):
                return self._from_mapping(value)
            return parse_ref(self._text.string(value, "a model"))
        except RecipeError as e:
            if str(e).startswith(self._text.start):
                raise
            raise self._text.error(value.line, str(e)) from e

    def optional_ref(self, fields: Fields, key: str) -> ModelRef | None:
        """None where the key is absent or null."""
        value = fields.get(key)
        return None if value is None or value.plain is None else self.ref(value)

    def _from_mapping(self, value: Value) -> ModelRef:
        fields = self._text.fields(value, "a model", ("model", "lora"))
        if "model" not in fields:
            raise self._text.error(value.line, "a model is a mapping without `model: {path: ...}`.")
        path, revision = self._path(fields["model"])
        lora = fields.get("lora")
        return ModelRef(path, revision, *((None, None) if lora is None or lora.plain is None else self._path(lora)))

    def _path(self, value: Value) -> tuple[str, str | None]:
        if not isinstance(value.plain, Mapping):
            return split_revision(self._text.string(value, "a path"))
        fields = self._text.fields(value, "a model", ("path", "revision"))
        if "path" not in fields:
            raise self._text.error(value.line, "a model has no path.")
        return self._text.string(fields["path"], "a path"), self._text.optional_string(fields, "revision")
