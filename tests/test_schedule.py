"""Schedules of t: which t each tensor gets, and that it is what the merge does, reports and continues with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import contents, language_model, load_folder, save_model
from merge_tool import RecipeError, merge
from merge_tool.cli import slerp_merge
from merge_tool.methods.registry import METHODS
from merge_tool.plan.expand import Expansion
from merge_tool.plan.stacks import split_layer
from merge_tool.recipe.pair import PairOptions
from merge_tool.recipe.pair import pair as recipe_of_pair
from merge_tool.recipe.settings import Pattern, Rules
from oracle import float64_merge


def run(*words: Any) -> Result:
    return CliRunner().invoke(slerp_merge, [str(word) for word in words])


def report(out: Path) -> dict[str, Any]:
    content = json.loads((out / "merge_report.json").read_text())
    return {tensor["name"]: tensor for tensor in content["tensors"]}


def ts(rules: Rules, names: list[str], t: float = 0.5) -> list[float]:
    """The t of each tensor of two models that both have these names."""
    recipe = recipe_of_pair("base", "ft", t, t_for=rules)
    expansion = Expansion(recipe, METHODS["slerp"], [names, names])
    return [expansion.values(expansion.tensor(name))[0].shared["t"] for name in names]


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("self_attn", ["model.layers.1.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.weight"]),
        ("layers.1", ["model.layers.1.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.weight"]),
        ("layers.1.", ["model.layers.1.self_attn.q_proj.weight"]),
        ("*.norm.weight", ["model.norm.weight"]),
        ("norm.*", []),
        ("model.?orm.weight", ["model.norm.weight"]),
        ("model.[m-o]orm*", ["model.norm.weight"]),
        (r"re:layers\.(1|2)\.", ["model.layers.1.self_attn.q_proj.weight"]),
        (r"re:^norm", []),
        (r"re:0.*weight$", ["model.layers.10.self_attn.q_proj.weight"]),
        ("NORM", []),
    ],
)  # fmt: skip
def test_a_pattern_is_a_part_a_glob_or_a_regular_expression(pattern: str, hits: list[str]) -> None:
    names = ["model.norm.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (1, 10))]
    assert [name for name in names if Pattern(pattern).matches(name)] == hits


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=7),
    st.integers(1, 130),
    st.sampled_from(["model.layers.", "h.", "", "encoder.block."]),
)
def test_a_list_is_linear_over_the_layers(values: list[float], layers: int, stack: str) -> None:
    names = [f"{stack}{n}.w" for n in range(layers)]
    found = ts({"w": values}, names)
    places = np.linspace(0, 1, layers) if layers > 1 else [1.0]
    np.testing.assert_allclose(found, np.interp(places, np.linspace(0, 1, len(values)), values), rtol=0, atol=1e-12)
    assert all(min(values) <= t <= max(values) for t in found)
    if layers > 1:
        assert (found[0], found[-1]) == (values[0], values[-1])


def test_every_stack_has_its_own_layers_and_what_is_outside_takes_the_first_value() -> None:
    names = ["embed", "head", *(f"enc.{n}.w" for n in range(3)), *(f"dec.{n}.experts.9.w" for n in range(5)), "one.0.w"]
    assert ts(["re:.=0,1"], names) == [0, 0, 0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1, 1]
    assert split_layer("a.b2.weight") is None


SCHEDULE = ["self_attn=0,0.5,1", r"re:layers\.(1|2)\.=0.2", "*norm*=0.9,0.1", "input_layernorm=1"]


def expected_t(name: str, layers: int, t: float) -> float:
    """SCHEDULE written another way."""
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else None
    if "self_attn" in parts:
        assert layer is not None
        return float(np.interp(layer / (layers - 1), [0, 0.5, 1], [0, 0.5, 1]))
    if layer in (1, 2):
        return 0.2
    if "norm" in name:
        return 0.9 if layer is None else float(np.interp(layer / (layers - 1), [0, 1], [0.9, 0.1]))
    return t


def test_every_tensor_is_the_slerp_of_its_parents_at_its_t(tmp_path: Path) -> None:
    x, y = (language_model(seed, delta=0.5, layers=5, dtype=np.float64) for seed in (0, 1))
    base, ft = save_model(tmp_path / "base", x, shards=2), save_model(tmp_path / "ft", y, shards=3)
    merge(base, ft, tmp_path / "out", 0.7, t_for=SCHEDULE)
    told = report(tmp_path / "out")
    for name, merged in load_folder(tmp_path / "out").items():
        t = expected_t(name, 5, 0.7)
        assert told[name]["settings"]["t"] == pytest.approx(t, abs=1e-12)
        np.testing.assert_allclose(merged, float64_merge(x[name], y[name], t), rtol=1e-9, atol=1e-12)
    assert told["model.layers.4.self_attn.q_proj.weight"]["settings"]["t"] == 1
    last = load_folder(tmp_path / "out")["model.layers.4.self_attn.q_proj.weight"]
    assert last.tobytes() == y["model.layers.4.self_attn.q_proj.weight"].tobytes()


def test_a_rule_for_all_tensors_is_that_t(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "a", 0.3)
    merge(*pair, tmp_path / "b", 0.9, t_for={"*": 0.3})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_several_t_move_what_no_rule_fixes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Each output is that of its --t alone with the same rules, to the last byte."""
    words = [w for rule in SCHEDULE[:3] for w in ("--t-for", rule)]
    assert run(*pair, tmp_path / "many", "--t", "0.3,0.6", *words).exit_code == 0
    for t in ("0.3", "0.6"):
        run(*pair, tmp_path / t, "--t", t, *words)
        assert contents(tmp_path / t) == contents(tmp_path / f"many/t-{t}")
    result = run(*pair, tmp_path / "all", "--t", "0.3,0.6", "--t-for", "*=0.5")
    assert "No tensor has its t from the several values given" in result.stderr


def test_the_dry_run_shows_the_t_of_every_layer_and_output(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A line for the tensors of a layer that have the same t; several where outputs differ. Nothing without a rule."""
    words = ["--t", "0.3,0.6", "--t-for", "self_attn=0,1", "--t-for", "*norm*=1"]
    result = run(*pair, tmp_path / "out", "--dry-run", *words)
    table = [" ".join(line.split()) for line in result.stdout.split("\n\n")[1].splitlines()]
    assert table == [
        "layer tensors parameters models",
        *(
            line
            for n, t in enumerate(("0", "0.5"))
            for line in (
                f"model.layers.{n} input_layernorm.bias + 1 t 1 all",
                f"model.layers.{n} mlp.up_proj.weight t [0.3, 0.6] all",
                f"model.layers.{n} self_attn.k_proj.weight + 3 t {t} all",
            )
        ),
        "model.layers.2 input_layernorm.bias + 5 t 1 all",
        "model.layers.2 mlp.up_proj.weight t [0.3, 0.6] all",
        "outside layers lm_head.weight + 1 t [0.3, 0.6] all",
        "outside layers model.norm.bias + 1 t 1 all",
    ]
    plan = json.loads(run(*pair, tmp_path / "out", "--dry-run", "--json", *words).stdout)
    assert plan["outputs"] == [{"t": 0.3}, {"t": 0.6}]
    rows = {(row["layer"], row["first"].split(".")[-2]): row for row in plan["settings"]}
    assert rows["model.layers.1", "k_proj"] == {
        "layer": "model.layers.1", "settings": {"t": 0.5}, "models": ["base", "ft"], "num_tensors": 4,
        "first": "model.layers.1.self_attn.k_proj.weight",
    }  # fmt: skip
    assert rows["model.layers.1", "up_proj"]["settings"] == {"t": [0.3, 0.6]}
    assert "parameters  models" not in run(*pair, tmp_path / "out", "--dry-run").stdout


def test_the_cards_command_makes_the_same_output(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", 0.4, t_for=[*SCHEDULE, "re:it's|mlp=1.5,-1"], extrapolate=True)
    card = (tmp_path / "out/README.md").read_text()
    assert "tensors at a t of their own" in card
    words = shlex.split(card.split("```")[1])
    assert words[:4] == ["slerp-merge", "base", "ft", "OUT"]
    assert run(*pair, tmp_path / "again", *words[4:]).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert run(*pair, tmp_path / "again", *words[4:]).stdout.endswith("already complete, nothing to do.\n")


def test_another_schedule_is_another_merge(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Neither a finished output nor unfinished work of other rules is taken for this merge's."""
    merge(*pair, tmp_path / "out", t_for=["mlp=0.1"])
    for words in ([], ["--t-for", "mlp=0.2"], ["--t-for", "mlp=0.1", "--t-for", "norm=1"]):
        assert "not the result of this merge" in run(*pair, tmp_path / "out", *words).stderr
    assert run(*pair, tmp_path / "out", "--t-for", "mlp=0.1").stdout.endswith("already complete, nothing to do.\n")


def test_unfinished_work_of_other_rules_is_told_apart(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    class Stop(Exception):
        pass

    def stop(nbytes: int, name: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        merge(*pair, tmp_path / "out", t_for=["mlp=0.1"], on_progress=stop)
    for words, now in (([], "none"), (["--t-for", "mlp=0.2"], "mlp=0.2")):
        error = run(*pair, tmp_path / "out", *words).stderr
        assert f"differs from this one: t_for was mlp=0.1, now {now}." in error
    assert run(*pair, tmp_path / "out", "--t-for", "mlp=0.1").exit_code == 0
    merge(*pair, tmp_path / "straight", t_for=["mlp=0.1"])
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("self_atn=0.5", "--t-for self_atn=0.5: matches no tensor. Did you mean self_attn? The tensors are lm_head."),
        ("mlp.*=0.5", "--t-for mlp.*=0.5: matches no tensor. A glob must match the whole name: write *PATTERN*"),
        ("mlp=1.5", "t for mlp is 1.5, expected 0 to 1. Give --extrapolate if you mean it."),
        ("mlp=0,-0.5,1", "t for mlp is -0.5, expected 0 to 1."),
        ("mlp", "'mlp' is not PATTERN=VALUE[,VALUE...]"),
        ("=0.5", "'=0.5' is not PATTERN=VALUE[,VALUE...]"),
        ("re:=0.5", "The pattern 're:' is empty"),
        ("re:(=0.5", "The pattern 're:(' is not a regular expression"),
        ("mlp=nan", "The t of 'mlp' has a value that is not finite: 0 is the base, 1 the finetune. Write --t-for"),
        ("mlp=half", "The t of 'mlp' is not a number or a list of numbers"),
        ("mlp=0.1,", "The t of 'mlp' is not a number or a list of numbers"),
        ("mlp=nan", "The t of 'mlp' has a value that is not finite"),
        ("ml\x1bp=0.5", "The pattern 'ml\\x1bp' is empty or not printable"),
    ],
)
def test_rules_that_make_no_sense(tmp_path: Path, pair: tuple[Path, Path], rule: str, expected: str) -> None:
    for more in ([], ["--dry-run"]):
        result = run(*pair, tmp_path / "out", "--t-for", rule, *more)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_rule_that_comes_too_late_is_warned_of(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run(*pair, tmp_path / "out", "--t-for", "layers=0.1", "--t-for", "mlp=0.9")
    assert (
        result.stderr
        == "Warning: --t-for mlp=0.9 has no effect: its tensors are not merged, or have their t from one before it.\n"
    )
    assert report(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]["settings"]["t"] == 0.1


def test_python_takes_mappings_and_texts_and_any_equals_sign() -> None:
    rules = PairOptions(t_for={"self_attn": [0, 0.5, 1], "re:(?=a)b": 1}).rules
    assert PairOptions(t_for=["self_attn=0,0.5,1", "re:(?=a)b=1"]).rules == rules == PairOptions(t_for=rules).rules
    assert [str(rule) for rule in rules] == ["self_attn=0,0.5,1", "re:(?=a)b=1"]
    for values in ([], [None], [1, "x"], float("inf")):
        with pytest.raises(RecipeError):
            PairOptions(t_for={"mlp": values})  # type: ignore[dict-item]
