"""Which tensors are merged and with what: chosen, missing, of another shape, tied, or called otherwise."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from checkpoints import BF16, DTYPES, contents, language_model, load_file, load_folder, save_file, save_model
from merge_tool import merge, open_checkpoint
from merge_tool.api import merge_models, plan_recipe
from merge_tool.arrays import TILE
from merge_tool.cli import merge_tool as all_commands
from merge_tool.cli import slerp_merge
from merge_tool.models.renaming import tied_embedding
from merge_tool.recipe.pair import pair as recipe_of_pair
from oracle import float64_merge


def run(*words: Any) -> Result:
    return CliRunner().invoke(slerp_merge, [str(word) for word in words])


def report(out: Path) -> dict[str, Any]:
    content = json.loads((out / "merge_report.json").read_text())
    return {tensor["name"]: tensor for tensor in content["tensors"]}


def names_of(told: dict[str, Any]) -> list[str]:
    """What a tensor is called in each model, as the report has it."""
    return [source["name"] for source in told["sources"]]


def check_parts(out: Path, whole: Path, base: dict[str, Any], kept: set[str]) -> None:
    """`out` has BASE's bytes of what is in `kept`, and the bytes of the merge of everything else."""
    found, merged = load_folder(out), load_folder(whole)
    assert found.keys() == base.keys()
    assert kept <= base.keys()
    for name, array in found.items():
        expected = base[name] if name in kept else merged[name]
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.tobytes() == expected.tobytes(), name


# ------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--only", "self_attn"], lambda name: "self_attn" not in name),
        (["--only", "self_attn", "--only", "*norm*"], lambda name: "self_attn" not in name and "norm" not in name),
        (["--exclude", "lm_head", "--exclude", "embed"], lambda name: "lm_head" in name or "embed" in name),
        (["--only", "layers", "--exclude", r"re:layers\.(0|2)"], lambda name: "layers.1." not in name),
    ],
)
def test_what_is_not_chosen_is_the_bases(tmp_path: Path, pair: tuple[Path, Path], words: list[str], kept: Any) -> None:
    x = language_model(0)
    run(*pair, tmp_path / "whole", "--t", "0.3")
    result = run(*pair, tmp_path / "out", "--t", "0.3", *words)
    assert (result.exit_code, result.stderr) == (0, "")
    names = {name for name in x if kept(name)}
    check_parts(tmp_path / "out", tmp_path / "whole", x, names)
    assert f"{len(names)} tensors are not merged: the base's are kept." in result.stdout
    told, whole = report(tmp_path / "out"), report(tmp_path / "whole")
    for name in x:
        if name in names:
            assert told[name] == {
                "name": name, "shape": list(x[name].shape), "dtype": "BF16",
                "sources": [{"model": "base", "name": name, "dtype": "BF16"}],
                "equal": False, "note": "not chosen: base kept",
            }  # fmt: skip
        else:
            assert told[name] == whole[name]


def odd_base() -> dict[str, Any]:
    """What no merge could take, beside a tensor that it can."""
    rng = np.random.default_rng(0)
    return {
        "merged": rng.standard_normal(1000).astype(np.float32),
        "odd.nan": np.full(3 * TILE + 5, np.nan, np.float32),
        "odd.payloads": rng.integers(0, 2**16, 70_001, dtype=np.uint16).view(BF16),
        "odd.eight": np.arange(256, dtype=np.uint8).view(DTYPES["F8_E4M3"]),
        "odd.ids": np.arange(10),
        "odd.empty": np.zeros((0, 3), np.float64),
        "odd.scalar": np.array(-np.inf),
    }


def test_copies_are_bit_for_bit_whatever_they_hold_and_ft_has(tmp_path: Path) -> None:
    """NaN with any payload, infinity, 8-bit floats, integers: also where FT lacks it, or has another shape or type."""
    x = odd_base()
    y = {"merged": x["merged"] + 1, "odd.nan": np.zeros(3), "odd.ids": np.ones(10), "odd.extra": np.zeros(2)}
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y, shards=2)
    for number, jobs in enumerate((1, 4)):
        merge(base, ft, tmp_path / str(number), exclude=["odd."], dtype="float16", jobs=jobs)
        out = load_folder(tmp_path / str(number))
        assert out.keys() == x.keys()
        assert out.pop("merged").dtype == np.float16
        for name, array in out.items():
            assert (array.dtype, array.shape, array.tobytes()) == (x[name].dtype, x[name].shape, x[name].tobytes())
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_copies_take_part_in_several_outputs_and_in_resuming(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    options: Any = {"only": "mlp", "t_for": {"layers.1.": 0.9}, "max_shard_bytes": 20_000}
    merge(*pair, tmp_path / "many", (0.2, 0.4), **options)
    for t in (0.2, 0.4):
        merge(*pair, tmp_path / str(t), t, **options)
        assert contents(tmp_path / str(t)) == contents(tmp_path / f"many/t-{t}")

    class Stop(Exception):
        pass

    told = []

    def stop(nbytes: int, name: str) -> None:
        told.append(nbytes)
        if len(told) == 30:
            raise Stop

    with pytest.raises(Stop):
        merge(*pair, tmp_path / "stopped", 0.2, on_progress=stop, **options)
    assert "only was mlp, now none" in run(*pair, tmp_path / "stopped", "--t", "0.2").stderr
    merge(*pair, tmp_path / "stopped", 0.2, **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "0.2")


def test_progress_and_the_plan_count_what_is_read(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    x, seen, total = language_model(0), [], []
    merge(*pair, tmp_path / "out", only="mlp", on_start=total.append, on_progress=lambda n, name: seen.append(n))
    nbytes = sum(a.nbytes for a in x.values())
    assert total == [sum(seen)] == [2 * nbytes + sum(a.nbytes for name, a in x.items() if "mlp" in name)]
    result = run(*pair, tmp_path / "plan", "--only", "mlp", "--dry-run")
    assert f"  merged    3; {len(x) - 3} copied from one model, unchanged\n" in result.stdout
    assert plan_recipe(recipe_of_pair(*pair, only="mlp"), tmp_path / "plan").read_bytes == total[0] - nbytes


def test_the_cards_command_chooses_the_same(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", 0.3, only=["self_attn", "*norm*"], exclude=r"re:layers\.0\.")
    words = shlex.split((tmp_path / "out/README.md").read_text().split("```")[1])
    run(*pair, tmp_path / "again", *words[4:])
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert "tensors are not merged" in (tmp_path / "out/README.md").read_text()
    assert run(*pair, tmp_path / "out", *words[4:]).stdout.endswith("already complete, nothing to do.\n")
    assert "not the result of this merge" in run(*pair, tmp_path / "out", *words[4:6]).stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--only", "self_atn"],
            "--only self_atn: matches no tensor. Did you mean self_attn? The tensors are lm_head.weight, ",
        ),
        (["--exclude", "mlp.*"], "--exclude mlp.*: matches no tensor. A glob must match the whole name"),
        (["--only", "mlp", "--only", "nothing"], "--only nothing: matches no tensor."),
        (["--exclude", "*"], "--only and --exclude leave no tensor to merge."),
        (["--only", "mlp", "--exclude", "up_proj"], "--only and --exclude leave no tensor to merge."),
        (["--exclude", "re:["], "The pattern 're:[' is not a regular expression"),
        (["--exclude", ""], "The pattern '' is empty"),
    ],
)
def test_choices_that_make_no_sense(tmp_path: Path, pair: tuple[Path, Path], words: list[str], expected: str) -> None:
    result = run(*pair, tmp_path / "out", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_rule_for_what_is_not_merged_is_warned_of(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run(*pair, tmp_path / "out", "--exclude", "mlp", "--t-for", "mlp=1", "--dry-run")
    assert "Warning: --t-for mlp=1 has no effect: its tensors are not merged, or" in result.stderr


def test_models_that_are_equal_where_they_are_merged_are_said_to_be(tmp_path: Path) -> None:
    x = language_model(0)
    y = {name: x[name] if "mlp" in name else array for name, array in language_model(1).items()}
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    result = run(base, ft, tmp_path / "out", "--only", "mlp")
    assert "the same in every tensor that is merged: the output is the base." in result.stderr


def test_a_single_file_is_chosen_from_alike(tmp_path: Path) -> None:
    x, y = {"a": np.zeros(3), "b": np.full(2, np.nan)}, {"a": np.ones(3)}
    save_file(x, tmp_path / "x.safetensors")
    save_file(y, tmp_path / "y.safetensors")
    merge(tmp_path / "x.safetensors", tmp_path / "y.safetensors", tmp_path / "o.safetensors", exclude="b")
    assert load_file(tmp_path / "o.safetensors")["b"].tobytes() == x["b"].tobytes()


# ------------------------------------------------------------------------------- missing and mismatched


def unlike_pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """FT lacks a tensor, has one of its own, and has three in another shape or type."""
    x, y = language_model(0), language_model(1)
    x["ids"], y["ids"] = np.arange(4), np.zeros(4, np.float32)
    del y["model.norm.bias"]
    y["value_head.weight"] = np.zeros(3, np.float32)
    y["model.embed_tokens.weight"] = np.zeros((104, 32), BF16)
    y["lm_head.weight"] = np.zeros((104, 32), BF16)
    return save_model(tmp_path / "base", x, shards=2), save_model(tmp_path / "ft", y, shards=3), x


UNLIKE = {"ids", "lm_head.weight", "model.embed_tokens.weight"}


def test_what_ft_lacks_or_has_otherwise_is_the_bases_if_asked(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, ft, x = unlike_pair(tmp_path / "unlike")
    result = run(base, ft, tmp_path / "out", "--on-missing", "base", "--on-mismatch", "base", "--dtype", "base")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "Warning: 1 tensor is not in ft; base's are kept: model.norm.bias.",
        "Warning: 1 tensor is only in ft; left out: value_head.weight.",
        "Warning: 3 tensors are of another shape or type in ft; base's are kept: "
        "ids, lm_head.weight, model.embed_tokens.weight.",
    ]
    kept = UNLIKE | {"model.norm.bias"}
    whole = load_folder(tmp_path / "out")
    assert whole.keys() == x.keys()
    merge(*pair, tmp_path / "whole")
    plain = load_folder(tmp_path / "whole")
    for name in x:
        assert whole[name].tobytes() == (x[name] if name in kept else plain[name]).tobytes()
    told = report(tmp_path / "out")
    assert told["model.norm.bias"]["note"] == "not in all models: base kept"
    assert {n for n in x if told[n].get("note") == "another shape or type in some model: base kept"} == UNLIKE
    words = shlex.split((tmp_path / "out/README.md").read_text().split("```")[1])[4:]
    run(base, ft, tmp_path / "again", *words)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "listed", "helps"),
    [
        ([], {"only in base", "only in ft", "shapes differ", "dtypes"}, {"--on-missing base", "--on-mismatch base"}),
        (["--on-missing", "base"], {"shapes differ", "dtypes"}, {"--on-mismatch base"}),
        (["--on-mismatch", "base"], {"only in base", "only in ft"}, {"--on-missing base"}),
        (["--exclude", "norm.bias", "--exclude", "value"], {"shapes differ", "dtypes"}, {"--on-mismatch base"}),
        (["--exclude", "embed", "--exclude", "lm_head"], {"only in base", "only in ft", "dtypes"},
         {"--on-missing base", "--on-mismatch base"}),
    ],
)  # fmt: skip
def test_each_option_allows_its_own_and_the_rest_is_listed_at_once(
    tmp_path: Path, words: list[str], listed: set[str], helps: set[str]
) -> None:
    base, ft, _ = unlike_pair(tmp_path)
    result = run(base, ft, tmp_path / "out", *words, "--dry-run")
    assert result.exit_code == 1
    for what in ("only in base", "only in ft", "shapes differ", "dtypes"):
        assert (f" {what}" in result.stderr) == (what in listed)
    for option in ("--on-missing base", "--on-mismatch base"):
        assert (f"  {option}:" in result.stderr) == (option in helps)
    assert not (tmp_path / "out").exists()


def test_what_is_excluded_needs_no_option(tmp_path: Path) -> None:
    base, ft, x = unlike_pair(tmp_path)
    result = run(base, ft, tmp_path / "out", "--only", "layers")
    assert (result.exit_code, result.stderr) == (0, "")
    assert load_folder(tmp_path / "out").keys() == x.keys()


def test_models_without_a_tensor_in_common_are_no_merge(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"a": np.zeros(3), "b": np.zeros(3)})
    ft = save_model(tmp_path / "ft", {"a": np.zeros(4), "c": np.zeros(3)})
    result = run(base, ft, tmp_path / "out", "--on-missing", "base", "--on-mismatch", "base")
    assert result.exit_code == 1
    assert "base and ft have no tensor in common that could be merged. Are they related?" in result.stderr


# --------------------------------------------------------------------------------- prefixes and heads


def config_of(tied: bool | None) -> dict[str, Any]:
    kind = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
    return kind | ({} if tied is None else {"tie_word_embeddings": tied})


def renamed(tensors: dict[str, Any], ours: str, theirs: str) -> dict[str, Any]:
    return {theirs + n.removeprefix(ours) if n.startswith(ours) else n: a for n, a in tensors.items()}


def check_same_weights(out: Path, whole: Path) -> None:
    found, expected = load_folder(out), load_folder(whole)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize(
    ("base_prefix", "ft_prefix", "count"),
    [
        ("model.", "", 24),
        ("", "model.", 24),
        ("transformer.", "", 24),
        ("model.", "model.language_model.", 24),
        ("language_model.model.", "model.language_model.", 24),
        ("model.", "base_model.model.model.", 24),
    ],
)
def test_prefixes_of_one_side_do_not_matter(tmp_path: Path, base_prefix: str, ft_prefix: str, count: int) -> None:
    x, y = (renamed(language_model(seed), "model.", base_prefix) for seed in (0, 1))
    base = save_model(tmp_path / "base", x, shards=2)
    merge(base, save_model(tmp_path / "plain/ft", y), tmp_path / "whole", 0.3)
    ft = save_model(tmp_path / "ft", renamed(y, base_prefix, ft_prefix) if base_prefix else
                    {n if n == "lm_head.weight" else ft_prefix + n: a for n, a in y.items()}, shards=3)  # fmt: skip
    result = run(base, ft, tmp_path / "out", "--t", "0.3")
    assert (result.exit_code, result.stderr.count("Warning")) == (0, 1)
    assert f"Warning: {count} tensors have the prefix '{ft_prefix}' in ft, '{base_prefix}' in base: " in result.stderr
    check_same_weights(tmp_path / "out", tmp_path / "whole")
    told = report(tmp_path / "out")
    assert names_of(told[f"{base_prefix}norm.bias"]) == [f"{base_prefix}norm.bias", f"{ft_prefix}norm.bias"]
    assert names_of(told["lm_head.weight"]) == ["lm_head.weight"] * 2


def test_a_wrapper_around_everything_does_not_matter(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    ft = save_model(tmp_path / "wrapped", {f"module._orig_mod.{n}": a for n, a in language_model(1).items()})
    result = run(pair[0], ft, tmp_path / "out", "--t-for", "model.layers.1.=1", "--exclude", "model.norm")
    assert result.exit_code == 0
    run(*pair, tmp_path / "whole", "--t-for", "model.layers.1.=1", "--exclude", "model.norm")
    check_same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("side", ["base", "ft"])
def test_names_that_could_mean_two_tensors_are_not_guessed(tmp_path: Path, side: str) -> None:
    rng = np.random.default_rng(0)
    one = {f"layers.{n}.w": rng.standard_normal(3) for n in range(2)} | {"other": rng.standard_normal(3)}
    two = {f"{p}.layers.{n}.w": one[f"layers.{n}.w"] for p in ("model", "language_model") for n in range(2)}
    two["other"] = one["other"]
    models = {"base": save_model(tmp_path / "one", one), "ft": save_model(tmp_path / "two", two)}
    if side == "base":
        models = {"base": models["ft"], "ft": models["base"]}
    result = run(models["base"], models["ft"], tmp_path / "out")
    assert result.exit_code == 1
    assert "4 tensors only in two: " in result.stderr
    assert "2 tensors only in one: " in result.stderr


def test_shapes_are_compared_across_names(tmp_path: Path) -> None:
    x = {"model.a": np.zeros((3, 4)), "b": np.ones(2)}
    base = save_model(tmp_path / "base", x)
    ft = save_model(tmp_path / "ft", {"a": np.zeros((4, 3)), "b": np.zeros(2)})
    result = run(base, ft, tmp_path / "out")
    assert "1 shapes differ:\n    model.a: [3, 4] in base, [4, 3] in ft\n" in result.stderr
    assert "only in" not in result.stderr


@pytest.mark.parametrize("tied", [True, None])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_head_that_ft_ties_is_its_embedding(tmp_path: Path, tied: bool | None, prefix: str) -> None:
    x, y = language_model(0), language_model(1)
    base = save_model(tmp_path / "base", x, shards=2, config=config_of(False))
    del y["lm_head.weight"]
    ft = save_model(tmp_path / "ft", renamed(y, "model.", prefix), config=config_of(tied))
    whole = save_model(tmp_path / "whole-ft", y | {"lm_head.weight": y["model.embed_tokens.weight"]})
    merge(base, whole, tmp_path / "whole", 0.4)
    result = run(base, ft, tmp_path / "out", "--t", "0.4")
    assert result.exit_code == 0
    assert (
        "Warning: lm_head.weight is not in ft, whose head is tied: merged with its input embedding "
        f"{prefix}embed_tokens.weight. The output has a head of its own, as base.\n"
    ) in result.stderr
    check_same_weights(tmp_path / "out", tmp_path / "whole")
    told = report(tmp_path / "out")["lm_head.weight"]
    assert names_of(told) == ["lm_head.weight", f"{prefix}embed_tokens.weight"]


@pytest.mark.parametrize(
    ("ft_tied", "reason"), [(True, "a copy, says its config"), (None, "what it learned apart is lost")]
)
def test_a_head_that_base_ties_stays_tied(tmp_path: Path, ft_tied: bool | None, reason: str) -> None:
    """FT's own config.json says that its head is a copy, or says nothing, which means the same in most models."""
    x, y = language_model(0), language_model(1)
    del x["lm_head.weight"]
    base = save_model(tmp_path / "base", x, config=config_of(True))
    ft = save_model(tmp_path / "ft", y, shards=2, config=config_of(ft_tied))
    result = run(base, ft, tmp_path / "out", "--t", "0.4")
    assert result.exit_code == 0
    assert (
        "Warning: base ties its head to model.embed_tokens.weight, and so does the output: lm_head.weight of ft is "
        f"left out ({reason}).\n"
    ) in result.stderr
    del y["lm_head.weight"]
    merge(base, save_model(tmp_path / "headless", y), tmp_path / "whole", 0.4)
    check_same_weights(tmp_path / "out", tmp_path / "whole")
    told = (
        "Warning: lm_head.weight is not chosen, but base and the output use model.embed_tokens.weight in its place, "
        "which is merged. To keep base's values there, give --exclude model.embed_tokens.weight, too.\n"
    )
    for number, (words, expected) in enumerate((
        (["--only", "mlp"], ""),
        (["--exclude", "lm_head", "--exclude", "model.embed_tokens.weight"], ""),
        (["--exclude", "lm_head"], told),
        (["--only", "embed_tokens"], told),
    )):  # fmt: skip
        chosen = run(base, ft, tmp_path / f"{number}", *words)
        assert (chosen.exit_code, chosen.stderr) == (0, expected)


@pytest.mark.parametrize(
    ("here", "there", "more"),
    [
        ("lm_head.weight", {}, {"tie_word_embeddings": False}),
        ("lm_head.weight", {}, {"text_config": {"tie_word_embeddings": False}}),
        ("lm_head.weight", {"other.embed_tokens.weight": np.zeros((100, 32), BF16)}, {}),
        ("score.weight", {}, {}),
    ],
)
def test_heads_that_are_not_clearly_tied_are_missing(
    tmp_path: Path, here: str, there: dict[str, Any], more: dict[str, Any]
) -> None:
    """The config denies it, two embeddings might be it, or it is another head: on either side."""
    both = {n: a for n, a in language_model(0).items() if n != "lm_head.weight"} | there
    full = save_model(tmp_path / "full", both | {here: np.zeros((100, 32), BF16)})
    less = save_model(tmp_path / "less", both, config=config_of(None) | more)
    for pair in ((full, less), (less, full)):
        result = run(*pair, tmp_path / "out", "--dry-run")
        assert result.exit_code == 1
        assert f"1 tensor only in full: {here}\n" in result.stderr
        assert "--on-missing base" in result.stderr


HEAD = (10, 4)
ENCODER, DECODER = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"model.embed_tokens.weight": HEAD, "vision.embed_tokens.weight": (6, 4)}, "model.embed_tokens.weight"),
        ({"model.embed_tokens.weight": HEAD, "vision.embed_tokens.weight": HEAD}, None),
        ({"shared.weight": HEAD, ENCODER: HEAD, DECODER: HEAD}, "shared.weight"),
        ({ENCODER: HEAD, DECODER: HEAD}, None),
        ({ENCODER: (9, 4), DECODER: HEAD}, DECODER),
        ({"model.embed_tokens.weight": (12, 4)}, "model.embed_tokens.weight"),
        ({"model.embed_tokens.weight": (10, 5)}, None),
        ({"model.embed_tokens.weight": (10,)}, None),
        ({"model.embed_tokens.weight": HEAD, "lm_head.weight": HEAD}, None),
    ],
)
def test_of_several_embeddings_the_head_is_the_one_that_can_be(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], expected: str | None
) -> None:
    """The only one of its shape, or what those are copies of; the only one of all, be it of another vocabulary."""
    model = save_model(tmp_path / "m", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert tied_embedding(open_checkpoint(model), HEAD) == expected


def test_tied_heads_of_another_vocabulary_are_a_mismatch(tmp_path: Path) -> None:
    y = language_model(1, vocab=104)
    del y["lm_head.weight"]
    base, ft = save_model(tmp_path / "base", language_model(0)), save_model(tmp_path / "ft", y)
    error = run(base, ft, tmp_path / "out").stderr
    assert "lm_head.weight: [100, 32] in base, [104, 32] in ft (a vocabulary mismatch: 100 and 104 tokens)" in error
    assert "only in" not in error


@pytest.mark.parametrize("tied", ["base", "ft", "inner"])
def test_transformers_loads_what_was_resolved(tmp_path: Path, tied: str) -> None:
    """Llamas of which one ties its head, and one saved without its head, loaded without a missing or unexpected key."""
    pytest.importorskip("torch")
    import transformers as hf

    sizes: Any = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=tied != "ft"))
    ft = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=tied != "base"))
    base.save_pretrained(tmp_path / "base")
    (ft.model if tied == "inner" else ft).save_pretrained(tmp_path / "ft")
    warnings: list[str] = []
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", 0.3, on_warning=warnings.append)
    assert any("prefix" in w if tied == "inner" else "head" in w for w in warnings)
    assert not any(w.startswith("tie_word_embeddings differs") for w in warnings)
    loaded, info = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x, y, merged = (model.state_dict() for model in (base, ft, loaded))
    for name in merged:
        other = y["model.embed_tokens.weight" if name == "lm_head.weight" and tied == "ft" else name]
        np.testing.assert_allclose(
            merged[name], float64_merge(x[name].numpy(), other.numpy(), 0.3), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("side", ["base", "ft", "both"])
@pytest.mark.parametrize(
    ("usual", "left"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
        ("shared.weight", "lm_head.weight"),
        ("shared.weight", DECODER),
        ("lm_head.bias", "lm_head.decoder.bias"),
    ],
)
def test_the_only_copy_of_a_tied_tensor_is_that_tensor(tmp_path: Path, usual: str, left: str, side: str) -> None:
    """Whatever name of several safetensors.torch.save_model left: in FT, in BASE, in both."""
    x, y = (
        {"n.weight": rng.standard_normal(3), "it": rng.standard_normal((10, 4))}
        for rng in map(np.random.default_rng, (1, 2))
    )
    folders = {}
    for name, tensors in (("base", x), ("ft", y)):
        own = left if side in (name, "both") else usual
        folders[name] = save_model(
            tmp_path / name, {"n.weight": tensors["n.weight"], own: tensors["it"]}, config=config_of(True)
        )
    report = merge(folders["base"], folders["ft"], tmp_path / "out", 0.3)
    out = load_folder(tmp_path / "out")
    assert out.keys() == load_folder(folders["base"]).keys()
    (matrix,) = (out[name] for name in out if name != "n.weight")
    np.testing.assert_allclose(matrix, float64_merge(x["it"], y["it"], 0.3), rtol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert not any("left out" in warning for warning in report.warnings)


@pytest.mark.parametrize("old", ["base", "ft"])
def test_names_that_libraries_changed_are_the_same_tensors(tmp_path: Path, old: str) -> None:
    """BERT's gamma and beta, torch's weight_g and weight_v; told; any other `gamma` is a tensor of its own."""
    pairs = {
        "bert.embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.beta": "bert.embeddings.LayerNorm.bias",
        "encoder.conv.weight_g": "encoder.conv.parametrizations.weight.original0",
        "encoder.conv.weight_v": "encoder.conv.parametrizations.weight.original1",
        "encoder.layer_scale.gamma": "encoder.layer_scale.gamma",
    }
    sides = {}
    for k, side in enumerate(("base", "ft")):
        names = pairs if side == old else pairs.values()
        sides[side] = {name: np.full(4, 10 * k + n, np.float32) for n, name in enumerate(names)}
    base, ft = (save_model(tmp_path / side, tensors) for side, tensors in sides.items())
    found = merge(base, ft, tmp_path / "out", 1)
    assert load_folder(tmp_path / "out").keys() == load_folder(base).keys()
    values = {pairs.get(n, n): v.tobytes() for n, v in load_folder(tmp_path / "out").items()}
    assert values == {pairs.get(n, n): v.tobytes() for n, v in load_folder(ft).items()}
    assert any(text.startswith("4 tensors have older or newer names in ft: ") for text in found.warnings)


def test_embeddings_and_biases_that_are_one_with_another_tensor(tmp_path: Path) -> None:
    """T5's and BART's shared embedding, BERT's two biases of one head: stored once or more often, on either side."""
    once = {"model.shared.weight": np.ones((6, 3), np.float32), "cls.predictions.bias": np.ones(6, np.float32)}
    more = {
        "model.encoder.embed_tokens.weight": once["model.shared.weight"],
        "model.decoder.embed_tokens.weight": once["model.shared.weight"],
        "cls.predictions.decoder.bias": once["cls.predictions.bias"],
        "lm_head.weight": once["model.shared.weight"],
    }
    other = {name: values + 1 for name, values in once.items()}
    full = save_model(tmp_path / "full", once | more)
    plain = save_model(tmp_path / "plain", other, config=config_of(True))
    done = merge(full, plain, tmp_path / "a", 1)
    found = load_folder(tmp_path / "a")
    assert found.keys() == (once | more).keys()
    for name, values in found.items():
        assert values.tobytes() == other["cls.predictions.bias" if "bias" in name else "model.shared.weight"].tobytes()
    assert any("which has model.shared.weight in its place" in text for text in done.warnings)
    done = merge(plain, full, tmp_path / "b", 1)
    assert {n: v.tobytes() for n, v in load_folder(tmp_path / "b").items()} == {n: v.tobytes() for n, v in once.items()}
    told = (
        "plain has model.shared.weight in its place, and so does the output: model.decoder.embed_tokens.weight of full"
    )
    assert any(text.startswith(told) for text in done.warnings)


def test_buffers_that_follow_from_the_configuration_may_be_on_one_side_only(tmp_path: Path) -> None:
    """Frequencies, positions and masks that older libraries stored: BASE's stay, FT's are left out, both aloud; a bias
    that was trained is none of them."""
    shared = {"h.0.attn.c_attn.bias": np.ones(6, np.float32), "wte.weight": np.ones((6, 3), np.float32)}
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "embeddings.position_ids": np.arange(5)[None],
        "gpt_neox.layers.1.attention.masked_bias": np.ones((), np.float32),
    }  # fmt: skip
    old, new = save_model(tmp_path / "old", shared | buffers), save_model(tmp_path / "new", shared)
    done = merge(old, new, tmp_path / "a")
    assert load_folder(tmp_path / "a").keys() == (shared | buffers).keys()
    assert any(text.startswith("4 tensors are not in new; old's are kept") for text in done.warnings)
    done = merge(new, old, tmp_path / "b")
    assert load_folder(tmp_path / "b").keys() == shared.keys()
    assert any(text.startswith("4 tensors are only in old; left out") for text in done.warnings)
    merge_models({"merge_method": "linear", "models": [
        {"model": str(m), "parameters": {"weight": 1}} for m in (new, old)]}, tmp_path / "c")  # fmt: skip
    assert load_folder(tmp_path / "c").keys() == shared.keys()
    lacking = save_model(tmp_path / "lacking", {"wte.weight": shared["wte.weight"]})
    assert "h.0.attn.c_attn.bias" in run(new, lacking, tmp_path / "d").stderr


# ------------------------------------------------------------------------------ what only another model has


def with_score(seed: int, **more: Any) -> dict[str, Any]:
    tensors = {name: array for name, array in language_model(seed).items() if name != "lm_head.weight"}
    return tensors | {"score.weight": np.full((2, 32), seed, BF16)} | more


def test_what_only_ft_has_is_copied_on_request_and_config_json_follows(tmp_path: Path) -> None:
    """A classifier on its base model: its head, its class and its labels; the rest is merged, config.json's too."""
    body = {name: array for name, array in language_model(0).items() if name != "lm_head.weight"}
    here = {"architectures": ["XModel"], "hidden_size": 32, "torch_dtype": "bfloat16"}
    there = {"architectures": ["XForSequenceClassification"], "id2label": {"0": "good", "1": "bad"}, "hidden_size": 32,
             "label2id": {"good": 0, "bad": 1}, "unrelated": 1}  # fmt: skip
    base = save_model(tmp_path / "base", body, config=here)
    ft = save_model(tmp_path / "ft", with_score(1), shards=2, config=there)
    refused = run(base, ft, tmp_path / "out")
    assert refused.exit_code == 1
    assert "--on-missing ft: the same, but tensors that BASE lacks are copied from a model" in refused.stderr
    result = run(base, ft, tmp_path / "out", "--on-missing", "ft", "--t", "0.3")
    assert result.exit_code == 0, result.stderr
    assert "1 tensor is only in ft; copied: score.weight." in result.stderr
    assert (
        "config.json has architectures, id2label, label2id from ft, as the output has score.weight of it"
        in result.stderr
    )
    out = load_folder(tmp_path / "out")
    assert out["score.weight"].tobytes() == with_score(1)["score.weight"].tobytes()
    plain = save_model(tmp_path / "plain", {n: a for n, a in with_score(1).items() if n != "score.weight"}, config=here)
    merge(base, plain, tmp_path / "expected", 0.3)
    expected = load_folder(tmp_path / "expected")
    assert all(out[name].tobytes() == expected[name].tobytes() for name in expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {**here, **{key: there[key] for key in ("architectures", "id2label", "label2id")}}
    assert report(tmp_path / "out")["score.weight"]["note"] == "not in the base: another model's, copied"
    found = CliRunner().invoke(all_commands, ["verify", str(tmp_path / "out"), "--against", str(base), str(ft)])
    assert found.exit_code == 0, found.output
    taken = run(base, ft, tmp_path / "files", "--on-missing", "ft", "--files-from", "ft")
    assert "config.json has" not in taken.stderr
    assert json.loads((tmp_path / "files/config.json").read_text()) == there


def test_what_ft_lacks_is_bases_with_on_missing_ft_too(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0) | {"only.base": np.ones(3, BF16)})
    ft = save_model(tmp_path / "ft", language_model(1) | {"only.ft": np.full(3, 2, BF16)})
    merge(base, ft, tmp_path / "out", on_missing="ft")
    out = load_folder(tmp_path / "out")
    assert (out["only.base"] == 1).all()
    assert (out["only.ft"] == 2).all()
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (base, ft)]}
    merge_models(recipe, tmp_path / "yaml", on_missing="ft")
    assert load_folder(tmp_path / "yaml").keys() == out.keys()


# ------------------------------------------------------------------------------ names that the user gives

OURS = {"encoder.conv.weight": (4, 3), "encoder.conv.bias": (4,), "head.w": (2, 4), "same": (3,)}
THEIRS = {"reparam.kernel": (4, 3), "reparam.offset": (4,), "final": (2, 4), "same": (3,)}
NAMES = {"reparam.kernel": "encoder.conv.weight", "reparam.offset": "encoder.conv.bias", "final": "head.w"}


def named_pair(folder: Path) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(0)
    x, y = ({n: rng.standard_normal(s).astype(np.float32) for n, s in names.items()} for names in (OURS, THEIRS))
    twin = {NAMES.get(name, name): array for name, array in y.items()}
    named = (("base", x), ("ft", y), ("twin/ft", twin))
    return tuple(save_model(folder / name, tensors) for name, tensors in named)  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["json", "columns", "csv"])
def test_names_from_a_file_pair_what_two_programs_named(tmp_path: Path, form: str) -> None:
    base, ft, twin = named_pair(tmp_path)
    lines = {"columns": "# theirs  ours\n" + "\n".join(f"{a}\t{b}" for a, b in NAMES.items()),
             "csv": "\n".join(f"{a}, {b}" for a, b in NAMES.items()), "json": json.dumps(NAMES)}  # fmt: skip
    (tmp_path / "names").write_text(lines[form])
    result = run(base, ft, tmp_path / "out", "--t", "0.3", "--names-from", tmp_path / "names")
    assert result.exit_code == 0, result.stderr
    merge(base, twin, tmp_path / "expected", 0.3)
    check_same_weights(tmp_path / "out", tmp_path / "expected")
    assert "--names-from FILE" in (tmp_path / "out/README.md").read_text()
    (tmp_path / "names").unlink()  # the report has them
    found = CliRunner().invoke(all_commands, ["verify", str(tmp_path / "out"), "--against", str(base), str(ft)])
    assert found.exit_code == 0, found.output


def test_names_may_change_places(tmp_path: Path) -> None:
    x = {"a": np.full(3, 1.0), "b": np.full(3, 2.0)}
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", {"a": x["b"], "b": x["a"]})
    merge(base, ft, tmp_path / "out", 0.5, names_from='{"a": "b", "b": "a"}')
    check_same_weights(tmp_path / "out", base)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"final": "head.w", "nope": "same"}', "not in ft: nope"),
        ('{"final": "nope"}', "not in base: nope"),
        ('{"final": "same"}', "ft has other tensors of these names, which need one of their own: same"),
        ("final head.w\nreparam.kernel head.w", "head.w of BASE is named twice"),
        ('{"final": "head.w", "final": "same"}', "final of FT is named twice"),
        ("final", "line 1: has 1 words, expected JSON"),
        ('{"final": 3}', "has a value that is no name"),
        ('{"final": ', "is not JSON"),
        ("", "names nothing"),
    ],
)
def test_names_that_do_not_fit_are_refused_whole(tmp_path: Path, text: str, problem: str) -> None:
    base, ft, _ = named_pair(tmp_path)
    (tmp_path / "names").write_text(text)
    result = run(base, ft, tmp_path / "out", "--names-from", tmp_path / "names")
    assert result.exit_code != 0
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


def test_names_that_only_shapes_suggest_are_in_the_error(tmp_path: Path) -> None:
    """Where shapes allow one way only; never taken without being asked."""
    base, ft, _ = named_pair(tmp_path)
    error = run(base, ft, tmp_path / "out").stderr
    lines = "\n    ".join(f"{a} {b}" for a, b in sorted(NAMES.items()))
    expected = "--names-from FILE with these lines, if they are the same tensors (--names-to FILE writes them)"
    assert f"{expected}:\n    {lines}" in error
    other = save_model(tmp_path / "o", {"p": np.zeros(3), "q": np.zeros(3)})
    assert (
        "--names-from"
        not in run(save_model(tmp_path / "b2", {"r": np.zeros(3), "s": np.zeros(3)}), other, "out").stderr
    )


def test_suggested_names_are_written_on_request_and_then_read(tmp_path: Path) -> None:
    base, ft, _ = named_pair(tmp_path)
    names = tmp_path / "names.json"
    result = run(base, ft, tmp_path / "out", "--names-to", names)
    assert result.exit_code == 1
    assert f"names.json has {len(NAMES)} pairs: check them, then give --names-from" in result.stderr
    assert json.loads(names.read_text()) == NAMES
    assert run(base, ft, tmp_path / "out", "--names-from", names, "--names-to", names).exit_code == 0
    before = names.read_text()
    assert "is there already. Choose another name" in run(base, ft, tmp_path / "x", "--names-to", names).stderr
    assert names.read_text() == before
    other = save_model(tmp_path / "o", {"p": np.zeros(3), "q": np.zeros(3)})
    more = run(base, other, tmp_path / "x", "--names-to", tmp_path / "more.json")
    assert "--names-to: shapes suggest no pairs of names; nothing is written." in more.stderr
    assert not (tmp_path / "more.json").exists()


@pytest.mark.parametrize("ft_tied", [None, False])
def test_an_embedding_that_ft_lacks_is_not_its_head(tmp_path: Path, ft_tied: bool | None) -> None:
    """BASE's embedding and head are two tensors; an incomplete FT has one of them, and does not say that it is both."""
    x, y = language_model(0), language_model(1)
    del y["model.embed_tokens.weight"]
    base = save_model(tmp_path / "base", x, config=config_of(False))
    result = run(base, save_model(tmp_path / "ft", y, config=config_of(ft_tied)), tmp_path / "out")
    assert result.exit_code == 1
    assert "1 tensor only in base: model.embed_tokens.weight" in result.stderr


def test_layers_that_base_lacks_are_not_added(tmp_path: Path) -> None:
    """config.json counts BASE's layers: a loader would ignore the others, at exit 0."""
    x, y = language_model(0), language_model(1)
    more = {name.replace("layers.1.", "layers.7."): array for name, array in y.items() if "layers.1." in name}
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y | more)
    assert not more.keys() & x.keys(), "the layer is new"
    result = run(base, ft, tmp_path / "out", "--on-missing", "ft")
    assert result.exit_code == 1
    assert "in layers that base does not have: model.layers.7." in result.stderr
    assert not (tmp_path / "out").exists()
