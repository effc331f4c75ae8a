"""Stacked layers: what lies outside the stack by config.json, and which models' layers fit together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import Array, load_folder, save_model
from merge_tool import merge, merge_models
from merge_tool.cli import merge_tool
from merge_tool.errors import MismatchError
from merge_tool.plan.stacks import Stacks

HIDDEN = 4


def model(
    folder: Path,
    value: float,
    *,
    layers: int = 3,
    predicted: int = 0,
    tokens: int = 6,
    width: int | list[int] = 8,
    hidden: int = HIDDEN,
    config: Mapping[str, Any] | None = None,
    announces: bool = True,
) -> Path:
    """A model that has one value in each tensor of layer k: `value` + k."""

    def full(*shape: int, more: float = 0) -> Array:
        return np.full(shape, value + more, np.float32)

    tensors = {"model.embed_tokens.weight": full(tokens, hidden)}
    for k in range(layers + predicted):
        rows = width[k % len(width)] if isinstance(width, list) else width
        tensors |= {
            f"model.layers.{k}.mlp.up_proj.weight": full(rows, hidden, more=k),
            f"model.layers.{k}.self_attn.q_proj.weight": full(hidden, hidden, more=k),
            f"model.layers.{k}.input_layernorm.weight": full(hidden, more=k),
        }
        if k >= layers:
            tensors[f"model.layers.{k}.eh_proj.weight"] = full(hidden, 2 * hidden, more=k)
    tensors |= {"model.norm.weight": full(hidden), "lm_head.weight": full(tokens, hidden)}
    content = {"architectures": ["X"], "model_type": "x", "num_hidden_layers": layers, "vocab_size": tokens}
    content |= {"num_nextn_predict_layers": predicted} if predicted and announces else {}
    return save_model(folder, tensors, config=content | dict(config or {}))


def stack(*slices: tuple[Path, int, int]) -> dict[str, Any]:
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(path), "layer_range": [a, b]}]} for path, a, b in slices],
    }


def config_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "config.json").read_text())
    return content


# ----------------------------------------------------------------------------- outside, by config.json


@pytest.mark.parametrize("announces", [True, False])
def test_values_along_the_layers_end_at_the_last_layer_that_config_json_counts(tmp_path: Path, announces: bool) -> None:
    """A layer that predicts further tokens gets the value for what lies outside, the first one."""
    a, b = (model(tmp_path / name, v, predicted=1, announces=announces) for name, v in (("a", 0.0), ("b", 10.0)))
    parts = [{"model": str(path)} for path in (a, b)]
    recipe = {"merge_method": "linear", "models": [
        {**parts[0], "parameters": {"weight": [1, 0]}}, {**parts[1], "parameters": {"weight": [0, 1]}},
    ]}  # fmt: skip
    report = merge_models(recipe, tmp_path / "out")
    values = [load_folder(tmp_path / "out")[f"model.layers.{k}.input_layernorm.weight"][0] for k in range(4)]
    assert values == [0, 6, 12, 3]  # layer k has k and k + 10
    assert any(text.startswith("model.layers.3 of a lies outside the layers") for text in report.warnings)
    assert config_of(tmp_path / "out") == config_of(a)


def test_a_pairs_list_ends_there_too(tmp_path: Path) -> None:
    a, b = (model(tmp_path / name, v, predicted=1) for name, v in (("a", 1.0), ("b", 3.0)))
    merge(a, b, tmp_path / "out", method="linear", t=0, t_for={"layernorm": [0, 1]})
    values = [load_folder(tmp_path / "out")[f"model.layers.{k}.input_layernorm.weight"][0] for k in range(4)]
    assert values == [1, 3, 5, 4]


def test_a_stack_keeps_the_predicting_layer_behind_its_layers(tmp_path: Path) -> None:
    a, b = (model(tmp_path / name, v, predicted=1) for name, v in (("a", 0.0), ("b", 10.0)))
    merge_models(stack((a, 0, 2), (b, 0, 3)), tmp_path / "out")
    tensors = load_folder(tmp_path / "out")
    values = [tensors[f"model.layers.{k}.input_layernorm.weight"][0] for k in range(6)]
    assert values == [0, 1, 10, 11, 12, 13]
    assert tensors["model.layers.5.eh_proj.weight"][0, 0] == 13
    assert "model.layers.2.eh_proj.weight" not in tensors
    assert (config_of(tmp_path / "out")["num_hidden_layers"], config_of(tmp_path / "out")["num_nextn_predict_layers"]) \
        == (5, 1)  # fmt: skip


def test_the_plan_does_not_count_the_predicting_layer(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 0.0, predicted=1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(stack((a, 0, 2), (a, 1, 3))))
    command = ["run", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--dry-run"]
    output = CliRunner().invoke(merge_tool, command).output
    assert "parameters, 4 layers)" in output
    assert "model.layers.4          eh_proj.weight + 3" in output
    assert "model.layers.3 of a lies outside the layers" in output


def test_a_slice_of_all_layers_keeps_everything(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 0.0, predicted=2)
    merge_models(stack((a, 0, 3)), tmp_path / "out")
    assert load_folder(tmp_path / "out").keys() == load_folder(a).keys()
    assert config_of(tmp_path / "out") == config_of(a)


def test_config_json_no_longer_announces_a_layer_that_is_not_there(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0.0, predicted=1), model(tmp_path / "b", 10.0)
    report = merge_models(stack((a, 0, 2), (b, 0, 3)), tmp_path / "out")
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert any("announces 0 layers that predict further tokens" in text for text in report.warnings)
    merge(b, a, tmp_path / "pair", t=0.5, on_missing="base", files_from="ft")
    assert config_of(tmp_path / "pair")["num_nextn_predict_layers"] == 0


def test_a_range_that_goes_beyond_is_refused_with_the_number_of_config_json(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 0.0, predicted=1)
    with pytest.raises(MismatchError, match=r"it has 3 layers in model\.layers\. \(by its config\.json; 1 more"):
        merge_models(stack((a, 0, 4)), tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.block.{}.a", "encoder.block.{}.b", "encoder.block.{}.c"],
        ["visual.blocks.{}.a", "visual.blocks.{}.b", "visual.blocks.{}.c"],
        [f"{side}.layers.{{}}.{leaf}" for side in ("encoder", "decoder") for leaf in "abc"],
    ],
)
def test_other_stacks_are_as_long_as_their_names_say(names: list[str]) -> None:
    stacks = Stacks([name.format(k) for name in names for k in range(4)], 2)
    assert stacks.extra is None
    assert stacks.position(names[0].format(3)) == 1


# ------------------------------------------------------------------------------ what fits together


def test_an_embedding_and_a_head_of_other_rows_are_refused_with_both_numbers(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0.0), model(tmp_path / "b", 1.0, tokens=8)
    with pytest.raises(MismatchError) as caught:
        merge_models(stack((a, 0, 2), (b, 1, 3)), tmp_path / "out")
    expected = "a vocabulary mismatch: 6 tokens in model.embed_tokens.weight (a) and 8 tokens in lm_head.weight (b)"
    assert expected in str(caught.value)
    assert "tokenizer_source: union" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_widths_that_no_model_mixes_are_refused(tmp_path: Path, method: str) -> None:
    """Also by a method that averages, where each slice has one source."""
    a, b = model(tmp_path / "a", 0.0), model(tmp_path / "b", 1.0, width=10)
    recipe = stack((a, 0, 2), (b, 1, 3)) | {"merge_method": method}
    recipe |= {"parameters": {"weight": 1}} if method == "linear" else {}
    with pytest.raises(MismatchError, match=r"up_proj\.weight: \[8, 4\] in 2 layers \(a\), \[10, 4\] in 2 layers"):
        merge_models(recipe, tmp_path / "out")


def test_layers_that_config_json_does_not_describe_are_refused(tmp_path: Path) -> None:
    """All layers of one width, but config.json of a model of another."""
    a, b = model(tmp_path / "a", 0.0), model(tmp_path / "b", 1.0, width=10)
    with pytest.raises(MismatchError, match=r"files_from=MODEL"):
        merge_models(stack((b, 0, 3)) | {"base_model": str(a)}, tmp_path / "out")
    merge_models(stack((b, 0, 3), (b, 0, 3)) | {"base_model": str(a)}, tmp_path / "out", files_from=str(b))


def test_hidden_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0.0), model(tmp_path / "b", 1.0, hidden=6)
    with pytest.raises(MismatchError, match="do not fit together"):
        merge_models(stack((a, 0, 2), (b, 1, 3)), tmp_path / "out")


def test_layers_that_differ_within_a_model_are_stacked(tmp_path: Path) -> None:
    """Widths by a list, as DeciLM and OpenELM have them: the list follows."""
    widths = [8, 10, 12]
    a, b = (
        model(tmp_path / name, v, width=widths, config={"intermediate_size": widths})
        for name, v in (("a", 0.0), ("b", 10.0))
    )
    merge_models(stack((a, 0, 3), (b, 1, 3)), tmp_path / "out")
    assert config_of(tmp_path / "out")["intermediate_size"] == [8, 10, 12, 10, 12]
    tensors = load_folder(tmp_path / "out")
    assert [len(tensors[f"model.layers.{k}.mlp.up_proj.weight"]) for k in range(5)] == [8, 10, 12, 10, 12]


def test_lists_that_say_other_widths_than_the_layers_have_are_refused(tmp_path: Path) -> None:
    """Two models with the same widths in another order: config.json has the first one's list."""
    a = model(tmp_path / "a", 0.0, width=[8, 10, 12], config={"intermediate_size": [8, 10, 12]})
    b = model(tmp_path / "b", 0.0, width=[12, 10, 8], config={"intermediate_size": [12, 10, 8]})
    with pytest.raises(MismatchError, match=r"\[8, 4\] in layer 2 \(b\), \[12, 4\] in a"):
        merge_models(stack((a, 0, 2), (b, 2, 3)), tmp_path / "out")


def test_a_models_own_rows_are_its_own_affair(tmp_path: Path) -> None:
    """A head that is longer than the embedding in the model itself is stacked as it is."""
    a = model(tmp_path / "a", 0.0)
    tensors = load_folder(a) | {"lm_head.weight": np.zeros((8, HIDDEN), np.float32)}
    a = save_model(tmp_path / "own", tensors, config=config_of(a))
    merge_models(stack((a, 0, 2), (a, 1, 3)), tmp_path / "out")
    assert len(load_folder(tmp_path / "out")["lm_head.weight"]) == 8


@pytest.mark.parametrize("under_the_heads_name", [(), "a", "b", "ab"])
def test_a_tied_matrix_is_the_first_slices_whatever_its_name(tmp_path: Path, under_the_heads_name: str) -> None:
    """The embedding comes before the layers, be it stored under the head's name only. Its shape is another's, too."""
    paths = []
    for name, value in (("a", 0.0), ("b", 10.0)):
        path = model(tmp_path / name, value, width=6, config={"tie_word_embeddings": True})
        tensors = load_folder(path)
        del tensors["model.embed_tokens.weight" if name in under_the_heads_name else "lm_head.weight"]
        paths.append(save_model(path, tensors, config=config_of(path)))
    merge_models(stack((paths[0], 0, 2), (paths[1], 1, 3)), tmp_path / "out")
    out = load_folder(tmp_path / "out")
    (matrix,) = (tensor for name, tensor in out.items() if "layers" not in name and tensor.ndim == 2)
    assert (matrix == 0).all()
    assert (out["model.norm.weight"] == 10).all()


def test_a_table_with_a_part_for_each_layer_is_not_stacked(tmp_path: Path) -> None:
    """Gemma 3n has one embedding for all layers: its columns would have to be restacked, too."""
    a = model(tmp_path / "a", 0.0)
    tensors = load_folder(a) | {"model.embed_tokens_per_layer.weight": np.zeros((6, 9), np.float32)}
    a = save_model(tmp_path / "own", tensors, config=config_of(a))
    with pytest.raises(MismatchError, match="embed_tokens_per_layer"):
        merge_models(stack((a, 0, 2), (a, 1, 3)), tmp_path / "out")
    merge_models(stack((a, 0, 3)), tmp_path / "out")


def test_stacks_beside_the_language_model_leave_its_number_alone(tmp_path: Path) -> None:
    """config.json says how many layers the language model has; a vision tower's are named in a warning."""
    a = model(tmp_path / "a", 0.0)
    tower = {
        f"visual.blocks.{k}.{leaf}.weight": np.full(HIDDEN, k, np.float32) for k in range(4) for leaf in ("q", "k", "v")
    }
    a = save_model(tmp_path / "both", load_folder(a) | tower, config=config_of(a))
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "visual": {"slices": stack((a, 0, 2), (a, 1, 4))["slices"]},
            "layers": {"models": [{"model": str(a)}]},
        },
    }
    report = merge_models(recipe, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(a)
    assert any("layers of visual.blocks. are stacked anew" in text for text in report.warnings)
    assert load_folder(tmp_path / "out")["visual.blocks.2.q.weight"][0] == 1
