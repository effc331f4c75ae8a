"""YAML of strangers -> plain values with their lines, and checks of their types. Only safe tags; text that is too
large, too deep or too often repeated, and keys given twice, are refused before anything is built from them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

from merge_tool.errors import RecipeError, shown

MOST_BYTES = 1_000_000
_MOST_VALUES = 50_000  # each use of an alias counts: nine lines of aliases can stand for a billion values
_MOST_DEPTH = 40
_TOO_MANY = f"more than {_MOST_VALUES:,} values, aliases included, which is no recipe"
_TOO_DEEP = f"nested too deeply, expected at most {_MOST_DEPTH} levels"
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = {"mapping": "tag:yaml.org,2002:map", "sequence": "tag:yaml.org,2002:seq"}


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the text: `plain` is a scalar, a tuple of Values or a mapping of text to Values. `line` counts from
    1. `key_line` is the line of its key, if it has one; `text` is a scalar as it was written, and `end` the position
    where it ends in the whole text. `is_lent`: it stands under a key of the whole text, and others take parts of it by
    aliases."""

    line: int
    plain: Any
    text: str = ""
    key_line: int = 0
    is_lent: bool = False
    end: int = 0


T = TypeVar("T")
Fields: TypeAlias = Mapping[str, Value]


def parse_yaml(text: Text, content: str) -> Value:
    """The one document of `content`. Raises RecipeError with the line for anything but plain, small YAML."""
    import yaml  # imported here, because it costs every other command a megabyte

    class Loader(yaml.SafeLoader):
        """Stops as soon as the text gets too deep or too long."""

        num_nodes = depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            self.num_nodes += 1
            self.depth += 1
            if self.depth > _MOST_DEPTH or self.num_nodes > _MOST_VALUES:
                what = _TOO_DEEP if self.depth > _MOST_DEPTH else _TOO_MANY
                event = self.peek_event()  # type: ignore[no-untyped-call]
                raise text.error(event.start_mark.line + 1, f"{what}.")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    where = text.where
    if len(content.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise RecipeError(f"{shown(where)} has more than {MOST_BYTES:,} bytes, which is no recipe.")
    try:
        node = yaml.compose(content, Loader=Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{shown(where)}{line}: not YAML ({shown(e.problem or e.context)}).{_hint(e)}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise RecipeError(f"{shown(where)}: not YAML ({shown(e)}).") from e
    if node is None:
        raise RecipeError(f"{shown(where)} is empty, expected a recipe: merge_method and models, at least.")
    top = _Reader(text).value(node)
    if not isinstance(node, yaml.MappingNode):
        return top
    parts = {key.value: set(_nodes(value)) for key, value in node.value}
    uses = Counter(part for nodes in parts.values() for part in nodes)
    lent = {key for key, nodes in parts.items() if any(uses[part] > 1 for part in nodes)}
    return replace(top, plain={key: replace(value, is_lent=key in lent) for key, value in top.plain.items()})


def _nodes(node: Any) -> Iterator[int]:
    """The ids of a node and all below it, each once."""
    seen, waiting = set[int](), [node]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield id(node)
        if node.id != "scalar":
            waiting += [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]


def _hint(e: Any) -> str:
    if "expected a single document" in str(e.context):
        return " A recipe is one document: give each part after a `---` a file of its own."
    return " Indent with spaces, please." if "'\\t'" in str(e.problem) else ""


class _Reader:
    """YAML nodes -> Values."""

    def __init__(self, text: Text) -> None:
        import yaml

        self._text = text
        self._scalars = yaml.constructor.SafeConstructor()
        self._errors: tuple[type[Exception], ...] = (yaml.YAMLError, ValueError, OverflowError)
        self._num_values = 0

    def value(self, node: Any, depth: int = 0, key_line: int = 0) -> Value:
        self._num_values += 1
        if self._num_values > _MOST_VALUES:
            raise self._error(node, _TOO_MANY)
        if depth > _MOST_DEPTH:
            raise self._error(node, _TOO_DEEP)
        if node.id in _PLAIN and node.tag != _PLAIN[node.id]:
            raise self._error(node, f"'{shown(node.tag, 50)}' is not one of YAML's plain types")
        plain: Any
        if node.id == "mapping":
            plain = self._mapping(node, depth)
        elif node.id == "sequence":
            plain = tuple(self.value(item, depth + 1) for item in node.value)
        else:
            scalar = self._scalar(node)
            return Value(node.start_mark.line + 1, scalar, node.value, key_line, end=node.end_mark.index)
        return Value(node.start_mark.line + 1, plain, "", key_line)

    def _mapping(self, node: Any, depth: int) -> Fields:
        own: dict[str, Value] = {}
        inherited: dict[str, Value] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for name, item in self._inherited(value, depth):
                    inherited.setdefault(name, item)  # the first mapping counts
                continue
            name, item = self._key(key), self.value(value, depth + 1, key.start_mark.line + 1)
            if name in own and _plain(own[name]) != _plain(item):
                raise self._error(
                    key, f"'{shown(name)}' is given twice with different values, first in line {own[name].key_line}"
                )
            if name in own:
                self._text.warn(item.key_line, name, f"line {own[name].key_line} says the same")
                continue
            own[name] = item
        return own | {name: item for name, item in inherited.items() if name not in own}

    def _inherited(self, node: Any, depth: int) -> list[tuple[str, Value]]:
        """The items that `<<: *other` or `<<: [*one, *other]` adds."""
        items: list[tuple[str, Value]] = []
        for mapping in node.value if node.id == "sequence" else [node]:
            if mapping.id != "mapping":
                raise self._error(mapping, "`<<` expects a mapping or a list of them")
            items.extend(self.value(mapping, depth + 1).plain.items())
        return items

    def _key(self, node: Any) -> str:
        if node.id != "scalar":
            raise self._error(node, "a key is a list or a mapping, expected text")
        if not isinstance(key := self._scalar(node), str):
            raise self._error(node, f"the key {shown(node.value)} is read as {shown(key)}, expected text: quote it")
        return key

    def _scalar(self, node: Any) -> Any:
        try:
            return self._scalars.construct_object(node)
        except self._errors as e:
            raise self._error(node, f"'{shown(node.value, 50)}' is not a value of YAML's plain types") from e

    def _error(self, node: Any, what: str) -> RecipeError:
        return self._text.error(node.start_mark.line + 1, f"{what}.")


def _plain(value: Value) -> Any:
    """A value without its lines."""
    if isinstance(value.plain, Mapping):
        return {key: _plain(item) for key, item in value.plain.items()}
    if isinstance(value.plain, tuple):
        return [_plain(item) for item in value.plain]
    return type(value.plain), value.plain


def plain_value(value: Value) -> Any:
    """A value as Python has it."""
    if isinstance(value.plain, Mapping):
        return {key: plain_value(item) for key, item in value.plain.items()}
    return [plain_value(item) for item in value.plain] if isinstance(value.plain, tuple) else value.plain


class _AllErrors(RecipeError):
    """All errors of a text in one."""


def _line_number(error: str) -> int:
    match = re.match(r"line (\d+):", error)
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Text:
    """A file being read: the beginning of its error messages, checks of values, and the warnings and errors so far (in
    order, each once).

    `inert` has for known keys without effect the reason; `hints` has for misplaced keys the right place.
    """

    where: str
    inert: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    errors: dict[str, None] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The beginning of error messages."""
        return f"{shown(self.where)}, line "

    def error(self, line: int, what: str) -> RecipeError:
        """The error for a line; line 0 means the whole file."""
        return RecipeError(f"{self.start}{line}: {what}" if line else f"{shown(self.where)}: {what}")

    def attempt(self, part: Callable[..., T], *arguments: Any, instead: T, **more: Any) -> T:
        """What `part` makes of its arguments; `instead` where it raises a RecipeError, which is kept for `check`."""
        try:
            return part(*arguments, **more)
        except _AllErrors:  # kept already
            return instead
        except RecipeError as e:
            self.errors.setdefault(str(e))
            return instead

    def check(self) -> None:
        """Raise RecipeError with all errors so far, if there are any."""
        if len(self.errors) == 1:
            raise _AllErrors(next(iter(self.errors)))
        if self.errors:
            lines = sorted((error.removeprefix(f"{shown(self.where)}, ") for error in self.errors), key=_line_number)
            raise _AllErrors(f"{shown(self.where)}: {len(lines)} errors.\n  " + "\n  ".join(lines))

    def warn(self, line: int, key: str, why: str) -> None:
        self.warnings.setdefault(f"{self.start}{line}: '{shown(key)}' has no effect: {why}.")

    def fields(self, value: Value, what: str, known: Collection[str]) -> Fields:
        """A mapping of `known` keys. Inert ones are warned about and left out."""
        mapping = self.mapping(value, what)
        mapping = {
            key: item
            for key, item in mapping.items()
            if key in known or key in self.inert or not item.is_lent or nearest(key, known)  # perhaps a typo
        }
        unknown = [key for key in mapping if key not in known and key not in self.inert]
        if unknown:
            unread = "; ".join(f"'{shown(key)}'{self.meant(key, known)}" for key in unknown[:5])
            raise self.error(mapping[unknown[0]].key_line, f"{what} has no key {unread}. Known: {', '.join(known)}.")
        for key in mapping:
            if key not in known:
                self.warn(mapping[key].key_line, key, self.inert[key])
        return {key: item for key, item in mapping.items() if key in known}

    def meant(self, key: str, known: Collection[str]) -> str:
        """A hint in brackets for an unknown key; or nothing."""
        return f" ({self.hints[key]})" if key in self.hints else nearest(key, known)

    def mapping(self, value: Value, what: str) -> Fields:
        if not isinstance(value.plain, Mapping):
            raise self.error(value.line, f"{what} is {kind(value)}, expected a mapping of keys to values.")
        return value.plain

    def items(self, value: Value, what: str) -> tuple[Value, ...]:
        """A list that is not empty."""
        if not isinstance(value.plain, tuple) or not value.plain:
            what_is = "an empty list" if value.plain == () else kind(value)
            raise self.error(value.line, f"{what} is {what_is}, expected a list.")
        return value.plain

    def string(self, value: Value, what: str) -> str:
        if not isinstance(value.plain, str) or not value.plain.strip():
            raise self.error(value.line, f"{what} is {kind(value)}, expected text.")
        return value.plain

    def optional_string(self, fields: Fields, key: str) -> str | None:
        """None where the key is absent or null."""
        value = fields.get(key)
        return None if value is None or value.plain is None else self.string(value, key)


def kind(value: Value) -> str:
    """The kind of a value, in words."""
    if isinstance(value.plain, Mapping):
        return "a mapping"
    if isinstance(value.plain, tuple):
        return "a list"
    return "empty" if value.plain is None or not value.text.strip() else f"'{shown(value.text, 50)}'"


def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean ...?)`, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
