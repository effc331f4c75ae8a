"""The configurations in one config.json: the model's own, and those of its parts (text, vision ...), at any depth.

A part's configuration is an object under a key that ends in `config`, or one that has a `model_type` (`encoder` and
`decoder` of older models). Objects in lists do not count, nor does quantization_config, which describes how weights are
stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

KeyPath = tuple[str, ...]  # the keys that lead to a configuration; () for the model's own

# Parts beside the language model: they have layers, and some have tokens, of their own.
_OTHERS = re.compile(
    r"vision|visual|image|video|audio|speech|codec|2wav|talker|(?:^|_)vit(?:_|$)|qformer|perceiver|projector|resampler"
    r"|^(?:encoder|question_encoder|generation_config)$"
)


def is_sub_config(key: str, value: Any) -> bool:
    """Whether a member of a configuration is the configuration of a part."""
    if not isinstance(value, dict) or key == "quantization_config":
        return False
    return key.endswith("config") or isinstance(value.get("model_type"), str)


def is_of_text(keys: KeyPath) -> bool:
    """Whether the configuration under these keys belongs to the whole model or to its language model.

    >>> [is_of_text(keys) for keys in ((), ("llm_config",), ("thinker_config", "text_config"), ("vision_config",))]
    [True, True, True, False]
    """
    return not any(map(_OTHERS.search, keys))


def sub_configs(config: Mapping[str, Any], keys: KeyPath = ()) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Every configuration with its keys; a part's configuration comes after its parent's."""
    yield keys, config
    for key, value in config.items():
        if is_sub_config(key, value):
            yield from sub_configs(value, (*keys, key))


def text_configs(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The configurations of the language model: the model's own, and its text part's."""
    return (part for keys, part in sub_configs(config or {}) if is_of_text(keys))
