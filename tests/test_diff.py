"""`merge-tool diff`: figures against an oracle on whole tensors, any two checkpoints, bounded memory, the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from checkpoints import language_model, save_model
from merge_tool import merge
from merge_tool.cli import merge_tool
from merge_tool.compare.diff import Diff, diff, split_layer
from oracle import exact_angle


def run(*words: Any) -> Any:
    return CliRunner().invoke(merge_tool, ["diff", *map(str, words)])


def by_name(diff: Diff) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in diff.tensors}


def test_figures_are_the_oracle_s(pair: tuple[Path, Path]) -> None:
    """Angle, norms, their ratio and the relative change, against whole tensors in float64."""
    base, ft = language_model(0), language_model(1)
    found = by_name(diff(*pair))
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        x, y = (side[name].astype(np.float64).ravel() for side in (base, ft))
        assert tensor.angle_degrees == pytest.approx(np.degrees(float(exact_angle(x, y))), rel=1e-9)
        assert tensor.norm_base == pytest.approx(np.linalg.norm(x), rel=1e-12)
        assert tensor.norm_ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-12)
        assert tensor.relative_change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)


def test_angles_are_the_merge_s_to_the_last_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(*pair, tmp_path / "out")
    found = by_name(diff(*pair, jobs=1))
    assert {t["name"]: t["angle_degrees"] for t in report.tensors} == {n: t.angle_degrees for n, t in found.items()}


def test_the_threads_change_nothing(pair: tuple[Path, Path]) -> None:
    assert diff(*pair, jobs=1) == diff(*pair, jobs=5)


def test_groups_are_their_tensors_joined(pair: tuple[Path, Path]) -> None:
    """A group's ratio and change are those of its tensors laid end to end; its median is that of the angles."""
    base, ft = language_model(0), language_model(1)
    compared = diff(*pair)
    assert [group.name for group in compared.layers] == ["layer 0", "layer 1", "layer 2", "outside layers"]
    for group in (*compared.layers, *compared.modules):
        names = [
            t.name
            for t in compared.tensors
            if group.name in (t.module, f"layer {t.layer}" if t.layer is not None else "outside layers")
        ]
        x, y = (np.concatenate([s[n].astype(np.float64).ravel() for n in names]) for s in (base, ft))
        assert group.num_tensors == len(names)
        assert group.norm_ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-12)
        assert group.relative_change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        angles = [by_name(compared)[name].angle_degrees for name in names]
        assert group.median_degrees == pytest.approx(np.median(angles))
        assert group.largest_degrees == max(angles)


def test_any_two_checkpoints_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    """Tensors of one side, other shapes, other kinds, NaN, integers, zeros: listed, never an error."""
    x = np.linspace(-1, 1, 12, dtype=np.float32)
    save_file(
        {"both": x, "wide": x, "a.only": x, "shape": x, "kind": x, "nan": x, "ids": np.arange(3), "zero": 0 * x},
        tmp_path / "a.safetensors",
    )
    nan = x.copy()
    nan[3] = np.nan
    save_file(
        {
            "both": x,
            "wide": x.astype(ml_dtypes.bfloat16),
            "b.only": x,
            "shape": x.reshape(3, 4),
            "kind": np.arange(12),
            "nan": nan,
            "ids": np.arange(1, 4),
            "zero": x,
        },
        tmp_path / "b.safetensors",
    )
    compared = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = by_name(compared)
    assert compared.only_base == ("a.only",)
    assert compared.only_ft == ("b.only",)
    assert [line.split(":")[0] for line in compared.unlike] == ["kind", "shape"]
    assert found["both"].equal
    assert found["both"].angle_degrees == 0
    assert 0 < found["wide"].angle_degrees < 1
    assert found["nan"].note == "holds NaN or infinity"
    assert found["ids"].note == "integers that differ"
    assert found["zero"].note == "zero norm"
    assert found["zero"].angle_degrees is None
    printed = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert printed.exit_code == 0
    for part in ("only in a.safetensors: a.only", "only in b.safetensors: b.only", "shape: F32 [12], F32 [3, 4]"):
        assert part in printed.stdout
    json.loads(run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json").stdout)


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / side / "final", language_model(k)) for k, side in enumerate(("cot", "ft"))]
    assert run(*folders).stdout.startswith("cot/final and ft/final: ")


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "model.layers.*.self_attn.q_proj.weight"),
        ("transformer.h.0.mlp.experts.7.w1", 0, "transformer.h.*.mlp.experts.*.w1"),
        ("lm_head.weight", None, "lm_head.weight"),
        ("conv1d.weight", None, "conv1d.weight"),
    ],
)
def test_layer_and_module_come_from_the_name(name: str, layer: int | None, module: str) -> None:
    assert split_layer(name) == (layer, module)


def test_the_picture_is_drawn_or_refused_before_the_work(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(*pair, "--plot", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    refused = run("no", "such", "--plot", tmp_path / "p.jpeg")
    assert refused.exit_code == 1
    assert "a picture is .png, .svg or .pdf" in refused.stderr
    assert "there is no such folder" in run(*pair, "--plot", tmp_path / "none/p.png").stderr


def test_names_are_never_printed_raw(tmp_path: Path) -> None:
    """Terminal escapes and mathematics in a stranger's tensor names reach neither the screen nor the picture."""
    tensors = {"layers.0.\x1b[2J$\\frac$": np.ones(3, np.float32), "evil\n$x$": np.ones(3, np.float32)}
    for side, factor in (("a", 1), ("b", [1, 2, 3])):
        save_file({n: (v * factor).astype(np.float32) for n, v in tensors.items()}, tmp_path / f"{side}.safetensors")
    found = run(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tensors", "--plot", tmp_path / "p.png"
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "\x1b" not in found.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_memory_is_bounded_for_tensors_larger_than_it(tmp_path: Path) -> None:
    """Two 200 MB tensors are compared in a process that never holds 64 MB."""
    from test_memory import write_model

    pair = [write_model(tmp_path / f"{k}.safetensors", {"a.weight": (10_000, 10_000)}, k) for k in (1, 2)]
    code = (
        "import sys; from merge_tool.cli import merge_tool; from merge_tool.plan.system_memory import peak_bytes\n"
        "merge_tool(['diff', *sys.argv[1:], '--memory', '64MB'], standalone_mode=False); print(peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, pair)], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 64_000_000


def test_a_missing_checkpoint_is_one_clear_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = run(pair[0], tmp_path / "none")
    assert found.exit_code == 1
    assert "no such file or folder" in found.stderr
