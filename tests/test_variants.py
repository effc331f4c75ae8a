"""--variant: which of the weights that lie beside each other in a folder, as diffusers names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoints import Array, contents, load_folder, save_file
from hub_replica import Replica, run, serve
from merge_tool import MergeToolError, RecipeError, merge, merge_models
from merge_tool.verification.verify import verify
from oracle import float64_merge

STEM = "diffusion_pytorch_model"


def tensors(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.standard_normal((6, 4)).astype(np.float32) for name in ("conv_in", "conv_out", "mid")}


def component(folder: Path, seed: int, *, variants: tuple[str, ...] = ("fp16",), shards: bool = False) -> Path:
    """A component of diffusers; the variants have other values, so that a mistake shows."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file(tensors(seed), folder / f"{STEM}.safetensors")
    for number, variant in enumerate(variants, 1):
        mine = {name: array.astype(np.float16) for name, array in tensors(seed + 100 * number).items()}
        if not shards:
            save_file(mine, folder / f"{STEM}.{variant}.safetensors")
            continue
        names = {name: f"{STEM}.{variant}-{k + 1:05d}-of-00003.safetensors" for k, name in enumerate(sorted(mine))}
        for name, file in names.items():
            save_file({name: mine[name]}, folder / file)
        (folder / f"{STEM}.safetensors.index.{variant}.json").write_text(json.dumps({"weight_map": names}))
    return folder


def check(out: Path, first: int, second: int) -> None:
    found, a, b = load_folder(out), tensors(first), tensors(second)
    for name, array in found.items():
        x, y = (side[name].astype(array.dtype).astype(np.float64) for side in (a, b))
        assert np.abs(array - float64_merge(x, y, 0.4)).max() < 2e-3


@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_is_merged_into_plain_names(tmp_path: Path, shards: bool) -> None:
    base, ft = (component(tmp_path / name, seed, shards=shards) for name, seed in (("base", 1), ("ft", 2)))
    told: list[str] = []
    merge(base, ft, tmp_path / "out", 0.4, variant="fp16", on_warning=told.append)
    check(tmp_path / "out", 101, 102)
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {f"{STEM}.safetensors"}
    assert not list((tmp_path / "out").glob("*.index.*"))
    assert not [line for line in told if "variant" in line]
    (one,) = verify(tmp_path / "out", (base, ft))
    assert (one.problems, one.num_compared) == ((), 72)


def test_without_it_the_plain_weights_are_merged_and_it_is_said(tmp_path: Path) -> None:
    base, ft = component(tmp_path / "base", 1), component(tmp_path / "ft", 2, variants=("fp16", "non_ema"))
    told: list[str] = []
    merge(base, ft, tmp_path / "out", 0.4, on_warning=told.append)
    check(tmp_path / "out", 1, 2)
    expected = 'has fp16, non_ema beside its plain weights, which are merged. variant="fp16" takes the other.'
    assert sum(expected in line for line in told) == 1


def test_a_model_without_the_variant_gives_its_plain_weights_and_it_is_said(tmp_path: Path) -> None:
    base, ft = component(tmp_path / "base", 1), component(tmp_path / "ft", 2, variants=())
    told: list[str] = []
    recipe = {"merge_method": "slerp", "base_model": str(base), "parameters": {"t": 0.4},
              "models": [{"model": str(base)}, {"model": str(ft)}]}  # fmt: skip
    merge_models(recipe, tmp_path / "out", variant="fp16", on_warning=told.append)
    check(tmp_path / "out", 101, 2)
    assert "ft has no variant fp16: its plain weights are merged." in told


def test_variants_that_nobody_has_and_folders_that_have_nothing_else(tmp_path: Path) -> None:
    base, ft = (component(tmp_path / name, k, variants=("fp16", "ema")) for k, name in enumerate(("base", "ft")))
    with pytest.raises(RecipeError, match=r'variant="fp8": no model has weights with \.fp8 in their names'):
        merge(base, ft, tmp_path / "out", variant="fp8")
    with pytest.raises(RecipeError, match="variant is 'a/b', expected a word such as fp16"):
        merge(base, ft, tmp_path / "out", variant="a/b")
    (base / f"{STEM}.safetensors").unlink()
    with pytest.raises(MergeToolError, match=r"has 2 .safetensors files .* Choose one: variant=\"ema\""):
        merge(base, ft, tmp_path / "out")
    merge(base, ft, tmp_path / "out", 0.4, variant="fp16")
    check(tmp_path / "out", 100, 101)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    for seed, name in enumerate(("base", "ft")):
        component(tmp_path / "hub/models/org" / name, seed, shards=True)
    with serve(tmp_path / "hub") as replica:
        yield replica


def test_of_a_model_of_the_hub_only_the_variant_is_fetched(hub: Replica, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "merge", "org/base", "org/ft", "out", "--t", "0.4", "--variant", "fp16")
    assert done.returncode == 0, done.stderr
    assert "variant" not in done.stderr
    check(tmp_path / "cwd/out", 100, 101)
    fetched = {path.name for path in tmp_path.rglob("snapshots/*/*.safetensors")}
    assert len(fetched) == 3
    assert all(".fp16-" in name for name in fetched)


def test_a_published_recipe_has_the_variant(tmp_path: Path) -> None:
    base, ft = component(tmp_path / "base", 1), component(tmp_path / "ft", 2)
    recipe = {"merge_method": "slerp", "base_model": str(base), "parameters": {"t": 0.4},
              "models": [{"model": str(base)}, {"model": str(ft)}]}  # fmt: skip
    merge_models(recipe, tmp_path / "out", variant="fp16")
    merge_models(tmp_path / "out/mergekit_config.yml", tmp_path / "again", models_dir=tmp_path)
    assert contents(tmp_path / "again")[f"{STEM}.safetensors"] == contents(tmp_path / "out")[f"{STEM}.safetensors"]
    check(tmp_path / "again", 101, 102)
    assert "--variant fp16" in (tmp_path / "out/README.md").read_text()
