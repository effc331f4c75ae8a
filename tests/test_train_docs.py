"""Docs are run: tables are what the programs print, snippets are configs that load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train_fixtures import REPO, environment
from train.config import Average, Lora, SourceConfig, TrainConfig, build_config
from train.contrast.options import ContrastConfig, QuestionsConfig, VerifyConfig
from train.help import help_text, keys_table

BIGRAM = REPO / "examples" / "mixce_bigram"


def load_script(path: Path) -> Any:
    spec = spec_from_file_location("script_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bigram_table_is_that_of_the_stored_results() -> None:
    """The README's numbers come from results.json, which the experiment wrote: 5 seeds, 7 ratios."""
    results = json.loads((BIGRAM / "results.json").read_text())
    assert len({r["seed"] for r in results}) == 5
    assert {r["ratio"] for r in results} == {1.0, 0.99, 0.9, 0.5, 0.1, 0.01, 0.0}
    assert load_script(BIGRAM / "run.py").table(results) in (BIGRAM / "README.md").read_text()


def test_the_bigram_experiment_measures_what_it_says() -> None:
    """The gold model is its own nearest neighbour; half of the other transitions are impossible, by chance, entry by
    entry; the first symbol is uniform, and its row counts."""
    import torch

    script = load_script(BIGRAM / "run.py")
    state = torch.get_rng_state()
    gold = script.gold_model(torch.Generator().manual_seed(7))
    torch.set_rng_state(state)
    assert gold.shape == (21, 20)
    rows = [row for row in range(21) if row != script.END]
    torch.testing.assert_close(gold[rows].sum(1), torch.ones(20))
    torch.testing.assert_close(gold[script.START], torch.full((20,), 0.05))
    impossible = (gold[: script.END, : script.END] == 0).sum(1)
    assert 0.42 < impossible.float().mean() / 19 < 0.58
    assert len(set(impossible.tolist())) > 3
    learned = torch.cat([gold, torch.zeros(21, 1)], 1)  # START is never a target
    assert script.distance(gold, learned) == (pytest.approx(0, abs=1e-12), 0.0)
    js, zeros = script.distance(gold, torch.full((21, 21), 1 / 21))
    assert 0.1 < js < 0.7
    assert zeros == pytest.approx(1 / 21)
    sequences = script.sample(gold, 200, torch.Generator().manual_seed(1))
    assert {int(s[0]) for s in sequences} == {script.START}
    assert {int(s[-1]) for s in sequences} == {script.END}
    assert min(len(s) for s in sequences) == 2  # the first symbol may be the end


def test_the_bigram_loss_is_divided_by_sequences() -> None:
    """Adam adds L2 to the gradient, so a loss per token would make it as much stronger as sequences are long: the first
    update of a weight is another one."""
    import torch

    script = load_script(BIGRAM / "run.py")
    script.EPOCHS = 1
    sequences = [torch.tensor([script.START, 1, 2, 3, script.END])] * script.BATCH
    pairs = script.Pairs(sequences)
    scales: list[float] = []
    plain = script.mixce_loss

    def seen(*arguments: Any) -> Any:
        loss, count = plain(*arguments)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: scales.append(float(gradient)))
        return loss, count

    script.mixce_loss = seen
    script.learn(pairs, pairs, 1.0, 7)
    assert scales == [pytest.approx(1 / script.BATCH)]


def test_the_smallest_config_of_the_docs_loads() -> None:
    """Every YAML block of docs/training.md and docs/contrast.md is a config."""
    text = "".join((REPO / "docs" / page).read_text() for page in ("training.md", "contrast.md"))
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        build_config(yaml.safe_load(block))


@pytest.mark.parametrize(
    "config", [TrainConfig, SourceConfig, Lora, Average, ContrastConfig, QuestionsConfig, VerifyConfig]
)
def test_the_docs_and_the_help_say_what_the_config_says(config: type[Any]) -> None:
    """One source: the docstring explains every key, in order; docs and help show each meaning and default."""
    table = keys_table(config)
    page = "docs/contrast.md" if config.__module__.startswith("train.contrast") else "docs/training.md"
    assert table in (REPO / page).read_text(), f"{page} needs this table:\n{table}"
    explained = re.findall(r"^    (\w+)(?: \[.+\])?: ", config.__doc__ or "", re.MULTILINE)
    assert explained == [field.name for field in fields(config)]
    shown = " ".join(help_text(100).split())
    for row in table.splitlines()[2:]:
        key, default, meaning = row.strip("| ").replace("`", "").split(" | ")
        assert f"{key} [{default}] {meaning}" in shown


def test_the_help_fits_its_width() -> None:
    """Each key's lines are wrapped."""
    keys = [line for line in help_text(60).splitlines() if line.startswith("  ")]
    assert max(map(len, keys)) <= 60
    assert "  --lr                       [1e-05] the highest learning rate" in help_text(80).splitlines()


@pytest.mark.slow
def test_the_memory_page_is_what_the_preflight_computes() -> None:
    """docs/training_memory.md holds the table that `bench/train.py memory` prints."""
    command = [sys.executable, str(REPO / "bench" / "train.py"), "memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() in (REPO / "docs" / "training_memory.md").read_text()
