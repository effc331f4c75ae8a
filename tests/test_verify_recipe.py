"""`verify --recipe`: a sample of an output is begun again from what its report says that the passes found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import BF16, language_model, save_model
from merge_tool import OutputError, merge
from merge_tool.api import merge_models
from merge_tool.cli import merge_tool
from merge_tool.methods.steps import TILE
from merge_tool.verification.verify import verify
from test_fp8 import quantised_model, values
from test_models import EACH, recipe, write

LARGE = "model.layers.1.mlp.up_proj.weight"  # of several tiles, flat or by rows
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in EACH},
    "linear of two": ("linear", {}),
    "slerp": ("slerp", {"t": 0.3}),
    "nuslerp by columns": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "ties rescaled": ("ties", {"rescale": True, "normalize": False}),
    "model_stock by rows": ("model_stock", {"filter_wise": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three finetunes, with one tensor that all have alike, and integers."""
    folder = tmp_path_factory.mktemp("models")
    return [model(folder / name, k) for k, name in enumerate(("base", "one", "two", "three"))]


def model(folder: Path, seed: int) -> Path:
    tensors = language_model(seed, layers=2, dtype=np.float32)
    common, own = np.random.default_rng(9), np.random.default_rng(seed)
    tensors[LARGE] = (common.standard_normal((801, 500)) + 0.1 * own.standard_normal((801, 500))).astype(np.float32)
    tensors["model.norm.weight"], tensors["ids"] = np.ones(32, BF16), np.arange(7)
    assert tensors[LARGE].size > 3 * 2 * TILE
    return save_model(folder, tensors, shards=seed % 2 + 1)


def asked_for(variant: str, models: list[Path]) -> dict[str, Any]:
    method, parameters = VARIANTS[variant]
    if method == "slerp":
        base, one = map(str, models[:2])
        return {"merge_method": "slerp", "base_model": base, "models": [{"model": base}, {"model": one}],
                "parameters": parameters}  # fmt: skip
    found = recipe(method, models[:3] if variant == "linear of two" else models)
    return {**found, "parameters": {**found.get("parameters", {}), **parameters}}


def changed(out: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of an output, and SHA256SUMS with it: as someone would who wants it to pass."""
    path, sums = out / name, out / "SHA256SUMS"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(change(path.read_bytes()))
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))
    (done,) = verify(out)
    assert not done.problems


def in_report(out: Path, tensor: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one tensor's line of a report."""

    def rewritten(raw: bytes) -> bytes:
        lines = raw.decode().split("\n")
        (place,) = (k for k, line in enumerate(lines) if line.startswith(f'  {{"name": "{tensor}"'))
        comma = lines[place].endswith(",")
        content = json.loads(lines[place].removesuffix(","))
        change(content)
        lines[place] = f"  {json.dumps(content)}{',' * comma}"
        return "\n".join(lines).encode()

    changed(out, "merge_report.json", rewritten)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_of_every_method_is_verified(variant: str, models: list[Path], tmp_path: Path) -> None:
    """Some tiles of every tensor, without the passes; and all of it, with them. Whatever memory made it."""
    path, out = write(tmp_path, asked_for(variant, models)), tmp_path / "out"
    merge_models(path, out, seed=3, max_shard_bytes=300_000)
    for options, all_of_it in (({"sample": 0.3}, False), ({"sample": 1.0}, True), ({"full": True, "jobs": 3}, True)):
        (done,) = verify(out, recipe=path, **options)
        assert done.problems == ()
        assert (done.num_compared == done.num_elements) == all_of_it
        assert done.num_compared > 0


@pytest.mark.parametrize("variant", ["ties", "dare_linear", "slerp", "model_stock by rows", "passthrough"])
def test_a_changed_byte_is_found(variant: str, models: list[Path], tmp_path: Path) -> None:
    """Of an element, whoever made the checksums anew: by a sample of all tiles, and by making everything again."""
    path, out = write(tmp_path, asked_for(variant, models)), tmp_path / "out"
    merge_models(path, out)
    changed(out, "model.safetensors", lambda raw: raw[:-40_001] + bytes([raw[-40_001] ^ 1]) + raw[-40_000:])
    for options in ({"sample": 1.0}, {"full": True}):
        (problem,) = verify(out, recipe=path, **options)[0].problems
        assert "is not the merge of these parents" in problem


@pytest.mark.parametrize("variant", ["ties", "breadcrumbs", "multislerp", "karcher", "nuslerp", "sce", "arcee_fusion"])
def test_a_changed_result_of_a_pass_is_found(variant: str, models: list[Path], tmp_path: Path) -> None:
    """A result that would make other elements, by a sample; in its last bit, by making the passes again."""
    path = write(tmp_path, asked_for(variant, models))

    def scale(factor: float) -> Callable[[dict[str, Any]], None]:
        def change(tensor: dict[str, Any]) -> None:
            holder = tensor["passes"]
            while isinstance(holder[-1], list):
                holder = holder[-1]
            assert holder[-1] == float.fromhex(holder[-1]).hex()
            holder[-1] = (float.fromhex(holder[-1]) * factor).hex()

        return change

    for number, (factor, options) in enumerate(((3.0, {"sample": 1.0}), (1 + 2.0**-52, {"full": True}))):
        out = tmp_path / f"{number}"
        merge_models(path, out)
        in_report(out, LARGE, scale(factor))
        problems = verify(out, recipe=path, **options)[0].problems
        assert any(LARGE in problem for problem in problems)


@pytest.mark.parametrize(
    "passes",
    [
        None, [], [[]], [[[]]], [["0x1p0"]], [[["nan", "nan"], ["nan"]]], [[[["0x1p+0"]]]] * 2, "0x1p+0", {"a": 1},
        [[["0x1p0", "half"]]], 7, [[[[[[[[[[[["0x1p0"]]]]]]]]]]]],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("variant", ["ties", "multislerp", "nuslerp"])
def test_results_of_passes_that_cannot_be_are_found(
    variant: str, passes: Any, models: list[Path], tmp_path: Path
) -> None:
    """None of them ends verify otherwise than by a problem."""
    path, out = write(tmp_path, asked_for(variant, models)), tmp_path / "out"
    merge_models(path, out)
    in_report(
        out, LARGE, lambda tensor: tensor.pop("passes") and None if passes is None else tensor.update(passes=passes)
    )
    assert verify(out, recipe=path, sample=0.2)[0].problems


def test_results_nested_too_deeply_are_a_problem(models: list[Path], tmp_path: Path) -> None:
    path, out = write(tmp_path, asked_for("ties", models)), tmp_path / "out"
    merge_models(path, out)
    nested: Any = ["0x1p0"]
    for _ in range(600):
        nested = [nested]
    in_report(out, LARGE, lambda tensor: tensor.update(passes=nested))
    (problem,) = verify(out, recipe=path)[0].problems
    assert problem.startswith("merge_report.json: its tensors cannot be read (lists in lists in lists: passes find no")


def test_results_that_are_too_many_are_made_again(models: list[Path], tmp_path: Path) -> None:
    """Of nuslerp by columns: the report leaves them out, and a sample makes the passes anew."""
    out = tmp_path / "out"
    merge_models(asked_for("nuslerp by columns", models), out)
    tensors = {t["name"]: t for t in json.loads((out / "merge_report.json").read_text())["tensors"]}
    assert "passes" not in tensors[LARGE]
    assert "passes" in tensors["lm_head.weight"]


def test_each_of_several_outputs_is_verified(models: list[Path], tmp_path: Path) -> None:
    path, out = write(tmp_path, asked_for("ties", models)), tmp_path / "out"
    merge_models(path, out, values={"density": [0.3, 0.6], "lambda": 0.9})
    done = verify(out, recipe=path)
    assert [one.path.name for one in done] == ["density-0.3", "density-0.6"]
    assert not any(one.problems for one in done)
    in_report(out / "density-0.6", LARGE, lambda tensor: tensor.update(passes=[["0x0p+0"]]))
    first, second = verify(out, recipe=path)
    assert not first.problems
    assert second.problems
    changed(
        out / "density-0.3", "merge_report.json", lambda raw: raw.replace(b'"density": 0.3,', b'"density": 0.4,', 1)
    )
    assert verify(out, recipe=path)[0].problems


def test_8_bits_of_a_recipe_are_verified(tmp_path: Path) -> None:
    """Codes and scales, by a sample and all of them; a scale that was changed is found."""
    base, one = (quantised_model(tmp_path / name, values(k))[0] for k, name in enumerate(("base", "one")))
    asked = {"merge_method": "slerp", "base_model": str(base), "models": [{"model": str(base)}, {"model": str(one)}]}
    path, out = write(tmp_path, {**asked, "parameters": {"t": 0.3}}), tmp_path / "out"
    merge_models(path, out, dtype="base")
    for options in ({}, {"full": True}):
        (done,) = verify(out, recipe=path, **options)
        assert done.problems == ()
    changed(out, "model.safetensors", lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    assert verify(out, recipe=path, sample=1.0)[0].problems


def test_another_recipe_and_other_models_are_found(models: list[Path], tmp_path: Path) -> None:
    """Whatever of the recipe changed the result; a model that is another by now; a model in another's place."""
    asked = asked_for("ties", models)
    out, path = tmp_path / "out", write(tmp_path, asked)
    merge_models(path, out)
    asked["models"][0]["parameters"] = {**EACH["ties"], "weight": 0.75}
    assert verify(out, recipe=write(tmp_path, asked))[0].problems
    swapped = {**asked_for("ties", models), "base_model": str(models[1])}
    swapped["models"][0] = {**swapped["models"][0], "model": str(models[0])}
    problems = verify(out, recipe=write(tmp_path, swapped))[0].problems
    assert any("model-1" in problem or "base: its" in problem for problem in problems)
    elsewhere = asked_for("ties", [models[0], model(tmp_path / "one", 77), *models[2:]])
    assert verify(out, recipe=write(tmp_path, elsewhere))[0].problems == (
        "one: its weights are not those that were merged; no element was compared.",
    )


def test_an_output_is_verified_in_the_way_it_was_asked_for(models: list[Path], tmp_path: Path) -> None:
    """A pair against BASE and FT, a recipe's output by the recipe; the error says which."""
    path = write(tmp_path, asked_for("slerp", models))
    merge_models(path, tmp_path / "yaml")
    merge(*models[:2], tmp_path / "pair", 0.3)
    with pytest.raises(OutputError, match=r"is that of a recipe's output. Give --recipe RECIPE.yaml"):
        verify(tmp_path / "yaml", (models[0], models[1]))
    with pytest.raises(OutputError, match=r"is that of a pair. Give --against BASE FT"):
        verify(tmp_path / "pair", recipe=path)
    command = ["verify", str(tmp_path / "yaml"), "--recipe", str(path), "--against", *map(str, models[:2])]
    result = CliRunner().invoke(merge_tool, command)
    assert (result.exit_code, "Give either --against BASE FT or --recipe RECIPE" in result.stderr) == (2, True)
