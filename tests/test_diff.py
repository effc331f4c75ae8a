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


# ------------------------------------------------------------------- configurations, tokenizers, the Hub


def test_configurations_and_tokenizers_are_compared_too(tmp_path: Path) -> None:
    """Key by key, nested ones with dots; what only names a place or a version is left out."""
    sides = [
        {"config": {"hidden_act": "silu", "rope": {"theta": 1e4, "kind": "x"}, "same": [1], "_name_or_path": "a"},
         "tokenizer_config.json": {"chat_template": "{{ a }}", "padding_side": "left"}},
        {"config": {"hidden_act": "gelu", "rope": {"theta": 1e6, "kind": "x"}, "same": [1], "_name_or_path": "b",
                    "new": None}, "tokenizer_config.json": {"padding_side": "right"}, "generation_config.json": {}},
    ]  # fmt: skip
    folders = []
    for k, side in enumerate(sides):
        files = {name: json.dumps(content) for name, content in side.items() if name != "config"}
        files |= {
            "config.json": json.dumps(side["config"]),
            "tokenizer.json": json.dumps(tokenizer("ab" if k else "abc")),
        }
        folders.append(save_model(tmp_path / "ab"[k], language_model(k), side_files=files))
    compared = diff(*folders)
    assert [(one.file, one.key, one.base, one.ft) for one in compared.settings] == [
        ("config.json", "hidden_act", "silu", "gelu"),
        ("config.json", "new", "not there", None),
        ("config.json", "rope.theta", 1e4, 1e6),
        ("generation_config.json", "", "not there", "there"),
        ("tokenizer_config.json", "padding_side", "left", "right"),
    ]
    told = "\n".join(compared.tokenizers)
    assert "2 tokens are in both" in told
    assert "1 only in a" in told
    assert "Only a has a chat template." in told
    printed = run(*folders).stdout
    assert "rope.theta" in printed
    assert "Tokenizers: Only a has a chat template." in printed
    assert json.loads(run(*folders, "--json").stdout)["settings"][0]["key"] == "hidden_act"
    same = diff(folders[0], folders[0])
    assert (same.settings, same.tokenizers) == ((), ())


def tokenizer(tokens: str) -> dict[str, Any]:
    vocab = {token: number for number, token in enumerate(tokens)}
    return {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def test_damaged_side_files_are_shown_and_stop_nothing(tmp_path: Path) -> None:
    good, bad = ({"generation_config.json": text, "tokenizer_config.json": text} for text in ("{}", "{"))
    folders = [save_model(tmp_path / n, language_model(0), side_files=f) for n, f in (("a", good), ("b", bad))]
    compared = diff(*folders)
    assert [(one.file, one.key) for one in compared.settings] == [
        ("generation_config.json", "(damaged)"),
        ("tokenizer_config.json", "(damaged)"),
    ]
    assert all(tensor.equal for tensor in compared.tensors)


def test_a_dry_run_of_models_of_the_hub_fetches_no_weights(tmp_path: Path) -> None:
    import hub_replica

    for k, name in enumerate(("base", "ft")):
        save_model(tmp_path / "hub/models/org" / name, language_model(k))
    with hub_replica.serve(tmp_path / "hub") as hub:
        dry = hub_replica.run(hub, tmp_path, "diff", "org/base", "org/ft", "--dry-run", "--json")
        planned = json.loads(dry.stdout)
        assert planned["num_tensors"] == len(language_model(0))
        assert planned["download_bytes"] >= planned["nbytes"]
        assert sum(hub.weights().values()) < planned["nbytes"] / 2  # headers
        done = hub_replica.run(hub, tmp_path, "diff", "org/base", "org/ft")
        assert done.stdout.startswith("org/base and org/ft: "), done.stderr
        merged = hub_replica.run(hub, tmp_path, "merge", "org/base", "org/ft", "out", "-q")
        assert merged.returncode == 0, merged.stderr
        hub.served.clear()
        words = ("verify", "out", "--against", "org/base", "org/ft", "--dry-run")
        fresh = hub_replica.run(hub, tmp_path, *words, HF_HOME=str(tmp_path / "other home"))
        assert "elements to merge again" in fresh.stdout, fresh.stderr
        assert sum(hub.weights().values()) < planned["nbytes"] / 2


# --------------------------------------------------------------------------------------- the pictures


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_pictures_name_the_models_and_cut_no_label(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every label lies in the picture, whole; no axis has an offset, whatever its values."""
    from merge_tool.cli import plot
    from merge_tool.sweeps.results import SweepPoint, SweepReport

    figures: list[Any] = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    long = "model.layers.0." + ".".join(f"module{k}_with_a_long_name" for k in range(6)) + ".weight"
    tensors = [
        dict(language_model(k), **{long: np.full(7, 1.0 + k * np.arange(7)).astype(np.float32)}) for k in range(2)
    ]
    plot.plot_diff(diff(*(save_model(tmp_path / n, t) for n, t in zip(("one", "two"), tensors, strict=True))), tmp_path)
    scores = [1e-9, 1e-9 + 1e-16, 1e-9 + 3e-16]
    points = [
        SweepPoint({"t": t, "density": d}, {"a_very_long_name_of_a_score/with,filters_and_more": 12345678 + s, "b": s})
        for t, s in zip((0.0, 0.5, 1.0), scores, strict=True)
        for d in (0.1, 0.9)
    ]
    plot.plot_sweep(SweepReport(tmp_path, tuple(points), frozenset(), ("some-base", "some$ft")), tmp_path)
    words = [SweepPoint({"kind": k}, {"x": n}) for n, k in enumerate(("count", "sum"))]
    plot.plot_sweep(SweepReport(tmp_path, tuple(words), frozenset(), ("p", "q")), tmp_path)
    assert any("one and two" in text for text in texts_of(figures[0]))
    joined = "".join(text.replace("\n", "") for text in texts_of(figures[0]))
    assert long.partition(".0.")[2] in joined.replace("-", "")
    assert any("some-base + some\\$ft" in text for text in texts_of(figures[1]))
    assert "".join(texts_of(figures[1])).count("density = 0.1") == 1
    assert {"count", "sum"} <= {*texts_of(figures[2])}
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                assert axis.get_offset_text().get_text() == ""


def test_loss_png_has_two_measures_on_axes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training MixCE and held-out cross-entropy never share an axis; the model is named."""
    from matplotlib.figure import Figure

    from train.watch import plot_loss

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    train = [{"kind": "train", "step": k, "loss": 1 - k / 100} for k in range(10)]
    evals = [{"kind": "eval", "step": k, "nll": {"prose": 2 - k / 100, "sums": 3.0}} for k in (0, 9)]
    assert plot_loss([*train, *evals], tmp_path / "loss.png", "scribe, a finetune of org/model")
    assert plot_loss(train, tmp_path / "loss.png")
    both, alone = figures
    assert [len(axes.lines) for axes in both.axes] == [1, 2]
    assert [axes.get_ylabel() for axes in both.axes] == ["MixCE per token", "cross-entropy (nats per token)"]
    assert "scribe, a finetune of org/model" in texts_of(both)
    assert len(alone.axes) == 1
