"""A merge that begins from the sums of an earlier one: the same bytes, from one read of the inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import contents, language_model, save_model
from merge_tool.api import merge_recipe, plan_recipe
from merge_tool.checkpoint.source import LocalFile
from merge_tool.methods.passes import run_steps
from merge_tool.methods.registry import METHODS
from merge_tool.methods.steps import MergeSpec
from merge_tool.models.side_files import REPORT
from merge_tool.output.known import EarlierFindings
from merge_tool.recipe.mergekit import read_recipe
from test_fp8_output import config_of, packed


class Reads:
    """The bytes of weights that are read from files."""

    def __init__(self) -> None:
        self.nbytes = 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts what is read; no tensor fits the arena, as with tensors that are larger than the memory."""
    counted, read_into = Reads(), LocalFile.read_into

    def counting(self: LocalFile, offset: int, buffer: memoryview) -> None:
        counted.nbytes += buffer.nbytes
        read_into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counting)
    monkeypatch.setattr("merge_tool.plan.memory._arena_bytes", lambda plan, room: 0)
    return counted


def merged(models: list[Path], out: Path, method: str, parameters: Mapping[str, Any], earlier: Path | None) -> None:
    entries: list[dict[str, Any]] = [{"model": str(path)} for path in models]
    each = {name: parameters[name] for name in METHODS[method].each if name in parameters}
    for number, entry in enumerate(entries):
        own = {name: values[number] for name, values in each.items() if values[number] is not None}
        entry |= {"parameters": own} if own else {}
    shared = {name: value for name, value in parameters.items() if name not in each}
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": shared}
    if METHODS[method].base != "none":
        recipe["base_model"] = str(models[0])
    merge_recipe(read_recipe(recipe, METHODS), out, earlier=earlier)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    tensors = [language_model(seed, hidden=128) for seed in range(3)]
    for one in tensors:
        one["model.steps"] = np.arange(7)  # integers, which are only compared
        one["model.same.weight"] = tensors[0]["model.norm.weight"]
    return [save_model(tmp_path / f"m{seed}", one) for seed, one in enumerate(tensors)]


ONCE, TWICE = 1.05, 1.9  # a pass over the inputs, a few bytes that identify them, and integers


@pytest.mark.parametrize(
    ("method", "count", "before", "now", "least", "most"),
    [
        ("slerp", 2, {"t": 0.5}, {"t": [0.1, 0.7, 0.2]}, TWICE, ONCE),
        ("linear", 2, {"weight": [0.5, 0.5]}, {"weight": [0.9, 0.1]}, TWICE, ONCE),
        ("ties", 3, {"weight": [None, 0.5, 0.5], "density": [None, 0.5, 0.5]},
         {"weight": [None, 0.2, 0.9], "density": [None, 0.5, 0.5], "lambda": 0.8}, TWICE, ONCE),
        ("multislerp", 3, {"weight": [None, 0.5, 0.5]}, {"weight": [None, 0.5, 0.5]}, TWICE, ONCE),
    ],
)  # fmt: skip
def test_known_sums_leave_one_read_and_the_same_bytes(
    models: list[Path],
    tmp_path: Path,
    reads: Reads,
    method: str,
    count: int,
    before: dict[str, Any],
    now: dict[str, Any],
    least: float,
    most: float,
) -> None:
    """What the passes found before is not found again; every file is the one that a merge of its own makes."""
    size = sum(path.stat().st_size for model in models[:count] for path in model.glob("*.safetensors"))
    merged(models[:count], tmp_path / "first", method, before, None)
    reads.nbytes = 0
    merged(models[:count], tmp_path / "alone", method, now, None)
    assert reads.nbytes / size > least
    reads.nbytes = 0
    merged(models[:count], tmp_path / "again", method, now, tmp_path / "first" / REPORT)
    assert reads.nbytes / size < most
    assert contents(tmp_path / "again") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("method", "count", "before", "now"),
    [
        ("linear", 2, {"weight": [0.5, 0.5], "normalize": False}, {"weight": [0.3, 0.3], "normalize": False}),
        ("linear", 2, {"weight": [0.3, 0.3], "normalize": False}, {"weight": [0.5, 0.5], "normalize": False}),
        ("ties", 3, {"weight": [None, 0.5, 0.5], "density": [None, 0.5, 0.5]},
         {"weight": [None, 0.5, 0.5], "density": [None, 0.4, 0.5]}),
        ("multislerp", 3, {"weight": [None, 0.5, 0.5]}, {"weight": [None, 0.2, 0.9]}),
        ("nuslerp", 3, {"weight": [None, 0.5, 0.5]}, {"weight": [None, 0.2, 0.9]}),
        ("sce", 3, {"select_topk": 0.5}, {"select_topk": 0.2}),
    ],
)  # fmt: skip
def test_what_depends_on_the_parameters_is_made_again(
    models: list[Path], tmp_path: Path, method: str, count: int, before: dict[str, Any], now: dict[str, Any]
) -> None:
    """Thresholds of another density, coefficients of other weights, equal tensors that are copied or not."""
    merged(models[:count], tmp_path / "first", method, before, None)
    merged(models[:count], tmp_path / "alone", method, now, None)
    merged(models[:count], tmp_path / "again", method, now, tmp_path / "first" / REPORT)
    assert contents(tmp_path / "again") == contents(tmp_path / "alone")


def test_8_bit_outputs_begin_from_known_sums(tmp_path: Path) -> None:
    shape, config = (700, 512), config_of((8, 8))  # three tiles
    weights = [{"a.weight": np.random.default_rng(k).standard_normal(shape)} for k in range(2)]
    base, ft = (save_model(tmp_path / f"p{k}", packed(one, (8, 8)), config=config) for k, one in enumerate(weights))
    for t, name, earlier in ((0.5, "first", None), (0.3, "alone", None), (0.3, "again", "first")):
        recipe = {
            "merge_method": "slerp",
            "base_model": str(base),
            "models": [{"model": str(base)}, {"model": str(ft)}],
            "parameters": {"t": t},
        }
        report = None if earlier is None else tmp_path / earlier / REPORT
        merge_recipe(read_recipe(recipe, METHODS, dtype="base"), tmp_path / name, earlier=report)
    assert contents(tmp_path / "again") == contents(tmp_path / "alone")


def test_a_report_of_anything_else_is_not_used(models: list[Path], tmp_path: Path) -> None:
    """Other weights, another method, a damaged file: the merge makes its own passes."""
    first = tmp_path / "first" / REPORT
    merged(models[:2], tmp_path / "alone", "slerp", {"t": 0.3}, None)
    merged([models[0], models[2]], tmp_path / "first", "slerp", {"t": 0.5}, None)
    merged(models[:2], tmp_path / "again", "slerp", {"t": 0.3}, first)
    assert contents(tmp_path / "again") == contents(tmp_path / "alone")
    recipe = {"merge_method": "slerp", "base_model": str(models[0]), "parameters": {"t": 0.3}}
    recipe |= {"models": [{"model": str(path)} for path in models[:2]]}
    for changed in ({"only": ["mlp"]}, {"dtype": "float32"}):
        prepared = plan_recipe(read_recipe(recipe, METHODS, **changed), tmp_path / "x", read_samples=True)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="of another merge"):
            EarlierFindings(tmp_path / "alone" / REPORT, prepared)
    prepared = plan_recipe(
        read_recipe({**recipe, "parameters": {"t": 0.8}}, METHODS), tmp_path / "x", read_samples=True
    )
    assert EarlierFindings(tmp_path / "alone" / REPORT, prepared)(next(prepared.plan.jobs())) is not None
    merged(models[:2], tmp_path / "line", "linear", {"weight": [0.5, 0.5]}, None)
    for number, text in enumerate(("", "{}", (tmp_path / "line" / REPORT).read_text(), first.read_text()[:-40])):
        (tmp_path / REPORT).write_text(text)
        merged(models[:2], tmp_path / f"again{number}", "slerp", {"t": 0.3}, tmp_path / REPORT)
        assert contents(tmp_path / f"again{number}") == contents(tmp_path / "alone")
    merged(models[:2], tmp_path / "none", "slerp", {"t": 0.3}, tmp_path / "no-such-file")
    assert contents(tmp_path / "none") == contents(tmp_path / "alone")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.passes_by is not None])
def test_passes_depend_on_no_other_parameter(name: str) -> None:
    """The results of a method's passes are the same whatever the parameters beside `passes_by` are."""
    method, random = METHODS[name], np.random.default_rng(3)
    assert method.passes_by is not None
    base, *inputs = (random.standard_normal(500) for _ in range(3))
    found = []
    for _ in range(6):
        shared: dict[str, Any] = {
            key: (bool(random.integers(2)) if isinstance(default, bool) else float(random.uniform(0.2, 0.9)))
            if key not in method.passes_by else {"rescale": True, "select_topk": 0.4}[key]
            for key, default in method.shared.items()
        }  # fmt: skip
        each = {
            key: (0.4, 0.7) if key in method.passes_by else tuple(random.uniform(0.2, 0.9, 2)) for key in method.each
        }
        spec = MergeSpec((500,), 2, has_base=True, shared=shared, each=each)
        passes: list[Any] = []
        run_steps(replace(method, steps=recording(method.steps, passes)), spec, base, inputs)
        found.append(json.dumps(passes))
    assert len(set(found)) == 1
    assert found[0] != "[]"


def recording(steps: Any, passes: list[Any]) -> Any:
    """The method, with the results of its passes written down."""

    def wrapped(spec: MergeSpec) -> Any:
        running = steps(spec)
        try:
            request = next(running)
            while True:
                result = yield request
                passes.append(np.asarray(result, dtype=object).tolist())
                request = running.send(result)
        except StopIteration as e:
            return e.value

    return wrapped
