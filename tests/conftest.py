"""Fixtures shared by all tests. Helpers that are plain functions live in checkpoints.py and oracle.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from checkpoints import language_model, save_model

# A shell that starts us in the background has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("same", derandomize=True)  # the same examples in every run; pytest
settings.load_profile("same")  # --hypothesis-profile=default looks for new ones


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output files may be smaller than a user may make them; small_shards.py does it for processes."""
    monkeypatch.setattr("merge_tool.cli.options.LEAST_SHARD_BYTES", 1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small base and finetune, sharded differently, with side files."""
    side = {"tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": 0}\n', "sub/chat.jinja": "{{ x }}"}
    base = save_model(tmp_path / "base", language_model(0), shards=2, side_files=side)
    ft = save_model(tmp_path / "ft", language_model(1), shards=3, side_files=side)
    return base, ft
