"""One table of names: whoever asks whether a tensor is an embedding, a head or the like gets the same answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from checkpoints import BF16, Array, load_folder, save_model
from merge_tool import MismatchError, merge, merge_models, open_checkpoint
from merge_tool.models.naming import (
    COPIES,
    EMBEDDINGS,
    HEADS,
    comes_last,
    embeds_tokens,
    has_token_rows,
    head_of,
    is_embedding,
    is_head,
    is_of_positions,
    own_name,
    predicts_tokens,
)
from merge_tool.models.renaming import find_renaming
from merge_tool.recipe.pair import pair
from merge_tool.vocabulary.align import align
from merge_tool.vocabulary.row_tensors import embedding_rows
from test_vocab import normal, tokenizer

ROWS, COLUMNS = 6, 8
TOKENS = ["<s>", "a", "b", "c"]


def model(folder: Path, embedding: str, head: str | None, *, rows: int = ROWS, layers: int = 0) -> Path:
    """An embedding, perhaps a head with its bias, a norm, and layers of three tensors; config.json says nothing."""
    tensors: dict[str, Array] = {f"{embedding}.weight": normal(rows, COLUMNS, dtype=BF16)}
    for layer in range(layers):
        tensors |= {f"layers.{layer}.{part}.weight": normal(COLUMNS, COLUMNS, dtype=BF16) for part in "abc"}
    tensors["model.norm.weight"] = np.ones(COLUMNS, BF16)
    if head is not None:
        tensors |= {f"{head}.weight": normal(rows, COLUMNS, dtype=BF16), f"{head}.bias": normal(rows, dtype=BF16)}
    config = {"architectures": ["X"], "vocab_size": rows, "num_hidden_layers": layers}
    return save_model(folder, tensors, config=config, side_files={"tokenizer.json": tokenizer(TOKENS)})


@pytest.mark.parametrize(
    ("embedding", "head"),
    [*((f"model.{e}", "lm_head") for e in EMBEDDINGS), *(("model.embed_tokens", h) for h in HEADS)],
)
def test_all_agree_on_every_known_name(tmp_path: Path, embedding: str, head: str) -> None:
    """Ties, rows of tokens, messages, config.json, and what comes last in a stack of layers."""
    weights = f"{embedding}.weight", f"{head}.weight"
    assert (is_embedding(weights[0]), is_head(weights[0])) == (True, False)
    assert (is_embedding(weights[1]), is_head(weights[1])) == (False, True)
    assert [comes_last(name) for name in weights] == [False, True]

    apart, tied = model(tmp_path / "apart", embedding, head), model(tmp_path / "tied", embedding, None)
    opened = open_checkpoint(apart), open_checkpoint(tied)
    assert find_renaming(*opened).ft_names == {weights[1]: weights[0]}
    assert find_renaming(*reversed(opened)).copies == {weights[1]: weights[0]}
    assert embedding_rows(opened[0].tensors.values()) == ROWS

    two = [open_checkpoint(model(tmp_path / name, embedding, head)) for name in ("one", "two")]
    recipe = pair("one", "two", vocab="base")
    aligned, _ = align(recipe, two)
    made = {name for name in aligned[0].tensors if aligned[0].source(name) is not two[0].source(name)}
    assert made >= {*weights, f"{head}.bias"}
    assert "model.norm.weight" not in {n for n in made if aligned[0].source(n).where.endswith("(rows by token)")}

    wider = model(tmp_path / "wider", embedding, head, rows=ROWS + 1)
    with pytest.raises(MismatchError) as caught:
        merge(apart, wider, tmp_path / "no")
    assert str(caught.value).count("(a vocabulary mismatch: 6 and 7 tokens)") == 2

    report = merge(apart, tied, tmp_path / "out", files_from="ft", exclude=[f"{head}.bias"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert any(f"{weights[1]} is not in tied, whose head is tied" in text for text in report.warnings)

    first, last = (model(tmp_path / name, embedding, head, layers=3) for name in ("first", "last"))
    slices = [{"sources": [{"model": str(path), "layer_range": [0, 2]}]} for path in (first, last)]
    merge_models({"merge_method": "passthrough", "slices": slices}, tmp_path / "stack")
    stack, a, b = (load_folder(path) for path in (tmp_path / "stack", first, last))
    for name, origin in ((weights[0], a), (weights[1], b), (f"{head}.bias", b), ("model.norm.weight", b)):
        assert stack[name].tobytes() == origin[name].tobytes(), name


@pytest.mark.parametrize(
    "name",
    ["wpe", "embeddings.position_embeddings", "embeddings.token_type_embeddings", "encoder.embed_positions",
     "layers.0.self_attn.relative_attention_bias", "encoder.patch_embed.proj"],
)  # fmt: skip
def test_positions_and_the_like_are_no_tokens(name: str) -> None:
    full = f"model.{name}.weight"
    assert [f for f in (embeds_tokens, has_token_rows, is_head, comes_last) if f(full)] == []
    assert is_of_positions(full) or "patch" in name


@pytest.mark.parametrize("name", ["layers.3.mlp.output", "layers.61.shared_head.head", "vision_model.head", "v_head"])
def test_what_is_called_like_a_head_elsewhere_is_none(name: str) -> None:
    """Inside a layer, or another part's."""
    assert not is_head(f"model.{name}.weight")


def test_a_head_that_is_no_row_long_enough_ties_nothing(tmp_path: Path) -> None:
    """A classifier's `head.weight`, of other columns than the embedding has."""
    base = {"embed_tokens.weight": normal(6, 8), "head.weight": normal(2, 5)}
    ft = {"embed_tokens.weight": normal(6, 8)}
    models = [open_checkpoint(save_model(tmp_path / n, t, config={})) for n, t in (("base", base), ("ft", ft))]
    assert find_renaming(*models).ft_names == {}


@pytest.mark.slow
def test_heads_have_the_names_that_transformers_gives_them() -> None:
    """Of every class that ties its head: the name that the head has where it is not tied, or that it is not known."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    tables = [vars(modeling_auto)[name] for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_.*_NAMES", name)]
    names = {n for table in tables for v in table.values() for n in ([v] if isinstance(v, str) else v)}
    known = 0
    for name in sorted(names):
        try:
            ties = getattr(getattr(transformers, name), "_tied_weights_keys", None) or {}
        except (AttributeError, ImportError, RuntimeError):  # a package that it needs is not there
            continue
        for head, embedding in ties.items() if isinstance(ties, dict) else ():
            if is_embedding(embedding) and "embed" not in head and own_name(head) not in COPIES:
                assert head_of(embedding, name) in (head, None), name
                assert head_of(embedding, name) == head or predicts_tokens(name) or "LM" not in name, name
                known += head_of(embedding, name) == head
    assert known > 200
