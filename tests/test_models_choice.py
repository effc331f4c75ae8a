"""Which tensors a recipe merges: --only, --exclude, --on-missing, --on-mismatch, as for pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import BF16, Array, language_model, load_folder, save_model
from merge_tool import MismatchError
from merge_tool.api import merge_models
from merge_tool.cli import merge_tool
from merge_tool.verification.verify import verify
from test_models import recipe, write


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [save_model(tmp_path / name, language_model(k)) for k, name in enumerate(("base", "one", "two", "three"))]


def load(path: Path) -> dict[str, Array]:
    return load_folder(path)


def note(out: Path, name: str) -> Any:
    tensors = json.loads((out / "merge_report.json").read_text())["tensors"]
    return next(tensor.get("note") for tensor in tensors if tensor["name"] == name)


@pytest.mark.parametrize("method", ["ties", "linear", "karcher"])
def test_what_is_not_chosen_is_the_bases_byte_for_byte(models: list[Path], tmp_path: Path, method: str) -> None:
    """Whatever dtype is asked; the base is base_model, or else the first model; the rest is merged as without."""
    asked = recipe(method, models) | {"dtype": "float32"}
    first = load(models[0] if "base_model" in asked else models[1])
    merge_models(asked, tmp_path / "all")
    merge_models(
        asked, tmp_path / "out", only=["self_attn", "lm_head"], exclude=["re:layers\\.1\\.", "*.q_proj.weight"]
    )
    everything, found = load(tmp_path / "all"), load(tmp_path / "out")
    assert found.keys() == everything.keys()
    for name, values in found.items():
        chosen = ("self_attn" in name or "lm_head" in name) and "layers.1." not in name and "q_proj" not in name
        expected = everything[name] if chosen else first[name]
        assert values.dtype == expected.dtype
        assert values.tobytes() == expected.tobytes(), name
    assert note(tmp_path / "out", "model.norm.weight") == "not chosen: base kept"


def test_a_choice_on_the_command_line_is_told_and_verified(models: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path, recipe("task_arithmetic", models))
    options = ["--only", "re:mlp|norm", "--exclude", "model.norm", "--quiet"]
    result = CliRunner().invoke(merge_tool, ["run", str(path), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out/README.md").read_text()
    assert "--only 're:mlp|norm' --exclude model.norm" in card
    assert not verify(tmp_path / "out", recipe=path)[0].problems


def test_a_hostile_pattern_in_a_report_does_not_hang(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regular expressions of a stranger's report are tried in another process first."""
    monkeypatch.setattr("merge_tool.plan.patterns._MATCH_SECONDS", 1)
    path = write(tmp_path, recipe("linear", models))
    merge_models(path, tmp_path / "out")
    report = tmp_path / "out/merge_report.json"
    hostile = report.read_text().replace('"options": {}', '"options": {"only": ["re:((\\\\w|\\\\W)+)+!$"]}', 1)
    report.write_text(hostile)
    result = CliRunner().invoke(merge_tool, ["verify", str(tmp_path / "out"), "--recipe", str(path)])
    assert result.exit_code == 1
    assert "take longer than 1 s" in result.output


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_missing_tensors_are_an_error_or_the_bases(models: list[Path], tmp_path: Path, method: str) -> None:
    """What some model lacks is the base's, what the base lacks is left out; both are named in a warning."""
    asked = recipe(method, models)
    lead, other = (models[0], models[2]) if "base_model" in asked else (models[1], models[2])
    tensors = load(other)
    del tensors["model.norm.bias"]
    save_model(other, {**tensors, "only.there": np.ones(3, BF16)})
    with pytest.raises(MismatchError, match=r"(?s)1 tensor not in two: model.norm.bias\n.*only.there"):
        merge_models(asked, tmp_path / "out")
    report = merge_models(asked, tmp_path / "out", on_missing="base")
    found = load(tmp_path / "out")
    assert found.keys() == load(lead).keys()
    assert found["model.norm.bias"].tobytes() == load(lead)["model.norm.bias"].tobytes()
    assert note(tmp_path / "out", "model.norm.bias") == "not in all models: base kept"
    assert f"1 tensor is not in some model; {lead.name}'s are kept: model.norm.bias." in report.warnings
    assert f"1 tensor is not in {lead.name}; left out: only.there." in report.warnings


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_other_shapes_are_an_error_or_the_bases(models: list[Path], tmp_path: Path, method: str) -> None:
    asked = recipe(method, models)
    lead = models[0] if "base_model" in asked else models[1]
    tensors = load(models[3])
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-3]
    save_model(models[3], tensors)
    with pytest.raises(MismatchError, match=r"(?s)lm_head.weight: \[100, 32\] in .*--on-mismatch base"):
        merge_models(asked, tmp_path / "out")
    report = merge_models(asked, tmp_path / "out", on_mismatch="base")
    assert load(tmp_path / "out")["lm_head.weight"].tobytes() == load(lead)["lm_head.weight"].tobytes()
    told = f"1 tensor is of another shape or type in some model; {lead.name}'s are kept: lm_head.weight."
    assert told in report.warnings


def test_slerp_of_a_recipe_keeps_base_models_tensors(models: list[Path], tmp_path: Path) -> None:
    """Not the first one listed: the one at t = 0."""
    asked = {
        "merge_method": "slerp", "base_model": str(models[1]), "parameters": {"t": 0.3},
        "models": [{"model": str(models[0])}, {"model": str(models[1])}],
    }  # fmt: skip
    merge_models(asked, tmp_path / "out", exclude=["mlp"])
    found, base = load(tmp_path / "out"), load(models[1])
    same = {name for name in base if found[name].tobytes() == base[name].tobytes()}
    assert same == {name for name in base if "mlp" in name}
