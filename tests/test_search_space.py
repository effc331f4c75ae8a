"""What a search may change: a space is read, a candidate is a recipe, a judge's words are scores. Needs no Optuna."""

from __future__ import annotations

import math
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import language_model, load_folder, save_model
from merge_tool import RecipeError, merge, merge_models
from merge_tool.errors import EvaluationError
from merge_tool.recipe.candidates import plain_recipe, recipe_of_models, with_settings
from merge_tool.recipe.space import parse_space, read_space
from merge_tool.sweeps.in_memory import merge_in_memory
from merge_tool.sweeps.judging import Hopeless, Names, judge_by_command, judge_by_function, parse_judgement
from merge_tool.sweeps.paired import holm, p_value
from merge_tool.sweeps.search_plan import default_groups, plan_search
from merge_tool.sweeps.search_results import build_report, report_lines
from merge_tool.sweeps.study import Objective, Tried

LIMITS: dict[str, Any] = {"memory_bytes": None, "jobs": None}
SPACE = """
parameters:
  t:
    attention: {filter: self_attn, low: 0, high: 1, bands: 2}
    mlp: {filter: [mlp, up_proj], low: 0.2, high: 0.8, bands: 2, smooth: false}
    rest: {low: 0, high: 1}
points:
  - {t: 0.5}
  - {t.attention: [0, 1], t.mlp: 0.25, t.rest: 0.75, t.mlp.2: 0.5}
"""


# ---------------------------------------------------------------------------------------- the space


def test_a_space_gives_knobs_points_and_entries_of_a_recipe() -> None:
    space = parse_space(SPACE, "s.yaml")
    assert list(space.knobs) == ["t.attention.1", "t.attention.2", "t.mlp.1", "t.mlp.2", "t.rest"]
    assert [space.filled(point) for point in space.points] == [
        dict.fromkeys(space.knobs, 0.5),
        {"t.attention.1": 0, "t.attention.2": 1, "t.mlp.1": 0.25, "t.mlp.2": 0.5, "t.rest": 0.75},
    ]
    assert space.settings(space.filled(space.points[1]), 5) == {
        "t": [
            {"filter": "self_attn", "value": [0, 1]},
            {"filter": "mlp", "value": [0.25, 0.25, 0.25, 0.5, 0.5]},
            {"filter": "up_proj", "value": [0.25, 0.25, 0.25, 0.5, 0.5]},
            {"value": 0.75},
        ]
    }
    assert space.uniform(0.3) == dict.fromkeys(space.knobs, 0.3)
    assert space.uniform(0.1) is None  # the mlp begins at 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: slerp", "there are no parameters"),
        ("parameters: {}", "parameters is empty"),
        ("parameters: {t: 1}", "s.yaml, line 1: 't' is '1', expected a mapping"),
        ("parameters: {t: {}}", "'t' is empty"),
        ("parameters:\n  t: {low: 0}", "s.yaml, line 2: the range has no high"),
        ("parameters: {t: {low: 1, high: 0}}", "goes from 1 to 0, expected low below high"),
        ("parameters: {t: {low: 0, high: 1, log: true}}", "low above 0 with log"),
        ("parameters: {t: {low: 0, high: .nan}}", "expected a finite number"),
        ("parameters: {t: {low: 0, hihg: 1}}", "no key 'hihg' (did you mean 'high'?)"),
        ("parameters: {t: {low: 0, high: 1, bands: 0}}", "expected a whole number from 1 on"),
        ("parameters: {t: {low: 0, high: 1, smooth: 2}}", "expected true or false"),
        ("parameters: {t: {a: {low: 0, high: 1}, b: {low: 0, high: 1}}}", "two groups without a filter"),
        ("parameters: {t: {a: {filter: 're:(', low: 0, high: 1}}}", "is not a regular expression"),
        ("parameters: {t: {a b: {low: 0, high: 1}}}", "expected a name of letters"),
        ("parameters: {t: {choices: [[1]]}}", "expected single values"),
        ("parameters: {t: {low: 0, high: 1}}\npoints: [{x: 1}]", "a point sets 'x', which is not searched"),
        ("parameters: {t: {low: 0, high: 1, bands: 2}}\npoints: [{t.1: 1}]", "has no value for 't.2'"),
        ("parameters: {t: {low: 0, high: 1}}\npoints: [{t: 2}]", "a point has 2 for 't', expected 0 to 1"),
        ("parameters: {t: {low: 0, high: 1, bands: 2}}\npoints: [{t: [1]}]", "1 values for 't', which has 2"),
        ("spaec: 1", "no key 'spaec'"),
    ],
)
def test_a_wrong_space_is_one_message(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space(text, "s.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("s.yaml")


def test_a_space_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        read_space(tmp_path / "none.yaml")


def plan(models: Any, out: Path, space: Any = None, method: str | None = None, **options: Any) -> Any:
    return plan_search(models, out, space=space, method=method, options=options, read_samples=True, **LIMITS)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"t": {"a": {"filter": "self_atn", "low": 0, "high": 1}, "b": {"low": 0, "high": 1}}},
         "Did you mean self_attn?"),
        ({"t": {"a": {"filter": "model", "low": 0, "high": 1}, "b": {"filter": "mlp", "low": 0, "high": 1}}},
         "the group 'b' of 't' has no tensor"),
        ({"tt": {"low": 0, "high": 1}}, "slerp has no parameter 'tt'"),
        ({"t": {"low": 0, "high": 2}}, "Give --extrapolate if you mean it"),
    ],
)  # fmt: skip
def test_a_space_that_does_not_fit_the_models_is_one_message(
    pair: tuple[Path, Path], tmp_path: Path, space: Any, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(pair, tmp_path / "out", {"parameters": space})
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_method_without_t_or_weights_needs_a_recipe(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Give a recipe and its space"):
        plan(pair, tmp_path / "out", method="karcher")
    with pytest.raises(RecipeError, match="there is no such method"):
        plan(pair, tmp_path / "out", method="slrp")
    with pytest.raises(RecipeError, match="at least one FT"):
        plan([pair[0]], tmp_path / "out")


def test_the_default_space_is_attention_mlp_and_the_rest() -> None:
    """Every tensor belongs to one group, whatever the family calls its parts."""
    llama = [
        f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "post_attention_layernorm")
    ]
    assert [(group.name, group.filters, group.bands) for group in default_groups([*llama, "lm_head.weight"])] == [
        ("attention", ("self_attn",), 4), ("mlp", ("mlp",), 4), ("rest", (), 4),
    ]  # fmt: skip
    bert = [f"encoder.layer.0.{part}.weight" for part in ("attention.self.query", "attention.output.dense",
            "intermediate.dense", "output.dense", "output.LayerNorm")]  # fmt: skip
    assert [(g.name, g.filters) for g in default_groups(bert)] == [
        ("attention", ("attention.",)), ("mlp", ("intermediate.dense", "output.dense")), ("rest", ()),
    ]  # fmt: skip
    assert [group.name for group in default_groups(["a", "b"])] == ["rest"]


# ----------------------------------------------------------------------------------- the candidates


def test_a_candidate_is_the_recipe_of_its_values(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Band by band: the weights are those of a merge of a pair with the same schedule."""
    found = plan(pair, tmp_path / "out", yaml.safe_load(SPACE))
    values = {"t.attention.1": 0.1, "t.attention.2": 0.9, "t.mlp.1": 0.25, "t.mlp.2": 0.75, "t.rest": 0.5}
    (tmp_path / "c.yaml").write_text(found.text_of(values))
    merge_models(tmp_path / "c.yaml", tmp_path / "c")
    rules = ["self_attn=0.1,0.9", "re:layers.[01].mlp=0.25", "mlp=0.75"]
    merge(*pair, tmp_path / "m", 0.5, t_for=rules)
    (one, other) = (load_folder(tmp_path / name) for name in "cm")
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)
    uniform = found.recipe_of(found.space.uniform(0.3))
    assert "value: 0.3" in uniform.text


def test_patterns_of_every_kind_become_filters_of_a_recipe(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Globs and regular expressions are the names that they match, as with --t-for."""
    groups = {
        "first": {"filter": r"re:layers\.[01]\.", "low": 0, "high": 1},
        "mlp": {"filter": "*.mlp.*", "low": 0, "high": 1},
        "rest": {"low": 0, "high": 1},
    }
    found = plan(pair, tmp_path / "out", {"parameters": {"t": groups}})
    (tmp_path / "c.yaml").write_text(found.text_of({"t.first": 0.1, "t.mlp": 0.9, "t.rest": 0.5}))
    merge_models(tmp_path / "c.yaml", tmp_path / "c")
    merge(*pair, tmp_path / "m", 0.5, t_for=[r"re:layers\.[01]\.=0.1", "*.mlp.*=0.9"])
    (one, other) = (load_folder(tmp_path / name) for name in "cm")
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)
    names = ["a.weight", "a.weight_scale"]
    space = parse_space("parameters: {t: {a: {filter: 're:weight$', low: 0, high: 1}}}", "s.yaml")
    with pytest.raises(RecipeError, match=r"is a part of a\.weight_scale, which it does not match"):
        space.resolved(names)


def test_options_go_into_the_recipe_and_make_it_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = plan(pair, tmp_path / "out", dtype="float32", only=["layers"], extrapolate=True)
    text = found.text_of(found.space.uniform(0.3))
    (tmp_path / "c.yaml").write_text(text)
    merge_models(tmp_path / "c.yaml", tmp_path / "c")
    merge(*pair, tmp_path / "m", 0.3, dtype="float32", only=["layers"])
    (one, other) = (load_folder(tmp_path / name) for name in "cm")
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)


def test_a_recipe_keeps_what_is_not_searched() -> None:
    """Searched parameters stand before the recipe's own, wherever it has them; --set of a published one gives way."""
    recipe = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": 0.5, "density": 0.5}}, {"model": "y"}],
        "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.1}], "lambda": 0.9},
        "merge_tool": {"set": ["lambda=0.3", "parameters.weight=1"]},
    }
    entries = [{"filter": "self_attn", "value": 0.7}]
    changed = with_settings(recipe, {"weight": entries, "models.1.parameters.density": [{"value": 0.2}]})
    assert changed["models"][0]["parameters"] == {"weight": [*entries, {"value": 0.5}], "density": 0.5}
    assert changed["models"][1]["parameters"] == {"density": 0.2}
    assert changed["parameters"] == {"weight": [*entries, *recipe["parameters"]["weight"]], "lambda": 0.9}  # type: ignore[index]
    assert changed["merge_tool"] == {"set": ["lambda=0.3"]}
    assert recipe["models"][1] == {"model": "y"}  # type: ignore[index]
    with pytest.raises(RecipeError, match="the recipe has 2 entries in models"):
        with_settings(recipe, {"models.2.parameters.density": entries})


def test_several_finetunes_have_weights_each(tmp_path: Path) -> None:
    models = [save_model(tmp_path / f"m{seed}", language_model(seed)) for seed in range(3)]
    found = plan(models, tmp_path / "out")
    assert plain_recipe(recipe_of_models(models, None))["merge_method"] == "task_arithmetic"
    assert len(found.space.knobs) == 2 * 3 * 4
    recipe = found.recipe_of(found.space.uniform(1.0))
    assert recipe.text.count("value: 0.5") == 6


def test_tensors_in_memory_are_those_of_the_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = plan(pair, tmp_path / "out", max_shard_bytes=20_000)
    tensors, _ = merge_in_memory(found.first)
    merge(*pair, tmp_path / "m", 0.5)
    other = load_folder(tmp_path / "m")
    assert tensors.keys() == other.keys()
    assert all(
        (tensors[n].dtype, tensors[n].shape, tensors[n].tobytes()) == (x.dtype, x.shape, x.tobytes())
        for n, x in other.items()
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    ("text", "scores", "items"),
    [
        ("skill 0.5", {"skill": 0.5}, {}),
        ("loading\nstep 1 skill 0.1\nstep 2: skill = 0.2\nskill: 0.5\nitems skill 1, 0\n", {"skill": 0.5},
         {"skill": (1, 0)}),
        ('noise\n{"skill": 0.5, "items": {"skill": [1, 0.5]}}', {"skill": 0.5}, {"skill": (1, 0.5)}),
        ('[{"skill": 1, "ppl": 2}]', {"skill": 1, "ppl": 2}, {}),
    ],
)  # fmt: skip
def test_scores_and_items_are_read(text: str, scores: Any, items: Any) -> None:
    judgement = parse_judgement(text, Names(["skill"]))
    assert (judgement.scores, judgement.items) == (scores, items)


@pytest.mark.parametrize(
    ("before", "text", "message"),
    [
        ("", "", "it printed no score"),
        ("", "step 1 skill 0.5\n\n", "it printed no score"),
        ("", "done.", "no score was found"),
        ("", "skill nan", "skill is nan"),
        ("", "skill -Inf\nppl 3", "skill is -inf"),
        ("", '{"skill": NaN}', "skill is nan"),
        ("", "skil 0.5", "there is no score skill; found: skil"),
        ("skill 1\nppl 2", "skill 1", "the scores are skill, expected skill, ppl"),
        ("skill 1\nitems skill 1 2", "skill 1\nitems skill 1", "the items are 1 of skill, expected 2 of skill"),
        ("skill 1\nitems skill 1 2", "skill 1", "the items are none, expected 2 of skill"),
        ("", "skill 1\nitems ppl 1", "there are items of ppl, which is not a score"),
        ("", '{"skill": 1, "items": {"skill": [1, null]}}', "not a list of finite numbers"),
    ],
)
def test_a_judge_that_says_nothing_of_use_is_refused(before: str, text: str, message: str) -> None:
    names = Names(["skill"])
    if before:
        parse_judgement(before, names)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_judgement(text, names)


def test_a_hopeless_candidate_ends_its_judge_at_once(tmp_path: Path) -> None:
    """Also what the judge has started."""
    code = (
        "import subprocess, sys; print('step 1 skill 0.5', flush=True); print('step 2 skill 0.1', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    seen, started = list[Any](), time.monotonic()

    def on_step(step: int, scores: Any) -> bool:
        seen.append((step, dict(scores)))
        return step == 2

    with pytest.raises(Hopeless):
        judge_by_command([sys.executable, "-c", code], tmp_path, tmp_path, Names(["skill"]), beat=int, on_step=on_step)
    assert seen == [(1, {"skill": 0.5}), (2, {"skill": 0.1})]
    assert time.monotonic() - started < 40


def test_a_judge_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('fell over', file=sys.stderr); sys.exit(3)"
    with pytest.raises(EvaluationError, match=r"exit code 3[\s\S]*fell over"):
        judge_by_command([sys.executable, "-c", code], tmp_path, tmp_path, Names([]), beat=int, on_step=never)
    with pytest.raises(EvaluationError, match="no-such-program cannot be run"):
        judge_by_command(["no-such-program"], tmp_path, tmp_path, Names([]), beat=int, on_step=never)


def never(step: int, scores: Any) -> bool:
    return False


def test_a_function_is_a_judge_too() -> None:
    """Its numbers may be numpy's; one that yields gives intermediate scores before its last ones."""
    names = Names(["skill"])
    items = {"skill": np.array([0.0, 1.0])}
    judgement = judge_by_function(lambda x: {"skill": np.float32(0.5), "items": items}, {}, names, on_step=never)
    assert (judgement.scores, judgement.items) == ({"skill": 0.5}, {"skill": (0, 1)})
    seen = []

    def slowly(tensors: Any) -> Any:
        for k in range(3):
            yield {"skill": k, "items": items}

    judge_by_function(slowly, {}, names, on_step=lambda step, scores: bool(seen.append((step, scores["skill"]))))
    assert seen == [(1, 0), (2, 1)]
    with pytest.raises(Hopeless):
        judge_by_function(slowly, {}, names, on_step=lambda step, scores: True)
    for answer, message in (
        (None, "expected a mapping"),
        ({"skill": "x"}, "expected numbers"),
        ({}, "expected numbers"),
    ):
        with pytest.raises(EvaluationError, match=message):
            judge_by_function(lambda x, a=answer: a, {}, names, on_step=never)
    with pytest.raises(EvaluationError, match="raised ZeroDivisionError"):
        judge_by_function(lambda x: 1 / 0, {}, names, on_step=never)


# ------------------------------------------------------------------------------ the front, the choice


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9))
def test_p_counts_every_flip_of_signs(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    gaps = [x - y for x, y in pairs]
    flips = [sum(s * g for s, g in zip(signs, gaps, strict=True)) for signs in product((1, -1), repeat=len(gaps))]
    assert p_value(a, b) == pytest.approx(sum(abs(f) >= abs(sum(gaps)) for f in flips) / len(flips))


def test_p_of_many_items_is_close_to_the_normal_one() -> None:
    """Against the normal approximation of the same test; a difference that is there is found, the same every time."""
    random = np.random.default_rng(0)
    for count, shift in ((300, 0.05), (300, 0.12), (300, 0.5), (501, 0.1)):
        a = random.standard_normal(count)
        b = a + shift + random.standard_normal(count)
        gaps = a - b
        z = abs(gaps.sum()) / math.sqrt((gaps**2).sum())
        assert p_value(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
        assert p_value(a, b) == p_value(b, a) == p_value(a, b)
    assert p_value(a, a) == 1
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def tried(number: int, skill: float, ppl: float, t: float | None = None, items: Any = None) -> Tried:
    return Tried(number, {"t": 0.5}, {"skill": skill, "ppl": ppl}, t=t, items=items)


def test_the_rule_chooses_and_says_what_really_differs(tmp_path: Path) -> None:
    """Objectives in opposite directions; ties go to the first tried; failures are counted and never chosen."""
    objectives = [Objective("skill"), Objective("ppl", is_less_better=True)]
    random = np.random.default_rng(1)
    noise = {"skill": list(random.standard_normal(50))}
    better = {"skill": [x + 1 for x in noise["skill"]]}
    points = [
        tried(0, 0.0, 1.0, t=0.0, items=noise), tried(1, 0.9, 1.2, items=better),
        tried(2, 1.0, 2.0, t=1.0, items=noise), tried(3, 0.5, 1.9), tried(4, 0.9, 1.2),
        Tried(5, {"t": 1}, None, error="fell over"),
    ]  # fmt: skip
    report = build_report(tmp_path, objectives, points, None, {1: {"skill": 0.8}})
    assert (report.front, report.chosen, report.uniform) == ((0, 1, 2, 4), 1, 0)
    assert {(c.a, c.b): c.differs for c in report.comparisons} == {(0, 1): True, (0, 2): False, (1, 2): True}
    assert report.test_scores == {"skill": 0.8}
    text = "\n".join(report_lines(report))
    assert "6 candidates (1 failed)" in text
    assert "no difference is shown between 0 and 2" in text
    assert "Against the best with one value for all layers, candidate 0 (t = 0)" in text
    best = build_report(tmp_path, objectives, points, "skill", {})
    assert (best.chosen, best.rule, best.uniform) == (2, "the largest skill", 2)
    assert "Nothing beat one value for all layers: the chosen one is t = 1 everywhere." in "\n".join(report_lines(best))
    assert build_report(tmp_path, objectives, points[5:], None, {}).chosen is None
