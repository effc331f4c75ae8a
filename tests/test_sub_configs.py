"""Where a model's config.json speaks of its language model: all that read or edit it look in the same places."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import save_model
from merge_tool import open_checkpoint
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.fp8 import quantization_of, without_quantization
from merge_tool.checkpoint.quantised import why_quantised
from merge_tool.models.layer_counts import counts_layers
from merge_tool.models.renaming import says_tied
from merge_tool.models.side_files import (
    edit_config_dtype,
    edit_config_layers,
    edit_ties,
    edit_vocab_size,
    without_quantization_config,
)
from merge_tool.plan.parents import _settings
from merge_tool.vocabulary.align import Alignment, config_sizes, settings_warnings

NESTINGS: list[tuple[str, ...]] = [  # where families have the configuration of their language model
    (),
    ("text_config",),  # Llava, Gemma 3, Mistral 3
    ("llm_config",),  # InternVL
    ("language_config",),  # DeepSeek-VL2
    ("thinker_config", "text_config"),  # Qwen2.5-Omni
    ("decoder",),  # vision-encoder-decoder
]
OTHERS = [("vision_config",), ("thinker_config", "audio_config"), ("talker_config", "text_config"), ("encoder",)]
TEXT = {
    "model_type": "llama", "num_hidden_layers": 2, "layer_types": ["a", "b"], "vocab_size": 6, "rope_theta": 1e4,
    "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 5,
}  # fmt: skip
QUANTISED = {"quantization_config": {"quant_method": "gptq", "dtype": "float32", "num_hidden_layers": 2}}


def nested(place: tuple[str, ...], inner: dict[str, Any]) -> dict[str, Any]:
    """A config.json with `inner` at `place`."""
    return reduce(lambda found, key: {key: found}, reversed(place), dict(inner))


def read(content: bytes) -> Any:
    return json.loads(content)


@pytest.mark.parametrize("place", NESTINGS)
def test_every_reader_and_editor_knows_where_the_language_model_is_spoken_of(
    tmp_path: Path, place: tuple[str, ...]
) -> None:
    config, quantised = nested(place, TEXT), nested(place, TEXT | QUANTISED)
    raw = json.dumps(quantised).encode()
    model = open_checkpoint(save_model(tmp_path / "m", {"w": np.zeros(2, np.float32)}, config=config))

    assert counts_layers(config)
    assert read(edit_config_layers(raw, (0, 1, 1))) == nested(
        place, TEXT | {"num_hidden_layers": 3, "layer_types": ["a", "b", "b"]} | QUANTISED
    )
    assert list(config_sizes(model)) == [6]
    assert read(edit_vocab_size(raw, frozenset({6}), 9)) == nested(place, TEXT | {"vocab_size": 9} | QUANTISED)
    assert says_tied(config) is False
    assert read(edit_ties(raw, True)) == nested(place, TEXT | {"tie_word_embeddings": True} | QUANTISED)
    assert read(edit_config_dtype(raw, "BF16")) == nested(place, TEXT | {"torch_dtype": "bfloat16"} | QUANTISED)
    assert _settings(config)["rope_theta"] == 1e4  # by its own name, wherever it stands
    assert quantization_of(quantised) == QUANTISED["quantization_config"]
    assert "method gptq" in (why_quantised(quantised, {}) or "")
    assert without_quantization(quantised) == config
    assert read(without_quantization_config(raw)) == config
    alignment = Alignment(Folder(tmp_path), None, frozenset(), 6, lambda side, number: None)
    assert "eos_token_id is 5" in next(settings_warnings(alignment, 0, model.folder))


@pytest.mark.parametrize("place", OTHERS)
def test_parts_beside_the_language_model_keep_their_own_numbers(tmp_path: Path, place: tuple[str, ...]) -> None:
    """But the output's dtype is theirs, too, and so is what is told of their settings and their quantisation."""
    config, quantised = nested(place, TEXT), nested(place, TEXT | QUANTISED)
    raw = json.dumps(quantised).encode()
    model = open_checkpoint(save_model(tmp_path / "m", {"w": np.zeros(2, np.float32)}, config=config))
    assert not counts_layers(config)
    assert read(edit_config_layers(raw, (0, 1, 1))) == quantised
    assert list(config_sizes(model)) == []
    assert edit_vocab_size(raw, frozenset({6}), 9) == raw
    assert says_tied(config) is None
    assert read(edit_ties(raw, True)) == {"tie_word_embeddings": True, **quantised}
    assert read(edit_config_dtype(raw, "BF16")) == nested(place, TEXT | {"torch_dtype": "bfloat16"} | QUANTISED)
    assert _settings(config)[".".join((*place, "rope_theta"))] == 1e4
    assert quantization_of(quantised) == QUANTISED["quantization_config"]
    assert read(without_quantization_config(raw)) == without_quantization(quantised) == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_a_configuration_is_edited_in_the_encoding_that_it_has(encoding: str) -> None:
    """And byte for byte the same but for what is to change."""
    text = '{ "note": "é \\u00e9",\r\n "vocab_size" :6, "dtype":"float16", "quantization_config": {"a": 1} }'
    raw = text.encode(encoding)
    assert edit_vocab_size(raw, frozenset({6}), 10) == text.replace("6", "10", 1).encode(encoding)
    assert edit_config_dtype(raw, "F32") == text.replace('"float16"', '"float32"').encode(encoding)
    assert without_quantization_config(raw) == text.replace(', "quantization_config": {"a": 1}', "").encode(encoding)
    assert read(edit_ties(b"{ }", False)) == {"tie_word_embeddings": False}
