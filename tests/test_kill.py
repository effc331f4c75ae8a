"""A process that is killed loses nothing: the harness of kill_harness.py, in small and in full."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kill_harness import VARIANTS, make_inputs, run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def test_merges_killed_at_random_moments_continue_to_the_same_bytes(tmp_path: Path) -> None:
    """A moment of each kind of merge, in the work and in the publishing; never half a model, nothing beside OUT."""
    found = run(len(VARIANTS), 1, make_inputs(tmp_path, transformers=False), tmp_path, transformers=False)
    assert sum(found.values()) >= len(VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("transformers", [False, True])
def test_two_hundred_kills(tmp_path: Path, transformers: bool) -> None:
    """The second time transformers itself is asked whether what was left is a model."""
    found = run(200, 2, make_inputs(tmp_path, transformers=transformers), tmp_path, transformers=transformers)
    print("kills:", dict(found))
    assert found["publishing"] >= 20
    assert found["merging"] >= 20


@pytest.mark.slow
def test_training_killed_fifty_times(tmp_path: Path) -> None:
    """Inside saves and between them; a small version is in test_train_checkpoint.py."""
    from train_kill_harness import run as run_training

    found = run_training(50, 1, tmp_path, 1200)
    print("kills of a training run:", dict(found))
    assert found["inside a save"] >= 10
