"""Rows by token from any number of models, as a recipe asks, against dictionaries of rows. Of two: test_vocab.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from checkpoints import BF16, Array, contents, load_folder, save_model
from merge_tool import CheckpointError, MismatchError, RecipeError, merge
from merge_tool.api import merge_models
from merge_tool.cli import merge_tool
from test_lora import normal
from test_memory import linux_only, write_model
from test_vocab import HIDDEN, ROW_TENSORS, model, tokenizer

# a: the base, with two rows of padding; b and c share what a lacks; the ids of common tokens differ everywhere.
TOKENS = {
    "a": ["<s>", "x", "y", "only a"],
    "b": ["<s>", "y", "x", "in b and c", "only b"],
    "c": ["y", "<s>", "in b and c", "x"],
}
ROWS = {"a": 6, "b": 5, "c": 4}
EVERY = ["<s>", "x", "y", "only a", "in b and c", "only b"]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [
        model(tmp_path / name, ROWS[name], tokenizer(TOKENS[name]), dtype=np.float32, eos_token_id=1) for name in TOKENS
    ]


def recipe(models: Sequence[Path], tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The plain mean of all models, with the first one's files."""
    listed = [{"model": str(path), "parameters": {"weight": 1}} for path in models]
    key = "tokenizer" if isinstance(tokenizer, Mapping) else "tokenizer_source"
    return {"merge_method": "linear", "base_model": str(models[0]), "models": listed, key: tokenizer, **more}


def rows_of(folder: Path, name: str) -> dict[str, Array]:
    rows = load_folder(folder)[name].astype(np.float64)
    return dict(zip(TOKENS[folder.name], rows, strict=False))


def mean_of(models: Sequence[Path], name: str, token: str) -> Array:
    """What the token's row comes to: a model that lacks it has the base's, else the mean of those that have it."""
    found = [rows_of(folder, name).get(token) for folder in models]
    have = [row for row in found if row is not None]
    default = have[0] if found[0] is not None or len(have) == 1 else np.mean(have, axis=0)
    return np.mean([default if row is None else row for row in found], axis=0)


@pytest.mark.parametrize(
    ("source", "tokens", "rows"),
    [("base", TOKENS["a"], 6), ("union", EVERY, 6), (1, TOKENS["b"], 5), (2, TOKENS["c"], 4)],
)
def test_each_token_has_its_row_in_every_model(
    models: list[Path], tmp_path: Path, source: Any, tokens: list[str], rows: int
) -> None:
    """Embedding, head and bias; a token that one model has, or some, or all."""
    asked = recipe(models, source if isinstance(source, str) else str(models[source]))
    merge_models(asked, tmp_path / "out")
    found = load_folder(tmp_path / "out")
    for name in ROW_TENSORS:
        assert len(found[name]) == rows
        for number, token in enumerate(tokens):
            np.testing.assert_allclose(found[name][number], mean_of(models, name, token), rtol=1e-6, err_msg=token)
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())
    ids = {**written["model"]["vocab"], **{entry["content"]: entry["id"] for entry in written["added_tokens"]}}
    assert ids == {token: number for number, token in enumerate(tokens)}
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows


def test_the_chosen_model_lends_its_tokenizer_files(models: list[Path], tmp_path: Path) -> None:
    report = merge_models(recipe(models, str(models[1])), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models[1] / name).read_bytes()
    told = [text for text in report.warnings if "eos_token_id" in text]
    assert told == [
        "a/config.json: eos_token_id is 1, a token that the output's tokenizer has as 2. Correct that file of OUT."
    ]


def test_rows_of_padding_are_kept_and_new_ones_are_the_mean(models: list[Path], tmp_path: Path) -> None:
    """The base's two rows without a token stay (mergekit drops them); a multiple of 8 adds two more."""
    merge_models(recipe(models, {"source": "base", "pad_to_multiple_of": 8}), tmp_path / "out")
    for name in ROW_TENSORS:
        found, base = load_folder(tmp_path / "out")[name], load_folder(models[0])[name].astype(np.float64)
        np.testing.assert_allclose(found[4:6], base[4:6], rtol=1e-6)
        np.testing.assert_allclose(found[6:], np.stack([found[:4].astype(np.float64).mean(axis=0)] * 2), atol=1e-6)


def test_tokens_may_have_rows_by_name(models: list[Path], tmp_path: Path) -> None:
    """Of a model, of another token there by name or id, zeros; for those that lack it, or by force for all; new tokens
    are added to the tokenizer."""
    a, b, c = map(str, models)
    tokens: dict[str, Any] = {
        "in b and c": {"source": c},
        "only a": {"source": {"kind": "model_token", "model": b, "token": "only b"}, "force": True},
        "x": {"source": {"kind": "model_token", "model": c, "token_id": 0}},
        "y": {"source": {"kind": "zero"}, "force": True},
        "only b": {"source": {"kind": "zero"}},
        "brand new": {"source": {"kind": "model_token", "model": a, "token": "<s>"}},
        "nobody's": {},
    }  # fmt: skip
    report = merge_models(recipe(models, {"source": "union", "tokens": tokens}), tmp_path / "out")
    for name in ROW_TENSORS:
        found = load_folder(tmp_path / "out")[name]
        rows = [rows_of(folder, name) for folder in models]
        average = np.mean(found[:7].astype(np.float64), axis=0)
        expected = [
            np.mean([r["<s>"] for r in rows], axis=0),
            np.mean([r["x"] for r in rows], axis=0),  # all have it, so nothing stands in
            np.zeros_like(rows[0]["x"]),
            rows[1]["only b"],
            (2 * rows[2]["in b and c"] + rows[1]["in b and c"]) / 3,
            rows[1]["only b"] / 3,
            rows[0]["<s>"],
            average,
        ]
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
    assert [(e["content"], e["id"]) for e in written] == [
        ("in b and c", 4), ("only b", 5), ("brand new", 6), ("nobody's", 7),
    ]  # fmt: skip
    assert any("1 tokens have no row in any model (nobody's)" in text for text in report.warnings)


@pytest.mark.parametrize("method", ["ties", "sce", "multislerp"])
def test_other_methods_see_whole_matrices(models: list[Path], tmp_path: Path, method: str) -> None:
    """What they make of models whose rows were brought together by hand; where two have a token that the base lacks,
    their differences from its row, the mean, cancel, and it stays."""
    asked = recipe(models, "union", merge_method=method)
    asked["models"] = [{"model": str(m), "parameters": {"weight": 1.0} if method != "sce" else {}} for m in models[1:]]
    merge_models(asked, tmp_path / "out")
    by_hand = []
    for folder in models:
        tensors = {"model.norm.weight": np.ones(HIDDEN, np.float32)}
        for name in ROW_TENSORS:
            rows = rows_of(folder, name)
            have = [rows_of(other, name).get("in b and c") for other in models[1:]]
            stand_in = {
                **{t: rows_of(models[0], name)[t] for t in TOKENS["a"]},
                "in b and c": np.mean([row for row in have if row is not None], axis=0),
                "only b": rows_of(models[1], name)["only b"],
            }
            tensors[name] = np.stack([rows.get(t, stand_in[t]) for t in EVERY]).astype(np.float32)
        by_hand.append(save_model(tmp_path / f"by hand {folder.name}", tensors))
    asked = {**asked, "base_model": str(by_hand[0]), "tokenizer_source": None}
    asked["models"] = [{**m, "model": str(f)} for m, f in zip(asked["models"], by_hand[1:], strict=True)]
    merge_models(asked, tmp_path / "other")
    found, expected = (load_folder(tmp_path / out) for out in ("out", "other"))
    for name in ROW_TENSORS:
        mean = np.mean([rows_of(folder, name)["in b and c"] for folder in models[1:]], axis=0)
        others = [0, 1, 2, 3, 5]
        if method == "multislerp":  # whose weights are those of whole matrices
            others.append(4)
        else:
            np.testing.assert_allclose(found[name][4], mean, rtol=1e-6)
        np.testing.assert_allclose(found[name][others], expected[name][others], rtol=1e-5, atol=1e-7)


def test_a_recipe_over_vocabularies_is_verified_and_the_same_for_any_budget(tmp_path: Path) -> None:
    """Bytes do not depend on memory, threads and shards; verify makes them again."""
    words = [f"w{n}" for n in range(9_000)]
    folders = []
    for k in range(3):
        order = np.random.default_rng(k).permutation(9_000)[: 8_000 + 300 * k]
        tokens = [words[n] for n in order]
        tensors = {
            "model.embed_tokens.weight": normal(len(tokens), 100, dtype=BF16),
            "a.weight": normal(50, dtype=BF16),
        }
        side = {"tokenizer.json": tokenizer(tokens, indent=None)}
        folders.append(save_model(tmp_path / f"m{k}", tensors, shards=1, side_files=side))
    asked = recipe(folders, "union")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    for number, (memory, jobs) in enumerate([(10**9, 1), (10**9, 3), (None, 2)]):
        merge_models(path, tmp_path / f"{number}", memory_bytes=memory, jobs=jobs)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    result = CliRunner().invoke(merge_tool, ["verify", str(tmp_path / "0"), "--recipe", str(path)])
    assert result.exit_code == 0, result.output


def test_the_same_tokenizer_everywhere_is_not_even_read(models: list[Path], tmp_path: Path) -> None:
    for folder in models:
        save_model(folder, {"w": normal(3, dtype=np.float32)}, side_files={"tokenizer.json": "{}"})
    merge_models(recipe(models, "union"), tmp_path / "out")
    merge(*models[:2], tmp_path / "pair", vocab="union")
    assert {(tmp_path / out / "tokenizer.json").read_text() for out in ("out", "pair")} == {"{}"}


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """What training leaves is called `final`, whatever was trained."""
    folders = [model(tmp_path / n / "final", ROWS[n], tokenizer(TOKENS[n]), dtype=np.float32) for n in TOKENS]
    merge_models(recipe(folders, str(folders[1])), tmp_path / "out")
    x, y, z = (load_folder(f)["lm_head.weight"].astype(np.float64) for f in folders)
    found = load_folder(tmp_path / "out")["lm_head.weight"]
    np.testing.assert_allclose(found[1], (x[2] + y[1] + z[0]) / 3, rtol=1e-6)


def test_a_model_without_a_tokenizer_has_the_donors_if_its_rows_do(models: list[Path], tmp_path: Path) -> None:
    bare = model(tmp_path / "bare", 6, None, dtype=np.float32)
    merge_models(recipe([*models[:2], bare], "union"), tmp_path / "out")
    found, z = load_folder(tmp_path / "out")["lm_head.weight"], load_folder(bare)["lm_head.weight"]
    x, y = (rows_of(m, "lm_head.weight") for m in models[:2])
    np.testing.assert_allclose(found[1], (x["x"] + y["x"] + z[1]) / 3, rtol=1e-6)
    shorter = model(tmp_path / "shorter", 5, None, dtype=np.float32)
    expected = r"^shorter: has no tokenizer, which rows .* need\. Put its tokenizer\.json beside its weights\.$"
    with pytest.raises(CheckpointError, match=expected):
        merge_models(recipe([*models[:2], shorter], "union"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"only b": {"source": "a"}}, "the token 'only b' is to have a row of a, which has no such token"),
        (
            {"x": {"source": {"kind": "model_token", "model": "b", "token": "none"}}},
            "the token 'x' is to have a row of b, which has no token 'none'",
        ),
        (
            {"x": {"source": {"kind": "model_token", "model": "b", "token_id": 5}}},
            "the token 'x' is to have row 5 of b, which has 5 rows",
        ),
    ],
)
def test_rows_that_are_not_there_are_refused(
    models: list[Path], tmp_path: Path, tokens: dict[str, Any], expected: str
) -> None:
    text = json.dumps(tokens)
    for folder in models:
        text = text.replace(f'"{folder.name}"', json.dumps(str(folder)))
    with pytest.raises(RecipeError, match=expected):
        merge_models(recipe(models, {"source": "union", "tokens": json.loads(text)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_columns_are_refused_and_other_rows_name_the_way(models: list[Path], tmp_path: Path) -> None:
    wide = save_model(
        tmp_path / "wide", {"model.embed_tokens.weight": normal(6, HIDDEN + 1, dtype=np.float32)},
        side_files={"tokenizer.json": tokenizer(TOKENS["a"])},
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"Rows cannot be matched by token in\n  lm_head.bias: is not in wide"):
        merge_models(recipe([*models, wide], "union"), tmp_path / "out")
    with pytest.raises(MismatchError, match=r"(?s)one vocabulary.*tokenizer_source: union.*only in"):
        merge_models(recipe(models, None), tmp_path / "out")


@linux_only
def test_the_budget_holds_with_three_vocabularies_of_ordinary_size(tmp_path: Path) -> None:
    """Tokenizers of 100,000 tokens, a thousand of them averaged, in the budget of any recipe."""
    words = [f"token number {n}" for n in range(100_000)]
    folders = []
    for k in range(3):
        tokens = [*words[k * 700 :], *(f"new {n}" for n in range(1_000 * (k > 0)))]
        folder = save_model(tmp_path / f"m{k}", {}, side_files={"tokenizer.json": tokenizer(tokens)})
        write_model(folder / "model.safetensors", {"embed_tokens.weight": (len(tokens), 200)}, k)
        folders.append(folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(folders, "union")))
    words = [sys.executable, "-m", "merge_tool", "run", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    done = subprocess.run([*words, "--memory", "68MB", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_bytes"] < 68_000_000


def test_a_recipe_that_does_not_ask_merges_rows_by_number_only_where_no_token_has_another(tmp_path: Path) -> None:
    """Tokens with other numbers are an error that says what to write; tokens added at the end are a warning."""
    base, moved = (model(tmp_path / n, 6, tokenizer(TOKENS[n]), dtype=np.float32) for n in ("a", "b"))
    with pytest.raises(MismatchError, match=r"(?s)a and b have different vocabularies.*With tokenizer_source: union"):
        merge_models(recipe([base, moved], None), tmp_path / "out")
    more = model(tmp_path / "more", 6, tokenizer([*TOKENS["a"], "new"]), dtype=np.float32)
    report = merge_models(recipe([base, more], None), tmp_path / "out")
    way = "With tokenizer_source: union (or base, or a model) rows are matched by token"
    assert any(way in text for text in report.warnings)
