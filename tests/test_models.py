"""Recipes of any number of models, end to end: from YAML on disk to a model, in bounded memory, by every method."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from checkpoints import CONFIG, Array, contents, language_model, load_folder, save_model
from merge_tool import DataError, MismatchError, OutputError, RecipeError
from merge_tool.api import merge_models, merge_recipe, plan_parts
from merge_tool.arrays import encode
from merge_tool.cli import merge_tool
from merge_tool.methods.inner import Weights
from merge_tool.methods.passes import run_steps
from merge_tool.methods.registry import METHODS
from merge_tool.methods.steps import MergeSpec, Method, OrderStatistics, Steps, Tile, seed_key
from merge_tool.plan.system_memory import resident_bytes
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.verification.verify import verify
from test_memory import linux_only, write_model
from test_sub_configs import NESTINGS, nested

EACH: dict[str, dict[str, Any]] = {  # what an input needs beside nothing
    "linear": {"weight": 0.5}, "nuslerp": {"weight": 0.5}, "multislerp": {"weight": 0.4}, "karcher": {},
    "model_stock": {}, "task_arithmetic": {"weight": 0.5}, "ties": {"weight": 0.5, "density": 0.4},
    "dare_linear": {"weight": 0.5, "density": 0.6}, "dare_ties": {"weight": 0.5, "density": 0.6},
    "breadcrumbs": {"weight": 0.5, "density": 0.6, "gamma": 0.02},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.6, "gamma": 0.02},
    "della": {"weight": 0.5, "density": 0.6, "epsilon": 0.1},
    "della_linear": {"weight": 0.5, "density": 0.6, "epsilon": 0.1},
    "sce": {}, "nearswap": {}, "arcee_fusion": {}, "passthrough": {"scale": 0.5},
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {"nearswap": {"t": 0.002}, "sce": {"select_topk": 0.4}}
LAYERS = 3


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and three finetunes, each sharded in its own way."""
    config = {**CONFIG, "num_hidden_layers": LAYERS, "layer_types": ["a", "b", "c"]}
    return [
        save_model(tmp_path / name, language_model(k, layers=LAYERS), shards=k + 1, config=config)
        for k, name in enumerate(("base", "one", "two", "three"))
    ]


def recipe(method: str, models: list[Path]) -> dict[str, Any]:
    """A recipe of this method over base and as many finetunes as it takes."""
    base, *fts = map(str, models)
    count = min(METHODS[method].inputs[1], len(fts))
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": ft, "parameters": EACH[method]} for ft in fts[:count]],
        "parameters": SHARED.get(method, {}),
    }
    if METHODS[method].base == "required":
        found["base_model"] = base
    return {key: value for key, value in found.items() if value}


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


@pytest.mark.parametrize("method", EACH)
def test_every_method_streamed_is_the_method_in_memory(method: str, models: list[Path], tmp_path: Path) -> None:
    """A streamed merge is, tensor by tensor, what the method makes of the whole tensors, rounded once."""
    asked = recipe(method, models)
    merge_models(write(tmp_path, asked), tmp_path / "out")
    merged = load_folder(tmp_path / "out")
    folders = [load_folder(Path(m["model"])) for m in asked["models"]]
    base = load_folder(models[0]) if "base_model" in asked else None
    assert merged.keys() == folders[0].keys()
    for name, values in merged.items():
        expected = in_memory(method, name, base and base[name], [f[name] for f in folders])
        assert values.dtype == folders[0][name].dtype
        np.testing.assert_array_equal(values, expected, name)


def in_memory(method: str, name: str, base: Array | None, inputs: list[Array]) -> Array:
    found = METHODS[method]
    shared = {**found.shared, **SHARED.get(method, {})}
    each = {k: (v,) * len(inputs) for k, v in {**found.each, **EACH[method]}.items()}
    given = MergeSpec(inputs[0].shape, len(inputs), base is not None, shared, each, seed_key(0, name))
    merged = run_steps(found, given, base, inputs)
    return encode(merged.reshape(-1), np.empty(merged.size, inputs[0].dtype)).reshape(merged.shape)


@pytest.mark.parametrize("method", ["ties", "della", "dare_ties", "multislerp", "nuslerp", "sce"])
def test_the_bytes_depend_on_neither_memory_nor_threads_nor_shards(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of several chunks: the same bytes for any budget, thread count and sharding of the inputs."""
    shapes = {"model.layers.0.a.weight": (700, 900), "model.layers.0.b.weight": (3, 150_001), "c.weight": (400_000,)}
    outputs = []
    for shards in (1, 3):
        folders = []
        for k in range(3):
            common, own = np.random.default_rng(0), np.random.default_rng(k + 1)
            tensors = {
                n: (common.standard_normal(s) + 0.1 * own.standard_normal(s)).astype(np.float32)
                for n, s in shapes.items()
            }
            folders.append(save_model(tmp_path / f"{shards}-{k}", tensors, shards=shards))
        asked = recipe(method, [*folders, folders[0]][:3])
        if method == "nuslerp":
            asked["parameters"] = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
        for jobs, tiles, room in ((1, 1, 60_000_000), (3, 2, 400_000_000)):
            monkeypatch.setattr("merge_tool.plan.memory._LARGEST_CHUNK_TILES", tiles)
            out = tmp_path / f"out-{shards}-{jobs}"
            merge_models(asked, out, jobs=jobs, memory_bytes=resident_bytes() + room)
            outputs.append((out / "model.safetensors").read_bytes())
    assert len(set(outputs)) == 1


@linux_only
@pytest.mark.parametrize(
    "method", ["ties", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dare_ties", "multislerp", "della"))]
)
def test_three_models_keep_the_memory_promise(method: str, tmp_path: Path) -> None:
    """Base and three finetunes with a tensor of 64 MB each, in a process that may have 96 MB."""
    shapes = {"a.norm": (512,), "b.weight": (8_000, 4_000)}
    paths = [write_model(tmp_path / f"{k}.safetensors", shapes, k) for k in range(4)]
    path = write(tmp_path, recipe(method, paths))
    command = [
        sys.executable,
        "-m",
        "merge_tool",
        "run",
        str(path),
        str(tmp_path / "out"),
        "--json",
        "--memory",
        "96MB",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)["peak_bytes"] <= 96_000_000


def test_an_interrupted_recipe_continues_to_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    """What was finished is kept, the rest is made, and nothing differs from an uninterrupted merge."""
    asked = recipe("dare_ties", models)
    merge_models(asked, tmp_path / "whole", max_shard_bytes=20_000)

    class Stopped(Exception):
        pass

    def stop(nbytes: int, name: str) -> None:
        if name.startswith("model.layers.1"):
            raise Stopped

    with pytest.raises(Stopped):
        merge_models(asked, tmp_path / "out", max_shard_bytes=20_000, on_progress=stop)
    assert (tmp_path / "out/.slerp-merge").exists()
    report = merge_models(asked, tmp_path / "out", max_shard_bytes=20_000)
    assert not report.already_complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert merge_models(asked, tmp_path / "out", max_shard_bytes=20_000).already_complete


def test_another_seed_is_another_merge(models: list[Path], tmp_path: Path) -> None:
    asked = recipe("dare_linear", models)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge_models(asked, tmp_path / out, seed=seed)
    a, b, c = (contents(tmp_path / out) for out in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_slerp_by_a_recipe_is_slerp_by_the_command(models: list[Path], tmp_path: Path) -> None:
    """The same weights, whichever way it is asked; t = 0 is base_model wherever it stands in the list."""
    base, one = map(str, models[:2])
    asked = {"merge_method": "slerp", "models": [{"model": one}, {"model": base}], "base_model": base}
    merge_models({**asked, "parameters": {"t": 0.3}}, tmp_path / "out")
    result = CliRunner().invoke(merge_tool, ["merge", base, one, str(tmp_path / "pair"), "--t", "0.3"])
    assert result.exit_code == 0, result.output
    ours, theirs = load_folder(tmp_path / "out"), load_folder(tmp_path / "pair")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("tied", [0, 1])
def test_heads_that_are_tied_or_left_out_are_told(models: list[Path], tmp_path: Path, tied: int) -> None:
    """As for pairs: a head that only one model has is merged with an embedding, or left out, and never in silence."""
    tensors = load_folder(models[tied])
    del tensors["lm_head.weight"]
    config = json.loads((models[tied] / "config.json").read_text()) | {"tie_word_embeddings": True}
    given = list(models[:2])
    given[tied] = save_model(tmp_path / "tied", tensors, config=config)
    told: list[str] = []
    parts = [{"model": str(path), "parameters": {"weight": 1}} for path in given]
    merge_models({"merge_method": "linear", "models": parts}, tmp_path / "out", on_warning=told.append)
    expected = "lm_head.weight is not in tied, whose head is tied" if tied else "tied ties its head to"
    assert any(text.startswith(expected) for text in told)


def test_stacked_layers_are_renumbered_and_the_configuration_follows(models: list[Path], tmp_path: Path) -> None:
    """Layers 0-1 of one and 1-2 of another make four; config.json says four, its lists per layer follow."""
    base, one = map(str, models[:2])
    slices = [
        {"sources": [{"model": base, "layer_range": [0, 2]}]},
        {"sources": [{"model": one, "layer_range": [1, 3]}]},
    ]
    merge_models({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged, a, b = load_folder(tmp_path / "out"), load_folder(models[0]), load_folder(models[1])
    part = "self_attn.q_proj.weight"
    for k, (origin, layer) in enumerate(((a, 0), (a, 1), (b, 1), (b, 2))):
        assert (merged[f"model.layers.{k}.{part}"] == origin[f"model.layers.{layer}.{part}"]).all()
    assert (merged["model.embed_tokens.weight"] == a["model.embed_tokens.weight"]).all()
    assert (merged["lm_head.weight"] == b["lm_head.weight"]).all()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["a", "b", "b", "c"]


@pytest.mark.parametrize("place", NESTINGS)
def test_stacked_layers_are_counted_wherever_the_configuration_does(
    models: list[Path], tmp_path: Path, place: tuple[str, ...]
) -> None:
    """And nothing else is; where no number of layers is known, a warning tells of it."""
    base = models[0]
    slices = [{"sources": [{"model": str(base), "layer_range": span}]} for span in ([0, 2], [1, 3])]
    vision = {"vision_config": {"num_hidden_layers": LAYERS}}
    for inner in ({"model_type": "x", "num_hidden_layers": LAYERS}, {"model_type": "x", "depth": LAYERS}):
        (base / "config.json").write_text(json.dumps(nested(place, inner) | vision))
        told: list[str] = []
        merge_models(
            {"merge_method": "passthrough", "slices": slices}, tmp_path / "out", overwrite=True, on_warning=told.append
        )
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config == nested(place, inner | {"num_hidden_layers": 4} if "depth" not in inner else inner) | vision
        assert any("set that number" in text for text in told) == ("depth" in inner)


def test_layers_that_are_merged_across_do_not_count_as_far_apart(models: list[Path], tmp_path: Path) -> None:
    """Layers of one model have nothing in common; what is no layer is compared as ever."""
    sources = [
        {"model": str(models[0]), "layer_range": layers, "parameters": {"weight": 1}} for layers in ([0, 2], [1, 3])
    ]
    report = merge_models({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")
    assert report.warnings == ()
    assert not any(kind.startswith("model.layers") for kind in report.summary.groups)
    tensors = {tensor["name"]: tensor for tensor in report.tensors}
    assert tensors["model.layers.0.mlp.up_proj.weight"]["angle_degrees"] > 80
    assert tensors["lm_head.weight"]["equal"]


def test_the_output_tells_its_recipe_and_no_path(models: list[Path], tmp_path: Path) -> None:
    """Card, report and mergekit_config.yml have the recipe with models by their names; verify finds nothing wrong."""
    merge_models(recipe("ties", models), tmp_path / "out")
    found = contents(tmp_path / "out")
    for name in ("README.md", "merge_report.json", "mergekit_config.yml"):
        assert b"merge_method: ties" in found[name], name
        assert str(tmp_path).encode() not in found[name], name
    line = next(t for t in json.loads(found["merge_report.json"])["tensors"] if t["name"] == "lm_head.weight")
    inputs = json.loads(found["merge_report.json"])["inputs"]
    assert [inputs[source["model"]]["name"] for source in line["sources"]] == ["base", "one", "two", "three"]
    assert line["settings"]["density"] == [0.4, 0.4, 0.4]
    (done,) = verify(tmp_path / "out")
    assert not done.problems
    with pytest.raises(OutputError, match="--recipe"):
        verify(tmp_path / "out", (models[0], models[1]))
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert verify(tmp_path / "out")[0].problems


def test_a_dry_run_shows_what_gradients_come_to(models: list[Path], tmp_path: Path) -> None:
    asked = recipe("linear", models)
    asked["models"][0]["parameters"] = {"weight": [0, 1]}
    path = write(tmp_path, asked)
    result = CliRunner().invoke(merge_tool, ["run", str(path), str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "model.layers.1" in result.output
    assert "weight [0.5, 0.5, 0.5] (shares [0.3333, 0.3333, 0.3333])" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(merge_tool, ["run", str(path), str(tmp_path / "out"), "--dry-run", "--json"])
    rows = json.loads(result.stdout)["settings"]
    assert [r["settings"]["weight"][0] for r in rows if r["layer"].startswith("model.layers")] == [0.0, 0.5, 1.0]


def test_all_mismatches_are_told_at_once(models: list[Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", language_model(9, hidden=48, layers=LAYERS))
    with pytest.raises(MismatchError) as caught:
        merge_models(recipe("ties", [*models[:2], other]), tmp_path / "out")
    assert f"{len(load_folder(other))} shapes differ" in str(caught.value)
    assert "[100, 32] in base, [100, 48] in other" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ties", "linear", "della"])
def test_a_value_that_is_not_finite_is_named(method: str, models: list[Path], tmp_path: Path) -> None:
    tensors = language_model(2, layers=LAYERS)
    tensors["model.norm.weight"][7] = np.nan
    bad = save_model(tmp_path / "bad", tensors)
    with pytest.raises(DataError, match=r"model.norm.weight in bad/model.safetensors: element 7 is nan"):
        merge_models(recipe(method, [models[0], models[1], bad]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_result_too_large_for_its_type_is_an_error(models: list[Path], tmp_path: Path) -> None:
    asked = recipe("passthrough", models)
    asked |= {"models": [{"model": str(models[1]), "parameters": {"scale": 1e38}}], "dtype": "float16"}
    with pytest.raises(DataError, match="too large for F16"):
        merge_models(asked, tmp_path / "out")


def test_integers_are_copied_when_all_are_equal(tmp_path: Path) -> None:
    """And an error that names them when they are not, unless the base's are asked for."""
    tensors = [{"w": np.full((4, 4), k, np.float32), "ids": np.arange(6) + (k == 2)} for k in range(3)]
    folders = [save_model(tmp_path / f"m{k}", t) for k, t in enumerate(tensors)]
    merge_models(recipe("task_arithmetic", folders[:2]), tmp_path / "out")
    assert (load_folder(tmp_path / "out")["ids"] == np.arange(6)).all()
    with pytest.raises(DataError, match="ids"):
        merge_models(recipe("task_arithmetic", folders), tmp_path / "bad")
    merge_models(recipe("task_arithmetic", folders), tmp_path / "kept", on_mismatch="base")
    assert (load_folder(tmp_path / "kept")["ids"] == np.arange(6)).all()


def test_a_method_of_ones_own(models: list[Path], tmp_path: Path) -> None:
    """From Python, under a name of one's own, by the same loop: here the larger half of the differences."""

    def larger_half(given: MergeSpec) -> Steps:
        found = yield OrderStatistics(lambda tile: [np.abs(tile.inputs[0] - tile.base)], [[given.numel // 2]])
        least = np.float32(found[0][0])

        def combine(tile: Tile) -> Array:
            (d,) = tile.deltas()
            return tile.base + np.where(np.abs(d).astype(np.float32) >= least, d, 0.0)

        return combine

    mine = {"larger_half": Method("the larger half", "here", larger_half, inputs=(1, 1))}
    asked = {"merge_method": "larger_half", "base_model": str(models[0]), "models": [{"model": str(models[1])}]}
    merge_models(asked, tmp_path / "out", methods=mine)
    merged, base, one = (load_folder(f)["model.norm.weight"].astype(float) for f in (tmp_path / "out", *models[:2]))
    moved = merged != base
    assert 16 <= moved.sum() <= 18
    assert np.abs(one - base)[moved].min() >= np.abs(one - base)[~moved].max()


def test_a_method_of_ones_own_cannot_stand_for_a_built_in_one(models: list[Path], tmp_path: Path) -> None:
    """Its output would be taken for the other's: by a resumed merge, by `verify`, and by "already complete"."""
    mine = {"linear": replace(METHODS["linear"], weights=lambda sums, spec: Weights(0.9, 0.1))}
    with pytest.raises(RecipeError, match=r"'linear' is a built-in method\. Give yours a name of its own"):
        merge_models(recipe("linear", models), tmp_path / "out", methods=mine)
    assert not (tmp_path / "out").exists()


def test_workers_do_not_know_a_method_of_ones_own(models: list[Path], tmp_path: Path) -> None:
    mine = {"mine": replace(METHODS["linear"], weights=lambda sums, spec: Weights(0.9, 0.1))}
    asked = {**recipe("linear", models), "merge_method": "mine"}
    with ThreadPoolExecutor(1) as pool, pytest.raises(RecipeError, match="'mine' is one of your own, which workers"):
        merge_models(asked, tmp_path / "out", methods=mine, executor=pool)
    own = read_recipe(asked, {**METHODS, **mine})
    with pytest.raises(RecipeError, match="'mine' is one of your own, which workers"):
        plan_parts(own, tmp_path / "out", 2, methods={**METHODS, **mine})
    with pytest.raises(RecipeError, match="'mine' is not known here"):
        merge_recipe(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_method_names_the_tensor(models: list[Path], tmp_path: Path) -> None:
    asked = recipe("linear", models)
    for model, weight in zip(asked["models"], (1, -1, 0), strict=True):
        model["parameters"] = {"weight": weight}
    with pytest.raises((DataError, RecipeError), match=r"weight"):
        merge_models(asked, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("merge_*.yaml")))
def test_the_example_recipes_run(path: Path, tmp_path: Path) -> None:
    """Each example, with tiny models of 32 layers in place of its own, makes a model; and has fewer than 25 lines."""
    text = path.read_text()
    assert len(text.splitlines()) < 25
    names = sorted(set(re.findall(r"(?:model|base_model): (\S+)", text)), key=len, reverse=True)
    for k, name in enumerate(names):
        text = text.replace(name, str(save_model(tmp_path / f"m{k}", language_model(k, layers=32, hidden=8, vocab=16))))
    (tmp_path / "recipe.yaml").write_text(text)
    merge_models(tmp_path / "recipe.yaml", tmp_path / "out")
    assert load_folder(tmp_path / "out")


def test_an_interrupted_recipe_that_changed_is_refused_by_what_changed(models: list[Path], tmp_path: Path) -> None:
    """The recipe, the seed, another shard size, another model; the same command continues."""
    asked, out = recipe("dare_ties", models), tmp_path / "out"

    def stop(nbytes: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_models(asked, out, on_progress=stop, max_shard_bytes=20_000)
    changed = {**asked, "parameters": {"lambda": 0.9}}
    for what, again, options in (
        ("seed was 0, now 7", asked, {"seed": 7}), ("the recipe changed", changed, {}),
        ("exclude was none, now mlp", asked, {"exclude": ["mlp"]}),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=what):
            merge_models(again, out, **{"max_shard_bytes": 20_000, **options})
    save_model(models[2], language_model(50, layers=LAYERS, dtype=np.float32), shards=3)
    with pytest.raises(OutputError, match=r"the files of model-\d changed"):
        merge_models(asked, out, max_shard_bytes=20_000)
