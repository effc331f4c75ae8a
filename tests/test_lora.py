"""Adapters, made by hand with peft's names: against whole matrices in float64, through every command."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import BF16, as_torch, contents, language_model, load_folder, save_file, save_model
from hub_replica import serve
from merge_tool import CheckpointError, MismatchError, merge
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.cli import merge_tool
from merge_tool.models.lora import local_parts, open_model, parts
from merge_tool.models.low_rank import sum_products
from merge_tool.models.rescaled import Factors
from test_memory import linux_only, measured, write_model

Array = Any
PREFIX = "base_model.model."
RNG = np.random.default_rng(5)


def config(**settings: Any) -> dict[str, Any]:
    """adapter_config.json as peft writes it, as far as it matters, and some of what does not."""
    return {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "fan_in_fan_out": False, "bias": "none", "lora_bias": False, "init_lora_weights": True, "use_dora": False,
        "base_model_name_or_path": "org/base", "modules_to_save": None, "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.05, "loftq_config": {}, **settings,
    }  # fmt: skip


def save_adapter(folder: Path, tensors: Mapping[str, Array], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{PREFIX}{name}": array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(**settings)))
    return folder


def normal(*shape: int, dtype: Any = np.float32, scale: float = 0.1) -> Array:
    return (scale * RNG.standard_normal(shape)).astype(dtype)


def whole(model: Checkpoint, name: str) -> Array:
    info = model.tensors[name]
    return model.read_new(name, 0, info.numel).reshape(info.shape)


def assert_rounded(got: Array, exact: Array) -> None:
    """`got` is `exact` to the last bit of float32, but for what float64 itself rounds."""
    assert got.dtype == np.float32
    near = np.nextafter(np.abs(exact).astype(np.float32), np.float32(np.inf)) - np.abs(exact).astype(np.float32)
    assert (np.abs(got.astype(np.float64) - exact) <= 0.5001 * near + 1e-12).all()


LINEAR = {"q.lora_A.weight": (4, 24), "q.lora_B.weight": (40, 4)}
KINDS: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]], str, dict[str, Any]]] = {
    "linear": ((40, 24), LINEAR, "or,ri->oi", {}),
    "fan in, fan out": ((24, 40), LINEAR, "or,ri->io", {"fan_in_fan_out": True}),
    "square": ((24, 24), {"q.lora_A.weight": (4, 24), "q.lora_B.weight": (24, 4)}, "or,ri->oi", {}),
    "square, fan in": (
        (24, 24), {"q.lora_A.weight": (4, 24), "q.lora_B.weight": (24, 4)}, "or,ri->io", {"fan_in_fan_out": True},
    ),
    "embedding": ((50, 24), {"q.lora_embedding_A": (4, 50), "q.lora_embedding_B": (24, 4)}, "or,ri->io", {}),
    "square embedding": ((24, 24), {"q.lora_embedding_A": (4, 24), "q.lora_embedding_B": (24, 4)}, "or,ri->io", {}),
    "1x1 convolution": (
        (40, 24, 1, 1), {"q.lora_A.weight": (4, 24, 1, 1), "q.lora_B.weight": (40, 4, 1, 1)}, "orxy,rixy->oixy", {},
    ),
    "3x3 convolution": (
        (40, 24, 3, 3), {"q.lora_A.weight": (4, 24, 3, 3), "q.lora_B.weight": (40, 4, 1, 1)}, "orzw,rixy->oixy", {},
    ),
    "1d convolution": ((40, 24, 5), {"q.lora_A.weight": (4, 24, 5), "q.lora_B.weight": (40, 4, 1)}, "orz,rix->oix", {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["F32", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_the_sum_of_weight_and_product(tmp_path: Path, kind: str, dtype: Any) -> None:
    shape, factors, formula, settings = KINDS[kind]
    base = save_model(tmp_path / "base", {"q.weight": normal(*shape, dtype=dtype), "norm.weight": normal(24)})
    tensors = {name: normal(*s, dtype=dtype) for name, s in factors.items()}
    adapter = save_adapter(tmp_path / "lora", tensors, **settings)
    model = open_model(f"{base}+{adapter}")
    b, a = (tensors[name].astype(np.float64) for name in sorted(factors, reverse=True))
    exact = load_folder(base)["q.weight"].astype(np.float64) + 2.0 * np.einsum(formula, b, a)
    assert_rounded(whole(model, "q.weight"), exact)
    assert whole(model, "norm.weight").tobytes() == load_folder(base)["norm.weight"].tobytes()
    assert model.stored_dtype("q.weight") == ("F32" if dtype == np.float32 else "BF16")


def test_the_scale_is_alpha_by_the_rank_or_its_root_and_patterns_change_both(tmp_path: Path) -> None:
    """As peft: the first pattern that matches the whole module's name, or its end from a dot on."""
    names = [f"layers.{n}.{part}" for n in (1, 11) for part in ("q", "v")]
    base = save_model(tmp_path / "base", {f"{name}.weight": np.zeros((6, 5), np.float32) for name in names})
    ranks = {"layers.1.q": 2, r".*\.11\.v": 9}
    alphas = {"v": 3, r"^layers\.11\.q$": 5.5, "layers.11.v": 100}
    expected = {"layers.1.q": (2, 8), "layers.1.v": (4, 3), "layers.11.q": (4, 5.5), "layers.11.v": (9, 3)}
    for root_scaled in (False, True):
        ones = {f"{n}.lora_A.weight": np.ones((r, 5), np.float32) for n, (r, _) in expected.items()}
        ones |= {f"{n}.lora_B.weight": np.ones((6, r), np.float32) for n, (r, _) in expected.items()}
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        adapter = save_adapter(tmp_path / f"lora-{root_scaled}", ones, use_rslora=root_scaled, **patterns)
        model = open_model(f"{base}+{adapter}")
        for name, (rank, alpha) in expected.items():
            scale = alpha / (math.sqrt(rank) if root_scaled else rank)
            assert (whole(model, f"{name}.weight") == np.float32(scale * rank)).all(), name


def test_whole_tensors_biases_and_resized_layers_take_the_place_of_the_models(tmp_path: Path) -> None:
    """modules_to_save, bias="all", lora_bias, and an embedding that was saved beside its own factors."""
    tensors = {
        "embed.weight": normal(9, 6, dtype=BF16), "q.weight": normal(7, 6, dtype=BF16), "q.bias": normal(7, dtype=BF16),
        "k.bias": normal(7, dtype=BF16), "head.weight": normal(9, 6, dtype=BF16),
    }  # fmt: skip
    base = save_model(tmp_path / "base", tensors)
    found = {
        "embed.base_layer.weight": normal(11, 6), "embed.lora_embedding_A": normal(4, 11),
        "embed.lora_embedding_B": normal(6, 4), "q.lora_A.weight": normal(4, 6), "q.lora_B.weight": normal(7, 4),
        "q.lora_B.bias": normal(7), "k.bias": normal(7), "head.modules_to_save.weight": normal(9, 6),
    }  # fmt: skip
    model = open_model(f"{base}+{save_adapter(tmp_path / 'lora', found, lora_bias=True, modules_to_save=['head'])}")
    wide = {name: array.astype(np.float64) for name, array in {**tensors, **found}.items()}
    product = (wide["embed.lora_embedding_B"] @ wide["embed.lora_embedding_A"]).T
    assert_rounded(whole(model, "embed.weight"), wide["embed.base_layer.weight"] + 2 * product)
    assert_rounded(whole(model, "q.weight"), wide["q.weight"] + 2 * wide["q.lora_B.weight"] @ wide["q.lora_A.weight"])
    assert_rounded(whole(model, "q.bias"), wide["q.bias"] + 2 * wide["q.lora_B.bias"])
    assert whole(model, "k.bias").tobytes() == found["k.bias"].tobytes()
    assert whole(model, "head.weight").tobytes() == found["head.modules_to_save.weight"].tobytes()
    assert {model.stored_dtype(name) for name in model.tensors} == {"BF16"}


def pickled(adapter: Path) -> Path:
    """The same adapter as peft saved it once, some of its tensors views that are not contiguous."""
    torch = pytest.importorskip("torch")
    folder = adapter.with_name(f"{adapter.name}-pickled")
    folder.mkdir()
    tensors = {name: as_torch(array) for name, array in load_folder(adapter).items()}
    views = {name: t.t().clone().t() if t.ndim == 2 and "lora_B" not in name else t for name, t in tensors.items()}
    torch.save(views, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return folder


def test_pickled_adapters_are_read_as_their_safetensors_which_win(tmp_path: Path) -> None:
    """Factors and whole tensors, element by element, in the dtype of BASE; what is no pickle is refused."""
    tensors = {"q.weight": normal(40, 24, dtype=BF16), "head.weight": normal(9, 24, dtype=BF16)}
    base = save_model(tmp_path / "base", tensors)
    found = {n: normal(*s) for n, s in LINEAR.items()} | {"head.modules_to_save.weight": normal(9, 24)}
    adapter = save_adapter(tmp_path / "lora", found, modules_to_save=["head"])
    old = pickled(adapter)
    expected, model = open_model(f"{base}+{adapter}"), open_model(f"{base}+{old}")
    for name in tensors:
        assert whole(model, name).tobytes() == whole(expected, name).tobytes()
        assert model.stored_dtype(name) == "BF16"
    assert "adapter/adapter_model.bin" in {file.file_name for file in model.files}
    merge(base, old, tmp_path / "out", t=1.0)
    merge(base, adapter, tmp_path / "by-hand", t=1.0)
    assert weights(tmp_path / "out") == weights(tmp_path / "by-hand")
    merge(old, old, tmp_path / "adapters")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= contents(tmp_path / "adapters").keys()
    (old / "adapter_model.bin").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match=r"lora-pickled/adapter_model.bin: is no file of torch.save"):
        open_model(f"{base}+{old}")
    (old / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    assert whole(open_model(f"{base}+{old}"), "q.weight").tobytes() == whole(expected, "q.weight").tobytes()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(300, 500, 7), (3, 70_000, 2), (70_000, 1, 33), (40, 30, 700), (1000, 2, 17)]
)
def test_an_element_has_the_same_bits_in_whatever_range_it_is_read(
    tmp_path: Path, rows: int, columns: int, rank: int, transposed: bool
) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(rows, columns)})
    n, m = (rows, columns) if transposed else (columns, rows)
    factors = {"q.lora_A.weight": normal(rank, n), "q.lora_B.weight": normal(m, rank)}
    adapter = save_adapter(tmp_path / "lora", factors, r=rank, fan_in_fan_out=transposed)
    model = open_model(f"{base}+{adapter}")
    size = rows * columns
    everything = model.read_new("q.weight", 0, size)
    a, b = (factors[f"q.lora_{side}.weight"].astype(np.float64) for side in "AB")
    product = (b @ a).T if transposed else b @ a
    exact = load_folder(base)["q.weight"].astype(np.float64) + 8 / rank * product
    np.testing.assert_allclose(everything, exact.reshape(-1), rtol=1e-7, atol=1e-10)
    cuts = np.sort(RNG.integers(0, size, 6))
    pieces = [model.read_new("q.weight", a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    assert np.concatenate(pieces).tobytes() == everything.tobytes()
    for place in RNG.integers(0, size, 20):
        assert model.read_new("q.weight", place, place + 1)[0] == everything[place]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["F32", "BF16"])
@pytest.mark.parametrize(("rows", "columns"), [(300, 500), (3, 70_000), (70_000, 2), (1, 30), (900, 1)])
def test_rescaled_rows_have_the_same_bits_in_whatever_range_they_are_read(
    tmp_path: Path, rows: int, columns: int, dtype: Any, transposed: bool
) -> None:
    """DoRA: each element once rounded, whether the tensor is acquired or not."""
    n, m = (rows, columns) if transposed else (columns, rows)
    base = save_model(tmp_path / "base", {"q.weight": normal(rows, columns, dtype=dtype)})
    found = {"q.lora_A.weight": normal(4, n), "q.lora_B.weight": normal(m, 4), "q.lora_magnitude_vector": normal(m)}
    adapter = save_adapter(tmp_path / "lora", found, fan_in_fan_out=transposed, use_dora=True)
    model = open_model(f"{base}+{adapter}")
    source, size = model.source("q.weight"), rows * columns
    a, b, lengths = (array.astype(np.float64) for array in found.values())
    exact = load_folder(base)["q.weight"].astype(np.float64) + 2 * ((b @ a).T if transposed else b @ a)
    norms = np.linalg.norm(exact, axis=0 if transposed else 1, keepdims=True)
    exact = lengths.reshape(norms.shape) / norms * exact
    everything = model.read_new("q.weight", 0, size)
    assert_rounded(everything, exact.reshape(-1))
    for place in RNG.integers(0, size, 5):
        assert model.read_new("q.weight", place, place + 1)[0] == everything[place]
    source.acquire()
    for cut in RNG.integers(0, size, 5):
        pieces = [model.read_new("q.weight", 0, cut), model.read_new("q.weight", cut, size)]
        assert np.concatenate(pieces).tobytes() == everything.tobytes()
    source.release()
    assert model.stored_dtype("q.weight") == ("F32" if dtype == np.float32 else "BF16")


@pytest.mark.parametrize("types", [(np.float32, np.float32), (BF16, BF16), (BF16, np.float32), (np.float64, BF16)])
def test_rows_of_tokens_are_replaced_in_whatever_range_they_are_read(tmp_path: Path, types: tuple[Any, Any]) -> None:
    rows = {"e.token_adapter.trainable_tokens_delta": normal(4, 7, dtype=types[1])}
    base = save_model(tmp_path / "base", {"e.weight": normal(50, 7, dtype=types[0])})
    adapter = save_adapter(tmp_path / "lora", rows, trainable_token_indices={"e": [49, 0, 12, 13]})
    model = open_model(f"{base}+{adapter}")
    exact = load_folder(base)["e.weight"].astype(np.float64)
    exact[[49, 0, 12, 13]] = rows["e.token_adapter.trainable_tokens_delta"]
    for start in range(0, 350, 3):
        for stop in (start, start + 1, start + 9, 350):
            found = model.read_new("e.weight", start, min(stop, 350)).astype(np.float64)
            assert (found == exact.reshape(-1)[start : min(stop, 350)]).all()
    assert model.stored_dtype("e.weight") == {np.float32: "F32", BF16: "BF16", np.float64: "F64"}[types[0]]


@pytest.mark.parametrize("rows", [2, 3, 17, 300])
@pytest.mark.parametrize("columns", [2, 3, 64, 1001])
def test_both_ways_to_sum_products_give_the_same_bits(rows: int, columns: int) -> None:
    """So that a row read apart, which goes the other way, is the row of the whole."""
    for rank in (1, 2, 7, 16):
        left, right = (normal(rank, n, scale=3.0).astype(np.float64) for n in (rows, columns))
        together = sum_products(left, right, exact=True)
        assert together.tobytes() == sum_products(left, right, exact=False).tobytes()
        for row in range(rows):
            assert sum_products(left[:, row : row + 1], right, exact=True).tobytes() == together[row].tobytes()
        last = sum_products(left, right[:, -1:], exact=True)
        assert last.tobytes() == together[:, -1:].copy().tobytes()


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A sharded bfloat16 model, an adapter of it, and the model with the adapter folded in, in float32."""
    tensors = language_model(0, hidden=64, vocab=1500)
    base = save_model(tmp_path / "base", tensors, shards=2, side_files={"tokenizer.json": "{}", "README.md": "# x\n"})
    factors = {}
    for layer in range(3):
        for part, rows in (("self_attn.q_proj", 64), ("mlp.up_proj", 192)):
            factors[f"model.layers.{layer}.{part}.lora_A.weight"] = normal(4, 64)
            factors[f"model.layers.{layer}.{part}.lora_B.weight"] = normal(rows, 4)
    factors["model.embed_tokens.lora_embedding_A"], factors["model.embed_tokens.lora_embedding_B"] = (
        normal(4, 1500), normal(64, 4),
    )  # fmt: skip
    adapter = save_adapter(tmp_path / "lora", factors)
    model = open_model(f"{base}+{adapter}")
    folded = save_model(tmp_path / "folded", {name: whole(model, name) for name in model.tensors})
    return base, adapter, folded


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


def test_a_merge_with_an_adapter_is_the_merge_with_the_folded_model(
    adapted: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """As BASE ADAPTER and as BASE BASE+ADAPTER, by whatever memory and threads; side files and dtypes are BASE's."""
    base, adapter, folded = adapted
    merge(base, folded, tmp_path / "expected", 0.4)
    for number, (ft, memory, jobs) in enumerate(
        [(adapter, None, 2), (f"{base}+{adapter}", 10**9, 1), (adapter, 10**9, 3)]
    ):
        merge(base, ft, tmp_path / f"{number}", 0.4, memory_bytes=memory, jobs=jobs)
        assert weights(tmp_path / f"{number}") == weights(tmp_path / "expected")
        assert (tmp_path / f"{number}/tokenizer.json").read_text() == "{}"
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    report = json.loads((tmp_path / "0/merge_report.json").read_text())
    assert list(report["inputs"]["ft"]["files"])[-2:] == [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ]
    assert report["inputs"]["ft"]["name"] == "base+lora"


def test_two_adapters_on_one_base_are_merged_as_models(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """BASE+A1 BASE+A2: the output has the types of the model, not of the sums."""
    base, adapter, folded = adapted
    other = save_adapter(
        tmp_path / "other",
        {"lm_head.lora_A.weight": normal(4, 64), "lm_head.lora_B.weight": normal(1500, 4)},
    )
    merge(f"{base}+{adapter}", f"{base}+{other}", tmp_path / "out")
    model = open_model(f"{base}+{other}")
    second = save_model(tmp_path / "second", {name: whole(model, name) for name in model.tensors})
    merge(folded, second, tmp_path / "expected", dtype="bfloat16")
    found, expected = load_folder(tmp_path / "out"), load_folder(tmp_path / "expected")
    assert {array.dtype for array in found.values()} == {BF16}
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_one_adapter_upon_another_adds_both(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, folded = adapted
    other = save_adapter(
        tmp_path / "other",
        {"model.embed_tokens.lora_embedding_A": normal(4, 1500), "model.embed_tokens.lora_embedding_B": normal(64, 4)},
    )
    both, once = open_model(f"{base}+{adapter}+{other}"), open_model(f"{folded}+{other}")
    assert len(both.files) == len({file.file_name for file in both.files}) == 6
    for name in both.tensors:
        np.testing.assert_array_equal(whole(both, name), whole(once, name))


def run(*words: Any) -> Any:
    return CliRunner().invoke(merge_tool, [str(word) for word in words])


def test_the_commands_take_a_model_with_its_adapter(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, folded = adapted
    assert run("merge", base, adapter, tmp_path / "out", "--quiet").exit_code == 0
    for ft in (adapter, f"{base}+{adapter}"):
        verified = run("verify", tmp_path / "out", "--against", base, ft, "--full")
        assert (verified.exit_code, "bit for bit the same" in verified.stdout) == (0, True), verified.output
    inspected = json.loads(run("inspect", f"{base}+{adapter}", "--json").stdout)
    assert [(s["name"], s["num_tensors"]) for s in inspected["shards"]][-1] == ("adapter/adapter_model.safetensors", 7)
    shown = [json.loads(run("diff", base, ft, "--json").stdout) for ft in (adapter, folded)]
    angles = [{t["name"]: t["angle_degrees"] for t in found["tensors"]} for found in shown]
    assert angles[0] == angles[1]
    assert run("inspect", f"{base}+{adapter}", "--health").exit_code == 0


def test_recipes_take_a_model_with_its_adapter(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = adapted
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in (f"{base}", f"{base}+{adapter}")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    assert run("run", tmp_path / "recipe.yml", tmp_path / "out").exit_code == 0
    merge(base, adapter, tmp_path / "expected", method="linear", dtype="float32")
    found, expected = load_folder(tmp_path / "out"), load_folder(tmp_path / "expected")
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)


def test_a_changed_adapter_configuration_is_another_merge(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Its numbers decide the weights as the tensors do."""
    base, adapter, _ = adapted
    command = ("merge", base, adapter, tmp_path / "out")
    assert run(*command).exit_code == 0
    assert "already complete" in run(*command).stdout
    (adapter / "adapter_config.json").write_text(json.dumps(config(lora_alpha=9)))
    again = run(*command)
    assert (again.exit_code, "not the result of this merge" in again.stderr) == (1, True)
    verified = run("verify", tmp_path / "out", "--against", base, adapter)
    assert (verified.exit_code, "its files are not those that the report names" in verified.stdout) == (1, True)


def test_a_path_that_exists_wins_over_its_plus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a+b", "b", "c+d"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parts("a+b") == ("a+b",)
    assert parts("a+c+d") == ("a", "c+d")
    assert parts("a+b+c+d") == ("a+b", "c+d")
    assert parts("b+a") == ("b", "a")
    assert parts(f"{tmp_path}/a+b") == (f"{tmp_path}/a+b",)
    assert parts("org/x@v1+org/y") == ("org/x@v1", "org/y")
    assert parts("org/x@v1+2") == ("org/x@v1+2",)
    with pytest.raises(CheckpointError, match=r"x\+y: no such file or folder, and no MODEL\+ADAPTER"):
        local_parts("x+y")


def test_models_and_adapters_of_the_hub(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """On either side of the plus, and an adapter alone as FT; a pickled one, too, with tensors beside it."""
    base, adapter, _ = adapted
    pickled(adapter).rename(tmp_path / "old")
    torch = pytest.importorskip("torch")
    norm = as_torch(load_folder(base)["model.norm.weight"])
    torch.save({"base_model.model.model.norm.weight": norm}, tmp_path / "old/non_lora_trainables.bin")
    shutil.copytree(adapter, tmp_path / "hub/models/org/headed")
    (tmp_path / "hub/models/org/headed/value_head.bin").write_bytes(b"x")
    base.rename(tmp_path / "hub/models/org/base")
    adapter.rename(tmp_path / "hub/models/org/lora")
    (tmp_path / "old").rename(tmp_path / "hub/models/org/old")
    with serve(tmp_path / "hub") as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        for number, ft in enumerate(("org/lora", "org/base@main+org/lora", "org/old")):
            done = subprocess.run(
                [sys.executable, "-m", "merge_tool", "merge", "org/base", ft, tmp_path / f"{number}"],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        done = subprocess.run(
            [sys.executable, "-m", "merge_tool", "merge", "org/base", "org/headed", tmp_path / "none"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "org/headed: has value_head.bin beside the adapter" in done.stderr
        assert "hf download org/headed --local-dir FOLDER, and move it out of FOLDER" in done.stderr
    assert "org/old/non_lora_trainables.bin" in hub.fetched()
    assert "org/headed/value_head.bin" not in hub.fetched()
    assert weights(tmp_path / "0") == weights(tmp_path / "1") == weights(tmp_path / "2")
    assert "\n- org/base\n- org/lora\n" in (tmp_path / "1/README.md").read_text()


def test_names_that_differ_by_wrappers_only_are_found(tmp_path: Path) -> None:
    """As of GPT-2 on the Hub, whose tensors have no `transformer.` before their names."""
    base = save_model(tmp_path / "base", {"h.0.attn.c_attn.weight": normal(24, 40), "wte.weight": normal(9, 24)})
    factors = {f"transformer.h.0.attn.c_attn.{name[2:]}": normal(*shape) for name, shape in LINEAR.items()}
    model = open_model(f"{base}+{save_adapter(tmp_path / 'lora', factors, fan_in_fan_out=True)}")
    assert (whole(model, "h.0.attn.c_attn.weight") != load_folder(base)["h.0.attn.c_attn.weight"]).all()


def test_a_tied_heads_copy_is_left_out_and_one_trained_apart_is_a_head(tmp_path: Path) -> None:
    base = save_model(
        tmp_path / "base", {"model.embed_tokens.weight": normal(9, 6)}, config={"tie_word_embeddings": True}
    )
    tensors = {"model.embed_tokens.weight": normal(9, 6), "lm_head.weight": normal(9, 6)}
    model = open_model(f"{base}+{save_adapter(tmp_path / 'a', tensors)}")
    assert model.tensors.keys() == {"model.embed_tokens.weight"}
    (told,) = model.notices
    assert told == "a: lm_head is left out, a copy of what model.embed_tokens.weight has there; base ties the two."
    model = open_model(f"{base}+{save_adapter(tmp_path / 'b', tensors, modules_to_save=['lm_head'])}")
    for name, values in tensors.items():
        assert np.array_equal(whole(model, name), values)
    (told,) = model.notices
    assert "the result has a head of its own, lm_head.weight" in told


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_qalora": True}, "lora: uses QA-LoRA, which is not read. Merge it with peft"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices has a token twice"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is '[-1]', expected numbers of tokens"),
        ({"alora_invocation_tokens": [1]}, "lora: uses activated LoRA"),
        (
            {"target_parameters": ["experts.w1"]},
            "lora: target_parameters in adapter_config.json names experts.w1; only",
        ),
        ({"init_lora_weights": "pissa"}, "was initialised by 'pissa', which changes BASE's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "was initialised by 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "was initialised by 'olora'"),
        ({"init_lora_weights": "corda"}, "was initialised by 'corda'"),
        ({"init_lora_weights": "loftq"}, "was initialised by 'loftq'"),
        *(
            ({"peft_type": kind}, f"peft_type in adapter_config.json is {kind}; only LORA is read. Merge it with peft")
            for kind in ("ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "NEW\\x1b"[:3])
        ),
        (
            {"peft_type": "PREFIX_TUNING"},
            "is a PREFIX_TUNING adapter: it has inputs of its own and no weights to merge",
        ),
        ({"peft_type": "PROMPT_TUNING"}, "is a PROMPT_TUNING adapter: it has inputs of its own and no weights"),
        ({"peft_type": "XLORA"}, "is a XLORA adapter, which weighs its parts by the input: it has no merge."),
        ({"r": 0}, "a rank is not a whole number above 0"),
        ({"r": "8"}, "adapter_config.json: r is '8', expected a number."),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha is 'None', expected a number."),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is not a regular expression"),
        ({"rank_pattern": {"(q+)+": 3}}, "rank_pattern: '(q+)+' repeats too much. Write the layers' names there."),
        ({"alpha_pattern": {".*.*.*x": 3}}, "alpha_pattern: '.*.*.*x' repeats too much."),
        ({"alpha_pattern": [1]}, "alpha_pattern is '[1]', expected names with their values."),
    ],
)
def test_what_a_sum_of_products_is_not_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24)})
    adapter = save_adapter(tmp_path / "lora", {n: normal(*s) for n, s in LINEAR.items()}, **settings)
    with pytest.raises(CheckpointError) as refused:
        open_model(f"{base}+{adapter}")
    assert expected in str(refused.value)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False])
def test_initialisations_that_leave_the_model_as_it_is_are_read(tmp_path: Path, init: Any) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24)})
    factors = {n: normal(*s) for n, s in LINEAR.items()}
    assert open_model(f"{base}+{save_adapter(tmp_path / 'lora', factors, init_lora_weights=init)}").tensors


def test_all_that_has_no_place_or_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {f"{name}.weight": normal(40, 24) for name in "qkvo"})
    tensors = {
        "q.lora_A.weight": normal(4, 23), "q.lora_B.weight": normal(40, 4),  # the wrong width
        "k.lora_A.weight": normal(4, 24),  # no B
        "v.lora_A.weight": normal(2, 24), "v.lora_B.weight": normal(40, 2),  # another rank than it says
        "o.lora_A.weight": normal(4, 24), "o.lora_B.weight": normal(40, 4), "o.lora_B.bias": normal(40),  # no bias
        "x.lora_A.weight": normal(4, 24), "x.lora_B.weight": normal(40, 4), "y.lora_magnitude_vector": normal(40),
    }  # fmt: skip
    with pytest.raises(MismatchError) as refused:
        open_model(f"{base}+{save_adapter(tmp_path / 'lora', tensors)}")
    assert str(refused.value).splitlines() == [
        "lora is not an adapter of base, or not in a form that is read.",
        "  no place there for 4 tensors: base_model.model.x.lora_A.weight, base_model.model.x.lora_B.weight, "
        "base_model.model.y.lora_magnitude_vector, base_model.model.o.lora_B.bias",
        "  k: has no lora_B.weight",
        "  q: A [4, 23] F32 and B [40, 4] F32, of rank 4 by adapter_config.json, do not fit q.weight [40, 24] F32",
        "  v: A [2, 24] F32 and B [40, 2] F32, of rank 4 by adapter_config.json, do not fit v.weight [40, 24] F32",
        "Give the model that it was trained on, or merge it with peft (merge_and_unload, then save_pretrained).",
    ]


@pytest.mark.parametrize(
    ("settings", "changed", "expected"),
    [
        ({"use_dora": True}, {}, "q: has no lora_magnitude_vector"),
        ({}, {"q.lora_magnitude_vector": (40,)}, "q: has lora_magnitude_vector, but use_dora in .* is false"),
        ({"use_dora": True}, {"q.lora_magnitude_vector": (24,)}, r"vector: is \[24\] F32, expected 40 numbers"),
        ({"use_dora": True}, {"q.lora_magnitude_vector": (40,), "q.lora_B.bias": (40,)}, "which DoRA does not use"),
        ({}, {"e.token_adapter.trainable_tokens_delta": (2, 24)}, "does not name the tokens of its rows"),
        (
            {"trainable_token_indices": [1, 2, 3]},
            {"e.token_adapter.trainable_tokens_delta": (2, 24)},
            r"\[2, 24\] F32, for 3 tokens, does not fit e\.weight",
        ),
        (
            {"trainable_token_indices": [1, 9]},
            {"e.token_adapter.trainable_tokens_delta": (2, 24)},
            "token 9 is beyond the 9 rows there",
        ),
        (
            {"trainable_token_indices": [1, 2]},
            {"q.token_adapter.trainable_tokens_delta": (2, 24)},
            "has both factors and rows of tokens",
        ),
        (
            {"trainable_token_indices": [1, 2]},
            {"f.token_adapter.trainable_tokens_delta": (2, 24)},
            r"no place there for 1 tensor: base_model\.model\.f\.token_adapter",
        ),
    ],
)
def test_lengths_and_rows_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any], changed: dict[str, tuple[int, ...]], expected: str
) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24), "e.weight": normal(9, 24)})
    tensors = {name: normal(*shape) for name, shape in (LINEAR | changed).items()}
    with pytest.raises(MismatchError, match=expected):
        open_model(f"{base}+{save_adapter(tmp_path / 'lora', tensors, **settings)}")


@pytest.mark.parametrize("said", [False, True])
def test_square_layers_that_could_go_either_way_are_refused(tmp_path: Path, said: bool) -> None:
    """When fan_in_fan_out says one thing, and the shapes of the other layers another."""
    wide = (40, 24) if said else (24, 40)
    base = save_model(tmp_path / "base", {"s.weight": normal(24, 24), "q.weight": normal(*wide)})
    tensors = {n: normal(*s) for n, s in LINEAR.items()}
    tensors |= {"s.lora_A.weight": normal(4, 24), "s.lora_B.weight": normal(24, 4)}
    with pytest.raises(MismatchError, match=r"s: is square, and fan_in_fan_out in adapter_config.json says"):
        open_model(f"{base}+{save_adapter(tmp_path / 'lora', tensors, fan_in_fan_out=said)}")


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24)})
    adapter = save_adapter(tmp_path / "lora", {n: normal(*s) for n, s in LINEAR.items()})
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Finish the download, or save it again"):
        open_model(f"{base}+{adapter}")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json, so it is no adapter"):
        open_model(f"{base}+{adapter}")


def test_an_adapter_in_the_models_place(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """As BASE it is refused with the way to say it; two adapters are merged as they are, with a warning."""
    base, adapter, _ = adapted
    assert (
        "lora: BASE is an adapter, but base is a model. Give MODEL+ADAPTER"
        in run("merge", adapter, base, tmp_path / "x").stderr
    )
    assert "lora: is an adapter, expected a model before the +" in run("inspect", f"{adapter}+{adapter}").stderr
    both = run("merge", adapter, adapter, tmp_path / "both")
    assert both.exit_code == 0
    assert "Warning: lora and lora are adapters: their factors are merged one by one" in both.stderr


def test_what_two_models_share_is_told_once(adapted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """One model on both sides, or with an adapter on both, in a merge and in a diff; what only one has stays."""
    base, adapter, _ = adapted
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("left", "right"):
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config(base_model_name_or_path="org/other")))
    left, right = (f"{base}+{tmp_path / name}" for name in ("left", "right"))
    shared = "base: 1 tensor is in the shards but not in the index: model.norm.weight"
    for pair in ((base, base), (base, left), (left, right), (left, left), (base, tmp_path / "left")):
        for said in (run("merge", *pair, tmp_path / "out", "--dry-run").stderr, run("diff", *pair).stdout):
            assert said.count(shared) == 1
            for name in ("left", "right"):
                assert said.count(f"{name} was trained on org/other") == any(name in str(part) for part in pair)


def test_an_adapter_beside_a_models_weights_does_not_get_into_the_output(
    adapted: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Its configuration alone would break the loading; with two adapters merged as they are it is needed."""
    base, adapter, folded = adapted
    for name, content in contents(adapter).items():
        (base / name).write_bytes(content)
    report = merge(base, folded, tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    assert "Not copied: adapter_config.json, adapter_model.safetensors." in report.warnings
    merge(adapter, adapter, tmp_path / "adapters")
    assert (tmp_path / "adapters/adapter_config.json").exists()


def test_another_base_than_the_adapter_names_and_unknown_settings_are_warned_of(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24)})
    factors = {n: normal(*s) for n, s in LINEAR.items()}
    adapter = save_adapter(tmp_path / "lora", factors, base_model_name_or_path="org/other\x1b", new_thing=3, old=None)
    result = run("merge", base, adapter, tmp_path / "out")
    assert result.stderr.splitlines() == [
        "Warning: lora was trained on org/other\\x1b, says its adapter_config.json; it is applied to base.",
        "Warning: lora/adapter_config.json: settings that are not known here are ignored: new_thing.",
    ]


def test_values_that_are_not_finite_are_named_with_both_files(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24)})
    factors = {n: normal(*s) for n, s in LINEAR.items()}
    factors["q.lora_B.weight"][3, 1] = np.nan
    result = run("merge", base, save_adapter(tmp_path / "lora", factors), tmp_path / "out")
    assert result.stderr.startswith(
        "Error: q.weight in base/model.safetensors + lora/adapter_model.safetensors: element 72 is nan."
    )


# ---------------------------------------------------------------------------------------------- memory


@linux_only
@pytest.mark.parametrize(("rank", "rows"), [(8, 10_000), (256, 2_000)])
def test_the_budget_holds_with_adapters_of_any_rank(tmp_path: Path, rank: int, rows: int) -> None:
    """A layer and an embedding that are together larger than the budget; an A that is a tenth of it."""
    shapes = {"embed.weight": (10_000, 1_000), "norm": (512,), "up.weight": (rows, 4_000)}
    base = save_model(tmp_path / "base", {})
    write_model(base / "model.safetensors", shapes, 1)
    factors = {
        "embed.lora_embedding_A": normal(8, 10_000), "embed.lora_embedding_B": normal(1_000, 8),
        "up.lora_A.weight": normal(rank, 4_000), "up.lora_B.weight": normal(rows, rank),
    }  # fmt: skip
    adapter = save_adapter(tmp_path / "lora", factors, r=rank, rank_pattern={"embed": 8})
    peak, expected = measured("merge", base, adapter, tmp_path / "out", "--memory", "64MB")
    assert peak < 64_000_000
    assert abs(expected - peak) < 0.2 * peak


def test_the_lengths_of_rows_are_found_once_for_each_time_a_tensor_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by --health and verify, which read in pieces: else each piece would take a pass over the tensor."""
    base = save_model(tmp_path / "base", {"q.weight": normal(900, 500)})
    found = {
        "q.lora_A.weight": normal(4, 500),
        "q.lora_B.weight": normal(900, 4),
        "q.lora_magnitude_vector": normal(900),
    }
    adapter = save_adapter(tmp_path / "lora", found, use_dora=True)
    passes: list[int] = []
    compute = Factors._compute
    monkeypatch.setattr(Factors, "_compute", lambda *asked: passes.append(asked[2] - asked[1]) or compute(*asked))
    for words in (
        ("merge", base, adapter, tmp_path / "out"), ("inspect", f"{base}+{adapter}", "--health"),
        ("verify", tmp_path / "out", "--against", base, adapter, "--full"), ("diff", base, adapter),
    ):  # fmt: skip
        passes.clear()
        assert run(*words).exit_code == 0
        assert passes.count(900) == 1, words[0]
        assert sum(passes) <= 900 + 2, words[0]  # the plan looks at some elements


@linux_only
@pytest.mark.parametrize("transposed", [False, True])
def test_the_budget_holds_with_rescaled_rows(tmp_path: Path, transposed: bool) -> None:
    """DoRA takes a pass for the lengths of rows, and keeps them."""
    shapes = {"embed.weight": (10_000, 1_000), "norm": (512,), "up.weight": (100_000, 400), "last.weight": (100_000, 9)}
    base = save_model(tmp_path / "base", {})
    write_model(base / "model.safetensors", shapes, 1)
    found = {
        "embed.token_adapter.trainable_tokens_delta": normal(5, 1_000),
    }  # fmt: skip
    for name in ("up", "last"):
        n, m = shapes[f"{name}.weight"] if transposed else shapes[f"{name}.weight"][::-1]
        found |= {f"{name}.lora_A.weight": normal(8, n), f"{name}.lora_B.weight": normal(m, 8)}
        found |= {f"{name}.lora_magnitude_vector": normal(m)}
    tokens = {"trainable_token_indices": [9_999, 0, 5, 7, 8]}
    adapter = save_adapter(tmp_path / "lora", found, r=8, fan_in_fan_out=transposed, use_dora=True, **tokens)
    peak, expected = measured("merge", base, adapter, tmp_path / "out", "--memory", "64MB")
    assert peak < 64_000_000
    assert abs(expected - peak) < 0.2 * peak
