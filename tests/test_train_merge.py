"""The two programs meet on disk: a finetune merges with its base, and the merged model runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train_fixtures import REPO, config_values, copy_rows, environment, save_model, write_jsonl
from train.config import build_config
from train.loop import finetune

pytest.importorskip("merge_tool.cli", reason="slerp-merge is not installed")


def test_a_finetune_merges_with_its_base_and_runs(tmp_path: Path) -> None:
    """`slerp-merge BASE OUT/final MERGED --t 0.5` gives a model between the two, with finite logits."""
    base = save_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "d.jsonl", copy_rows())
    finetune(build_config(config_values(base, data, tmp_path / "o")))
    tuned, merged = tmp_path / "o" / "final", tmp_path / "merged"
    command = [sys.executable, "-c", "from merge_tool.cli import slerp_merge; slerp_merge()"]
    done = subprocess.run(
        [*command, str(base), str(tuned), str(merged), "--t", "0.5"],
        capture_output=True, text=True, cwd=REPO, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "may not mean the same" not in done.stderr  # the tokenizer of `final` is the base's
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (base, merged, tuned)]
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in models]
    assert torch.isfinite(logits[1]).all()
    distances = [float((logits[1] - other).norm()) for other in (logits[0], logits[2])]
    assert 0 < max(distances) < float((logits[0] - logits[2]).norm())
