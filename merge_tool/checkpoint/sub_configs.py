"""The configurations in one config.json: the model's own, and those of its parts (text, vision ...), at any depth.

A part's configuration is an object under a key that ends in `config`, or one that has a `model_type` (`encoder` and
`decoder` of older models). Not what lies in a list, and not a quantization_config, which says how weights are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Place = tuple[str, ...]  # the keys that lead to a configuration; none lead to the model's own

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


def is_of_text(place: Place) -> bool:
    """Whether the configuration at a place is the whole model's, or its language model's.

    >>> [is_of_text(place) for place in ((), ("llm_config",), ("thinker_config", "text_config"), ("vision_config",))]
    [True, True, True, False]
    """
    return not any(map(_OTHERS.search, place))


def sub_configs(config: Mapping[str, Any], place: Place = ()) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every configuration and its place, a part's after that of which it is a part."""
    yield place, config
    for key, value in config.items():
        if is_sub_config(key, value):
            yield from sub_configs(value, (*place, key))


def text_configs(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The configurations that speak of the language model: the model's own, and that of its text part."""
    return (part for place, part in sub_configs(config or {}) if is_of_text(place))
