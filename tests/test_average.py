"""`merge-tool average`: weights by formula, windows from one reading, any number of checkpoints in one memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from checkpoints import Array, contents, language_model, load_folder, save_file, save_model
from merge_tool import DataError, MergeToolError, MismatchError, RecipeError, average, merge_models, verify
from merge_tool.api import averaging, plan_recipe
from merge_tool.checkpoint.source import LocalFile
from merge_tool.cli import merge_tool
from merge_tool.recipe.average import AverageOptions, weights_of

STEPS = (100, 200, 400, 1_000, 2_000)


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """A run's checkpoints, the oldest first; their names are not in the order of spelling."""
    return [save_model(tmp_path / f"run/step-{step}", language_model(k)) for k, step in enumerate(STEPS)]


def command(*words: Any) -> Result:
    return CliRunner().invoke(merge_tool, ["average", *map(str, words), "--quiet"])


def mean_of(folders: list[Path], weights: Any) -> dict[str, Array]:
    """Whole tensors in float64 by numpy's average."""
    loaded = [load_folder(folder) for folder in folders]
    return {
        name: np.average(np.stack([one[name].astype(np.float64) for one in loaded]), axis=0, weights=weights)
        for name in loaded[0]
    }


def kind(text: Any) -> Any:
    return AverageOptions(weights=text).weights[0]


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("count", [2, 5, 16])
def test_sqrt_weights_are_a_rate_that_decays_by_1_minus_sqrt(count: int) -> None:
    """A run at a constant rate, averaged, is the run whose step i of N was taken at the rate 1 - sqrt(i / N)."""
    rng = np.random.default_rng(count)
    start, steps = rng.standard_normal(7), rng.standard_normal((count - 1, 7))
    checkpoints = [start - steps[:j].sum(axis=0) for j in range(count)]
    decayed = start - sum((1 - np.sqrt(i / count)) * step for i, step in enumerate(steps, 1))
    mean = np.average(checkpoints, axis=0, weights=weights_of(kind("sqrt"), count))
    np.testing.assert_allclose(mean, decayed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_ema_weights_are_the_running_average(decay: float) -> None:
    values = np.random.default_rng(1).standard_normal(9)
    running = values[0]
    for value in values[1:]:
        running = decay * running + (1 - decay) * value
    assert np.dot(weights_of(kind(f"ema:{decay}"), 9), values) == pytest.approx(running, rel=1e-12)


def test_uniform_linear_and_given_weights(tmp_path: Path) -> None:
    file = tmp_path / "w.txt"
    file.write_text("# the oldest first\n0.5, 1\n2\n")
    assert [one.name for one in AverageOptions(weights="uniform,ema:0.5").weights] == ["uniform", "ema-0.5"]
    assert weights_of(kind(np.array([1, 2])), 2) == [1, 2]
    assert weights_of(kind("uniform"), 3) == [1, 1, 1]
    assert weights_of(kind("linear"), 4) == [1, 2, 3, 4]
    assert weights_of(kind(str(file)), 3) == weights_of(kind([0.5, 1, 2]), 3) == [0.5, 1, 2]


# ------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("weights", "expected"), [("uniform", [1] * 5), ("linear", [1, 2, 3, 4, 5]), ([3, 0, 1, 1, -1], [3, 0, 1, 1, -1])]
)
def test_an_average_is_numpys(tmp_path: Path, run: list[Path], weights: Any, expected: list[float]) -> None:
    """In float64 to rounding; in bfloat16 each element is within half a unit of the last place."""
    oracle = mean_of(run, expected)
    average(run, tmp_path / "wide", weights=weights, dtype="float64", progress="none")
    for name, array in load_folder(tmp_path / "wide").items():
        np.testing.assert_allclose(array, oracle[name], rtol=1e-13, atol=1e-15)
    average(run, tmp_path / "out", weights=weights, progress="none")
    for name, array in load_folder(tmp_path / "out").items():
        np.testing.assert_allclose(array.astype(np.float64), oracle[name], rtol=2.0**-8 * (1 + 1e-6), atol=1e-16)


def test_windows_and_weights_are_those_of_separate_runs_from_one_reading(
    tmp_path: Path, run: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor byte of every checkpoint is read once, for six outputs."""
    fill, read = LocalFile._fill, Counter[str]()

    def counted(self: LocalFile, offset: int, buffer: memoryview) -> None:
        read[str(self.path)] += len(buffer)
        fill(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "_fill", counted)
    planned = sum(plan_recipe(averaging(list(map(str, run))), tmp_path / "no").plan.input_bytes for _ in range(1))
    for path in run:  # looking at the headers, twice, and at samples of the weights
        read[str(path / "model.safetensors")] = 0
    average(run, tmp_path / "out", window=[2, 3, 5], weights=["uniform", "sqrt"], progress="none")
    headers = sum(int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little") + 8 for path in run)
    samples = len(run) * len(language_model(0)) * 256
    assert planned <= sum(read.values()) <= planned + headers + samples
    monkeypatch.undo()
    for window in (2, 3, 5):
        for weights in ("uniform", "sqrt"):
            average(run[-window:], tmp_path / "one", weights=weights, overwrite=True, progress="none")
            alone = {name: array.tobytes() for name, array in load_folder(tmp_path / "one").items()}
            several = load_folder(tmp_path / f"out/window-{window}-weights-{weights}")
            if window > 2:  # two models are merged by two weights, in float32 where that is exact enough
                assert {name: array.tobytes() for name, array in several.items()} == alone


def test_last_and_every_choose_from_the_end(tmp_path: Path, run: list[Path]) -> None:
    """The last checkpoint is always in."""
    assert command(*run, tmp_path / "out", "--last", "4", "--every", "2", "--dtype", "float64").exit_code == 0
    oracle = mean_of([run[2], run[4]], None)
    for name, array in load_folder(tmp_path / "out").items():
        np.testing.assert_allclose(array, oracle[name], rtol=1e-13, atol=1e-15)


def test_the_order_is_that_of_the_numbers_unless_another_is_given(tmp_path: Path, run: list[Path]) -> None:
    """A glob, and what a shell makes of one, which is told; another order stays."""
    names = [path.name for path in run]

    def taken(*given: Any) -> tuple[list[str], str]:
        recipe = averaging([str(one) for one in given], weights="linear")
        return [Path(ref.path).name for ref in recipe.models], " ".join(recipe.warnings)

    assert taken(tmp_path / "run/step-*") == (names, "")
    assert taken(*run) == (names, "")
    by_shell, warning = taken(*sorted(run))
    assert (by_shell, "order of their numbers: step-100, step-200, step-400" in warning) == (names, True)
    assert taken(*run[::-1]) == (names[::-1], "")
    assert taken(run[3], tmp_path / "run/step-?00") == ([names[3], *names[:3]], "")


def test_an_average_is_verified_and_made_again_by_its_own_recipe(tmp_path: Path, run: list[Path]) -> None:
    """One of several, from its mergekit_config.yml; --overwrite replaces the windows of before."""
    average(run, tmp_path / "out", window=[2, 4], weights="ema:0.7", progress="none")
    own = tmp_path / "out/window-4/mergekit_config.yml"
    assert verify(tmp_path / "out/window-4", recipe=own, models_dir=tmp_path / "run", full=True)[0].problems == ()
    assert len(verify(tmp_path / "out")) == 2
    result = CliRunner().invoke(
        merge_tool, ["run", str(own), str(tmp_path / "again"), "--models-dir", str(tmp_path / "run"), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "again")["model.safetensors"] == contents(tmp_path / "out/window-4")["model.safetensors"]
    assert command(*run, tmp_path / "out", "--window", "3", "--overwrite").exit_code == 0
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.is_dir() and "window" in path.name]
    card = (tmp_path / "again/README.md").read_text()
    assert "by weighted average (`linear`, 4 weights)" in card


@pytest.mark.slow
def test_workers_make_the_same_windows(tmp_path: Path, run: list[Path]) -> None:
    """Not every combination of the weights is one of the averages."""
    words = ("--window", "2,3,5", "--weights", "sqrt", "--weights", "linear")
    assert command(*run, tmp_path / "out", *words).exit_code == 0
    assert command(*run, tmp_path / "shared", *words, "--executor", "processes:2").exit_code == 0
    for folder in sorted((tmp_path / "out").iterdir()):
        assert contents(folder)["model.safetensors"] == contents(tmp_path / "shared" / folder.name)["model.safetensors"]


# ------------------------------------------------------------------------------------------- bounds

MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from merge_tool import average
average([sys.argv[1] + "/step-*"], sys.argv[2], window=[300, 7], progress="none")
"""


def many(folder: Path, count: int) -> list[Path]:
    """Tiny checkpoints of two tensors, the second of two chunks."""
    rng, paths = np.random.default_rng(0), []
    base = rng.standard_normal(70_000).astype(np.float32)
    for k in range(count):
        path = folder / f"step-{k + 1}"
        path.mkdir(parents=True)
        tensors = {"a.weight": np.full((3, 4), float(k), np.float32), "b.weight": base + np.float32(k)}
        save_file(
            tensors if k < 100 else {"a.weight": tensors["a.weight"], "b.weight": base}, path / "model.safetensors"
        )
        paths.append(path)
    return paths


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit on Windows")
def test_300_checkpoints_are_averaged_with_100_open_files(tmp_path: Path) -> None:
    paths = many(tmp_path / "run", 300)
    subprocess.run([sys.executable, "-c", MANY, tmp_path / "run", tmp_path / "out"], check=True)
    found = load_folder(tmp_path / "out/window-300")
    np.testing.assert_allclose(found["a.weight"], np.full((3, 4), 149.5), rtol=1e-7)
    np.testing.assert_allclose(found["b.weight"], mean_of(paths, None)["b.weight"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(load_folder(tmp_path / "out/window-7")["a.weight"], np.full((3, 4), 296.0))


def test_more_checkpoints_take_no_more_buffers(tmp_path: Path) -> None:
    """And one header's entries for all of them."""
    paths = [str(path) for path in many(tmp_path / "run", 60)]
    few, all_of_them = (
        plan_recipe(averaging(several, window=[2, len(several)]), tmp_path / "out", jobs=2)
        for several in (paths[:3], paths)
    )
    assert few.layout == all_of_them.layout
    infos = {id(source.info) for job in all_of_them.plan.jobs() for source in job.sources}
    assert len(infos) == 2


def test_a_training_checkpoints_other_files_stay_behind(tmp_path: Path, run: list[Path]) -> None:
    """Optimizer, generators and state of mixce-train."""
    for path in run:
        save_file({"state": np.zeros(3, np.float32)}, path / "optimizer.safetensors")
        save_file({"cpu|0": np.zeros(3, np.uint8)}, path / "generators.safetensors")
        (path / "state.json").write_text("{}")
    result = command(tmp_path / "run/step-*", tmp_path / "out")
    assert result.exit_code == 0, result.output
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"optimizer.safetensors", "generators.safetensors", "state.json"} & kept
    assert load_folder(tmp_path / "out").keys() == language_model(0).keys()
    assert len(result.stderr.splitlines()) < 4, result.stderr


# ---------------------------------------------------------------------------------------- bad input

BAD = [
    ({"window": 9}, "--window 9 is larger than the number of checkpoints to average, 5. Give --window 5 or less"),
    ({"window": [2, 0]}, "--window is 0, expected at least 1"),
    ({"window": "2,x"}, "--window 2,x: is not a whole number, or several as in 4,8,16"),
    ({"window": [3, 3]}, "--window 3 is given more than once"),
    ({"window": 1, "weights": ["uniform", "linear"]}, "weights-uniform, weights-linear would be the same average"),
    ({"weights": "mean"}, "--weights mean: is neither a kind of weights nor a file, expected uniform, linear, sqrt"),
    ({"weights": "ema:1"}, "--weights ema:1: the decay must be above 0 and below 1, as in ema:0.9"),
    ({"weights": "ema:x"}, "the decay must be above 0 and below 1"),
    ({"weights": [1, -1, 0, 0, 0]}, "its numbers add up to 0, so they make no average"),
    ({"weights": [1, 2]}, "has 2 numbers, the average has 5 checkpoints. Give one for each, the oldest first"),
    ({"weights": [1, 2, 3, 4, float("nan")]}, "nan is not a finite number"),
    ({"last": 6}, "--last 6: there are 5 checkpoints. Give no more"),
    ({"last": 1}, "1 checkpoint of 5 (--last, --every) cannot be averaged. Give two or more"),
    ({"every": 0}, "--every is 0, expected at least 1"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_a_wrong_request_is_one_message_before_anything_is_written(
    tmp_path: Path, run: list[Path], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        averaging(list(map(str, run)), **options)
    assert says in str(caught.value)
    with pytest.raises(MergeToolError) as spoken:
        average(run, tmp_path / "out", **options, progress="none")
    assert "--" not in str(spoken.value)
    assert not (tmp_path / "out").exists()


def test_a_file_of_weights_for_another_number_of_checkpoints_is_named(tmp_path: Path, run: list[Path]) -> None:
    (tmp_path / "w.txt").write_text("1 2 3\n")
    result = command(*run, tmp_path / "out", "--weights", tmp_path / "w.txt")
    assert result.exit_code == 1
    assert f"--weights {tmp_path}/w.txt: has 3 numbers, the average has 5 checkpoints." in result.stderr
    assert command(*run, tmp_path / "out", "--weights", tmp_path / "w.txt", "--window", "3").exit_code == 0


def test_checkpoints_that_are_not_there_or_twice_or_alone(tmp_path: Path, run: list[Path]) -> None:
    for words, says in (
        ([tmp_path / "run/stop-*"], "run/stop-*: the pattern matches no file or folder."),
        ([*run, tmp_path / "run/step-201"], "run/step-201: no such file or folder. Did you mean"),
        ([*run, tmp_path / "run/../run/step-100"], "step-100 is given twice; a checkpoint counts once."),
        (run[:1], "1 checkpoint cannot be averaged. Give two or more."),
    ):
        result = command(*words, tmp_path / "out")
        assert (result.exit_code, says in result.stderr) == (1, True), result.stderr
    assert command(run[0]).exit_code == 2


def test_checkpoints_of_different_shapes_and_values_that_are_not_finite_are_named(
    tmp_path: Path, run: list[Path]
) -> None:
    other = save_model(tmp_path / "other", language_model(9, vocab=80))
    with pytest.raises(
        MismatchError, match=r"2 shapes differ:\n    lm_head.weight: \[\d+, 32\] in step-100, \[\d+, 32\]"
    ):
        average([*run, other], tmp_path / "out", progress="none")
    bad = language_model(9)
    name = next(name for name in sorted(bad) if bad[name].dtype.kind != "i")
    bad[name].reshape(-1)[1] = np.nan
    with pytest.raises(DataError, match=f"{name} in bad/model.safetensors: element 1 is nan"):
        average([*run, save_model(tmp_path / "bad", bad)], tmp_path / "out", progress="none")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_checkpoint_before_the_longest_window_is_not_read(tmp_path: Path, run: list[Path]) -> None:
    """Not even opened; and of several windows, a value that no average has does not matter."""
    (run[0] / "model.safetensors").write_bytes(b"damaged")
    assert command(*run, tmp_path / "out", "--window", "2,4").exit_code == 0
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": float(k > 1)}} for k, path in enumerate(run[1:])],
    }
    merge_models(recipe, tmp_path / "three", progress="none")
    for name, array in load_folder(tmp_path / "three").items():
        oracle = mean_of(run[3:], None)[name]
        np.testing.assert_allclose(array.astype(np.float64), oracle, rtol=2.0**-8 * (1 + 1e-6), atol=1e-16)


def test_the_plan_says_what_is_averaged(tmp_path: Path, run: list[Path]) -> None:
    result = command(*run, tmp_path / "out", "--window", "2,4", "--dry-run")
    assert result.stdout.startswith("Plan: linear for window-2, window-4 of step-200, step-400, step-1000, ")
    plan = json.loads(command(*run, tmp_path / "out", "--weights", "linear", "--dry-run", "--json").stdout)
    assert plan["settings"][0]["settings"]["weight"] == [1, 2, 3, 4, 5]


def test_numbers_belong_to_the_checkpoints_beside_which_they_are_given(tmp_path: Path) -> None:
    """No order is guessed then: a list of weights goes place by place; a file's stops where a shell may have sorted."""
    for number in (2, 10):
        save_file({"w": np.full(4, float(number), "f4")}, tmp_path / f"m-{number}.safetensors")
    given = [tmp_path / "m-10.safetensors", tmp_path / "m-2.safetensors"]
    average(given, tmp_path / "out.safetensors", weights=[0.9, 0.1])
    assert load_file(tmp_path / "out.safetensors")["w"] == pytest.approx(9.2)
    (tmp_path / "w.txt").write_text("0.9 0.1")
    with pytest.raises(RecipeError, match=r"sorted by spelling, as a shell does: m-10.safetensors, m-2.safetensors"):
        averaging([str(one) for one in given], weights=str(tmp_path / "w.txt"))
    average([tmp_path / "m-*.safetensors"], tmp_path / "glob.safetensors", weights=str(tmp_path / "w.txt"))
    assert load_file(tmp_path / "glob.safetensors")["w"] == pytest.approx(2.8)
    average(given, tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors")["w"] == pytest.approx(6)
