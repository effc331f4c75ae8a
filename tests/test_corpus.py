"""Outputs of every kind of merge are the bytes that corpus.json records; see corpus.py."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from corpus import differences, make, recorded, twin_differences
from corpus_cases import CASES, TWINS

RECORDED = recorded()
recorded_here = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the digests are of x86-64 Linux: the last bits of float64 may be others here",
)


def test_each_case_is_recorded_and_nothing_else() -> None:
    """A new case wants `python tests/corpus.py --record`."""
    assert sorted(RECORDED) == sorted(CASES)


@recorded_here
@pytest.mark.parametrize("name", CASES)
def test_a_merge_writes_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    """A change on purpose is recorded anew, and the commit says what changed and why."""
    assert list(differences(RECORDED[name], make(CASES[name], tmp_path / name))) == []


@pytest.mark.parametrize("name", TWINS)
def test_two_ways_of_asking_have_one_result(name: str) -> None:
    """Two models by options or by a recipe: the same weights, index, configuration and tokenizer, byte for byte."""
    assert list(twin_differences({way: RECORDED[way] for way in (f"{name}-pair", f"{name}-yaml")})) == []


def test_a_twin_that_differs_would_be_found() -> None:
    twins = {"slerp-pair": {"out/a": "1", "out/README.md": "there"}, "slerp-yaml": {"out/a": "1", "out/x.yml": "there"}}
    assert list(twin_differences(twins)) == []
    for other in ({"out/a": "2"}, {}, {"out/a": "1", "out/b": "3"}):
        assert len(list(twin_differences({**twins, "slerp-yaml": other or {"out/x.yml": "there"}}))) == 1
