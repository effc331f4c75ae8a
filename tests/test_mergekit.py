"""mergekit's recipes: what each rule of the format makes of a text, and what is refused, with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoints import load_folder, save_file, save_model
from merge_tool import merge_models
from merge_tool.checkpoint.reader import open_checkpoint
from merge_tool.errors import MismatchError, RecipeError
from merge_tool.methods.registry import METHODS
from merge_tool.models.renaming import Renaming
from merge_tool.plan.expand import Expansion
from merge_tool.plan.plan import MergePlan
from merge_tool.plan.plan_merge import plan_merge
from merge_tool.recipe.mergekit import TOP, parse_recipe
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.options import Options
from merge_tool.recipe.recipe import Recipe, Tokenizer, TokenRow
from merge_tool.recipe.settings import Choice, constant

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("merge_*.yaml"))
PARTS = ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")


def llama(layers: int = 5, *, head: bool = True) -> list[str]:
    inside = [f"model.layers.{k}.{part}.weight" for k in range(layers) for part in PARTS]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", *(["lm_head.weight"] if head else [])]


def parse(text: str, **more: Any) -> Recipe:
    return parse_recipe(text, "recipe.yaml", METHODS, **more)


@dataclass(frozen=True)
class Ask:
    """What is asked for a tensor of the output: (model, the tensor's name there), and the parameters."""

    base: tuple[int, str] | None
    inputs: tuple[tuple[int, str], ...]
    shared: Mapping[str, Any]
    each: Mapping[str, tuple[Any, ...]]


def names_of(recipe: Recipe, names: Sequence[list[str]]) -> Sequence[list[str]]:
    """The tensors of each model: of all models the same, unless several lists are given."""
    return names if len(names) > 1 else [names[0] if names else llama()] * len(recipe.models)


def asks(text: str, *names: list[str], renamings: dict[int, Renaming] | None = None, **more: Any) -> dict[str, Ask]:
    """The asks by name; every model has the names of a 5-layer Llama, unless they are given."""
    recipe = parse(text, **more)
    expansion = Expansion(recipe, METHODS[recipe.method], names_of(recipe, names), renamings)
    found: dict[str, Ask] = {}
    for name in expansion.names():
        assert name not in found
        tensor = expansion.tensor(name)
        sources, (values,) = expansion.sources(tensor), expansion.values(tensor)
        base = sources[0] if expansion.has_base(tensor) else None
        found[name] = Ask(base, sources[base is not None :], values.shared, values.each)
    return found


def plan(text: str, *names: list[str]) -> MergePlan:
    """The whole plan, of models that have one value in each tensor."""
    recipe = parse(text)
    with TemporaryDirectory() as folder:
        folders = [
            save_model(Path(folder) / str(ref), {name: np.zeros(1, np.float32) for name in own})
            for ref, own in zip(recipe.models, names_of(recipe, names), strict=True)
        ]
        return plan_merge(recipe, [open_checkpoint(path) for path in folders])


def refusal(text: str, *names: list[str]) -> str:
    with pytest.raises((RecipeError, MismatchError)) as caught:
        plan(text, *names)
    return str(caught.value)


def merging(method: str, models: str, parameters: str = "{}", more: str = "") -> str:
    listed = ", ".join(f"{{model: {name}}}" for name in models.split())
    return f"merge_method: {method}\nmodels: [{listed}]\nparameters: {parameters}\n{more}"


def slerp(t: str, *, layers: str = "") -> str:
    return f"models: [{{model: A}}, {{model: B}}]\nmerge_method: slerp\nbase_model: A\nparameters:\n  t: {t}\n{layers}"


def linear(*weights: str, more: str = "") -> str:
    models = "".join(f"  - {{model: M{k}, parameters: {{weight: {w}}}}}\n" for k, w in enumerate(weights))
    return f"merge_method: linear\nmodels:\n{models}{more}"


CLASSIC = """
slices:
  - sources:
      - {model: A, layer_range: [0, 5]}
      - {model: B, layer_range: [0, 5]}
merge_method: slerp
base_model: B
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
"""


def layer_ts(found: dict[str, Ask], part: str) -> list[float]:
    return [ask.shared["t"] for name, ask in found.items() if part in name]


# The parameters of each tensor


def test_the_classic_recipe_gives_each_tensor_the_t_worked_out_by_hand() -> None:
    found = asks(CLASSIC)
    assert sorted(found) == sorted(llama())
    assert layer_ts(found, "self_attn") == [0, 0.5, 0.3, 0.7, 1]
    assert layer_ts(found, "mlp") == [1, 0.5, 0.7, 0.3, 0]
    others = [name for name in llama() if "mlp" not in name and "self_attn" not in name]
    assert [found[name].shared["t"] for name in others] == [0.5] * 8


def test_slerp_goes_from_base_model_to_the_other_whatever_their_order() -> None:
    ask = asks(CLASSIC)["lm_head.weight"]
    assert parse(CLASSIC).models == (ModelRef("A"), ModelRef("B"))
    assert ask.base is None
    assert ask.inputs == ((1, "lm_head.weight"), (0, "lm_head.weight"))


@settings(deadline=None)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=9), st.integers(1, 60))
@example([0.1], 3)
def test_a_list_is_linear_between_its_values_over_the_layers(values: list[float], layers: int) -> None:
    names = [f"h.{k}.{part}" for k in range(layers) for part in "abc"]
    text = linear(str(values), "1")
    found = asks(text, names, names)
    for k in range(layers):
        position = k / (layers - 1) if layers > 1 else 1.0
        knots = [n / max(len(values) - 1, 1) for n in range(len(values))]
        right = next((n for n, knot in enumerate(knots) if knot >= position), len(values) - 1)
        left = max(right - 1, 0)
        share = (position - knots[left]) / (knots[right] - knots[left]) if right > left else 0.0
        expected = values[left] + share * (values[right] - values[left])
        assert found[f"h.{k}.a"].each["weight"][0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_list_of_switches_or_words_is_taken_as_it_is_not_interpolated() -> None:
    found = asks(linear("1", "2", more="parameters: {normalize: [true, false, true]}"))
    ts = [found[f"model.layers.{k}.mlp.up_proj.weight"].shared["normalize"] for k in range(5)]
    assert ts == [True, True, False, False, True]


@pytest.mark.parametrize(("layers", "expected"), [(1, [1.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0])])
def test_the_only_layer_of_a_stack_is_its_last(layers: int, expected: list[float]) -> None:
    found = asks(slerp("[0, 1]"), llama(layers))
    assert layer_ts(found, "mlp") == expected


def test_what_is_outside_the_layers_gets_the_first_value_before_and_after_them() -> None:
    found = asks(slerp("[0.2, 0.5, 1]"))
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert [found[name].shared["t"] for name in outside] == [0.2, 0.2, 0.2]


def test_each_stack_has_its_own_number_of_layers() -> None:
    names = [
        f"{stack}.{k}.{part}" for stack, n in (("enc.block", 3), ("dec.block", 5)) for k in range(n) for part in "abc"
    ]
    found = asks(slerp("[0, 1]"), names, names)
    assert [found[f"enc.block.{k}.a"].shared["t"] for k in range(3)] == [0, 0.5, 1]
    assert [found[f"dec.block.{k}.a"].shared["t"] for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_list_lies_along_a_stack_that_the_first_model_lacks() -> None:
    """A language model's layers beside those of two towers that it does not have."""
    text = """
merge_method: linear
modules:
  model.layers: {models: [{model: L}, {model: A}], parameters: {weight: [0, 1]}}
  visual: {models: [{model: A, parameters: {weight: [0, 1]}}, {model: B, parameters: {weight: 1}}]}
"""
    language = [name for name in vision_language() if "visual" not in name]
    found = asks(text, language, vision_language(), vision_language())
    assert [found[f"visual.blocks.{k}.a"].each["weight"] for k in range(3)] == [(0, 1), (0.5, 1), (1, 1)]
    assert [found[f"model.layers.{k}.a"].each["weight"][0] for k in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        ("[{filter: layers.1, value: 0.1}, {value: 0.9}]", [0.9, 0.1, 0.9, 0.1, 0.1]),  # 0, 1, 2, 10, 11
        ("[{filter: layers.1., value: 0.1}, {value: 0.9}]", [0.9, 0.1, 0.9, 0.9, 0.9]),
        ("[{filter: mlp, value: 0.1}, {filter: layers.2, value: 0.2}, {value: 0.9}]", [0.1] * 5),
        ("[{filter: layers.2, value: 0.2}, {filter: mlp, value: 0.1}, {value: 0.9}]", [0.1, 0.1, 0.2, 0.1, 0.1]),
        ("[{filter: '*', value: 0.3}]", [0.3] * 5),
        ("[{filter: null, value: 0.3}]", [0.3] * 5),
        ("{value: 0.3}", [0.3] * 5),
        ("[{filter: '.*mlp.*', value: 0.1}, {filter: 'm?p', value: 0.2}, {value: 0.9}]", [0.9] * 5),
    ],
)
def test_a_filter_is_a_part_of_the_name_and_the_first_that_matches_counts(t: str, expected: list[float]) -> None:
    found = asks(slerp(t), llama(12))
    assert [found[f"model.layers.{k}.mlp.up_proj.weight"].shared["t"] for k in (0, 1, 2, 10, 11)] == expected


def test_a_shared_parameter_is_the_slices_then_the_modules_then_the_recipes() -> None:
    text = """
modules:
  model.layers:
    parameters: {t: [{filter: q_proj, value: 0.2}, {filter: up_proj, value: 0.4}]}
    slices:
      - sources: [{model: A, layer_range: [0, 5]}, {model: B, layer_range: [0, 5]}]
        parameters: {t: {filter: q_proj, value: 0.1}}
merge_method: slerp
base_model: A
parameters: {t: 0.9}
"""
    found = asks(text)
    assert [found[f"model.layers.0.{part}.weight"].shared["t"] for part in PARTS] == [0.9, 0.4, 0.1]


def test_a_parameter_of_an_input_is_its_own_first_and_then_the_same_scopes() -> None:
    text = """
merge_method: linear
models:
  - {model: A, parameters: {weight: {filter: mlp, value: 3}}}
  - {model: B}
parameters: {weight: [{filter: self_attn, value: 2}, {value: 1}]}
"""
    found = asks(text)
    weights = [found[f"model.layers.1.{part}.weight"].each["weight"] for part in PARTS]
    assert weights == [(1, 1), (3, 1), (2, 2)]


def test_shared_filters_see_the_outputs_name_and_those_of_an_input_the_inputs() -> None:
    text = """
merge_method: linear
slices:
  - sources: [{model: A, layer_range: [0, 1], parameters: {weight: 1}}]
  - sources:
      - {model: A, layer_range: [3, 4], parameters: {weight: [{filter: layers.3., value: 5}, {value: 1}]}}
      - {model: B, layer_range: [2, 3], parameters: {weight: [{filter: layers.2., value: 7}, {value: 1}]}}
    parameters: {normalize: [{filter: layers.1., value: false}, {filter: layers., value: true}]}
"""
    ask = asks(text)["model.layers.1.mlp.up_proj.weight"]
    assert ask.inputs == ((0, "model.layers.3.mlp.up_proj.weight"), (1, "model.layers.2.mlp.up_proj.weight"))
    assert ask.each == {"weight": (5, 7)}
    assert ask.shared == {"normalize": False}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("1.0", True), ("no", False)])
def test_switches_may_be_numbers(text: str, value: bool) -> None:
    assert asks(linear("1", more=f"parameters: {{normalize: {text}}}"))["lm_head.weight"].shared == {"normalize": value}


def test_defaults_are_filled_in_and_the_base_has_no_parameters_of_its_own() -> None:
    text = """
merge_method: ties
base_model: Base
models:
  - {model: Base}
  - {model: A, parameters: {density: 0.5, weight: 0.3}}
  - {model: B, parameters: {weight: 0.7}}
"""
    ask = asks(text)["lm_head.weight"]
    assert ask.base == (0, "lm_head.weight")
    assert [model for model, _ in ask.inputs] == [1, 2]
    assert ask.each == {"weight": (0.3, 0.7), "density": (0.5, 1.0)}
    assert ask.shared == {"normalize": True, "lambda": 1.0, "rescale": False}


def test_a_number_that_yaml_takes_for_a_word_is_a_number() -> None:
    text = "merge_method: karcher\nmodels: [{model: A}, {model: B}]\nparameters: {max_iter: 5, tol: 1e-9}"
    assert asks(text)["lm_head.weight"].shared == {"max_iter": 5, "tol": 1e-9}


def test_a_tensor_that_no_filter_gives_a_value_is_named() -> None:
    message = refusal(slerp("{filter: self_attn, value: 0.5}"))
    assert "'t' of 13 tensors" in message
    assert "model.embed_tokens.weight" in message
    assert "without a filter" in message


def test_filters_that_are_in_no_name_are_warned_about() -> None:
    (warning,) = plan(slerp("[{filter: '.*mlp.*', value: 0.1}, {filter: mlp, value: 0.1}, {value: 0.9}]")).warnings
    assert "'.*mlp.*' of 't'" in warning


def test_a_filter_that_is_in_an_inputs_name_is_not_warned_about_though_another_comes_before_it() -> None:
    text = """
merge_method: passthrough
slices:
  - sources:
      - model: A
        layer_range: [3, 5]
        parameters: {scale: [{filter: layers., value: 2}, {filter: layers.4., value: 3}]}
"""
    assert asks(text)["model.layers.1.mlp.up_proj.weight"].inputs == ((0, "model.layers.4.mlp.up_proj.weight"),)
    assert plan(text).warnings == ()
    (warning,) = plan(text.replace("layers.4.", "layers.9.")).warnings
    assert "'layers.9.' of 'scale'" in warning


# The models


def test_base_model_is_a_source_even_if_models_does_not_list_it() -> None:
    found = asks("merge_method: task_arithmetic\nmodels: [{model: A}]\nbase_model: Z\nparameters: {weight: 1}")
    assert found["lm_head.weight"].base == (1, "lm_head.weight")
    assert found["lm_head.weight"].inputs == ((0, "lm_head.weight"),)


def test_linear_has_no_base_so_base_model_is_an_input_like_the_others() -> None:
    text = "merge_method: linear\nmodels: [{model: A}]\nbase_model: Z\nparameters: {weight: 1}"
    ask = asks(text)["lm_head.weight"]
    assert (ask.base, ask.inputs) == (None, ((0, "lm_head.weight"), (1, "lm_head.weight")))


def test_a_slice_may_have_a_base_of_its_own() -> None:
    text = """
merge_method: slerp
base_model: A
slices:
  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]
  - sources: [{model: A, layer_range: [2, 5]}, {model: B, layer_range: [2, 5]}]
    base_model: B
parameters: {t: 0.25}
"""
    found = asks(text)
    first = {name: ask.inputs[0][0] for name, ask in found.items()}
    assert [first[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(5)] == [0, 0, 1, 1, 1]
    assert first["model.embed_tokens.weight"] == 0
    assert first["model.norm.weight"] == first["lm_head.weight"] == 1


def test_the_same_model_twice_is_averaged_over_its_own_layers() -> None:
    text = """
merge_method: linear
slices:
  - sources:
      - {model: A, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: A, layer_range: [2, 4], parameters: {weight: 3}}
"""
    ask = asks(text)["model.layers.1.mlp.up_proj.weight"]
    assert ask.inputs == ((0, "model.layers.1.mlp.up_proj.weight"), (0, "model.layers.3.mlp.up_proj.weight"))
    assert ask.each == {"weight": (1, 3)}
    assert parse(text).models == (ModelRef("A"),)


def test_a_model_may_be_merged_with_itself() -> None:
    text = "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: A}]\nparameters: {t: 0.3}"
    assert asks(text)["lm_head.weight"].inputs == ((0, "lm_head.weight"), (0, "lm_head.weight"))


@pytest.mark.parametrize(
    ("text", "donor"),
    [(CLASSIC, 1), (linear("1", "1"), 0), ("merge_method: linear\nmodels: [{model: B}]\nparameters: {weight: 1}", 0)],
)
def test_the_donor_is_base_model_or_the_first_listed(text: str, donor: int) -> None:
    assert parse(text).donor == donor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", ModelRef("org/model")),
        ("org/model@v1.0", ModelRef("org/model", "v1.0")),
        ("org/model+org/lora", ModelRef("org/model", None, "org/lora")),
        ("org/model@a+org/lora@b", ModelRef("org/model", "a", "org/lora", "b")),
        ("{model: {path: m@x, revision: r}, lora: {path: l}}", ModelRef("m@x", "r", "l")),
        ("{model: m@r, lora: l@s}", ModelRef("m", "r", "l", "s")),
    ],
)
def test_a_model_is_a_path_a_revision_and_an_adapter(text: str, expected: ModelRef) -> None:
    assert parse(f"merge_method: passthrough\nmodels: [{{model: {text}}}]").models == (expected,)


def test_what_exists_on_disk_is_not_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b@c", "d@e", "f"):
        Path(name).mkdir()
    for text, expected in {
        "a+b@c": ModelRef("a+b@c"),
        "a+b@c+x": ModelRef("a+b@c", None, "x"),
        "d@e@rev": ModelRef("d@e", "rev"),
        "d@e+f@1": ModelRef("d@e", None, "f", "1"),
    }.items():
        assert parse(f"merge_method: passthrough\nmodels: [{{model: {text}}}]").models == (expected,)


def test_a_model_reads_back_from_its_text() -> None:
    for text in ("a", "a@b", "a+c", "a@b+c@d"):
        (model,) = parse(f"merge_method: passthrough\nmodels: [{{model: {text}}}]").models
        assert str(model) == text


# Layers


STACKED = """
merge_method: passthrough
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources: [{model: B, layer_range: [1, 5], parameters: {scale: [{filter: up_proj, value: [0, 1]}]}}]
"""


def test_layers_are_stacked_and_numbered_on() -> None:
    found = asks(STACKED)
    came_from = [found[f"model.layers.{k}.mlp.up_proj.weight"].inputs[0] for k in range(7)]
    expected = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert came_from == [(model, f"model.layers.{layer}.mlp.up_proj.weight") for model, layer in expected]
    assert len(found) == 3 + 7 * len(PARTS)
    assert parse(STACKED).num_layers == 7
    assert parse(linear("1")).num_layers is None


def test_positions_begin_anew_in_every_slice() -> None:
    found = asks(STACKED)
    scales = [found[f"model.layers.{k}.mlp.up_proj.weight"].each["scale"][0] for k in range(7)]
    assert scales == [None, None, None, 0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1]


def test_what_is_before_the_layers_is_the_first_slices_and_what_is_after_the_lasts() -> None:
    found = asks(STACKED)
    assert {name: ask.inputs[0][0] for name, ask in found.items() if ".layers." not in name} == {
        "model.embed_tokens.weight": 0,
        "model.norm.weight": 1,
        "lm_head.weight": 1,
    }


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("transformer.ln_f.bias", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("gpt_neox.embed_in.weight", False),
        ("embed_out.weight", True),
        ("bert.embeddings.LayerNorm.weight", False),
        ("bert.pooler.dense.weight", True),
        ("classifier.weight", True),
        ("score.weight", True),
        ("score.0.weight", True),
        ("proj_out.weight", True),
        ("model.decoder.project_out.weight", True),
        ("pre_classifier.bias", True),
        ("visual_projection.weight", True),
        ("bert.embeddings.cls_token", False),
        ("feature_extractor.conv_layers.0.layer_norm.weight", False),
        ("feature_projection.layer_norm.weight", False),
        ("wav2vec2.encoder.layer_norm.weight", True),
        ("model.language_model.norm.weight", True),
        ("model.word_embeddings_layernorm.weight", False),
        ("backbone.norm_f.weight", True),
        ("vision_model.pre_layrnorm.weight", False),
        ("vision_model.post_layernorm.weight", True),
        ("vision_model.pre_layernorm.weight", False),
        ("visual.patch_embed.proj.weight", False),
        ("multi_modal_projector.linear_1.weight", False),
        ("shared.weight", False),
    ],
)
def test_final_norms_and_heads_come_last_all_else_first(name: str, last: bool) -> None:
    layers = [f"x.layers.{k}.{part}" for k in range(2) for part in "abc"]
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {m}, layer_range: [{k}, {k + 1}]}}]\n" for k, m in enumerate("AB")
    )
    names = [*layers, name]
    assert asks(text, names, names)[name].inputs == ((int(last), name),)


def test_a_slice_without_layers_still_says_what_is_before_them() -> None:
    text = STACKED.replace("[0, 3]", "[0, 0]")
    found = asks(text)
    assert found["model.embed_tokens.weight"].inputs[0][0] == 0
    assert found["model.layers.0.mlp.up_proj.weight"].inputs[0] == (1, "model.layers.1.mlp.up_proj.weight")


def test_a_range_beyond_the_layers_says_how_many_there_are() -> None:
    message = refusal(STACKED.replace("[1, 5]", "[1, 9]").replace("[0, 3]", "[4, 6]"))
    assert "layer_range [1, 9] of B: it has 5 layers in model.layers." in message
    assert "layer_range [4, 6] of A: it has 5 layers in model.layers." in message
    assert message.startswith("The models do not have all layers that the recipe names.\n")
    assert message.endswith("\nA has 18 parameters and 5 layers; B has 18 parameters and 5 layers.")
    smaller = [name for name in llama(4) if name != "model.norm.weight"]
    message = refusal(CLASSIC, llama(), smaller)
    assert message.startswith("A and B do not have the same tensors.\n  layer_range [0, 5] of B: it has 4 layers in")
    assert "\n  --exclude PATTERN: " in message


def vision_language() -> list[str]:
    return [
        *(f"visual.blocks.{k}.{part}" for k in range(3) for part in "abcd"),
        "visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "visual.merger.ln_q.weight",
        *(f"model.layers.{k}.{part}" for k in range(4) for part in "abcd"),
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip


def test_slices_of_a_model_with_two_stacks_must_say_which() -> None:
    message = refusal(STACKED, vision_language())
    assert "2 stacks: model.layers., visual.blocks." in message
    assert "modules: {model.layers: {slices: ...}" in message


MODULES = """
merge_method: passthrough
modules:
  visual: {models: [{model: B}]}
  model.layers:
    slices:
      - sources: [{model: A, layer_range: [0, 2]}]
      - sources: [{model: A, layer_range: [1, 4]}]
"""


def test_modules_give_each_stack_its_own_sources_and_every_tensor_one_module() -> None:
    found = asks(MODULES, vision_language())
    assert parse(MODULES).models == (ModelRef("B"), ModelRef("A"))
    of_vision = {name for name, ask in found.items() if ask.inputs[0][0] == 0}
    assert of_vision - {"lm_head.weight"} == {name for name in vision_language() if name.startswith("visual.")}
    assert found["model.layers.2.a"].inputs == ((1, "model.layers.1.a"),)
    assert len(found) == len(vision_language()) + 4
    assert [module.num_layers for module in parse(MODULES).modules] == [None, 5]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "visual:",
            "text_decoder:",
            "No tensor belongs to the module 'text_decoder'; the stacks of layers are: model.layers., visual",
        ),
        ("  visual: {models: [{model: B}]}\n", "", "`modules` does not say how to merge visual.blocks."),
        ("visual:", "layers:", "Two of the modules (layers, model.layers) mean the same stack"),
        ("merge_method: passthrough\n", "", "there is no merge_method"),
    ],
)
def test_modules_that_fit_no_stack_or_leave_one_out_are_refused(old: str, new: str, says: str) -> None:
    assert says in refusal(MODULES.replace(old, new), vision_language())


def test_the_only_module_of_a_model_with_one_stack_may_be_called_anything() -> None:
    text = "merge_method: passthrough\nmodules: {default: {slices: [{sources: [{model: A, layer_range: [2, 4]}]}]}}"
    names = [name for name in asks(text) if "mlp" in name]
    assert names == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]


def test_what_is_given_as_null_is_not_given() -> None:
    text = linear("1", more="slices: null\nmodules:\ntokenizer: {tokens: null}\nparameters:")
    assert parse(text).modules == parse(linear("1")).modules


# Models that do not fit together


def test_all_tensors_that_some_models_lack_are_said_at_once() -> None:
    smaller = [name for name in llama(4) if name != "model.norm.weight"]
    message = refusal(linear("1", "1"), [*llama(), "model.extra"], smaller)
    assert "5 tensors only in M0: model.extra, model.layers.4.input_layernorm.weight, " in message
    assert "M0 has 19 parameters and 5 layers; M1 has 14 parameters and 4 layers." in message
    assert "1 tensor only in M1: model.other" in refusal(linear("1", "1"), llama(), [*llama(), "model.other"])
    message = refusal(linear("1", "1", "1"), [*llama(), "model.extra"], smaller, [*llama(), "model.other"])
    for told in ("6 tensors not in M1: model.extra, ", "1 tensor not in M2: model.extra", "1 tensor not in M0: "):
        assert told in message


def test_a_tied_head_and_another_prefix_are_found_under_the_models_own_names() -> None:
    bare = [name.removeprefix("model.") for name in llama(head=False)]
    names = {f"model.{name}": name for name in bare} | {"lm_head.weight": "embed_tokens.weight"}
    found = asks(linear("1", "1"), llama(), bare, renamings={1: Renaming(ft_names=names)})
    assert list(found) == llama()
    assert found["lm_head.weight"].inputs == ((0, "lm_head.weight"), (1, "embed_tokens.weight"))
    assert found["model.norm.weight"].inputs == ((0, "model.norm.weight"), (1, "norm.weight"))
    copies = Renaming(copies={"lm_head.weight": "model.embed_tokens.weight"})
    found = asks(linear("1", "1"), llama(head=False), llama(), renamings={1: copies})
    assert list(found) == llama(head=False)


# dtype, tokenizer, chat template


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes_are_read_with_or_without_torch(name: str) -> None:
    recipe = parse(linear("1", more=f"dtype: torch.{name}\nout_dtype: {name}"))
    assert recipe.options.dtype == name


def test_the_outputs_dtype_is_the_options_then_out_dtype_then_dtype() -> None:
    text = linear("1", more="dtype: float32\nout_dtype: float16")
    assert parse(text).options.dtype == "float16"
    assert parse(text, options=Options(dtype="float64")).options.dtype == "float64"


def test_the_text_the_chat_template_and_the_absence_of_the_rest_are_kept() -> None:
    text = linear("1", more="chat_template: auto\ndtype: null\ntokenizer_source: null\nbase_model: null")
    recipe = parse(text)
    assert recipe.text == text
    assert (recipe.chat_template, recipe.options.dtype, recipe.tokenizer, recipe.base) == ("auto", None, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer_source: union", Tokenizer("union")),
        ("tokenizer_source: M0", Tokenizer(0)),
        ("tokenizer_source: elsewhere", Tokenizer(1)),
        ("tokenizer: {}", Tokenizer("union")),
        ("tokenizer: {source: M0, pad_to_multiple_of: 64}", Tokenizer(0, {}, 64)),
        (
            "tokenizer: {tokens: {a: {source: M0}, b: {source: {kind: zero}, force: true}, c: {source: {kind: "
            "model_token, model: M0, token: x}}, d: {source: {kind: model_token, model: M0, token_id: 7}}, e: {}}}",
            Tokenizer(
                "union",
                {
                    "a": TokenRow("model", 0),
                    "b": TokenRow("zero", force=True),
                    "c": TokenRow("model_token", 0, "x"),
                    "d": TokenRow("model_token", 0, None, 7),
                    "e": TokenRow("default"),
                },
            ),
        ),
    ],
)
def test_the_vocabulary_is_the_union_the_bases_or_a_models(text: str, expected: Tokenizer) -> None:
    assert parse(linear("1", more=text)).tokenizer == expected


def test_a_model_that_only_lends_its_tokenizer_is_known_as_such() -> None:
    recipe = parse(linear("1", more="tokenizer_source: elsewhere"))
    assert recipe.models == (ModelRef("M0"), ModelRef("elsewhere"))
    assert recipe.sources == {0}
    assert asks(recipe.text, llama(), [])["lm_head.weight"].inputs == ((0, "lm_head.weight"),)


# What has no effect


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (linear("1", more="parameters: {int8_mask: true}"), "line 4: 'int8_mask' has no effect"),
        (linear("1", more="name: mine"), "line 4: 'name' has no effect"),
        (linear("1", more="random_seed: 0"), "'random_seed' has no effect: mergekit does not read it"),
        (slerp("0.5\n  embed_slerp: true"), "line 6: 'embed_slerp' has no effect"),
        (slerp("0.5\n  normalize: true"), "'normalize' has no effect: slerp has no such parameter"),
        (STACKED.replace("- sources", "- residual_weight: 0.1\n    sources", 1), "line 4: 'residual_weight'"),
        (merging("passthrough", "A").replace("A}", "{model: A, override_architecture: X}}"), "'override_arch"),
        (linear("1", "2", more="base_model: M0").replace("linear", "ties"), "M0 is base_model"),
        (slerp("[{value: 0.5}, {filter: mlp, value: 1}]"), "never used"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_a_warning_that_names_it(text: str, says: str) -> None:
    (warning,) = parse(text).warnings
    assert says in warning


def test_a_clean_recipe_has_no_warnings() -> None:
    assert parse(CLASSIC).warnings == ()


# What is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # keys
        (linear("1", more="dtyp: bfloat16"), "line 4: the recipe has no key 'dtyp' (did you mean 'dtype'?)"),
        (linear("1", more="t: 0.5"), "'t' (it belongs under `parameters:`)"),
        ("merge_method: linear\nmodels: [{model: A, weight: 1}]", "'weight' (it belongs under `parameters:`)"),
        ("merge_method: linear\nmodels: [{model: A, layer_range: [0, 2]}]", "'layer_range' (it belongs into slices"),
        (linear("1", more="parameters: {dtype: bfloat16}"), "(it belongs at the top of the recipe)"),
        (linear("1", more="out_path: x"), "'out_path' (the output is named on the command line)"),
        ("merge_method: linear\nmodels: [{model: A, revision: x}]", "'revision' (write model: PATH@REVISION)"),
        (linear("1", more="parameters: {wieght: 1}"), "linear has no parameter 'wieght' (did you mean 'weight'?)"),
        (slerp("{fliter: mlp, value: 1}"), "an entry of 't' has no key 'fliter' (did you mean 'filter'?)"),
        (slerp("{filter: mlp}"), "an entry of 't' has no value"),
        ("merge_method: passthrough\nmodels: [{model: {path: x}}]", "a model has no key 'path'"),
        ("merge_method: passthrough\nmodels: [{parameters: {}}]", "an entry of models has no model"),
        (linear("1", more="tokenizer: {padding: 8}"), "tokenizer has no key 'padding'"),
        # other programs
        ("method: slerp\nmodels: [a, b]\nparameters: {t: 0.5}", "mlx-lm"),
        ("base_model: a\ngate_mode: hidden\nexperts: []", "mergekit-moe"),
        ("genome: {}", "mergekit-evolve"),
        # methods
        ("models: [{model: A}]", "line 1: there is no merge_method, expected one of: arcee_fusion, breadcrumbs"),
        ("merge_method: slrp\nmodels: [{model: A}]", "merge_method is 'slrp' (did you mean 'slerp'?)"),
        ("merge_method: [slerp]\nmodels: [{model: A}]", "merge_method is a list, expected text"),
        # counts
        ("merge_method: linear", "the recipe has no model, expected exactly one of: models, slices, modules"),
        (CLASSIC + "models: [{model: A}]", "the recipe has models and slices, expected exactly one of"),
        (linear("1", more="modules: {a: {}}"), "the recipe has models and modules"),
        ("merge_method: linear\nmodels: []", "models is an empty list"),
        ("merge_method: linear\nmodules: {}", "modules is empty"),
        ("merge_method: linear\nmodules: {a: {parameters: {}}}", "needs either models or slices"),
        ("merge_method: linear\nmodels: {model: A}", "models is a mapping, expected a list"),
        ("merge_method: linear\nmodels: [A]", "expected `- model: A`"),
        ("merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: 1}", "slerp needs base_model"),
        (slerp("0.5").replace("{model: B}", "{model: B}, {model: C}"), "slerp merges exactly 2 models, found 3"),
        (slerp("0.5").replace("base_model: A", "base_model: C"), "found 3 with base_model, which is one of them"),
        (slerp("0.5").replace(", {model: B}", ""), "slerp merges exactly 2 models, found 1"),
        (merging("nuslerp", "A", "{weight: 1}"), "nuslerp merges exactly 2 models, found 1"),
        (merging("nearswap", "B C", "{t: 1}", "base_model: A"), "merges exactly 1 model beside base_model, found 2"),
        (merging("model_stock", "A B", more="base_model: A"), "at least 2 models beside base_model, found 1"),
        (merging("passthrough", "A B"), "passthrough merges exactly 1 model, found 2"),
        (CLASSIC.replace("base_model: B", "base_model: Z"), "base_model Z is not among the sources of the slice"),
        # parameters
        (slerp("0.5").replace("parameters:\n  t: 0.5\n", ""), "slerp needs a 't': put it into `parameters:`"),
        (linear("1").replace(", parameters: {weight: 1}", ""), "linear needs a 'weight' for M0"),
        (slerp("1").replace("B}", "B, parameters: {t: 0.9}}"), "slerp has one for all models: put it into the re"),
        (slerp("1.5"), "line 5: 't' is 1.5, expected 0 (base_model) to 1 (the other model). Give --extrapolate"),
        (slerp("[0, -0.1]"), "'t' is -0.1"),
        (slerp("high"), "'t' is 'high', expected a finite number"),
        (slerp(".nan"), "'t' is '.nan', expected a finite number"),
        (slerp("true"), "'t' is 'true', expected a finite number"),
        (slerp("null"), "'t' is empty"),
        (slerp("[]"), "'t' is an empty list"),
        (slerp("[0, [1]]"), "'t' is a list"),
        (slerp("[{value: 1}, 0.5]"), "an entry of 't' is '0.5', expected a mapping"),
        (slerp("[0.5, {value: 1}]"), "'t' is a mapping"),
        (slerp("{filter: 3, value: 1}"), "the filter of 't' is '3', expected text"),
        (linear("1", more="parameters: {normalize: maybe}"), "'normalize' is 'maybe', expected true or false"),
        (linear("1", more="parameters: [1]"), "parameters is a list, expected a mapping"),
        (merging("ties", "A", "{density: 1.2}", "base_model: B"), "'density' is '1.2', expected a number from 0 to 1"),
        (merging("karcher", "A", "{max_iter: 2.5}"), "'max_iter' is '2.5', expected a whole number"),
        (merging("karcher", "A", "{max_iter: [1, 5]}"), "'max_iter' is a list, expected one whole number"),
        # layers
        (CLASSIC.replace("[0, 5]", "[0, 5, 6]", 1), "line 4: layer_range is [0, 5, 6], expected [first, end]"),
        (CLASSIC.replace("[0, 5]", "[3, 2]", 1), "layer_range is [3, 2]"),
        (CLASSIC.replace("[0, 5]", "[-1, 2]", 1), "layer_range is [-1, 2]"),
        (CLASSIC.replace("[0, 5]", "[0, 0]"), "line 3: the slices have no layers at all, expected one layer or more"),
        (CLASSIC.replace("[0, 5]", "0-5", 1), "layer_range is '0-5'"),
        (CLASSIC.replace(", layer_range: [0, 5]", "", 1), "an entry of sources has no layer_range"),
        (CLASSIC.replace("[0, 5]", "[0, 4]", 1), "line 3: the sources of a slice have layers [0, 4], [0, 5], expe"),
        ("merge_method: passthrough\nslices: [{parameters: {}}]", "an entry of slices has no sources"),
        # dtypes, tokenizers, models
        (linear("1", more="dtype: bf16"), "dtype is 'bf16' (did you mean 'bfloat16'?), expected one of: float32"),
        (linear("1", more="out_dtype: int64"), "out_dtype is 'int64'"),
        (linear("1", more="dtype: 16"), "dtype is '16', expected text"),
        (linear("1", more="tokenizer_source: union\ntokenizer: {source: union}"), "and tokenizer, expected one"),
        (linear("1", more="tokenizer_source: base"), "there is no base_model"),
        (linear("1", more="tokenizer: {tokens: {x: {source: {kind: mean}}}}"), "the token 'x' has a source that is n"),
        (linear("1", more="tokenizer: {tokens: {x: {force: 3}}}"), "force is '3', expected true or false"),
        (linear("1", more="tokenizer: {pad_to_multiple_of: 0}"), "pad_to_multiple_of is '0'"),
        (linear("1", more="chat_template: [a]"), "chat_template is a list, expected text"),
        (merging("passthrough", "a+b+c"), "line 2: The model 'a+b+c' has 2 '+', expected at most one"),
        (merging("passthrough", "a@b@c"), "has 2 '@'"),
        (merging("passthrough", "a+"), "lacks a name or an adapter"),
        (merging("passthrough", "3"), "a model is '3', expected text"),
        (merging("passthrough", "''"), "a model is empty"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_line_and_what_would_be_right(text: str, says: str) -> None:
    message = refusal(text)
    assert says in message
    assert "recipe.yaml, line " in message


def test_t_outside_0_and_1_is_read_if_it_is_meant() -> None:
    found = asks(slerp("[1.5, -0.5]"), llama(3), extrapolate=True)
    assert layer_ts(found, "mlp") == [1.5, 0.5, -0.5]


# YAML of strangers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "recipe.yaml is empty"),
        ("# nothing\n", "recipe.yaml is empty"),
        ("just words", "the recipe is 'just words', expected a mapping"),
        ("a: [1", "line 1: not YAML"),
        ("a: 1\n\tb: 2", "line 2: not YAML"),
        ("a: 1\nb: 2\na: 3", "recipe.yaml, line 3: 'a' is given twice with different values, first in line 1"),
        ("models:\n- {model: a, model: b}", "line 2: 'model' is given twice"),
        ("a: 1\n---\nb: 2", "one document"),
        (
            "a: !!python/object/apply:os.system [echo]",
            "line 1: 'tag:yaml.org,2002:python/object/apply:os.system' is not one of",
        ),
        ("a: !!set {b}", "not one of YAML's plain types"),
        ("a: !!python/name:os.system x", "not a value of YAML's plain types"),
        ("a: &x [*x]", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply, expected at most 40"),
        ("a: [" + "1," * 60_000 + "]", "more than 50,000 values"),
        ("a: *nowhere", "not YAML"),
        ("? [a, b]\n: 1", "a key is a list or a mapping"),
        ("1: a", "the key 1 is read as 1, expected text: quote it"),
        ("yes: a", "the key yes is read as True"),
        ("a: " + "9" * 5000, "not a value of YAML's plain types"),
        ("a: 2024-13-45", "not a value of YAML's plain types"),
        ("a: \x00", "not YAML"),
        ("a: " + "x" * 1_000_001, "more than 1,000,000 bytes"),
        ("<<: 3\na: 1", "`<<` expects a mapping"),
        ("[2]: \ud800", "not YAML"),
    ],
)
def test_hostile_or_broken_yaml_is_one_clear_error(text: str, says: str) -> None:
    message = refusal(text)
    assert says in message
    assert message.startswith("recipe.yaml")
    assert len(message) < 1000
    assert message.replace("\n", "").isprintable()


def test_aliases_that_multiply_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 9))
    assert "more than 50,000 values, aliases included" in refusal(bomb)


def test_anchors_and_merge_keys_are_fine_and_what_stands_nearer_counts() -> None:
    text = """
merge_method: linear
models:
  - &first {model: A, parameters: &p {weight: 1}}
  - {<<: *first, model: B}
  - {model: C, parameters: {<<: *p, weight: 4}}
"""
    assert asks(text)["lm_head.weight"].each == {"weight": (1, 1, 4)}


@settings(deadline=None)
@given(st.text(max_size=200))
@example("merge_method: slerp\nmodels:\n  - &a {<<: *a}")
def test_any_text_is_a_recipe_or_a_clear_error(text: str) -> None:
    try:
        parse(text)
    except RecipeError as e:
        message = str(e)
        assert message.startswith("recipe.yaml")


_KEYS = [
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "parameters", "tokenizer", "tokenizer_source",
    "model", "sources", "layer_range", "t", "weight", "filter", "value", "path", "lora", "source", "tokens", "kind",
]  # fmt: skip
_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["A", "slerp", "linear", "base", "x+y"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["models", "slices", "modules", "parameters", "tokenizer", "base_model"]), _values)
)
def test_values_of_any_shape_are_a_recipe_or_a_clear_error(fields: dict[str, Any]) -> None:
    import yaml

    for method in ("slerp", "linear", "ties"):
        try:
            asks(yaml.safe_dump({"merge_method": method, **fields}))
        except (RecipeError, MismatchError):
            continue


def test_a_number_stays_between_its_neighbours() -> None:
    values = (0.1, 0.7)
    assert all(0.1 <= Choice(None, values).at(k / 1000) <= 0.7 for k in range(1001))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_short_recipes_without_warnings(path: Path) -> None:
    text = path.read_text()
    assert parse(text).warnings == ()
    assert len(text.splitlines()) < 25
    assert plan(text, llama(32)).warnings == ()


def test_there_are_six_examples() -> None:
    assert len(EXAMPLES) == 6


def test_the_docs_name_every_method_and_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs/mergekit.md").read_text()
    assert [name for name in METHODS if f"{name}," not in text and f"{name} |" not in text] == []
    assert [key for key in TOP if f"`{key}`" not in text] == []
    assert [path.name for path in EXAMPLES if path.name not in text] == []


# --------------------------------------------------------------------------------- leniency where it is safe


def parsed(text: str) -> Any:
    return parse_recipe(text, "r.yaml", METHODS)


TWO = "models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        (f"merge_method: linear\nint8_mask: true\n{TWO}", "int8_mask", "mergekit keeps its masks in"),
        (f"merge_method: linear\nembed_slerp: true\n{TWO}", "embed_slerp", "no longer reads it"),
        (f"merge_method: linear\nrandom_seed: 3\n{TWO}", "random_seed", "given on the command line"),
        (f"merge_method: linear\npad_to_multiple_of: 8\n{TWO}", "pad_to_multiple_of", "it belongs into `tokenizer:`"),
        (f"merge_method: linear\n{TWO}parameters: {{smooth: false}}", "smooth", "no such switch, and it is off"),
        (f"merge_method: linear\n{TWO}parameters: {{smooth: null}}", "smooth", "no such switch, and it is off"),
        (f"merge_method: linear\ndtype: float16\ndtype: float16\n{TWO}", "dtype", "line 2 says the same"),
        (
            "merge_method: della\nbase_model: A\nmodels: [{model: B, parameters: {weight: 1, lambda: 1.1}}]\n"
            "parameters: {lambda: 1.1}",
            "lambda",
            "it says the same as the recipe's value for all models",
        ),
    ],
)
def test_what_has_no_effect_is_one_warning(text: str, key: str, why: str) -> None:
    (told,) = parsed(text).warnings
    assert f"'{key}' has no effect: " in told
    assert why in told


def test_a_repeated_value_that_is_another_is_refused() -> None:
    """Of two values one would be lost; without a value for all, the default counts."""
    for lines in ("parameters: {lambda: 0.9}", "parameters: {epsilon: 0.1}"):
        text = "merge_method: della\nbase_model: A\nmodels: [{model: B, parameters: {weight: 1, lambda: 1.1}}]\n"
        with pytest.raises(RecipeError, match="'lambda' stands in the parameters of B, but della has one for all"):
            parsed(text + lines)
    with pytest.raises(RecipeError, match="line 3: 'dtype' is given twice with different values, first in line 2"):
        parsed(f"merge_method: linear\ndtype: float16\ndtype: float32\n{TWO}")


def test_all_errors_of_a_recipe_are_shown_at_once() -> None:
    text = (
        "merge_method: linear\ndtype: float17\nmodels:\n- {model: A, parameters: {wieght: 1, normalize: maybe}}\n"
        "- {model: B, parameters: {weight: x}}\n- C\nparameters: {normalise: true}\nchat_template: foo\n"
        "tokenizer_source: base\n"
    )
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    first, *rest = str(caught.value).split("\n")
    assert first == "r.yaml: 8 errors."
    assert [int(line.split(":")[0].removeprefix("  line ")) for line in rest] == [2, 4, 4, 5, 6, 7, 8, 9]


def test_keys_that_only_hold_anchors_are_no_keys() -> None:
    models = "models: [{model: A, parameters: *w}, {model: B, parameters: {<<: *w}}]"
    lent = f"scratch: &w {{weight: 0.3}}\nmerge_method: linear\n{models}"
    recipe = parsed(lent)
    assert recipe.warnings == ()
    assert [s.parameters["weight"] for s in recipe.modules[0].slices[0].sources] == [constant(0.3)] * 2
    with pytest.raises(RecipeError, match="line 1: the recipe has no key 'scratch'"):
        parsed(f"scratch: &w {{weight: 0.3}}\nmerge_method: linear\n{TWO}")


def test_a_tokenizer_source_may_say_model() -> None:
    plain, older = (parsed(f"merge_method: linear\ntokenizer_source: {s}\n{TWO}") for s in ("B", "model:B"))
    assert plain.tokenizer == older.tokenizer
    assert plain.models == older.models


def test_an_old_base_model_beside_the_sources_gets_the_way_to_write_it() -> None:
    text = (
        "merge_method: slerp\nbase_model: Z\nslices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, "
        "layer_range: [0, 2]}]}]\nparameters: {t: 0.5}"
    )
    with pytest.raises(RecipeError, match=r"Write base_model: A, the source that t = 0 stands for"):
        parsed(text)
    with pytest.raises(RecipeError, match=r"Add it as a source: \{model: Z, layer_range: \[first, end\]\}"):
        parsed(text.replace("slerp", "ties").replace("t: 0.5", "weight: 1"))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della"])
def test_a_base_with_its_adapter_alone_is_that_model(tmp_path: Path, method: str) -> None:
    """ "Lorablated" models: base_model and the only model are the same MODEL+ADAPTER."""
    rng = np.random.default_rng(0)
    base = save_model(tmp_path / "base", {"model.q.weight": rng.standard_normal((6, 4)).astype(np.float32)})
    a, b = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    factors = {"base_model.model.model.q.lora_A.weight": a, "base_model.model.model.q.lora_B.weight": b}
    adapter = tmp_path / "lora"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    model = {"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}
    recipe = {"merge_method": method, "base_model": f"{base}+{adapter}", "models": [model]}
    report = merge_models(recipe, tmp_path / "out")
    assert any("of base_model alone is base_model" in w and "with the adapter in it" in w for w in report.warnings)
    expected = load_folder(base)["model.q.weight"].astype(np.float64) + b.astype(np.float64) @ a
    assert np.allclose(load_folder(tmp_path / "out")["model.q.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        f"merge_method: linear\n{TWO}parameters: {{normalise: false}}",
        f"merge_method: linear\n{TWO}parameters: {{smooth: 0}}",
        "merge_method: ties\nbase_model: A\nmodels: [{model: B, parameters: {wieght: 0}}]",
        f"dtyp: &d bfloat16\nout_dtype: *d\nmerge_method: linear\n{TWO}",
    ],
)
def test_leniency_ends_where_a_typo_would_be_another_merge(text: str) -> None:
    """Switches that are on by default, numbers, and keys that only seem to hold an anchor."""
    with pytest.raises(RecipeError, match=r"has no (parameter|key) '"):
        parsed(text)
