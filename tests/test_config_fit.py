"""config.json of an output says what its tensors are, wherever it was copied from: its rows, and whether its head is
tied. transformers loads it without a tensor too many, too few or made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import BF16, load_folder, save_model
from merge_tool import merge
from test_lora import normal, save_adapter


def model(folder: Path, rows: int, *, head: bool, tied: bool | None, text: str = "") -> Path:
    tensors = {"model.embed_tokens.weight": normal(rows, 8, dtype=BF16), "model.norm.weight": np.ones(8, BF16)}
    if head:
        tensors["lm_head.weight"] = normal(rows, 8, dtype=BF16)
    config: dict[str, Any] = {"architectures": ["X"], "vocab_size": rows}
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    return save_model(folder, tensors, config=config, side_files={"tokenizer.json": text} if text else {})


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


@pytest.mark.parametrize("files_from", ["base", "ft"])
@pytest.mark.parametrize(
    ("base", "ft"),
    [
        ((False, True), (True, False)),
        ((True, False), (False, True)),
        ((False, None), (True, None)),
        ((True, None), (False, None)),
        ((True, True), (True, False)),
    ],
)
def test_the_head_that_is_there_is_the_one_that_is_spoken_of(
    tmp_path: Path, base: tuple[bool, bool | None], ft: tuple[bool, bool | None], files_from: str
) -> None:
    """Tied or not, by the config or by what is stored: a loader that believes config.json finds what it needs, and
    uses what there is."""
    sides = [model(tmp_path / name, 6, head=head, tied=tied) for name, (head, tied) in (("base", base), ("ft", ft))]
    report = merge(*sides, tmp_path / "out", files_from=files_from)
    has_head = "lm_head.weight" in load_folder(tmp_path / "out")
    assert has_head == (base[0] or ft == (True, False))  # a copy, or silent: BASE's layout; its own: kept
    said = config_of(tmp_path / "out").get("tie_word_embeddings")
    donor = base if files_from == "base" else ft
    assert said == (not has_head) or (said is None and donor[0] == has_head)
    changed = config_of(tmp_path / "out") != config_of(sides[files_from == "ft"])
    assert changed == any("tie_word_embeddings in config.json is" in text for text in report.warnings)


def test_heads_that_are_copies_everywhere_stay_tied(tmp_path: Path) -> None:
    base, ft = (model(tmp_path / name, 6, head=True, tied=True) for name in ("base", "ft"))
    merge(base, ft, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("options", [{"exclude": "lm_head"}, {"exclude": "embed_tokens"}, {"t_for": {"lm_head": 0.2}}])
def test_a_copy_that_is_merged_otherwise_is_no_longer_tied(tmp_path: Path, options: dict[str, Any]) -> None:
    """Else a loader would put the embedding in its place."""
    base, ft = (model(tmp_path / name, 6, head=True, tied=True) for name in ("base", "ft"))
    report = merge(base, ft, tmp_path / "out", **options)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert report.warnings[0] == (
        "tie_word_embeddings in config.json is false: the output has a head of its own, which is not merged as its "
        "embedding is."
    )
    for alike in ({"exclude": ["lm_head", "embed_tokens"]}, {"t_for": {"lm_head": 0.2, "embed_tokens": 0.2}}):
        merge(base, ft, tmp_path / "alike", overwrite=True, **alike)
        assert config_of(tmp_path / "alike") == config_of(base)


def test_rows_of_another_size_are_said_of_the_config_that_is_copied(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 6, head=True, tied=False)
    ft = model(tmp_path / "ft", 9, head=True, tied=False)
    report = merge(base, ft, tmp_path / "out", on_mismatch="base", files_from="ft")
    assert config_of(tmp_path / "out")["vocab_size"] == 6
    assert any(text.startswith("vocab_size in config.json is 6, the rows of the output's") for text in report.warnings)


def test_rows_that_an_adapter_brings_are_said_of_the_config(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 6, head=True, tied=False)
    tensors = {"model.embed_tokens.weight": normal(9, 8), "lm_head.weight": normal(9, 8)}
    adapter = save_adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens", "lm_head"])
    merge(f"{base}+{adapter}", f"{base}+{adapter}", tmp_path / "out")
    assert len(load_folder(tmp_path / "out")["lm_head.weight"]) == 9
    assert config_of(tmp_path / "out")["vocab_size"] == 9


def test_what_a_model_says_of_itself_is_its_own_affair(tmp_path: Path) -> None:
    """A config that never fitted is copied as it is."""
    base, ft = (model(tmp_path / name, 6, head=True, tied=False) for name in ("base", "ft"))
    for side in (base, ft):
        (side / "config.json").write_text(json.dumps(config_of(side) | {"vocab_size": 5}))
    merge(base, ft, tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 5
