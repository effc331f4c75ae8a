"""How many layers a language model has, by config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_tool.checkpoint.sub_configs import is_of_text, sub_configs

Config = Mapping[str, Any]

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_COUNTED = ("layers_block_type", "hybrid_override_pattern", "attn_layers")  # as long as the model: Nemotron-H, Reformer
PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")


def num_layers(config: Config | None) -> int | None:
    """The language model's number of layers; None if config.json does not say, or says two."""
    counts = {count for keys, part in sub_configs(config or {}) if is_of_text(keys) if (count := count_of(part))}
    return counts.pop() if len(counts) == 1 else None


def counts_layers(config: Config | None) -> bool:
    """Whether config.json says how many layers the language model has."""
    return any(count_of(part) is not None for keys, part in sub_configs(config or {}) if is_of_text(keys))


def count_of(part: Config) -> int | None:
    """The number of layers that one configuration says; None if it says none."""
    count = next((part[key] for key in COUNTS if type(part.get(key)) is int), None)
    if count is None:
        count = next((len(part[key]) for key in _COUNTED if isinstance(part.get(key), (list, str)) and part[key]), None)
    return count
