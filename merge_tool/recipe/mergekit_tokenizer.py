"""`tokenizer_source` and `tokenizer` of a recipe's text -> `Tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping

from merge_tool.errors import shown
from merge_tool.recipe.mergekit_models import NamedModels
from merge_tool.recipe.recipe import Tokenizer, TokenRow
from merge_tool.recipe.yaml_text import Fields, Text, Value, kind


def parse_tokenizer(text: Text, models: NamedModels, fields: Fields, *, has_base: bool) -> Tokenizer | None:
    """The recipe's tokenizer; None if the recipe has no such key. Raises RecipeError."""
    return _Parser(text, models, has_base).parse(fields)


class _Parser:
    def __init__(self, text: Text, models: NamedModels, has_base: bool) -> None:
        self._text = text
        self._models = models
        self._has_base = has_base

    def parse(self, fields: Fields) -> Tokenizer | None:
        source, mapping = fields.get("tokenizer_source"), fields.get("tokenizer")
        if source and mapping and source.plain is not None and mapping.plain is not None:
            raise self._text.error(source.key_line, "there are tokenizer_source and tokenizer, expected one of them.")
        if mapping and mapping.plain is not None:
            inside = self._text.fields(mapping, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
            entries = inside.get("tokens")
            tokens = {} if entries is None or entries.plain is None else self._text.mapping(entries, "tokens")
            return Tokenizer(
                self._vocabulary(inside["source"]) if "source" in inside else "union",
                {token: self._token(token, value) for token, value in tokens.items()},
                self._multiple(inside.get("pad_to_multiple_of")),
            )
        return Tokenizer(self._vocabulary(source)) if source and source.plain is not None else None

    def _vocabulary(self, value: Value) -> str | int:
        if value.plain == "base" and not self._has_base:
            raise self._text.error(value.line, "the tokenizer is the base's, but there is no base_model.")
        if value.plain in ("union", "base"):
            return str(value.plain)
        return self._models.number(self._models.ref_of_tokenizer(value))

    def _token(self, token: str, value: Value) -> TokenRow:
        what = f"the token '{shown(token)}'"
        fields = self._text.fields(value, what, ("source", "force"))
        force = fields["force"].plain if "force" in fields else False
        if not isinstance(force, bool):
            raise self._text.error(fields["force"].line, f"force is {kind(fields['force'])}, expected true or false.")
        source = fields.get("source")
        if source is None or source.plain is None:
            return TokenRow("default", force=force)
        if not isinstance(source.plain, Mapping) or "kind" not in source.plain:
            return TokenRow("model", self._models.number(self._models.ref(source)), force=force)
        return self._row(what, source, force)

    def _row(self, what: str, source: Value, force: bool) -> TokenRow:
        fields = self._text.fields(source, what, ("kind", "model", "token", "token_id"))
        name = fields["kind"].plain
        if name == "zero":
            return TokenRow("zero", force=force)
        if name != "model_token" or "model" not in fields or ("token" in fields) == ("token_id" in fields):
            raise self._text.error(
                source.line, f"{what} has a source that is neither {{kind: zero}} nor {{kind: model_token, model: ..., "
                "token: ... (or token_id: ...)}.",
            )  # fmt: skip
        token_id = fields["token_id"].plain if "token_id" in fields else None
        if token_id is not None and (type(token_id) is not int or token_id < 0):
            raise self._text.error(source.line, f"{what} has a token_id that is not a whole number.")
        text = self._text.string(fields["token"], "token") if "token" in fields else None
        return TokenRow(
            kind="model_token",
            model=self._models.number(self._models.ref(fields["model"])),
            token=text,
            token_id=token_id,
            force=force,
        )

    def _multiple(self, value: Value | None) -> int | None:
        if value is None or value.plain is None:
            return None
        if type(value.plain) is not int or not 1 <= value.plain <= 1_000_000:
            raise self._text.error(value.line, f"pad_to_multiple_of is {kind(value)}, expected 1 to 1000000.")
        return value.plain
