"""Laws of train/config.py: strict keys, types, ranges; one message that names the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train_fixtures import REPO, make_config
from train.config import TrainConfig, build_config, check_batch, load_config
from train.errors import TrainError

SOURCE = {"path": "d.jsonl", "templates": [{"prompt": "{a}", "response": "{b}"}]}
GOOD = {"model": "m", "output": "o", "sources": [SOURCE]}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"mixin_ratio": 0.5}, "'mixin_ratio' is not a key. Did you mean 'mixing_ratio'"),
    ({"mixing_ratio": 1.5}, "mixing_ratio is 1.5, expected from 0"),
    ({"mixing_ratio": -0.1}, "mixing_ratio is -0.1, expected from 0"),
    ({"mixing_ratio": float("nan")}, "mixing_ratio is nan"),
    ({"warmup": 20}, "warmup is 20.0, expected a share .*20 % is 0.2"),
    ({"lr": "fast"}, r"lr is 'fast' \(str\), expected a number"),
    ({"lr": 0}, "lr is 0.0, expected above 0"),
    ({"seed": 1.5}, r"seed is 1.5 \(float\), expected a whole number"),
    ({"packing": "yes"}, "packing is 'yes'.*expected true or false"),
    ({"micro_batch": True}, "micro_batch is True.*expected a whole number"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd', expected one of adalite, adamw"),
    ({"model": None}, "model is empty"),
    ({"sources": []}, "expected at least one source"),
    ({"sources": {"path": "x"}}, "sources is .*expected a list"),
    ({"sources": ["x"]}, r"sources\[0\] is 'x'"),
    ({"sources": [SOURCE, SOURCE]}, "Two sources are called 'd.jsonl'"),
    ({"sources": [{**SOURCE, "tke": 3}]}, r"'sources\[0\].tke' is not a key. Did you mean 'take'"),
    ({"sources": [{**SOURCE, "take": 0}]}, "take is 0"),
    ({"sources": [{**SOURCE, "weight": -1}]}, "weight is -1"),
    ({"sources": [{**SOURCE, "held_out": 1.5}]}, "held_out is 1.5"),
    ({"sources": [{**SOURCE, "held_out": float("inf")}]}, "held_out is inf"),
    ({"sources": [{**SOURCE, "messages": "m"}]}, "either `templates` or `messages`"),
    ({"sources": [{"path": "x"}]}, "either `templates` or `messages`"),
    ({"sources": [{"path": "x", "templates": [{"prompt": "{a}"}]}]}, "response is missing in format memphis"),
    ({"sources": [{**SOURCE, "format": "text"}]}, "prompt has no place in format text"),
    ({"sources": [{**SOURCE, "where": [{"column": "a", "op": "~", "value": 1}]}]}, "op is '~'"),
    ({"sources": [{**SOURCE, "where": [{"column": "a", "op": "in", "value": 1}]}]}, "a list for 'in'"),
    ({"global_batch": 8, "global_batch_tokens": 8192}, "both given"),
    ({"global_batch_tokens": 5000}, "expected a multiple of sequence_length 4096"),
    ({"fused_backward": True, "max_grad_norm": 1.0}, "max_grad_norm cannot be applied"),
    ({"betas": [0.9]}, "betas has 1 entries, expected 2"),
    ({"betas": [0.9, 1.0]}, "betas is"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    """One error that names the key, what was found and what was expected."""
    with pytest.raises(TrainError, match=message):
        build_config({**GOOD, **change})


@pytest.mark.parametrize("key", ["model", "output", "sources"])
def test_a_missing_key_is_named(key: str) -> None:
    """The three keys without a default."""
    with pytest.raises(TrainError, match=f"{key} is missing"):
        build_config({k: v for k, v in GOOD.items() if k != key})


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML reads 1e-5 as text; it is meant as a number."""
    path = tmp_path / "c.yaml"
    path.write_text("model: m\noutput: o\nlr: 1e-5\nsources:\n- {path: d.csv, templates: [{prompt: x, response: y}]}\n")
    assert load_config(path).lr == 1e-5
    assert load_config(path, {"lr": 2}).lr == 2.0


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- x", "expected keys"), ("", "empty")])
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    """Broken YAML, a list, nothing."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(TrainError, match=message):
        load_config(path)
    with pytest.raises(TrainError, match="the config cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_the_batch_divides_over_processes_and_micro_batches() -> None:
    """The number of micro-batches, or what to change."""
    assert check_batch(make_config(global_batch=16, micro_batch=2), 2) == 4
    assert check_batch(make_config(global_batch_tokens=16 * 4096, micro_batch=4), 4) == 1
    assert check_batch(make_config(micro_batch=3), 5) == 1
    with pytest.raises(TrainError, match="expected a multiple of micro_batch 2 x 3 processes = 6"):
        check_batch(make_config(global_batch=16, micro_batch=2), 3)


def test_fused_backward_refuses_accumulation() -> None:
    """It names the micro-batch that would work."""
    with pytest.raises(TrainError, match=r"cannot accumulate 4 micro-batches\. Set micro_batch to 8"):
        check_batch(make_config(global_batch=16, micro_batch=2, fused_backward=True), 2)


def test_the_defaults_are_the_memphis_settings() -> None:
    """Lambda 0.01, lr 1e-5, 20 % warm-up, cosine, length 4096, frozen embeddings, Adalite."""
    config = make_config()
    assert (config.adalite_lambda, config.lr, config.warmup, config.schedule) == (0.01, 1e-5, 0.2, "cosine")
    assert (config.sequence_length, config.freeze_embeddings, config.optimizer) == (4096, True, "adalite")


EXAMPLES = sorted((REPO / "examples").glob("train*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.name for p in EXAMPLES])
def test_every_example_loads_and_is_short(path: Path) -> None:
    """Examples are configs of today's keys, under 25 lines."""
    assert isinstance(load_config(path), TrainConfig)
    assert len(path.read_text().splitlines()) < 25


def test_there_are_examples() -> None:
    """The glob above finds something."""
    assert EXAMPLES


def test_a_models_revision_may_stand_behind_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/name@revision` is the two keys; two different revisions are refused; a local path that exists wins."""
    monkeypatch.chdir(tmp_path)
    config = make_config(model="org/name@refs/pr/1")
    assert (config.model, config.revision) == ("org/name", "refs/pr/1")
    assert make_config(model="org/name@v1", revision="v1").revision == "v1"
    for values in ({"model": "org/name@v1", "revision": "v2"}, {"model": "org/name@"}):
        with pytest.raises(TrainError, match="Give one revision, in one place"):
            make_config(**values)
    (tmp_path / "org/name@v1").mkdir(parents=True)
    assert make_config(model="org/name@v1").model == "org/name@v1"
