"""Vocabularies that differ: rows by token, against dictionaries of rows merged by the oracle."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import BF16, contents, load_folder, save_model
from merge_tool import CheckpointError, DataError, MismatchError, RecipeError, merge
from merge_tool.checkpoint.folder import Folder
from merge_tool.cli import merge_tool
from merge_tool.vocabulary.join import compare_tokenizers
from oracle import float64_merge
from test_lora import normal, save_adapter
from test_memory import linux_only, measured, write_model

Array = Any
HIDDEN = 8


def tokenizer(
    tokens: Sequence[str], added: Mapping[str, int] | None = None, *, kind: str = "BPE", indent: int | None = 2
) -> str:
    """A tokenizer.json of the usual form; `added` are tokens beside the model's."""
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": token, **entry} for token, number in (added or {}).items()],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
    }  # fmt: skip
    ids = {token: number for number, token in enumerate(tokens)}
    if kind == "Unigram":
        content["model"] = {"type": kind, "unk_id": 0, "vocab": [[token, -1.0] for token in tokens]}
    elif kind == "BPE":
        content["model"] = {"type": kind, "vocab": ids, "merges": []}
    else:
        content["model"] = {"type": kind, "unk_token": tokens[0], "vocab": ids}
        if kind == "WordPiece":
            content["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return json.dumps(content, indent=indent, ensure_ascii=False)


def model(
    folder: Path, rows: int, text: str | bytes | None, *, dtype: Any = BF16, tied: bool = False, **more: Any
) -> Path:
    """An embedding, perhaps a head with its bias, and one other tensor, which is the same in all."""
    tensors = {"model.embed_tokens.weight": normal(rows, HIDDEN, dtype=dtype, scale=1.0)}
    if not tied:
        tensors |= {
            "lm_head.weight": normal(rows, HIDDEN, dtype=dtype, scale=1.0),
            "lm_head.bias": normal(rows, dtype=dtype, scale=1.0),
        }
    tensors["model.norm.weight"] = np.ones(HIDDEN, dtype)
    config = {"vocab_size": rows, "tie_word_embeddings": tied, "torch_dtype": "bfloat16", **more}
    side = {} if text is None else {"tokenizer.json": text, "tokenizer_config.json": f'{{"x": "{folder.name}"}}'}
    return save_model(folder, tensors, config=config, side_files=side)


BASE_TOKENS = ["<s>", "a", "b", "c", "ü"]  # and 3 rows of padding
FT_TOKENS = ["<s>", "b", "a", "d", "ü"]  # moved, another one
FT_ADDED = {"<|im|>": 5, "<|end|>": 6}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        model(tmp_path / "base", 8, tokenizer(BASE_TOKENS)),
        model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED)),
    )


ROW_TENSORS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def expected_rows(base: Array, ft: Array, tokens: Sequence[str | None], t: float) -> dict[int, Array]:
    """By token: the merge of the rows that both have, as a tensor of its own; the others as they are."""
    x, y = dict(zip(BASE_TOKENS, base, strict=False)), dict(zip([*FT_TOKENS, *FT_ADDED], ft, strict=False))
    shared = [token for token in BASE_TOKENS if token in y]
    merged = float64_merge(np.stack([x[s] for s in shared]), np.stack([y[s] for s in shared]), t).astype(base.dtype)
    rows = {**x, **y, **dict(zip(shared, merged, strict=True))}
    return {n: rows[token] for n, token in enumerate(tokens) if token is not None}


def assert_close_rows(found: Array, expected: Mapping[int, Array], alone: set[int]) -> None:
    for number, row in expected.items():
        if number in alone:
            assert found[number].tobytes() == row.tobytes(), number
        else:
            np.testing.assert_allclose(found[number].astype(float), row.astype(float), rtol=2.0**-8)


@pytest.mark.parametrize(
    ("vocab", "tokens", "rows", "alone"),
    [
        ("base", BASE_TOKENS, 8, {3}),
        ("ft", [*FT_TOKENS, *FT_ADDED], 7, {3, 5, 6}),
        ("union", [*BASE_TOKENS, "d", *FT_ADDED], 8, {3, 5, 6, 7}),
    ],
)
def test_rows_of_a_token_are_merged_and_rows_of_one_side_are_kept(
    pair: tuple[Path, Path], tmp_path: Path, vocab: str, tokens: Sequence[str], rows: int, alone: set[int]
) -> None:
    """Embedding, head and the head's bias; the sums are those of the shared rows alone; padding is BASE's."""
    merge(*pair, tmp_path / "out", 0.4, vocab=vocab)
    found, base, ft = (load_folder(folder) for folder in (tmp_path / "out", *pair))
    for name in ROW_TENSORS:
        assert found[name].shape == (rows, *base[name].shape[1:])
        assert_close_rows(found[name], expected_rows(base[name], ft[name], tokens, 0.4), alone)
        for padding in range(len(tokens), rows):
            assert found[name][padding].tobytes() == base[name][padding].tobytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows


def test_the_ends_are_the_sides_own_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """At t = 0 the base's rows by token, at t = 1 the finetune's."""
    merge(*pair, tmp_path / "out", [0, 1], vocab="union")
    base, ft = (load_folder(folder)["lm_head.weight"] for folder in pair)
    ends = [load_folder(tmp_path / f"out/t-{t}")["lm_head.weight"] for t in (0, 1)]
    assert [row.tobytes() for row in ends[0]] == [row.tobytes() for row in [*base[:5], ft[3], ft[5], ft[6]]]
    by_ft = [ft[0], ft[2], ft[1], base[3], ft[4], ft[3], ft[5], ft[6]]
    assert [row.tobytes() for row in ends[1]] == [row.tobytes() for row in by_ft]


def test_the_bytes_do_not_depend_on_memory_or_threads(tmp_path: Path) -> None:
    """With rows in any order, and tensors of several chunks."""
    order = np.random.default_rng(3).permutation(9_000)
    words = [f"w{n}" for n in range(9_000)]
    folders = []
    for name, tokens in (("base", words), ("ft", [words[n] for n in order[:8_500]])):
        tensors = {"model.embed_tokens.weight": normal(len(tokens), 100, dtype=BF16)}
        side = {"tokenizer.json": tokenizer(tokens[:-1], {f"<{name}>": len(tokens) - 1}, indent=None)}
        folders.append(save_model(tmp_path / name, tensors, config={"vocab_size": len(tokens)}, side_files=side))
    for number, (memory, jobs) in enumerate([(10**9, 1), (10**9, 3), (None, 2)]):
        merge(*folders, tmp_path / f"{number}", vocab="union", memory_bytes=memory, jobs=jobs)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def assert_mean(row: Array, rows: Array) -> None:
    """To what two roundings to bfloat16 leave of it."""
    mean = rows.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(row.astype(np.float64), mean, atol=2.0**-6 * np.abs(rows.astype(np.float64)).max())


@pytest.mark.parametrize(("vocab", "tokens"), [("base", 5), ("union", 8), ("ft", 7)])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_new_padding_is_the_mean_of_the_outputs_rows_with_tokens(
    pair: tuple[Path, Path], tmp_path: Path, vocab: str, tokens: int, t: float
) -> None:
    """Of the merged rows, whatever t: so no score of theirs is above the best of a token's."""
    merge(*pair, tmp_path / "out", t, vocab=vocab, pad_vocab_to_multiple_of=16)
    found = load_folder(tmp_path / "out")
    for name in ROW_TENSORS:
        assert len(found[name]) == 16
        assert len({row.tobytes() for row in found[name][8:]}) == 1
        assert_mean(found[name][-1], found[name][:tokens])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16


def test_rows_that_are_a_mean_do_not_count_for_the_angle(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The rows with tokens are those of a merge without padding."""
    merge(*pair, tmp_path / "padded", 0.4, vocab="base", pad_vocab_to_multiple_of=64)
    merge(*pair, tmp_path / "plain", 0.4, vocab="base")
    padded, plain = load_folder(tmp_path / "padded"), load_folder(tmp_path / "plain")
    for name in ROW_TENSORS:
        assert padded[name][:8].tobytes() == plain[name].tobytes()


def test_positions_are_no_tokens(tmp_path: Path) -> None:
    """As many of them as rows of the vocabulary: they stay where they are, whatever becomes of the tokens."""
    names = ("transformer.wpe.weight", "bert.embeddings.position_embeddings.weight", "model.embed_positions.weight")
    folders = []
    for side, tokens in (("base", BASE_TOKENS), ("ft", [*FT_TOKENS[::-1], "more"])):
        tensors = {"transformer.wte.weight": normal(len(tokens), HIDDEN, dtype=BF16)}
        tensors |= {name: np.arange(5 * HIDDEN).reshape(5, HIDDEN).astype(BF16) for name in names}
        folders.append(save_model(tmp_path / side, tensors, side_files={"tokenizer.json": tokenizer(tokens)}))
    for vocab in ("base", "ft", "union"):
        merge(*folders, tmp_path / f"by {vocab}", vocab=vocab)
        found, base = load_folder(tmp_path / f"by {vocab}"), load_folder(folders[0])
        assert all(found[name].tobytes() == base[name].tobytes() for name in names)


def test_a_union_grows_beyond_the_rows_there_were(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 5, tokenizer(BASE_TOKENS))
    ft = model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED))
    merge(base, ft, tmp_path / "out", vocab="union")
    found, rows = load_folder(tmp_path / "out")["lm_head.weight"], load_folder(ft)["lm_head.weight"]
    assert [row.tobytes() for row in found[5:]] == [rows[n].tobytes() for n in (3, 5, 6)]


def test_types_that_differ_keep_rows_of_one_side_exact(tmp_path: Path) -> None:
    """A float32 row of FT's token is rounded once, to the output's type; a bfloat16 row of BASE's is the same."""
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS))
    ft = model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED), dtype=np.float32)
    merge(base, ft, tmp_path / "out", 0.3, vocab="union")
    merge(base, ft, tmp_path / "wide", 0.3, vocab="union", dtype="float32")
    x, y = load_folder(base)["lm_head.weight"], load_folder(ft)["lm_head.weight"]
    found, wide = load_folder(tmp_path / "out")["lm_head.weight"], load_folder(tmp_path / "wide")["lm_head.weight"]
    assert found.dtype == BF16
    assert wide[3].tobytes() == x[3].astype(np.float32).tobytes()
    for place, row in ((5, 3), (6, 5), (7, 6)):
        assert found[place].tobytes() == y[row].astype(BF16).tobytes()
        assert wide[place].tobytes() == y[row].tobytes()


def test_rows_of_one_side_may_hold_anything_and_those_of_both_may_not(tmp_path: Path) -> None:
    """A bias of minus infinity on padding, say, is handed on; in a row that both have it is named."""
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS))
    tensors = load_folder(model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED)))
    for name, row in (("a", 6), ("b", 1)):
        changed = tensors["lm_head.bias"].copy()
        changed[row] = -np.inf
        side = {"tokenizer.json": tokenizer(FT_TOKENS, FT_ADDED)}
        save_model(tmp_path / name, {**tensors, "lm_head.bias": changed}, side_files=side)
    merge(base, tmp_path / "a", tmp_path / "out", vocab="union", pad_vocab_to_multiple_of=16)
    found = load_folder(tmp_path / "out")["lm_head.bias"]
    assert [float(value) for value in found[~np.isfinite(found.astype(float))]] == [-np.inf]
    with pytest.raises(DataError, match=r"lm_head.bias in b/model.safetensors \(rows by token\): element 2 is -inf"):
        merge(base, tmp_path / "b", tmp_path / "other", vocab="union")


def test_heads_and_biases_of_encoders_and_translators_are_found(tmp_path: Path) -> None:
    """Under their names in BERT and BART, and whatever stands outside the layers with a row for each token."""
    names = {
        "bert.embeddings.word_embeddings.weight": (HIDDEN,), "cls.predictions.decoder.weight": (HIDDEN,),
        "cls.predictions.bias": (), "final_logits_bias": None, "model.layers.1.shared_head.head.weight": (HIDDEN,),
    }  # fmt: skip
    folders = []
    for side, rows, text in (("base", 8, tokenizer(BASE_TOKENS)), ("ft", 7, tokenizer(FT_TOKENS, FT_ADDED))):
        tensors = {n: normal(*((1, rows) if s is None else (rows, *s)), dtype=BF16) for n, s in names.items()}
        tensors["bert.embeddings.position_embeddings.weight"] = normal(20, HIDDEN, dtype=BF16)
        folders.append(save_model(tmp_path / side, tensors, side_files={"tokenizer.json": text}))
    merge(*folders, tmp_path / "out", 1, vocab="ft")
    found, expected = load_folder(tmp_path / "out"), load_folder(folders[1])
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_heads_that_one_side_ties(tmp_path: Path) -> None:
    """BASE's head is merged with FT's embedding, rows that only BASE has being the head's own; and the other way round
    BASE's embedding with FT's head."""
    apart = model(tmp_path / "apart", 8, tokenizer(BASE_TOKENS))
    tied = model(tmp_path / "tied", 7, tokenizer(FT_TOKENS, FT_ADDED), tied=True)
    for folder in (apart,):  # a head without bias
        tensors = load_folder(folder)
        del tensors["lm_head.bias"]
        save_model(folder, tensors, config=json.loads((folder / "config.json").read_text()))
    merge(apart, tied, tmp_path / "out", vocab="union")
    found, x, y = (load_folder(folder) for folder in (tmp_path / "out", apart, tied))
    assert found["lm_head.weight"][3].tobytes() == x["lm_head.weight"][3].tobytes()
    assert found["model.embed_tokens.weight"][3].tobytes() == x["model.embed_tokens.weight"][3].tobytes()
    assert found["lm_head.weight"][5].tobytes() == y["model.embed_tokens.weight"][3].tobytes()
    expected = expected_rows(x["lm_head.weight"], y["model.embed_tokens.weight"], [*BASE_TOKENS, "d", *FT_ADDED], 0.5)
    assert_close_rows(found["lm_head.weight"], expected, {3, 5, 6, 7})
    report = merge(tied, apart, tmp_path / "other", vocab="union")
    found = load_folder(tmp_path / "other")["lm_head.weight"]
    assert found.shape == (len({*FT_TOKENS, *FT_ADDED, *BASE_TOKENS}), x["lm_head.weight"].shape[1])
    assert any("apart has a head of its own: the output has one, too" in warning for warning in report.warnings)


def run(*words: Any) -> Any:
    return CliRunner().invoke(merge_tool, [str(word) for word in words])


def test_it_resumes_is_recognised_and_verified(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The tokenizers count as inputs: the same command finds its result, verify makes it again bit for bit, and another
    tokenizer is another merge."""
    command = ("merge", *pair, tmp_path / "out", "--vocab", "union", "--pad-vocab-to-multiple-of", 4)
    assert run(*command).exit_code == 0
    assert "already complete" in run(*command).stdout
    for more in ((), ("--full",)):
        verified = run("verify", tmp_path / "out", "--against", *pair, *more)
        assert (verified.exit_code, "bit for bit the same" in verified.stdout) == (0, True), verified.output
    tensors = json.loads((tmp_path / "out/merge_report.json").read_text())["tensors"]
    notes = {tensor["name"]: tensor.get("note") for tensor in tensors}
    assert notes["lm_head.weight"] == "4 rows of one side only, as they are; figures are of the others"
    assert "--vocab union --pad-vocab-to-multiple-of 4" in (tmp_path / "out/README.md").read_text()
    (pair[1] / "tokenizer.json").write_text(tokenizer(FT_TOKENS, {"<|im|>": 6, "<|end|>": 5}))
    assert "not the result of this merge" in run(*command).stderr


def test_a_sweep_matches_by_token(pair: tuple[Path, Path], tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("import sys\nprint('rows', open(sys.argv[1] + '/config.json').read().count('8'))\n")
    command = ("sweep", *pair, tmp_path / "out", "--t", "0,1", "--vocab", "union", "--keep")
    result = run(*command, "--eval", f"{sys.executable} {judge}")
    assert result.exit_code == 0, result.output
    merge(*pair, tmp_path / "expected", 1, vocab="union")
    assert load_folder(tmp_path / "out/t-1")["lm_head.weight"].tobytes() == (
        load_folder(tmp_path / "expected")["lm_head.weight"].tobytes()
    )


# ----------------------------------------------------------------------------------------------- files


def test_the_base_vocabulary_has_the_base_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*pair, tmp_path / "out", vocab="base")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pair[0] / name).read_bytes()
    other = merge(*pair, tmp_path / "other", vocab="base", files_from="ft")
    known_first = "3 tokens of ft are not in the output's vocabulary: <|im|>, <|end|>, d."
    assert known_first in other.warnings
    assert (tmp_path / "other/tokenizer_config.json").read_bytes() == (pair[0] / "tokenizer_config.json").read_bytes()
    assert json.loads((tmp_path / "other/config.json").read_text())["vocab_size"] == 8


def test_the_finetunes_vocabulary_has_its_tokenizer_and_the_base_configuration(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """But for vocab_size, wherever that of either model stands."""
    (pair[0] / "tokenizer.model").write_bytes(b"of another")
    config = json.loads((pair[0] / "config.json").read_text()) | {"text_config": {"vocab_size": 8}, "other": 8}
    (pair[0] / "config.json").write_text(json.dumps(config, indent=3))
    merge(*pair, tmp_path / "out", vocab="ft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pair[1] / name).read_bytes()
    assert not (tmp_path / "out/tokenizer.model").exists()
    found = (tmp_path / "out/config.json").read_text()
    assert found == json.dumps(config | {"vocab_size": 7, "text_config": {"vocab_size": 7}}, indent=3)


@pytest.mark.parametrize("indent", [2, None])
@pytest.mark.parametrize("added", [{}, {"<s>": 0}])
def test_a_union_adds_tokens_to_the_base_tokenizer_and_changes_nothing_else(
    tmp_path: Path, indent: int | None, added: dict[str, int]
) -> None:
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS, added, indent=indent))
    ft = model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED))
    report = merge(base, ft, tmp_path / "out", vocab="union")
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (base, tmp_path / "out"))
    new = after.pop("added_tokens")[len(before["added_tokens"]) :]
    assert after == {key: value for key, value in before.items() if key != "added_tokens"}
    assert [(entry["content"], entry["id"], entry["special"]) for entry in new] == [
        ("d", 5, False), ("<|im|>", 6, True), ("<|end|>", 7, True),
    ]  # fmt: skip
    assert any("1 of the 3 added tokens are ordinary tokens of another" in warning for warning in report.warnings)
    assert run("verify", tmp_path / "out", "--against", base, ft).exit_code == 0


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece", "WordLevel"])
def test_every_kind_of_tokenizer_is_read_and_its_union_loads(tmp_path: Path, kind: str) -> None:
    """By the tokenizers library: every token of both has the id of its row."""
    library = pytest.importorskip("tokenizers")
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS, {"<s>": 0}, kind=kind))
    ft = model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED, kind=kind))
    merge(base, ft, tmp_path / "out", vocab="union")
    loaded = library.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    expected = [*BASE_TOKENS, "d", *FT_ADDED]
    assert loaded.get_vocab(with_added_tokens=True) == {token: number for number, token in enumerate(expected)}
    assert loaded.encode("<|im|>").ids == [6]


def test_transformers_loads_a_union(tmp_path: Path) -> None:
    """A byte-level BPE trained here, a finetune with chat tokens added by transformers itself and its rows resized."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    library = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=320, **settings)  # 20 rows of padding
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.resize_token_embeddings(len(words), mean_resizing=False)
    base.save_pretrained(tmp_path / "ft")
    words.save_pretrained(tmp_path / "ft")
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", vocab="union", pad_vocab_to_multiple_of=64)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    result, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert result.get_input_embeddings().weight.shape == (320, 16)
    size = len(trained.get_vocab(with_added_tokens=False))
    assert loaded("<|im_start|>fox<|im_end|>")["input_ids"][::2][:1] == [size]
    assert loaded.decode(loaded("the fox<|im_end|>")["input_ids"]) == "the fox<|im_end|>"
    row = result.get_input_embeddings().weight[size + 1]
    assert torch.equal(row, base.get_input_embeddings().weight[words.convert_tokens_to_ids("<|im_end|>")])


def test_a_vocabulary_that_an_adapter_brings(tmp_path: Path) -> None:
    """Tokens added for the training of an adapter, whose folder has the resized embedding and the tokenizer."""
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS))
    tensors = {"model.embed_tokens.weight": normal(10, HIDDEN), "lm_head.weight": normal(10, HIDDEN)}
    tensors["lm_head.bias"] = normal(10)
    adapter = save_adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens", "lm_head"])
    (adapter / "tokenizer.json").write_text(tokenizer(BASE_TOKENS, {"<|im|>": 5}))
    failed = run("merge", base, adapter, tmp_path / "out")
    assert (
        "5 tokens are in both, 0 of them with another id, 0 only in base and 1 only in base+lora (<|im|>)"
        in failed.stderr
    )
    for number, models in enumerate([(base, adapter), (f"{base}+{adapter}", base)]):
        report = merge(*models, tmp_path / f"{number}", vocab="base" if number else "union")
        rows = 10 if number else 8
        assert json.loads((tmp_path / f"{number}/config.json").read_text())["vocab_size"] == rows
        assert len(load_folder(tmp_path / f"{number}")["lm_head.weight"]) == rows
        assert any("lora: lm_head.weight is [10, 8] there, [8, 8] in base." in told for told in report.warnings)
        assert "<|im|>" in (tmp_path / f"{number}/tokenizer.json").read_text()
    found = load_folder(tmp_path / "0")["model.embed_tokens.weight"]
    assert found.shape == (8, HIDDEN)
    assert found[5].tobytes() == tensors["model.embed_tokens.weight"][5].astype(BF16).tobytes()


def test_a_one_file_output_has_the_rows_and_says_that_it_lacks_the_tokenizer(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    report = merge(*pair, tmp_path / "out.safetensors", vocab="union")
    merge(*pair, tmp_path / "out", vocab="union")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert any("is one file: the tokenizer that goes with its rows is not written" in told for told in report.warnings)


# -------------------------------------------------------------------------------- errors and warnings


def test_other_sizes_are_an_error_with_the_figures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("merge", *pair, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "4 tokens are in both, 2 of them with another id, 1 only in base (c) and 3 only in ft (<|im|>, <|end|>, d); "
        "rows beyond the tokenizer (padding): 3 in base, 0 in ft."
    )
    assert "  --vocab base, ft or union: rows are matched by token" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_size_with_other_tokens_is_an_error_with_the_figures_and_matched_on_request(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 5, tokenizer(BASE_TOKENS))
    ft = model(tmp_path / "ft", 5, tokenizer(FT_TOKENS))
    result = run("merge", base, ft, tmp_path / "out")
    assert result.stderr.startswith(
        "Error: base and ft have different vocabularies, so rows of one number mean other tokens. 4 tokens are in "
        "both, 2 of them with another id, 1 only in base (c) and 1 only in ft (d); rows beyond the tokenizer"
    )
    assert "\nWith --vocab base, ft or union rows are matched by token; --exclude PATTERN keeps" in result.stderr
    assert not (tmp_path / "out").exists()
    body = merge(base, ft, tmp_path / "body", exclude=["embed_tokens", "lm_head"])
    assert any("tokenizer.json differs between base and ft" in warning for warning in body.warnings)
    matched = merge(base, ft, tmp_path / "matched", 1, vocab="base")
    x, y = load_folder(base)["lm_head.weight"], load_folder(ft)["lm_head.weight"]
    found = load_folder(tmp_path / "matched")["lm_head.weight"]
    assert [row.tobytes() for row in found] == [row.tobytes() for row in (y[0], y[2], y[1], x[3], y[4])]
    assert any(warning.startswith("Rows were matched by token: 4 tokens are in both") for warning in matched.warnings)
    assert "1 tokens of ft are not in the output's vocabulary: d." in matched.warnings


def test_special_tokens_that_no_longer_hold_are_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "generation_config.json").write_text('{"eos_token_id": [1, 3, 4], "pad_token_id": null}')
    report = merge(*pair, tmp_path / "out", vocab="ft")
    told = [warning for warning in report.warnings if "generation_config" in warning]
    assert told == [
        "base/generation_config.json: eos_token_id is 1, a token that the output's tokenizer has as 2. Correct that "
        "file of OUT.",
        "base/generation_config.json: eos_token_id is 3, a token that the output's tokenizer does not have. Correct "
        "that file of OUT.",
    ]
    (pair[1] / "generation_config.json").write_text('{"eos_token_id": 5}')
    report = merge(*pair, tmp_path / "union", vocab="union", files_from="ft")
    assert any("eos_token_id is 5, a token that the output's tokenizer has as 6" in told for told in report.warnings)


def test_tokens_beyond_the_rows_are_told_and_have_no_row(tmp_path: Path) -> None:
    """As in models whose tokenizer knows more than the embedding: they count as tokens without a row."""
    base = model(tmp_path / "base", 8, tokenizer(BASE_TOKENS))
    ft = model(tmp_path / "ft", 6, tokenizer(FT_TOKENS, FT_ADDED))
    report = merge(base, ft, tmp_path / "out", vocab="union")
    assert any("ft: 1 ids of its tokenizer are beyond its embedding's 6 rows" in told for told in report.warnings)
    found = load_folder(tmp_path / "out")["lm_head.weight"]
    assert_mean(found[7], found[:7])


@pytest.mark.parametrize(("vocab", "rows"), [("base", 4), ("union", 8)])
def test_a_token_without_a_row_has_the_other_sides_in_a_union(tmp_path: Path, vocab: str, rows: int) -> None:
    """Otherwise rows stay as many as there were."""
    base = model(tmp_path / "base", 4, tokenizer(BASE_TOKENS))
    ft = model(tmp_path / "ft", 7, tokenizer(FT_TOKENS, FT_ADDED))
    merge(base, ft, tmp_path / "out", vocab=vocab)
    found, y = load_folder(tmp_path / "out")["lm_head.weight"], load_folder(ft)["lm_head.weight"]
    assert len(found) == rows
    if vocab == "union":
        assert [row.tobytes() for row in found[4:]] == [y[n].tobytes() for n in (4, 3, 5, 6)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            None,
            r"other: has no tokenizer.json \(only tokenizer.model: a slow tokenizer\). Convert it first: AutoTokenizer",
        ),
        ("{}", r"other/tokenizer.json: is not a tokenizer that can be read: it has no model. Fetch it again"),
        ("", r"can be read: it is empty\."),
        ("version https://git-lfs.github.com/spec/v1\n", r"other/tokenizer.json: is a Git LFS pointer.*pull\.$"),
        ("\udce4", r"it is not UTF-8 text, at byte 0"),
        ('{"model": null}', r"it has no model\."),
        ('{"model": {}}', r"its model has no vocab\."),
        ('{"model": {"vocab": {"a": 0', r"its JSON is damaged or cut short, at character"),
        ('{"model": {"vocab": {"a": 0}}', r"it ends in the middle of its JSON"),
        ('{"model": 1 "x"}', r"it is not one object of JSON"),
        ("[]", r"its JSON is damaged, expected { at character 0"),
        ('{"model": {"vocab": {}}, "added_tokens": {}}', r"its added_tokens are no list"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', r"expected a token with its content and id"),
        ('{"model": {"vocab": {"a": 1, "b": 1}}}', r"tokens 'a' and 'b' have the same id, 1;.*AutoTokenizer"),
        ('{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 1, "content": "b"}]}', r"tokens 'a' and 'b' have the"),
        ('{"model": {"vocab": {"a": "x"}}, "added_tokens": []}', r"the token 'a' has the id 'x'"),
        ('{"model": {"vocab": {"a": -1}}, "added_tokens": []}', r"the token 'a' has the id '-1'"),
        ('{"model": {"vocab": {"a": 99999999999}}, "added_tokens": []}', r"the token 'a' has the id '99999999999'"),
        ('{"model": {"vocab": [["a"]]}, "added_tokens": []}', r"its vocab has '\['a'\]', expected a token"),
        ('{"model": ' + "[" * 100_000, r"it is nested too deep"),
    ],
)
def test_tokenizers_that_cannot_be_read_say_what_to_do(
    pair: tuple[Path, Path], tmp_path: Path, content: str | None, expected: str
) -> None:
    other = model(tmp_path / "other", 8, content and content.encode(errors="surrogateescape"))
    (other / "tokenizer.model").write_bytes(b"x")
    for models in ((pair[0], other), (other, pair[0])):
        with pytest.raises(CheckpointError, match=expected):
            merge(*models, tmp_path / "out", vocab="union")
    assert not (tmp_path / "out").exists()


def test_an_added_token_may_repeat_one_of_the_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As transformers writes them: the same content, and whatever id; the model's counts."""
    other = model(tmp_path / "other", 8, tokenizer(FT_TOKENS, {**FT_ADDED, FT_TOKENS[0]: 0, FT_TOKENS[1]: 0}))
    merge(pair[0], other, tmp_path / "out", vocab="union")


def test_what_cannot_be_matched_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    x = load_folder(pair[1])
    wider = {**x, "lm_head.weight": normal(7, HIDDEN + 1, dtype=BF16)}
    side = {"tokenizer.json": tokenizer(FT_TOKENS, FT_ADDED)}
    other = save_model(tmp_path / "wider", wider, side_files=side)
    with pytest.raises(
        MismatchError, match=r"Rows cannot be matched by token in\n  lm_head.weight: BF16 \[8, 8\] and BF16"
    ):
        merge(pair[0], other, tmp_path / "out", vocab="base")
    nothing = save_model(tmp_path / "nothing", {"x": normal(3)}, side_files=side)
    with pytest.raises(
        MismatchError,
        match=r"nothing: has no embedding under a known name .* copy such tensors from BASE: exclude=PATTERN",
    ):
        merge(pair[0], nothing, tmp_path / "out", vocab="base")
    with pytest.raises(CheckpointError, match=r"has no tokenizer, which .* need. Give its folder instead"):
        merge(pair[0], pair[1] / "model.safetensors", tmp_path / "out", vocab="base")
    with pytest.raises(RecipeError, match="goes with vocab"):
        merge(*pair, tmp_path / "out", pad_vocab_to_multiple_of=64)
    with pytest.raises(RecipeError, match="vocab is 'both', expected one of: base, ft, union"):
        merge(*pair, tmp_path / "out", vocab="both")
    assert run("merge", *pair, tmp_path / "out", "--vocab", "base", "--pad-vocab-to-multiple-of", 0).exit_code == 1


def test_figures_count_every_token_once(tmp_path: Path) -> None:
    for name, text in (
        ("a", tokenizer(["x", "y", "z"], {"y": 1, "<n>": 9})),
        ("b", tokenizer(["y", "x", "z"], {"<m>": 3})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    found = compare_tokenizers(Folder(tmp_path / "a"), Folder(tmp_path / "b"))
    assert [list(ids) for ids in found.ids] == [[0, 1, 2, *[-1] * 6, 9, -1], [1, 0, 2, *[-1] * 6, -1, 3]]
    assert (found.num_moved, found.num_alone, found.sizes, found.added) == (2, (1, 1), (10, 4), (1, 0))
    assert found.figures(("a", "b")).startswith("3 tokens are in both, 2 of them with another id, 1 only in a (<n>)")


# ---------------------------------------------------------------------------------------------- memory


@linux_only
def test_the_budget_holds_with_a_vocabulary_of_ordinary_size(tmp_path: Path) -> None:
    """Tokenizers of 100,000 tokens, whose parsing takes more than the budget, are parsed elsewhere."""
    words = [f"token number {n}" for n in range(100_000)]
    for name, tokens in (("base", words), ("ft", [*reversed(words[500:]), *(f"new {n}" for n in range(2_000))])):
        save_model(tmp_path / name, {}, side_files={"tokenizer.json": tokenizer(tokens)})
        write_model(tmp_path / name / "model.safetensors", {"embed_tokens.weight": (len(tokens), 200)}, len(name))
    options = ("--memory", "64MB", "--vocab", "union", "--pad-vocab-to-multiple-of", "64")
    peak, expected = measured("merge", tmp_path / "base", tmp_path / "ft", tmp_path / "out", *options)
    assert peak < 64_000_000
    assert abs(expected - peak) < 0.2 * peak


def test_the_element_of_a_tokens_row_that_is_too_large_is_named(tmp_path: Path) -> None:
    """In its tensor, not in its row: of a token that FT alone has."""
    base, ft = (np.full((rows, HIDDEN), rows, np.float32) for rows in (3, 4))
    ft[3, 5] = 1e6
    folders = [
        save_model(tmp_path / name, {"embed_tokens.weight": rows}, side_files={"tokenizer.json": tokenizer(words)})
        for name, rows, words in (("base", base, ["a", "b", "c"]), ("ft", ft, ["a", "b", "c", "d"]))
    ]
    with pytest.raises(
        DataError, match=rf"embed_tokens\.weight: element {3 * HIDDEN + 5} is finite but too large for F16"
    ):
        merge(*folders, tmp_path / "out", vocab="union", dtype="float16")
