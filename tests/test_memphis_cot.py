"""The rehearsal: examples/memphis_cot as it stands, by the real clients against a replica of the Hub."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from checkpoints import load_folder
from hub_replica import Replica, serve
from test_scribe import run
from tests.scribe_hub import make_hub
from tests.train_fixtures import REPO, write_config
from train.config import load_config

RECIPE = REPO / "examples" / "memphis_cot"
SMALL = {"sequence_length": 256, "global_batch": 4, "max_steps": 2, "device": "cpu"}
# The replica's model solves nothing: every other response counts as right.
CHECK = f'{sys.executable} -c "import sys; [print(n % 2) for n, _ in enumerate(sys.stdin)]"'


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with serve(make_hub(tmp_path_factory.mktemp("hub"))) as replica:
        yield replica


@pytest.mark.parametrize("name", ["sft.yaml", "contrast.yaml"])
def test_every_line_says_where_it_comes_from(name: str) -> None:
    for line in (RECIPE / name).read_text().split("# ---- watching")[0].splitlines():
        is_value = re.match(r"\s*\w+: \S", line) and not line.startswith("output:")
        assert not is_value or re.search(r"# (KNOWN|ASSUMED|ours)", line), line


def test_the_recipe_says_what_is_known() -> None:
    sft, stage = load_config(RECIPE / "sft.yaml"), load_config(RECIPE / "contrast.yaml")
    assert (sft.mixing_ratio, sft.lr, sft.warmup, sft.neftune_alpha, sft.epochs) == (0.75, 1e-5, 0.2, 10, 2)
    assert [s.title for s in sft.sources] == ["TinyCoT", "reddit-instruct", "oasst2_curated"]
    contrast = stage.contrast
    assert contrast is not None
    assert (contrast.cycles, contrast.samples, contrast.temperature, contrast.top_p) == (3, 8, 0.5, 0.8)
    assert (contrast.max_new_tokens, contrast.merge_t, contrast.pairs, contrast.ce_on) == (
        512,
        0.99,
        "unique",
        "chosen",
    )
    assert (stage.epochs, stage.mixing_ratio, contrast.rank_rows) == (1, 1.0, "tokens")


@pytest.mark.slow
def test_the_recipe_runs_from_the_hub_to_a_model(hub: Replica, tmp_path: Path) -> None:
    """SFT of the old StableLM, then the stage on its result: 356 tensors; the stage's held-out questions are rows that
    the SFT held out."""
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    done = run(hub, tmp_path, sys.executable, "-m", "train", RECIPE / "sft.yaml", *flags, "--eval_batches", 1)
    assert done.returncode == 0, done.stderr
    assert "old stablelm_epoch config" in done.stderr
    values: dict[str, Any] = yaml.safe_load((RECIPE / "contrast.yaml").read_text())
    values |= SMALL
    values["contrast"] |= {"cycles": 1, "samples": 2, "max_new_tokens": 8, "temperature": 2.0, "stop": "e"}
    values["contrast"] |= {"verify": {"compare": CHECK}}
    values["contrast"]["questions"] |= {"held_out": 200, "take": 12}
    done = run(hub, tmp_path, sys.executable, "-m", "train", write_config(tmp_path / "contrast.yaml", values))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/memphis-cot"
    assert json.loads((out / "cycle-1/pairs/report.json").read_text())["pairs"] > 0
    before, after = (load_folder(tmp_path / "runs" / name / "final") for name in ("memphis-sft", "memphis-cot"))
    assert before.keys() == after.keys()
    assert len(after) == 356
    lines = map(json.loads, (out / "questions/held_out.jsonl").read_text().splitlines())
    data = json.loads((tmp_path / "runs/memphis-sft/run.json").read_text())["data"][0]
    ids, offsets = (
        np.load(tmp_path / f"runs/memphis-sft/data/{data}/held_out.{part}.npy") for part in ("ids", "offsets")
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    texts = [tokenizer.decode(ids[start:stop]) for start, stop in pairwise(offsets)]
    assert [line["prompt"] + line["gold"] for line in lines] == texts
    assert len(texts) == 200
