"""The memory promise, measured: peak resident memory of a fresh process, for large tensors and for many."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from merge_tool import RecipeError
from merge_tool.api import plan_recipe
from merge_tool.arrays import TILE
from merge_tool.checkpoint.header import TensorInfo, build_header
from merge_tool.methods.registry import METHODS
from merge_tool.plan.memory import default_budget, plan_layout
from merge_tool.plan.system_memory import available_bytes, peak_bytes, resident_bytes
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.recipe.pair import pair

LEAST = 64_000_000
COMMAND = [sys.executable, "-m", "merge_tool", "merge"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")


def write_model(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> Path:
    """One bfloat16 file of any size, in little memory: blocks of the same random numbers, over and over."""
    header, infos = build_header([TensorInfo(n, "BF16", s, 0) for n, s in shapes.items()], {"format": "pt"})
    shared, own = (np.random.default_rng(s).standard_normal(1 << 20, dtype=np.float32) for s in (0, seed))
    block = (shared + 0.1 * own).astype(ml_dtypes.bfloat16).tobytes()
    with path.open("wb") as file:
        file.write(header)
        left = sum(info.nbytes for info in infos)
        while left:
            left -= file.write(block[: min(left, len(block))])
    return path


def measured(*words: str | Path) -> tuple[int, int]:
    """Peak bytes of a merge in a process of its own, and what a dry run expected."""
    command = [sys.executable, "-m", "merge_tool", *map(str, words), "--json"]
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, check=True)
    done = subprocess.run(command, capture_output=True, check=True)
    return json.loads(done.stdout)["peak_bytes"], json.loads(planned.stdout)["expected_peak_bytes"]


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A pair with one tensor of 640 MB, ten times the least budget, between small ones."""
    folder = tmp_path_factory.mktemp("huge")
    shapes = {"a.norm": (512,), "b.embed": (80_000, 4_000), "c.norm": (512,), "d.proj": (1000, 2000)}
    pair = write_model(folder / "base.safetensors", shapes, 1), write_model(folder / "ft.safetensors", shapes, 2)
    yield pair
    for path in pair:
        path.unlink()


@linux_only
@pytest.mark.parametrize("jobs", ["1", "8"])
def test_a_tensor_ten_times_the_budget_is_merged_below_it(huge: tuple[Path, Path], tmp_path: Path, jobs: str) -> None:
    peak, expected = measured("merge", *huge, tmp_path / "out", "--memory", "64MB", "--jobs", jobs)
    (tmp_path / "out/model.safetensors").unlink()
    assert peak < LEAST
    assert abs(expected - peak) < 0.2 * peak


SLERP = """\
merge_method: slerp
base_model: {0}
models: [{{model: {0}}}, {{model: {1}}}]
parameters:
  t: [{{filter: experts.1, value: [0, 0.5, 1]}}, {{filter: layers.1, value: 0.2}}, {{value: 0.5}}]
"""
TIES = """\
merge_method: ties
base_model: {0}
models:
  - model: {1}
    parameters: {{weight: [0, 0.5, 1], density: 0.5}}
  - model: {2}
    parameters: {{weight: [{{filter: experts.1, value: 0.3}}, {{value: 1}}], density: 0.4}}
"""


@linux_only
@pytest.mark.parametrize(
    "asked",
    [
        "--t 0.5",
        pytest.param("--t 0.1,0.3,0.5,0.7,0.9", marks=pytest.mark.slow),
        pytest.param("--t-for experts.1=0,0.5,1 --t-for layers.1=0.2 --exclude layers.3.", marks=pytest.mark.slow),
        pytest.param(SLERP, marks=pytest.mark.slow),
        TIES,
    ],
)
def test_ten_thousand_tensors_stay_below_the_least_budget(tmp_path: Path, asked: str) -> None:
    """Of a pair, and of a recipe for two models and for three."""
    shapes = {f"model.layers.{n // 100}.mlp.experts.{n % 100}.down_proj.weight": (8, 16) for n in range(10_000)}
    models = [write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in range(3)]
    words = ["merge", *models[:2], tmp_path / "out", *asked.split()]
    if asked in (SLERP, TIES):
        (tmp_path / "recipe.yaml").write_text(asked.format(*models))
        words = ["run", tmp_path / "recipe.yaml", tmp_path / "out"]
    peak, expected = measured(*words, "--memory", "64MB")
    assert peak < LEAST
    assert abs(expected - peak) < 0.2 * peak


@linux_only
@pytest.mark.parametrize("budget", [64, 100, 256])
def test_the_budget_holds_and_the_estimate_is_within_a_fifth(tmp_path: Path, budget: int) -> None:
    shapes = {f"layers.{n}.weight": (1500 + 100 * n, 2000) for n in range(8)}
    base, ft = (write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in (1, 2))
    peak, expected = measured("merge", base, ft, tmp_path / "out", "--memory", f"{budget}MB")
    assert peak < budget * 1_000_000
    assert abs(expected - peak) < 0.2 * peak


def test_what_would_not_fit_is_refused_with_the_figure(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.weight": (2,) for n in range(50_000)}
    base, ft = (write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in (1, 2))
    done = subprocess.run([*COMMAND, base, ft, tmp_path / "out", "--memory", "64MB"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Give --memory" in done.stderr or "Give at least --memory" in done.stderr
    figure = done.stderr.split("--memory ")[1].split("MB")[0]
    assert 64 < int(figure) <= 64 + 2 * 40
    planned = subprocess.run(
        [*COMMAND, base, ft, tmp_path / "out", "--memory", f"{int(figure) + 40}MB", "--dry-run"], capture_output=True
    )
    assert planned.returncode == 0


@pytest.mark.slow
@linux_only
def test_a_hundred_thousand_tensors_cost_two_kilobytes_each(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n // 500}.mlp.experts.{n % 500}.down_proj.weight": (8, 8) for n in range(100_000)}
    base, ft = (write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in (1, 2))
    peak, _ = measured("merge", base, ft, tmp_path / "out", "--memory", "300MB")
    assert peak < LEAST + 2_000 * 90_000


def test_a_layout_uses_its_room_and_no_more(tmp_path: Path) -> None:
    shapes = {"embed": (3000, 1000), "norm": (1000,)}
    base, ft = (write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in (1, 2))
    plan = plan_recipe(pair(base, ft), tmp_path / "out", memory_bytes=10**9).plan
    for budget in (60_000_000, 80_000_000, 200_000_000, 10**9):
        for jobs in (1, 2, 8):
            layout = plan_layout(plan, budget, jobs, held=40_000_000)
            assert layout.buffer_bytes <= budget - 40_000_000
            assert 1 <= layout.jobs <= jobs
    with pytest.raises(RecipeError, match=r"needs at least \d+MB of memory, the budget is 44MB"):
        plan_layout(plan, 44_000_000, 8, held=40_000_000)


def test_a_chunk_holds_whole_tiles_of_rows_longer_than_a_tile(tmp_path: Path) -> None:
    base, ft = (write_model(tmp_path / f"{n}.safetensors", {"long": (3, TILE + 5)}, n) for n in (1, 2))
    text = f"""
        merge_method: nuslerp
        models: [{{model: {base}, parameters: {{weight: 0.5}}}}, {{model: {ft}, parameters: {{weight: 0.5}}}}]
        parameters: {{nuslerp_flatten: false}}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    plan = plan_recipe(read_recipe(tmp_path / "recipe.yaml", METHODS), tmp_path / "out", memory_bytes=10**9).plan
    (job,) = plan.jobs()
    assert plan.tile(job) == TILE + 5
    found = set()
    for budget in range(40_000_000, 100_000_000, 1_000_000):
        with contextlib.suppress(RecipeError):  # too little
            found.add(plan_layout(plan, budget, 1, held=30_000_000).chunk_elements)
    assert min(found) == 2 * TILE
    assert max(found) > 2 * TILE
    assert all(chunk % (2 * TILE) == 0 for chunk in found)


def test_what_the_machine_says_is_plausible() -> None:
    assert 10_000_000 < resident_bytes() <= peak_bytes() * 1.01
    assert available_bytes() is None or available_bytes() > 0  # type: ignore[operator]
    assert LEAST <= default_budget(40_000_000) <= 256_000_000
    assert default_budget(10**9) > 10**9 + 12_000_000


# ------------------------------------------------------------------------------------------- cgroups

CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def small_cgroup() -> Iterator[tuple[Path, str]]:
    """A memory cgroup of 96 MB, page cache included: its folder, and the file that holds its peak."""
    v1 = CGROUPS / "memory"
    folder = (v1 if v1.is_dir() else CGROUPS) / f"slerp-merge-test-{os.getpid()}"
    limit, peak = (
        ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if v1.is_dir() else ("memory.max", "memory.peak")
    )
    try:
        folder.mkdir()
        (folder / limit).write_text("96000000")
    except OSError:
        pytest.skip("this user may not make a memory cgroup")
    yield folder, peak
    folder.rmdir()


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@linux_only
def test_a_merge_finishes_in_a_cgroup_of_96_mb(
    huge: tuple[Path, Path], small_cgroup: tuple[Path, str], tmp_path: Path
) -> None:
    """With inputs cold, and storage reads of twice their bytes: a busy machine may drop some before they are used."""
    folder, peak = small_cgroup
    for path in huge:
        drop_from_cache(path)
    code = (
        "import os, sys; from pathlib import Path; Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid())); "
        "sys.argv[0:2] = ['slerp-merge']; from merge_tool.cli import slerp_merge; slerp_merge(standalone_mode=False); "
        "print('read_bytes', Path('/proc/self/io').read_text().split('read_bytes: ')[1].split()[0])"
    )
    command: list[Any] = [sys.executable, "-c", code, folder, *huge, tmp_path / "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary, read = done.stdout.split("read_bytes ")
    assert json.loads(summary)["peak_bytes"] < 96_000_000
    assert int((folder / peak).read_text()) <= 96_100_000
    assert int(read) <= 2.5 * sum(path.stat().st_size for path in huge)
    (tmp_path / "out/model.safetensors").unlink()
