"""Conversations -> segments: under `###` headers, or by the tokenizer's own chat template.

A template gets each message whole, with tool calls, reasoning and whatever else the row holds. What a format cannot
write, and a template does not write, is refused: learned without it, a turn would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.errors import TrainError

USER, ASSISTANT, SYSTEM = "### User:\n", "### Assistant:\n", "### System:\n"
_HEADERS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
# What a turn says beside its content, under the names that data sets have for it.
_SAYINGS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Message = Mapping[str, Any]


class BadRow(Exception):
    """A row that cannot become text, and why; whoever reads rows knows its number."""


@dataclass(frozen=True)
class Segment:
    """Text tokenised apart from its neighbours; `learned` when the model is to predict its tokens."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Rendered:
    """An example as segments; none when nothing is to be learned. `last_turn_only`: the template writes earlier turns
    in another way, so only the last assistant turn is learned."""

    segments: list[Segment] = field(default_factory=list)
    last_turn_only: bool = False


def read_messages(value: Any, column: str) -> list[Message]:
    """A cell's messages, without keys that are empty: `datasets` gives every message the keys of all others."""
    try:
        return [_message(message) for message in value or ()]
    except (TypeError, KeyError, ValueError) as e:
        raise BadRow(f"column {column} is {value!r:.80}, expected a list of {{role, content}}.") from e


def _message(message: Any) -> Message:
    """TypeError or KeyError for what is no message, and for content that is not text."""
    known = {key: plain for key, item in dict(message).items() if (plain := without_empty(item)) is not None}
    content = known.get("content", "")
    if isinstance(content, list) and all(isinstance(p, dict) and set(p) == {"type", "text"} for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(known["role"], str):
        raise TypeError(content)
    return {**known, "content": content.strip()}


def without_empty(value: Any) -> Any:
    """A value without the keys, at any depth, that are null."""
    if isinstance(value, Mapping):
        return {key: plain for key, item in value.items() if (plain := without_empty(item)) is not None}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


def _says_something(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"] or any(message.get(key) for key in _SAYINGS))


def memphis_chat(messages: Sequence[Message]) -> Rendered:
    """Turns under `###` headers; each assistant turn is learned together with the user header after it."""
    segments: list[Segment] = []
    pending, header_written = "", False
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in _HEADERS or (header_written and role != "user"):
            expected = "user" if header_written else "system, user or assistant"
            raise BadRow(f"a message has role {role!r}, expected {expected}.")
        if lost := [key for key in _SAYINGS if message.get(key)]:
            raise BadRow(f"a message has {lost[0]}, which memphis-chat cannot write. Set format: chat-template.")
        pending += "" if header_written else _HEADERS[role]
        header_written = role == "assistant"
        if role == "assistant":
            segments += [Segment(pending, False), Segment(f"{content}\n{USER}", True)]
            pending = ""
        else:
            pending += f"{content}\n"
    return Rendered(segments if any(map(_says_something, messages)) else [])


class ChatTemplate:
    """A tokenizer's chat template, for the rows of one source. `tools` are those that a row offers to the model."""

    def __init__(self, tokenizer: Any, title: str, tools: Any = None) -> None:
        if not tokenizer.chat_template:
            raise TrainError(f"Source {title}: the tokenizer has no chat template. Set format: memphis-chat.")
        self._tokenizer, self._tools = tokenizer, tools

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Each assistant turn, from its generation prompt to its end, as it is written when it is the last one."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(map(_says_something, messages)):
            return Rendered()
        segments: list[Segment] = []
        done = ""
        for number in turns:
            before, after = self._around(messages, number)
            if not before.startswith(done):
                return self._last_turn(messages, turns[-1])
            segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
            done = after
        return Rendered(segments)

    def _last_turn(self, messages: Sequence[Message], number: int) -> Rendered:
        """A model never sees earlier turns as they were written when they were the last: templates drop their
        reasoning, for example. The last turn is exact."""
        before, after = self._around(messages, number)
        if not _says_something(messages[number]):
            return Rendered(last_turn_only=True)
        return Rendered([Segment(before, False), Segment(after[len(before) :], True)], last_turn_only=True)

    def _around(self, messages: Sequence[Message], number: int) -> tuple[str, str]:
        """The conversation up to a turn's generation prompt, and up to its end."""
        before = self._text(messages[:number], prompt=True)
        after = self._text(messages[: number + 1])
        if not after.startswith(before):
            raise BadRow(
                "the tokenizer's chat template does not write an assistant turn behind its generation prompt, so the "
                "learned tokens cannot be found. Set format: memphis-chat."
            )
        for key in _SAYINGS:
            if messages[number].get(key):
                without = {name: value for name, value in messages[number].items() if name != key}
                if self._text([*messages[:number], without]) == after:
                    raise BadRow(
                        f"a message has {key}, which the tokenizer's chat template does not write. Use a tokenizer "
                        "whose template does."
                    )
        return before, after

    def _text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise BadRow(
                f"the tokenizer's chat template refuses the conversation ({e}). Set format: memphis-chat."
            ) from e
        return text
