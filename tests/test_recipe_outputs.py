"""`--set`: a recipe's parameters from the command line, and several outputs of a recipe in one pass."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from checkpoints import contents, language_model, load_folder, save_model
from merge_tool import OutputError, RecipeError
from merge_tool.api import merge_models, plan_recipe
from merge_tool.cli import merge_tool
from merge_tool.methods.registry import METHODS
from merge_tool.output.older import is_output_of_several
from merge_tool.recipe.mergekit import read_recipe
from test_memory import linux_only, write_model
from test_models import recipe, write


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [save_model(tmp_path / name, language_model(k)) for k, name in enumerate(("base", "one", "two", "three"))]


def run(*words: Any) -> Result:
    return CliRunner().invoke(merge_tool, ["run", *map(str, words), "--quiet"])


def slerp(models: list[Path], **more: Any) -> dict[str, Any]:
    base, one = map(str, models[:2])
    return {"merge_method": "slerp", "base_model": base, "models": [{"model": base}, {"model": one}], **more}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_folder(folder).items()}


SETTINGS: list[tuple[str, dict[str, str]]] = [
    ("slerp", {"t": "0.2,0.7"}),
    ("linear", {"normalize": "true,false"}),
    ("ties", {"density": "0.2,0.6", "lambda": "0.5,1"}),
    ("dare_ties", {"density": "0.3,0.8"}),
    ("della_linear", {"epsilon": "0.05,0.2"}),
    ("karcher", {"max_iter": "0,5"}),
    ("sce", {"select_topk": "0.1,0.4"}),
    ("nearswap", {"t": "0.0005,0.002"}),
    ("passthrough", {"scale": "0.5,2"}),
]


@pytest.mark.parametrize(("method", "given"), SETTINGS, ids=[method for method, _ in SETTINGS])
def test_several_outputs_in_one_pass_are_those_of_separate_runs(
    models: list[Path], tmp_path: Path, method: str, given: dict[str, str]
) -> None:
    """Every file of them, card and report included, whatever is chosen, sharded and seeded."""
    path = write(tmp_path, slerp(models) if method == "slerp" else recipe(method, models))
    same = ["--max-shard-size", "20kB", "--exclude", "lm_head", "--jobs", "2"]
    same += ["--seed", "3"] if method in ("dare_ties", "della_linear") else []
    several = [word for key, values in given.items() for word in ("--set", f"{key}={values}")]
    result = run(path, tmp_path / "many", *several, *same)
    assert result.exit_code == 0, result.output
    outputs = []
    for number, values in enumerate(product(*(texts.split(",") for texts in given.values()))):
        pairs = dict(zip(given, values, strict=True))
        result = run(path, tmp_path / f"{number}", *(w for k, v in pairs.items() for w in ("--set", f"{k}={v}")), *same)
        assert result.exit_code == 0, result.output
        outputs.append(tmp_path / "many" / "-".join(f"{key}-{value}" for key, value in pairs.items()))
        assert contents(outputs[-1]) == contents(tmp_path / f"{number}")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(p.name for p in outputs)
    assert len({tuple(weights(output).values()) for output in outputs}) == len(outputs)
    assert (
        "already complete"
        in CliRunner().invoke(merge_tool, ["run", str(path), str(tmp_path / "many"), *several, *same]).stdout
    )


@pytest.mark.parametrize("method", ["ties", "slerp", "task_arithmetic"])
def test_a_value_that_is_set_is_that_of_a_recipe_that_says_so(models: list[Path], tmp_path: Path, method: str) -> None:
    """For all tensors and all models: filters, lists and what single models have do not count then."""
    key = {"ties": "density", "slerp": "t", "task_arithmetic": "weight"}[method]
    filters = [{"filter": "mlp", "value": [0.9, 0.1]}, {"value": 0.5}]
    said, other = (slerp(models) if method == "slerp" else recipe(method, models) for _ in range(2))
    said["parameters"] = {key: 0.3}
    other["parameters"] = {key: filters}
    for asked, value in ((said, {key: 0.3}), (other, {key: filters})):
        if method != "slerp":
            asked["models"] = [{**m, "parameters": {**m["parameters"], **value}} for m in asked["models"]]
    merge_models(said, tmp_path / "said")
    report = merge_models(other, tmp_path / "set", values={key: 0.3})
    assert weights(tmp_path / "said") == weights(tmp_path / "set")
    assert report.num_scheduled == 0
    merge_models(other, tmp_path / "other")
    assert weights(tmp_path / "other") != weights(tmp_path / "set")


def test_what_is_set_need_not_be_in_the_recipe(models: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path, slerp(models))
    assert "slerp needs a 't'" in run(path, tmp_path / "out").stderr
    assert run(path, tmp_path / "out", "--set", "t=0.5").exit_code == 0
    asked = recipe("linear", models)
    asked["models"] = [{"model": m["model"]} for m in asked["models"]]
    merge_models(asked, tmp_path / "linear", values={"weight": 1})


def test_outputs_share_what_is_read(models: list[Path], tmp_path: Path) -> None:
    """Two outputs are read for once, and written twice; the dry run and Python say which there are."""
    asked = recipe("dare_linear", models)
    one, two = (
        plan_recipe(read_recipe(asked, METHODS, values={"lambda": values}), tmp_path / "out")
        for values in (0.5, [0.5, 1.0])
    )
    assert two.read_bytes == one.read_bytes
    assert two.plan.output_bytes == 2 * one.plan.output_bytes
    assert two.plan.labels == ("lambda-0.5", "lambda-1")
    dry = run(write(tmp_path, asked), tmp_path / "out", "--set", "lambda=0.5,1", "--set", "weight=1", "--dry-run")
    assert dry.stdout.startswith("Plan: dare_linear at lambda = 0.5, 1 and weight = 1 of one, two, three, base;")
    assert "lambda [0.5, 1]" in dry.stdout
    report = merge_models(slerp(models), tmp_path / "slerp", values={"t": [0.25, 0.5]})
    assert report.ts == (0.25, 0.5)
    assert [path.name for path in report.outputs] == ["t-0.25", "t-0.5"]


@linux_only
def test_several_outputs_keep_the_memory_promise(tmp_path: Path) -> None:
    """Six at once, each with histograms of its own, of tensors of 16 MB."""
    paths = [
        write_model(tmp_path / f"{k}.safetensors", {"a.norm": (512,), "b.weight": (4_000, 1_000)}, k) for k in range(3)
    ]
    words = [
        "run",
        write(tmp_path, recipe("ties", paths)),
        tmp_path / "out",
        "--set",
        "density=0.1,0.2,0.3,0.4,0.5,0.6",
    ]
    command = [sys.executable, "-m", "merge_tool", *map(str, words), "--memory", "80MB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_bytes"] <= 80_000_000


def test_several_outputs_continue_where_they_were_stopped(models: list[Path], tmp_path: Path) -> None:
    """With what the passes of finished tensors found, for each output."""
    asked, options = recipe("ties", models), {"values": {"density": [0.2, 0.6]}, "max_shard_bytes": 20_000}
    merge_models(asked, tmp_path / "whole", **options)

    class Stopped(Exception):
        pass

    def stop(nbytes: int, name: str) -> None:
        if name.startswith("model.layers.1"):
            raise Stopped

    with pytest.raises(Stopped):
        merge_models(asked, tmp_path / "out", on_progress=stop, **options)
    assert '"passes"' in (tmp_path / "out/.slerp-merge/journal.jsonl").read_text()
    with pytest.raises(OutputError, match=r"density was 0\.2, 0\.6, now 0\.2\."):
        merge_models(asked, tmp_path / "out", **{**options, "values": {"density": 0.2}})
    merge_models(asked, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "given"), [("linear", "normalize=true,false"), ("ties", "density=0.2,0.6"), ("slerp", "t=-0.5,0.5")]
)
def test_the_cards_command_makes_the_same_outputs(models: list[Path], tmp_path: Path, method: str, given: str) -> None:
    asked = slerp(models) if method == "slerp" else recipe(method, models)
    path = write(tmp_path, asked)
    assert run(path, tmp_path / "many", "--set", given, "--extrapolate").exit_code == 0
    for folder in (tmp_path / "many").iterdir():
        words = shlex.split((folder / "README.md").read_text().split("```")[3])
        assert words[:4] == ["merge-tool", "run", "RECIPE.yaml", "OUT"]
        assert run(path, tmp_path / f"again {folder.name}", *words[4:]).exit_code == 0
        assert contents(folder) == contents(tmp_path / f"again {folder.name}")


@pytest.mark.parametrize("t", [1.5, [0, -0.5], {"filter": "mlp", "value": 2}])
def test_the_card_says_that_a_recipe_extrapolates(models: list[Path], tmp_path: Path, t: Any) -> None:
    values = [t, {"value": 0.5}] if isinstance(t, dict) else t
    for value, words in ((values, ["--extrapolate"]), (0.5, [])):
        out = tmp_path / f"out {len(words)}"
        merge_models(slerp(models, parameters={"t": value}), out, extrapolate=bool(words))
        assert shlex.split((out / "README.md").read_text().split("```")[3])[4:] == words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lambda=0.5"], "--set: slerp has no parameter 'lambda'. It has: t."),
        (["int8_mask=true"], "--set: slerp has no parameter 'int8_mask'."),
        (["tt=0.5"], "--set: slerp has no parameter 'tt' (did you mean 't'?)"),
        (["t=1.5"], "--set: 't' is 1.5, expected 0 (base_model) to 1 (the other model). Give --extrapolate"),
        (["t=half"], "--set: 't' is 'half', expected a finite number"),
        (["t=nan"], "--set: 't' is 'nan', expected a finite number"),
        (["t=0.3,0.30"], "--set: two of the values are the same"),
        (["t=0.3", "t=0.4"], "--set: 't' is given twice; write t=VALUE,VALUE."),
        (["t"], "--set: 't' is not NAME=VALUE[,VALUE...], as in lambda=0.5 or t=0.3,0.5."),
        (["t="], "--set: 't=' is not NAME=VALUE"),
        (["t=0.3,,0.4"], "--set: 't=0.3,,0.4' is not NAME=VALUE"),
        (["=0.3"], "--set: '=0.3' is not NAME=VALUE"),
    ],
)
def test_values_that_make_no_sense(models: list[Path], tmp_path: Path, words: list[str], expected: str) -> None:
    path = write(tmp_path, slerp(models))
    result = run(path, tmp_path / "out", *(part for word in words for part in ("--set", word)))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {expected}")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_one_pass_or_no_folder_are_refused(models: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path, recipe("model_stock", models))
    result = run(path, tmp_path / "out", "--set", "filter_wise=true,false")
    assert "is merged by rows in one output and as a whole in another, which is not one pass" in result.stderr
    result = run(path, tmp_path / "out.safetensors", "--set", "filter_wise=true,false")
    assert "out.safetensors: is one file, but 2 outputs need a folder." in result.stderr
    for values in ({"t": []}, {"t": {}}, {"t": None}):
        with pytest.raises(RecipeError, match="--set: 't'"):
            read_recipe(slerp(models), METHODS, values=values)


def test_values_that_no_tensor_has_make_no_outputs(tmp_path: Path) -> None:
    """Of integers alone nothing is merged."""
    folders = [save_model(tmp_path / name, {"ids": np.arange(5)}) for name in ("base", "one")]
    with pytest.raises(RecipeError, match="No tensor has its t from the several values given"):
        merge_models(slerp(folders), tmp_path / "out", values={"t": [0.1, 0.2]})


def test_a_folder_is_one_of_several_outputs_by_what_sets_it_apart(models: list[Path], tmp_path: Path) -> None:
    """`lambda-0.5` where that is its lambda; a stranger's report of many parameters is not taken apart for long."""
    merge_models(recipe("ties", models), tmp_path / "out", values={"lambda": [0.5, 1], "density": 0.3})
    folder = tmp_path / "out/lambda-0.5"
    assert is_output_of_several(folder)
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["parameters"] == {"lambda": 0.5, "density": 0.3}
    assert is_output_of_several(folder.rename(tmp_path / "lambda-0.5-density-0.3"))
    folder = (tmp_path / "lambda-0.5-density-0.3").rename(tmp_path / "lambda-1")
    assert not is_output_of_several(folder)
    (folder / "merge_report.json").write_text(json.dumps({"parameters": {f"p{n}": n for n in range(60)}}))
    assert not is_output_of_several(folder)
