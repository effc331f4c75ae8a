"""merge(): what ends up on disk, for any way of asking for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from checkpoints import BF16, DTYPES, contents, language_model, load_file, load_folder, save_file, save_model
from merge_tool import MergeToolError, merge, merge_models, open_checkpoint, plan_merge, run_plan
from merge_tool.arrays import TILE
from merge_tool.plan.memory import Layout
from merge_tool.plan.system_memory import resident_bytes
from merge_tool.recipe.pair import pair as pair_recipe
from oracle import exact_angle, float64_merge, ulp


def check_close(out: Any, x: Any, y: Any, t: float) -> None:
    """Within the stated bound of whole-tensor float64 slerp, with some room for the oracle's own rounding."""
    expected = float64_merge(x, y, t)
    found = out.astype(np.float64)
    if out.dtype == np.float32 or out.dtype == np.float64:
        assert np.linalg.norm(found - expected) <= 1e-7 * np.linalg.norm(expected)
        return
    slack = 2.0**-22 * 2 * (np.abs(x.astype(np.float64)) + np.abs(y.astype(np.float64)))
    units = np.vectorize(lambda v: ulp(v, out.dtype))(expected) if out.size else expected
    assert (np.abs(found - expected) <= units / 2 * (1 + 1e-9) + slack).all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64])
def test_every_tensor_is_the_slerp_of_its_parents(tmp_path: Path, dtype: Any, t: float) -> None:
    x, y = language_model(0, dtype=dtype), language_model(1, delta=0.5, dtype=dtype)
    base, ft = save_model(tmp_path / "base", x, shards=2), save_model(tmp_path / "ft", y, shards=3)
    merge(base, ft, tmp_path / "out", t)
    out = load_folder(tmp_path / "out")
    assert out.keys() == x.keys()
    for name, merged in out.items():
        assert (merged.shape, merged.dtype) == (x[name].shape, x[name].dtype)
        check_close(merged, x[name], y[name], t)


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_the_ends_are_the_parents_byte_for_byte(tmp_path: Path, method: str, t: int) -> None:
    x, y = language_model(0), language_model(1)
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y, shards=2)
    merge(base, ft, tmp_path / "out", t, method=method)
    for name, merged in load_folder(tmp_path / "out").items():
        assert merged.tobytes() == (y if t else x)[name].tobytes()


def test_linear_is_linear(tmp_path: Path) -> None:
    x, y = language_model(0, dtype=np.float32), language_model(1, delta=2, dtype=np.float32)
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out", 0.25, method="linear")
    for name, merged in load_folder(tmp_path / "out").items():
        np.testing.assert_allclose(merged, 0.75 * x[name].astype(np.float64) + 0.25 * y[name], rtol=1e-6, atol=1e-9)


def test_swapping_the_models_mirrors_t(tmp_path: Path) -> None:
    x, y = language_model(0, dtype=np.float64), language_model(1, delta=1, dtype=np.float64)
    base, ft = save_model(tmp_path / "a", x), save_model(tmp_path / "b", y)
    merge(base, ft, tmp_path / "ab", 0.3)
    merge(ft, base, tmp_path / "ba", 0.7)
    one, other = load_folder(tmp_path / "ab"), load_folder(tmp_path / "ba")
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------ the same bytes


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair with tensors of many tiles, one of none, scalars, odd sizes and integers."""

    def model(seed: int) -> dict[str, Any]:
        own = np.random.default_rng(seed)
        sizes = {"big": 5 * TILE + 77, "tile": TILE, "less": TILE - 1, "more": TILE + 1, "odd": 12345, "one": 1}
        shared = np.random.default_rng(0)
        found = {
            name: (shared.standard_normal(size) + 0.3 * own.standard_normal(size)).astype(np.float32).astype(BF16)
            for name, size in sizes.items()
        }
        found["scalar"] = np.array(own.standard_normal(), np.float32)
        found["empty"] = np.zeros((0, 4), BF16)
        found["wide"] = (shared.standard_normal((3, TILE)) + own.standard_normal((3, TILE))).astype(np.float64)
        found["ids"] = np.arange(1000)
        found["mask"] = np.array([True, False, True])
        return found

    folder = tmp_path_factory.mktemp("tiles")
    save_model(folder / "base", model(1), shards=2)
    save_model(folder / "base1", model(1), shards=1)
    save_model(folder / "ft", model(2), shards=3)
    return folder / "base", folder / "ft"


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(contents(folder).items())).encode()).hexdigest()


def test_one_digest_for_any_memory_and_jobs(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = tiles
    found = set()
    for number, (room, jobs) in enumerate([(None, None), (20e6, 1), (30e6, 2), (40e6, 5), (300e6, 8), (300e6, 8)]):
        memory_bytes = None if room is None else resident_bytes() + int(room)  # this process may hold torch
        merge(base, ft, tmp_path / str(number), 0.4, memory_bytes=memory_bytes, jobs=jobs, max_shard_bytes=10**6)
        found.add(digest(tmp_path / str(number)))
    assert len(found) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="these switches are Linux's")
@pytest.mark.parametrize(
    "switch",
    [
        "NPY_DISABLE_CPU_FEATURES=X86_V3",
        "GLIBC_TUNABLES=glibc.cpu.hwcaps=-FMA,-AVX2,-FMA4",
        "OPENBLAS_CORETYPE=Prescott",
        "OPENBLAS_NUM_THREADS=1",
    ],
)
def test_one_digest_for_any_kernels(tiles: tuple[Path, Path], tmp_path: Path, switch: str) -> None:
    """Without this processor's newer instructions, in numpy, in the C library's sine, in BLAS: the same bytes."""
    merge(*tiles, tmp_path / "here", 0.4)
    command = [sys.executable, "-W", "ignore", "-m", "merge_tool", "merge", *map(str, tiles), str(tmp_path / "there")]
    environment = os.environ | dict([switch.split("=", 1)])
    subprocess.run([*command, "--t", "0.4", "--quiet"], env=environment, check=True)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


class Memory:
    """A sink that keeps shards in files of its own folder and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open_shard(self, shard: Any, header: bytes) -> list[Any]:
        from merge_tool.checkpoint.writer import ShardWriter

        return [ShardWriter(self.folder / shard.file_name, header)]

    def finish_shard(self, done: Any, writers: list[Any]) -> None:
        for writer in writers:
            writer.publish()


def test_jobs_are_numbered_through_all_shards(tiles: tuple[Path, Path]) -> None:
    plan = plan_merge(pair_recipe(*tiles, 0.4, max_shard_bytes=10**6), [open_checkpoint(path) for path in tiles])
    jobs = [job for shard in plan.shards for job in shard.jobs]
    assert len(plan.shards) > 2
    assert [job.number for job in jobs] == list(range(len(jobs)))


@pytest.mark.parametrize(
    ("jobs", "chunk_tiles", "arena"), [(1, 1, 0), (3, 1, 0), (2, 2, 3_000_000), (8, 4, 50_000_000), (2, 8, 7_000_000)]
)
def test_one_digest_for_any_layout_of_memory(
    tiles: tuple[Path, Path], tmp_path: Path, jobs: int, chunk_tiles: int, arena: int
) -> None:
    """Streamed or kept, in any chunks, on any number of threads: merged by the parts, compared with the default."""
    models = [open_checkpoint(path) for path in tiles]
    plan = plan_merge(pair_recipe(*tiles, 0.4, max_shard_bytes=10**6), models)
    merge(*tiles, tmp_path / "out", 0.4, max_shard_bytes=10**6)
    layout = Layout(jobs, chunk_tiles * TILE, chunk_tiles * TILE * 24, arena)
    done = list(run_plan(plan, Memory(tmp_path / "mine"), layout))
    assert [shard.shard.number for shard in sorted(done, key=lambda d: d.shard.number)] == list(range(len(plan.shards)))
    expected = {k: v for k, v in contents(tmp_path / "out").items() if k.startswith("model-")}
    assert contents(tmp_path / "mine") == expected
    for shard in done:
        assert shard.sha256[0] == hashlib.sha256(expected[shard.shard.file_name]).hexdigest()


def test_two_ranks_write_what_one_writes(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    models = [open_checkpoint(path) for path in tiles]
    plan = plan_merge(pair_recipe(*tiles, 0.4, max_shard_bytes=10**6), models)
    layout = Layout(2, TILE, TILE * 24, 0)
    list(run_plan(plan, Memory(tmp_path / "one"), layout))
    list(run_plan(plan, Memory(tmp_path / "r0"), layout, rank=0, world_size=2))
    list(run_plan(plan, Memory(tmp_path / "r1"), layout, rank=1, world_size=2))
    assert contents(tmp_path / "r0").keys() & contents(tmp_path / "r1").keys() == set()
    assert contents(tmp_path / "one") == {**contents(tmp_path / "r0"), **contents(tmp_path / "r1")}


def test_input_sharding_does_not_matter(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = tiles
    merge(base, ft, tmp_path / "two")
    shutil.copytree(base.with_name("base1"), tmp_path / "base")
    merge(tmp_path / "base", ft, tmp_path / "one")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_several_t_in_one_pass_equal_single_runs(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    """Byte for byte, cards and reports included, and the inputs are read no more often than for one t."""
    base, ft = tiles
    read: dict[int, int] = {}
    for number, ts in enumerate([(0.3,), (0.3, 0.5, 1)]):
        before = read_bytes()
        merge(base, ft, tmp_path / f"n{number}", ts, max_shard_bytes=3 * 10**6)
        read[number] = read_bytes() - before
    single = [merge(base, ft, tmp_path / f"t-{t}", t, max_shard_bytes=3 * 10**6) for t in (0.5, 1)]
    assert single[0].ts == (0.5,)
    assert sorted(p.name for p in (tmp_path / "n1").iterdir()) == ["t-0.3", "t-0.5", "t-1"]
    assert contents(tmp_path / "n1/t-0.3") == contents(tmp_path / "n0")
    assert contents(tmp_path / "n1/t-0.5") == contents(tmp_path / "t-0.5")
    assert contents(tmp_path / "n1/t-1") == contents(tmp_path / "t-1")
    if read[0]:
        assert read[1] < read[0] + 300_000  # the journal and the side files, once more


def read_bytes() -> int:
    """Bytes that this process has asked the system to read (Linux)."""
    try:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    except OSError:
        return 0


def test_shards_are_the_librarys_own_files(tiles: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*tiles, tmp_path / "out", 0.5, max_shard_bytes=10**6)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        save_file(load_file(shard), tmp_path / "again", {"format": "pt"})
        assert (tmp_path / "again").read_bytes() == shard.read_bytes()


# ------------------------------------------------------------------------------------- dtypes, values


@given(
    st.sampled_from([BF16, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    st.floats(0, 1).map(lambda t: round(t, 6)),
    st.data(),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shapes_dtypes_values_and_t(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: tuple[int, ...], t: float, data: st.DataObject
) -> None:
    """A merge of anything finite is within the bound of the oracle, whatever it is."""
    limit = 6e4 if dtype == np.float16 else float(np.float32(1e30))
    elements = st.floats(-limit, limit, width=32, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-30)
    x, y = (data.draw(hnp.arrays(np.float32, shape, elements=elements)).astype(dtype) for _ in "xy")
    folder = tmp_path_factory.mktemp("any")
    save_file({"a": x}, folder / "x.safetensors")
    save_file({"a": y}, folder / "y.safetensors")
    if dtype == np.float16 and not (np.abs(float64_merge(x, y, t)) < 65504).all():
        assert "too large for F16" in refusal(folder / "x.safetensors", folder / "y.safetensors", folder / "out", t)
        return
    merge(folder / "x.safetensors", folder / "y.safetensors", folder / "out.safetensors", t)
    out = load_file(folder / "out.safetensors")["a"]
    assert (out.shape, out.dtype) == (shape, dtype)
    x64, y64 = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    if not (x64.any() and y64.any() and float(exact_angle(x64, y64)) > 3.1):
        check_close(out, x, y, t)  # near pi the plain oracle has no digits left; test_methods covers that in 60


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
def test_8_bit_floats_are_merged_in_real_values(tmp_path: Path, code: str) -> None:
    x, y = ({k: v.astype(np.float32).astype(DTYPES[code]) for k, v in language_model(n).items()} for n in (0, 1))
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    merge(base, ft, tmp_path / "wide", 0.5)
    merge(base, ft, tmp_path / "narrow", 0.5, dtype="base")
    wide, narrow = load_folder(tmp_path / "wide"), load_folder(tmp_path / "narrow")
    for name in x:
        assert wide[name].dtype == BF16
        assert narrow[name].dtype == DTYPES[code]
        check_close(wide[name], x[name], y[name], 0.5)
        step = 2.0**-3 if code == "F8_E4M3" else 2.0**-2
        expected = float64_merge(x[name], y[name], 0.5)
        assert (np.abs(narrow[name].astype(np.float64) - expected) <= step / 2 * np.abs(expected) * 1.01 + 2**-10).all()


@pytest.mark.parametrize(("first", "second"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "F64"), ("F8_E4M3", "BF16")])
def test_the_sides_may_differ_in_float_dtype(tmp_path: Path, first: str, second: str) -> None:
    x = {k: v.astype(np.float32).astype(DTYPES[first]) for k, v in language_model(0).items()}
    y = {k: v.astype(np.float32).astype(DTYPES[second]) for k, v in language_model(1).items()}
    merge(save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y), tmp_path / "out")
    for name, merged in load_folder(tmp_path / "out").items():
        assert merged.dtype == (BF16 if first.startswith("F8") else DTYPES[first])
        check_close(merged, x[name], y[name], 0.5)


@pytest.mark.parametrize(("name", "code"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_dtype_converts_every_float_and_edits_config(tmp_path: Path, name: str, code: str) -> None:
    text = (
        '{\n  "torch_dtype" : "float64",\r\n\t"dtype": "torch.float32", "note": "dtype: \\"dtype\\": float32",\n'
        '  "text_config": {"dtype": "bfloat16", "hidden_size": 2.50}, "map": {"dtype": "float32"}, "n": null,'
        ' "list_config": [{"dtype": "float32"}], "vision_config": {"torch_dtype": "auto"}}'
    )
    x, y = language_model(0, dtype=np.float64), language_model(1, dtype=np.float64)
    x["ids"] = y["ids"] = np.arange(5)
    inner = '{"dtype": "float64"}'
    index = '{"text_encoder": ["transformers", "CLIP"]}'
    side = {"config.json": text, "text_encoder/config.json": inner, "model_index.json": index}
    base = save_model(tmp_path / "base", x, side_files=side)
    merge(base, save_model(tmp_path / "ft", y), tmp_path / "out", dtype=name)
    out = load_folder(tmp_path / "out")
    assert {a.dtype for k, a in out.items() if k != "ids"} == {DTYPES[code]}
    assert out["ids"].dtype == np.int64
    edited = (tmp_path / "out/config.json").read_bytes().decode()
    expected = text.replace('"float64"', f'"{name}"').replace("torch.float32", f"torch.{name}")
    assert edited == expected.replace('"bfloat16", "hidden', f'"{name}", "hidden')
    assert (tmp_path / "out/text_encoder/config.json").read_text() == inner


def test_integers_that_differ_are_all_named_before_anything_is_written(tmp_path: Path) -> None:
    x, y = ({f"n{k}": np.array([seed * k]) for k in range(7)} | language_model(seed) for seed in (0, 1))
    message = refusal(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out")
    assert "6 integer tensors differ between a and b" in message
    assert ": n1, n2, n3, n4, n5 and 1 more." in message
    assert not (tmp_path / "out").exists()


def test_products_beyond_float32_whose_sum_fits_are_merged(tmp_path: Path) -> None:
    x = {"w": np.array([3.3e38, 0, 1e38, 0]).astype(BF16)}
    y = {"w": np.array([-1.4e38, 3e38, 0, 0]).astype(BF16)}
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out", 0.2)
    check_close(load_folder(tmp_path / "out")["w"], x["w"], y["w"], 0.2)


def test_a_report_is_strict_json_whatever_the_norms(tmp_path: Path) -> None:
    x, y = {"w": np.full(4, 1.7e308)}, {"w": np.array([1.7e308, 1e308, 1.6e308, 1.5e308])}
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((tmp_path / "out/merge_report.json").read_text(), parse_constant=refuse)
    assert report["tensors"][0]["norms"][0] is None
    assert report["tensors"][0]["angle_degrees"] == pytest.approx(np.degrees(float(exact_angle(x["w"], y["w"]))))


@pytest.mark.parametrize(
    ("shard", "max_shard"), [("pytorch_model-{}.safetensors", 10**9), ("w/layer_{}.safetensors", 9000)]
)
def test_outputs_are_called_what_the_bases_index_is_called(tmp_path: Path, shard: str, max_shard: int) -> None:
    """Whatever the shards are called: a loader looks for model.safetensors or model.safetensors.index.json."""
    tensors = language_model(0)
    base = save_model(tmp_path / "base", tensors, shards=2)
    (base / "w").mkdir()
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for number in (1, 2):
        old = f"model-0000{number}-of-00002.safetensors"
        (base / old).rename(base / shard.format(number))
        index["weight_map"] = {k: shard.format(number) if v == old else v for k, v in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out", max_shard_bytes=max_shard)
    names = {p.name for p in (tmp_path / "out").glob("*.safetensors*")}
    assert "model.safetensors" in names or "model.safetensors.index.json" in names
    assert load_folder(tmp_path / "out").keys() == tensors.keys()


def test_equal_tensors_are_copied_whatever_they_hold(tmp_path: Path) -> None:
    mask = np.array([0.0, -np.inf, np.nan, -0.0], np.float32)
    x = {"mask": mask, "w": np.ones(3, np.float32)}
    y = {"mask": mask.copy(), "w": np.full(3, 2, np.float32)}
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out", 0.3)
    out = load_folder(tmp_path / "out")
    assert out["mask"].tobytes() == mask.tobytes()
    np.testing.assert_allclose(out["w"], 1.3)
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "half", 0.3, dtype="float16")
    assert np.isneginf(load_folder(tmp_path / "half")["mask"][1])


def test_masks_that_are_equal_in_another_dtype_are_copied(tmp_path: Path) -> None:
    x, y = {"mask": np.array([0.0, -np.inf], np.float32)}, {"mask": np.array([0.0, -np.inf]).astype(BF16)}
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "out")
    assert load_folder(tmp_path / "out")["mask"].tolist() == [0.0, -np.inf]


def refusal(base: Path, ft: Path, out: Path, *args: Any, **options: Any) -> str:
    with pytest.raises(MergeToolError) as caught:
        merge(base, ft, out, *args, **options)
    return str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("t", [0, 0.5, 1])
def test_nan_and_infinity_name_tensor_file_and_first_index(tmp_path: Path, value: float, side: str, t: float) -> None:
    models = {"base": language_model(0), "ft": language_model(1)}
    bad = np.zeros(3 * TILE, np.float32)
    bad[2 * TILE + 5 :] = value
    for name, tensors in models.items():
        tensors["bad"] = bad if name == side else np.ones_like(bad)
        save_model(tmp_path / name, tensors, shards=2)
    message = refusal(tmp_path / "base", tmp_path / "ft", tmp_path / "out", t)
    assert message.startswith(f"bad in {side}/model-0000")
    assert f"element {2 * TILE + 5:,} is {value}" in message
    assert not (tmp_path / "out").exists()


def test_overflow_of_the_output_dtype_is_an_error(tmp_path: Path) -> None:
    x, y = {"w": np.array([1.0, 1e6], np.float32)}, {"w": np.array([1.0, 2e6], np.float32)}
    base, ft = save_model(tmp_path / "a", x), save_model(tmp_path / "b", y)
    for t in (0, 0.5, 1):
        message = refusal(base, ft, tmp_path / "out", t, dtype="float16")
        assert "w: element 1 is finite but too large for F16" in message
        assert not (tmp_path / "out").exists()
    merge(base, ft, tmp_path / "out", dtype="bfloat16")


TOO_LARGE: dict[str, Any] = {  # what is asked: the t and the method of a pair, or a recipe's method
    "merged": {"t": 0.5},
    "merged, linear": {"t": 0.5, "method": "linear"},
    "the base's": {"t": 0},
    "the finetune's": {"t": 1},
    "copied": "passthrough",
    "of three models": "linear",
    "after passes": "model_stock",
}


@pytest.mark.parametrize("place", [TILE + 5, 2 * TILE + 5])
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_the_first_element_that_is_too_large_is_named(tmp_path: Path, kind: str, place: int) -> None:
    """In its tensor, not in its chunk or tile, and not the first of the tile."""
    models = []
    for seed in range(3):
        values = np.random.default_rng(seed).standard_normal(3 * TILE).astype(np.float32)
        values[[place, place + 4]] = 1e6
        models.append(save_model(tmp_path / f"m{seed}", {"first": values, "other": np.ones(3, np.float32) + seed}))
    asked = TOO_LARGE[kind]
    if isinstance(asked, dict):
        task = partial(merge, *models[:2], dtype="float16", **asked)
    else:
        count = 1 if asked == "passthrough" else 3
        listed = [{"model": str(model), "parameters": {"weight": 1}} for model in models[:count]]
        recipe: dict[str, Any] = {"merge_method": asked, "models": listed, "dtype": "float16"}
        base = {"base_model": str(models[0])} if asked == "model_stock" else {}
        task = partial(merge_models, recipe | base)
    with pytest.raises(MergeToolError, match=rf"^first: element {place:,} is finite but too large for F16\."):
        task(out=tmp_path / "out")


@pytest.mark.parametrize("code", ["I64", "I32", "U8", "BOOL"])
def test_integers_are_copied_when_equal_and_refused_when_not(tmp_path: Path, code: str) -> None:
    x, y = language_model(0), language_model(1)
    x["ids"] = np.array([0, 1, 1]).astype(DTYPES[code])
    y["ids"] = np.array([0, 1, 0]).astype(DTYPES[code])
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    message = refusal(base, ft, tmp_path / "out")
    assert "1 integer tensor differs between base and ft, and integers have nothing between them: ids." in message
    assert 'on_mismatch="base"' in message
    report = merge(base, ft, tmp_path / "out", 1, on_mismatch="base")
    assert load_folder(tmp_path / "out")["ids"].tobytes() == x["ids"].tobytes()
    assert report.summary.num_kept_base == 1


# --------------------------------------------------------------------------------------- side files


SIDE_FILES: dict[str, str | bytes] = {
    "README.md": "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\n# Base\n",
    "generation_config.json": "{ }\n\n",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": "{{ messages }}",
    "modeling_custom.py": "raise SystemExit('never run')\n",
    "deep/er/notes.txt": "x",
    ".gitattributes": "* text",
    "pytorch_model.bin": b"old",
    "model.gguf": b"old",
    "stale-00001-of-00002.safetensors": b"old",
    "original/consolidated.00.pth": b"old",
    "original/params.json": "{}",
    "checkpoint-500/optimizer.pt": b"old",
    "checkpoint-500/config.json": "{}",
    "optimizer.pt": b"old",
    "onnx/model.onnx": b"old",
    "onnx/config.json": "{}",
    ".git/HEAD": "ref",
    ".cache/huggingface/x": "x",
    "2_Dense/model.safetensors": b"kept",
    "2_Dense/config.json": "{}",
    "modules.json": '[{"path": ""}, {"path": "2_Dense"}]',
}


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0), side_files=SIDE_FILES)
    ft = save_model(tmp_path / "ft", language_model(1), side_files={"only_ft.json": "{}"})
    warnings: list[str] = []
    merge(base, ft, tmp_path / "out", on_warning=warnings.append)
    out = contents(tmp_path / "out")
    copied = {
        "README.base.md": "README.md",
        **{n: n for n in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_custom.py")},
        **{n: n for n in ("deep/er/notes.txt", ".gitattributes", "config.json", "onnx/config.json", "modules.json")},
        **{n: n for n in ("2_Dense/model.safetensors", "2_Dense/config.json")},
    }
    assert out.keys() == {*copied, "README.md", "merge_report.json", "SHA256SUMS", "model.safetensors"}
    for target, source in copied.items():
        assert out[target] == contents(base)[source]
    said = " ".join(warnings)
    assert "Copied without merging, as parts of the model: 2_Dense/model.safetensors." in said
    skipped = said.split("Not copied: ")[1]
    for name in (".cache/", ".git/", "checkpoint-500/", "model.gguf", "onnx/model.onnx"):
        assert name in skipped
    assert "modeling_custom.py" not in skipped
    assert "Python code" in out["README.md"].decode()


def test_a_part_with_other_weights_in_the_finetune_is_said_and_can_be_merged_by_itself(tmp_path: Path) -> None:
    """2_Dense of sentence-transformers: the command of the warning makes the part."""
    modules = {"modules.json": '[{"path": ""}, {"path": "2_Dense"}]'}
    base, ft = (save_model(tmp_path / n, language_model(k), side_files=modules) for k, n in enumerate(("base", "ft")))
    parts = [{"linear.weight": np.full((3, 2), value, np.float32)} for value in (1.0, 3.0)]
    for model, tensors in zip((base, ft), parts, strict=True):
        save_model(model / "2_Dense", tensors, config={"in_features": 2})
    told: list[str] = []
    merge(base, ft, tmp_path / "out", on_warning=told.append)
    (line,) = (
        text for text in told if text.startswith("2_Dense/model.safetensors of ft has other weights than base's")
    )
    assert "slerp-merge base/2_Dense ft/2_Dense PART" in line
    merge(base / "2_Dense", ft / "2_Dense", tmp_path / "part", method="linear")
    assert (load_folder(tmp_path / "part")["linear.weight"] == 2).all()
    shutil.copytree(base / "2_Dense", ft / "2_Dense", dirs_exist_ok=True)
    told.clear()
    merge(base, ft, tmp_path / "same", on_warning=told.append)
    assert not any("has other weights" in text for text in told)


def test_files_from_ft_copies_the_finetunes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0), side_files={"only_base.json": "{}"})
    ft = save_model(tmp_path / "ft", language_model(1), side_files={"only_ft.json": "{}"})
    (ft / "README.md").write_text("# FT")
    merge(base, ft, tmp_path / "out", files_from="ft")
    assert (tmp_path / "out/README.ft.md").read_text() == "# FT"
    assert (tmp_path / "out/only_ft.json").exists()
    assert not (tmp_path / "out/only_base.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs symlinks")
def test_a_side_file_that_links_outside_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0))
    (tmp_path / "secret").write_text("x")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    message = refusal(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out")
    assert "notes.txt: is a link to" in message
    assert not (tmp_path / "out").exists()


def test_a_merge_of_merges_replaces_their_reports(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "first", 0.5)
    merge(tmp_path / "first", pair[1], tmp_path / "second", 0.5)
    out = contents(tmp_path / "second")
    assert out["README.base.md"] == contents(tmp_path / "first")["README.md"]
    check_sums(tmp_path / "second")


def check_sums(folder: Path) -> None:
    files = contents(folder)
    listed = dict(reversed(line.split("  ", 1)) for line in files["SHA256SUMS"].decode().splitlines())
    assert listed == {n: hashlib.sha256(raw).hexdigest() for n, raw in files.items() if n != "SHA256SUMS"}


def test_file_modes_follow_the_umask(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    if os.name == "nt":
        pytest.skip("no modes")
    before = os.umask(0o027)
    try:
        merge(*pair, tmp_path / "out", max_shard_bytes=10_000)
    finally:
        os.umask(before)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {"0o640"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_carried(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \\\n`|")
    base = save_model(tmp_path / odd, language_model(0), side_files={odd: "x"})
    merge(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out")
    assert (tmp_path / "out" / odd).read_text() == "x"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    merge(base, tmp_path / "ft", tmp_path / "out")


# -------------------------------------------------------------------------------- card and report


def test_card_report_and_sums(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0), side_files=SIDE_FILES)
    ft = save_model(tmp_path / "ft", language_model(1))
    report = merge(base, ft, tmp_path / "out", 0.4)
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == ["base", "ft"]
    data = card.data.to_dict()
    assert (data["base_model_relation"], data["license"], data["language"]) == ("merge", "apache-2.0", ["en", "de"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "slerp-merge base ft OUT --t 0.4" in card.text
    assert "| `model.layers.*.mlp.up_proj.weight` | 3 |" in card.text
    check_sums(tmp_path / "out")
    written = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert (written["format"], written["method"], written["parameters"]) == (2, "slerp", {"t": 0.4})
    assert (
        written["inputs"]["base"]["files"]["model.safetensors"]["size"] == (base / "model.safetensors").stat().st_size
    )
    assert len(written["tensors"]) == len(language_model(0)) == report.summary.num_tensors
    for tensor in written["tensors"]:
        x, y = (m[tensor["name"]].astype(np.float64) for m in (language_model(0), language_model(1)))
        assert tensor["angle_degrees"] == pytest.approx(np.degrees(float(exact_angle(x, y))), rel=1e-10)
        assert tensor["norms"] == pytest.approx([np.linalg.norm(x), np.linalg.norm(y)], rel=1e-12)
        assert tensor["norm_ratio"] == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-12)
        assert tensor["relative_change"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert float.fromhex(tensor["sums"]["xx"]) == pytest.approx(float((x * x).sum()), rel=1e-13)
    assert report.tensors == written["tensors"]


def test_nothing_written_names_a_path_or_a_time(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The same merge from and into other places, later, is the same folder byte for byte."""
    merge(*pair, tmp_path / "out")
    elsewhere = tmp_path / "else" / "where"
    for path in pair:
        shutil.copytree(path, elsewhere / path.name)
    merge(
        elsewhere / "base", elsewhere / "ft", elsewhere / "result", memory_bytes=resident_bytes() + 300_000_000, jobs=1
    )
    assert contents(tmp_path / "out") == contents(elsewhere / "result")
    for raw in contents(tmp_path / "out").values():
        assert str(tmp_path).encode() not in raw


def test_a_hostile_card_of_the_base_does_no_harm(tmp_path: Path) -> None:
    bomb = "---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
    )
    for text in (bomb + "license: *j\n---\n", "---\n[1\n---\n", "---\nlicense: {a: b}\n---\n", "\xff---"):
        base = save_model(tmp_path / "base", language_model(0), side_files={"README.md": text})
        merge(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out", overwrite=True)
        assert "license" not in (tmp_path / "out/README.md").read_text().split("---")[1]


def test_metadata_of_the_base_is_kept(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0), metadata={"format": "pt", "ss_tag": "x", "a": "é"})
    merge(base, save_model(tmp_path / "ft", language_model(1), metadata={"other": "y"}), tmp_path / "out")
    with safe_open(str(tmp_path / "out/model.safetensors"), framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt", "ss_tag": "x", "a": "é"}


# ------------------------------------------------------------------------------------- one-file output


def test_single_files_of_any_origin(tmp_path: Path) -> None:
    """No config, no folder: exactly one file comes out, and a report where it is asked for."""
    x, y = ({"unet.a": v["lm_head.weight"], "x": v["model.norm.bias"]} for v in (language_model(0), language_model(1)))
    save_file(x, tmp_path / "a.safetensors", {"modelspec.title": "t"})
    save_file(y, tmp_path / "b.safetensors")
    out = tmp_path / "results" / "merged.safetensors"
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", out, report_path=tmp_path / "r.json")
    assert [p.name for p in out.parent.iterdir()] == ["merged.safetensors"]
    for name, merged in load_file(out).items():
        check_close(merged, x[name], y[name], 0.5)
    assert json.loads((tmp_path / "r.json").read_text())["parameters"] == {"t": 0.5}
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "folder")
    assert load_folder(tmp_path / "folder").keys() == x.keys()


def test_a_sharded_model_becomes_one_file(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "one.safetensors", max_shard_bytes=1000)
    merge(*pair, tmp_path / "folder")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "folder/model.safetensors").read_bytes()


def test_tensors_without_float_in_between_are_fine(tmp_path: Path) -> None:
    x = {"only.ids": np.arange(4)}
    report = merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", x), tmp_path / "out")
    assert report.summary.median_degrees is None
    assert load_folder(tmp_path / "out")["only.ids"].tolist() == [0, 1, 2, 3]


def test_unrelated_models_raise_an_alarm(tmp_path: Path) -> None:
    x, y = ({"w": np.random.default_rng(n).standard_normal(500)} for n in (0, 1))
    warnings: list[str] = []
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "b", y), tmp_path / "o", on_warning=warnings.append)
    assert any("are these related models?" in w for w in warnings)
    y = {"w": -x["w"]}
    merge(save_model(tmp_path / "a", x), save_model(tmp_path / "c", y), tmp_path / "p", on_warning=warnings.append)
    assert any(w.startswith("w: the two tensors point in opposite directions") for w in warnings)


def test_parents_that_differ_are_told_before_the_work(tmp_path: Path) -> None:
    side = [{"tokenizer.json": f'{{"v": {n}}}'} for n in (1, 2)]
    configs: list[dict[str, Any]] = [
        {"architectures": ["A"], "rope_theta": 1e4, "num_attention_heads": 4},
        {"architectures": ["B"]},
    ]
    configs[1] |= {"rope_parameters": {"rope_theta": 5e5}, "num_attention_heads": 8, "num_key_value_heads": 1}
    for n in (0, 1):
        configs[n]["text_config"] = {"num_attention_heads": 2 + 2 * n}
    base, ft = (
        save_model(tmp_path / f"m{n}", language_model(n), config=configs[n], side_files=side[n]) for n in (0, 1)
    )
    warnings: list[str] = []
    merge(base, ft, tmp_path / "out", on_warning=warnings.append, allow_different_architectures=True)
    expected = ("architectures differs: A in m0", "rope_theta", "num_attention_heads", "tokenizer.json differs")
    for what in (*expected, "num_attention_heads differs: 2 in m0, 4 in m1", "num_key_value_heads differs"):
        assert any(what in w for w in warnings)
