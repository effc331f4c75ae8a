"""The names of an adapter's tensors, as peft writes them -> which module they change, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.source import TensorSource

_PREFIX = "base_model.model."
# what peft puts into names of whole tensors
_FULL = re.compile(r"(?:\.token_adapter)?\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_FACTOR = re.compile(
    r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_B\.bias"
    r"|lora_magnitude_vector(?=(?:\.weight)?$))(?:\.weight)?"
)
_TOKENS = re.compile(r"(.*?)(?:\.token_adapter)?\.(trainable_tokens_delta|trainable_tokens_original)")
MAGNITUDE = "lora_magnitude_vector"
TOKENS, OLD_TOKENS = "trainable_tokens_delta", "trainable_tokens_original"


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A tensor of an adapter: a `factor` of a layer's change (its name there: a factor of the product, lengths of rows,
    rows of tokens), or a whole tensor in place of BASE's.

    `module` and `leaf` are the name of the tensor that it changes.
    """

    source: TensorSource
    module: str
    leaf: str
    factor: str = ""

    @property
    def info(self) -> TensorInfo:
        return self.source.info

    @property
    def name(self) -> str:
        return self.source.info.name

    @property
    def is_factor(self) -> bool:
        return bool(self.factor)

    @property
    def is_tokens(self) -> bool:
        """Whether the tensor has new rows for some tokens."""
        return self.factor == TOKENS

    @property
    def target(self) -> str:
        return f"{self.module}.{self.leaf}" if self.module else self.leaf


def parse_name(source: TensorSource) -> AdapterTensor:
    name = source.info.name.removeprefix(_PREFIX)
    if match := _TOKENS.fullmatch(name):
        return AdapterTensor(source, match[1], "weight", match[2])
    if match := _FACTOR.fullmatch(name):
        return AdapterTensor(source, match[1], "bias" if match[2] == "lora_B.bias" else "weight", match[2])
    module, _, leaf = _FULL.sub("", name).rpartition(".")
    return AdapterTensor(source, module, leaf)
