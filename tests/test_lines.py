"""`lines`: a coefficient that grows along the layers, by LiNeS's formula alpha + beta (l - 1) / (L - 1)."""

from __future__ import annotations

import re

import pytest

from test_mergekit import asks, llama, merging, refusal, slerp

GROWS = "{lines: {alpha: 0.2, beta: 0.6}}"


def test_layers_grow_by_the_formula_and_the_rest_has_an_end() -> None:
    """Layer l of L has alpha + beta (l - 1) / (L - 1); the embedding alpha, final norm and head alpha + beta."""
    found = asks(merging("task_arithmetic", "B", f"{{weight: 1, lambda: {GROWS}}}", "base_model: A\n"), llama(5))
    layers = [found[f"model.layers.{k}.mlp.up_proj.weight"].shared["lambda"] for k in range(5)]
    assert layers == pytest.approx([0.2 + 0.6 * (layer - 1) / (5 - 1) for layer in range(1, 6)], rel=1e-15)
    ends = [found[f"{name}.weight"].shared["lambda"] for name in ("model.embed_tokens", "model.norm", "lm_head")]
    assert ends == [0.2, 0.8, 0.8]


def test_any_number_of_any_method_grows_each_models_too_and_beside_filters() -> None:
    found = asks(slerp(f"[{{filter: mlp, lines: {{alpha: 1, beta: -1}}}}, {GROWS}]"))
    assert [found[f"model.layers.{k}.mlp.up_proj.weight"].shared["t"] for k in (0, 4)] == [1.0, 0.0]
    assert [found[f"model.layers.{k}.self_attn.q_proj.weight"].shared["t"] for k in (0, 4)] == [0.2, 0.8]
    weights = "{weight: [{filter: mlp, value: 0.5}, " + GROWS + "], density: 0.5}"
    found = asks(f"merge_method: ties\nbase_model: A\nmodels: [{{model: B, parameters: {weights}}}]\n")
    assert found["lm_head.weight"].each["weight"] == (0.8,)
    assert found["model.layers.4.mlp.up_proj.weight"].each["weight"] == (0.5,)


def test_in_slices_it_grows_along_each_slice() -> None:
    sources = "{sources: [{model: A, layer_range: [%s]}, {model: B, layer_range: [%s]}]}"
    text = f"merge_method: slerp\nbase_model: A\nparameters: {{t: {GROWS}}}\nslices: [" + ", ".join(
        sources % (span, span) for span in ("0, 2", "2, 5")
    )
    found = asks(text + "]\n")
    layers = [found[f"model.layers.{k}.mlp.up_proj.weight"].shared["t"] for k in range(5)]
    assert layers == pytest.approx([0.2, 0.8, 0.2, 0.5, 0.8])
    assert (found["model.embed_tokens.weight"].shared["t"], found["lm_head.weight"].shared["t"]) == (0.2, 0.8)


@pytest.mark.parametrize(
    ("t", "says"),
    [
        ("{lines: {alpha: 0.2}}", "line 5: the lines of 't' have no beta, expected {alpha: 0.2, beta: 0.8}"),
        ("{lines: 0.2}", "line 5: the lines of 't' are '0.2', expected {alpha"),
        ("{lines: {alpha: 0.5, beta: 0.6}}", "line 5: 't' is 1.1 at an end of its lines, expected 0 .* to 1"),
        ("{lines: {alpha: 0.5, beta: .nan}}", "line 5: 't' is '.nan', expected a finite number"),
        ("{lines: {alpha: 0.2, beta: 0.1}, value: 1}", "line 5: an entry of 't' has both value and lines"),
        ("{lines: {alpha: 0.2, gamma: 0.1}}", "no key 'gamma' .* Known: alpha, beta"),
    ],
)
def test_lines_that_are_none_are_refused_with_the_line(t: str, says: str) -> None:
    assert re.search(says, refusal(slerp(t)))


def test_a_switch_does_not_grow() -> None:
    says = refusal(merging("linear", "A B", "{weight: 1, normalize: {lines: {alpha: 0, beta: 1}}}"))
    assert says == "recipe.yaml, line 3: 'normalize' does not grow along the layers, expected a `value`."
