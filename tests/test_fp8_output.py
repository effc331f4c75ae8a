"""`--dtype base` over 8-bit floats with scales: BASE's very format, with codes and scales of the merged values."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BF16, DTYPES, STORED, Array, contents, load_file, load_folder, save_file, save_model
from merge_tool import DataError, MergeToolError, merge, open_checkpoint
from merge_tool.api import plan_recipe
from merge_tool.checkpoint.header import TensorInfo, build_header
from merge_tool.checkpoint.source import LocalFile
from merge_tool.compare.diff import diff
from merge_tool.recipe.pair import pair as pair_recipe
from merge_tool.verification.inspection import inspect
from merge_tool.verification.verify import verify
from oracle import float64_merge
from test_vocab import tokenizer

E8M0 = STORED["F8_E8M0"]
CODES = {name: DTYPES[name] for name in ("F8_E4M3", "F8_E5M2")}
SCALES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16, "F8_E8M0": E8M0}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
Block = tuple[int, int]


def normal(seed: int, *shape: int) -> Array:
    """Values about 0.02 large; two seeds are some degrees apart."""
    shared, own = (np.random.default_rng(s).standard_normal(shape) for s in (99, seed))
    return (0.02 * (shared + 0.1 * own)).astype(np.float32)


# ---------------------------------------------------------------------- the quantiser, written another way


def finite_values(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """All finite values of an 8-bit dtype but -0, in order, and their bit patterns."""
    bits = np.arange(256, dtype=np.uint8)
    wide = bits.view(dtype).astype(np.float64)
    keep = np.isfinite(wide) & ((bits != 0x80) | (dtype == E8M0))
    order = np.argsort(wide[keep])
    return wide[keep][order], bits[keep][order]


def least_not_below(value: float, dtype: np.dtype[Any]) -> Array:
    """The smallest value of `dtype` that is at least `value`: by search through all of them, or by neighbours."""
    if dtype == np.float32:
        found = np.float32(value)
        return np.array(found if float(found) >= value else np.nextafter(found, np.float32(np.inf)))
    bits = np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
    with np.errstate(invalid="ignore"):
        wide = bits.view(dtype).astype(np.float64)
    fits = np.flatnonzero(wide >= value)
    return bits[fits[np.argmin(wide[fits])]].view(dtype)


def nearest_codes(quotients: Array, dtype: np.dtype[Any]) -> Array:
    """Each value's nearest code, of two the one with an even last bit: by search among all codes."""
    values, bits = finite_values(dtype)
    above = np.clip(np.searchsorted(values, quotients), 1, len(values) - 1)
    low, high = quotients - values[above - 1], values[above] - quotients
    takes_high = (high < low) | ((high == low) & (bits[above] % 2 == 0))
    found = np.where(takes_high, bits[above], bits[above - 1])
    return np.where((found == 0) & np.signbit(quotients), 0x80, found).astype(np.uint8).view(dtype)


def quantise(values: Array, block: Block, codes: np.dtype[Any], scales: np.dtype[Any]) -> tuple[Array, Array]:
    """Codes and scales of float64 `values`, block after block, in loops over whole tensors."""
    rows, columns = values.shape[-2:]
    largest_code = finite_values(codes)[0][-1]
    found = np.zeros(values.shape, codes)
    own = np.zeros((*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1])), scales)
    for place in np.ndindex(own.shape):
        *lead, i, j = place
        cut = (*lead, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        largest = np.abs(values[cut]).max()
        own[place] = least_not_below(largest / largest_code if largest else 1.0, scales)
        found[cut] = nearest_codes(values[cut] / float(own[place]), codes)
    return found, own


def meaning(codes: Array, scales: Array, block: Block) -> Array:
    """The real values as float32: every scale repeated over its block."""
    wide = np.repeat(np.repeat(scales.astype(np.float32), block[0], -2), block[1], -1)
    return codes.astype(np.float32) * wide[..., : codes.shape[-2], : codes.shape[-1]]


def half_steps(codes: Array, scales: Array, block: Block) -> Array:
    """How far a value may be from what its code means: half the step to the next code, on the larger side."""
    positive = finite_values(codes.dtype)[0]
    positive = positive[positive >= 0]
    steps = np.append(np.diff(positive), positive[-1] - positive[-2])
    place = np.searchsorted(positive, np.abs(codes.astype(np.float64)))
    ones = np.ones(codes.shape, codes.dtype)
    return steps[place] / 2 * meaning(ones, scales, block).astype(np.float64)


# ------------------------------------------------------------------------------------------- models


def config_of(block: Block, **more: Any) -> dict[str, Any]:
    quantisation = {**DEEPSEEK, "weight_block_size": list(block)}
    return {
        "architectures": ["StableLmForCausalLM"],
        "torch_dtype": "bfloat16",
        "quantization_config": quantisation,
        **more,
    }


def packed(
    values: dict[str, Array], block: Block, codes: str = "F8_E4M3", scales: str = "F32", suffix: str = "_scale_inv"
) -> dict[str, Array]:
    """Tensors as they are stored: matrices in 8 bits, the rest in bfloat16."""
    tensors: dict[str, Array] = {}
    for name, array in values.items():
        if array.ndim < 2:
            tensors[name] = array.astype(BF16)
        else:
            tensors[name], tensors[name + suffix] = quantise(
                array.astype(np.float64), block, CODES[codes], SCALES[scales]
            )
    return tensors


def matrices(seed: int) -> dict[str, Array]:
    return {"m.0.weight": normal(seed, 50, 40), "m.1.weight": normal(seed, 16, 33), "norm.weight": normal(seed, 7)}


def fp8_model(folder: Path, seed: int, block: Block = (16, 16), **options: Any) -> Path:
    return save_model(folder, packed(matrices(seed), block), config=config_of(block), **options)


def plain_model(folder: Path, seed: int) -> Path:
    tensors = {name: array.astype(BF16) for name, array in matrices(seed).items()}
    return save_model(folder, tensors, config={"architectures": ["StableLmForCausalLM"], "torch_dtype": "bfloat16"})


@pytest.fixture
def fp8_pair(tmp_path: Path) -> tuple[Path, Path]:
    """BASE and FT, both in 8 bits; FT in other blocks and two shards."""
    return fp8_model(tmp_path / "base", 1), fp8_model(tmp_path / "ft", 2, (32, 8), shards=2)


def read(folder: Path, name: str) -> Array:
    with open_checkpoint(folder) as checkpoint:
        info = checkpoint.tensors[name]
        return checkpoint.read_new(name, 0, info.numel).reshape(info.shape)


def same_bytes(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a
    )


# --------------------------------------------------------------------------------------- the very values


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_codes_and_scales_are_those_of_the_exact_merge(tmp_path_factory: Any, data: Any) -> None:
    """Bit for bit what another quantiser makes of the merge in float64; and within half a step of the exact merge.

    Any grid, sizes that are no multiples of the block, experts, both kinds of codes, all four types of scales; FT in
    bfloat16 or in 8 bits with other blocks; one block of it all zero.
    """
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    codes, scales = data.draw(st.sampled_from(list(CODES))), data.draw(st.sampled_from(list(SCALES)))
    t = data.draw(st.sampled_from([0.3, 0.5, 0.9, -0.25]))
    x, y = normal(1, *shape), normal(2, *shape)
    x[..., : block[0], : block[1]] = y[..., : block[0], : block[1]] = 0
    folder = tmp_path_factory.mktemp("f")
    base = save_model(folder / "b", packed({"a.weight": x}, block, codes, scales), config=config_of(block))
    ft = save_model(folder / "f", {"a.weight": y.astype(BF16)})
    if data.draw(st.booleans()):
        ft = save_model(folder / "f", packed({"a.weight": y}, (4, 5)), config=config_of((4, 5)))
    merge(base, ft, folder / "out", t, dtype="base", extrapolate=True)
    merge(base, ft, folder / "wide", t, dtype="float64", extrapolate=True)
    out, wide = load_folder(folder / "out"), load_folder(folder / "wide")["a.weight"]
    expected = quantise(wide, block, CODES[codes], SCALES[scales])
    if np.array_equal(read(base, "a.weight"), read(ft, "a.weight").astype(np.float32)):  # all zero
        expected = load_folder(base)["a.weight"], load_folder(base)["a.weight_scale_inv"]
    assert same_bytes(out, {"a.weight": expected[0], "a.weight_scale_inv": expected[1]})
    exact = float64_merge(read(base, "a.weight"), read(ft, "a.weight"), t)
    allowed = half_steps(*expected, block) * (1 + 1e-6)
    assert (np.abs(read(folder / "out", "a.weight") - exact) <= allowed).all()


LAYOUTS: dict[str, tuple[str, Callable[[int, int], Block], Callable[[Array], Array]]] = {
    "a block": ("_scale_inv", lambda rows, columns: (128, 128), lambda s: s),
    "a row": ("_scale", lambda rows, columns: (1, columns), lambda s: s),
    "a row, flat": ("_scale", lambda rows, columns: (1, columns), lambda s: s.ravel()),
    "the tensor, a scalar": ("_scale", lambda rows, columns: (rows, columns), lambda s: s.reshape(())),
    "the tensor, of one element": ("_scale_inv", lambda rows, columns: (rows, columns), lambda s: s.reshape(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_grids_are_written_as_they_are_read(tmp_path: Path, layout: str) -> None:
    """One scale a block, row or tensor, whatever its shape, of more elements than are in hand at a time; in a file
    without a configuration."""
    suffix, block_of, reshape = LAYOUTS[layout]
    block = block_of(300, 700)
    codes, scales = quantise(normal(1, 300, 700).astype(np.float64), block, CODES["F8_E4M3"], SCALES["F32"])
    save_file({"w": codes, f"w{suffix}": reshape(scales)}, tmp_path / "base.safetensors")
    save_file({"w": normal(2, 300, 700)}, tmp_path / "ft.safetensors")
    parents = tmp_path / "base.safetensors", tmp_path / "ft.safetensors"
    merge(*parents, tmp_path / "out.safetensors", 0.4, dtype="base", report_path=tmp_path / "report.json")
    merge(*parents, tmp_path / "wide.safetensors", 0.4, dtype="float64")
    codes, scales = quantise(load_file(tmp_path / "wide.safetensors")["w"], block, codes.dtype, scales.dtype)
    assert same_bytes(load_file(tmp_path / "out.safetensors"), {"w": codes, f"w{suffix}": reshape(scales)})
    for full in (False, True):
        (found,) = verify(tmp_path / "out.safetensors", parents, full=full, report_path=tmp_path / "report.json")
        assert found.problems == ()


def test_scales_are_rounded_up_so_that_no_code_overflows(tmp_path: Path) -> None:
    """Largest values just above what a power of two, or the next scale in bfloat16, could take."""
    largest = np.array([448.0, 449.0, 447.0, 448.5, 2.0**-140, 450.0], np.float32)
    for scales in SCALES:
        y = np.tile(largest[:, None], (1, 4)) * np.array([1.0, -1.0, 0.5, 0.0], np.float32)
        x = packed({"w": normal(1, 6, 4)}, (1, 4), scales=scales)
        base = save_model(tmp_path / f"b{scales}", x, config=config_of((1, 4)))
        ft = save_model(tmp_path / f"f{scales}", {"w": y})
        merge(base, ft, tmp_path / f"out{scales}", 1, dtype="base")
        out = load_folder(tmp_path / f"out{scales}")
        assert (out["w"].view(np.uint8) & 0x7F != 0x7F).all()
        assert (largest <= 448 * out["w_scale_inv"].astype(np.float64).ravel()).all()
        expected = quantise(y.astype(np.float64), (1, 4), CODES["F8_E4M3"], SCALES[scales])
        assert same_bytes(out, dict(zip(("w", "w_scale_inv"), expected, strict=True)))


def test_values_beyond_the_scales_are_refused_by_name(tmp_path: Path) -> None:
    """Scales in float16 end at 65504; nothing is left behind."""
    base = save_model(tmp_path / "b", packed({"w": normal(1, 8, 8)}, (4, 4), scales="F16"), config=config_of((4, 4)))
    ft = save_model(tmp_path / "f", {"w": np.full((8, 8), 1e9, np.float32)})
    with pytest.raises(DataError, match=r"w: merged values reach 5e\+08, too much for F8_E4M3 with scales in F16"):
        merge(base, ft, tmp_path / "out", 0.5, method="linear", dtype="base")
    assert not (tmp_path / "out").exists()


def test_negative_and_zero_scales_are_plain_arithmetic(tmp_path: Path) -> None:
    tensors = packed({"w": normal(1, 8, 8)}, (4, 4))
    tensors["w_scale_inv"] *= np.array([[-1, 1], [1, 0]], np.float32)
    base = save_model(tmp_path / "b", tensors, config=config_of((4, 4)))
    ft = save_model(tmp_path / "f", {"w": normal(2, 8, 8)})
    for dtype in ("base", "float64"):
        merge(base, ft, tmp_path / dtype, 0.5, dtype=dtype)
    expected = quantise(load_folder(tmp_path / "float64")["w"], (4, 4), CODES["F8_E4M3"], SCALES["F32"])
    assert same_bytes(load_folder(tmp_path / "base"), dict(zip(("w", "w_scale_inv"), expected, strict=True)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers_are_refused_by_the_weights_name(tmp_path: Path, bad: float) -> None:
    tensors = packed({"w": normal(1, 8, 8)}, (4, 4))
    tensors["w_scale_inv"][1, 0] = bad
    base = save_model(tmp_path / "b", tensors, config=config_of((4, 4)))
    ft = save_model(tmp_path / "f", {"w": normal(2, 8, 8)})
    for pair in ((base, ft), (ft, base)):
        with pytest.raises(DataError, match=r"^w in b/model\.safetensors: element 32 is (nan|-?inf)"):
            merge(*pair, tmp_path / "out", dtype="base")


# ------------------------------------------------------------------------------------------- the format


def test_the_output_has_the_format_of_the_base(tmp_path: Path, fp8_pair: tuple[Path, Path]) -> None:
    """Its names, shapes, dtypes and config.json; it is inspected, compared and read as any model in 8 bits."""
    base, ft = fp8_pair
    merge(base, ft, tmp_path / "out", 0.3, dtype="base")
    assert merge(base, ft, tmp_path / "out", 0.3, dtype="base").already_complete
    before, after = load_folder(base), load_folder(tmp_path / "out")
    assert {n: (a.dtype, a.shape) for n, a in before.items()} == {n: (a.dtype, a.shape) for n, a in after.items()}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert inspect(tmp_path / "out").dtypes == inspect(base).dtypes
    assert diff(base, tmp_path / "out").unlike == ()
    assert len(diff(base, tmp_path / "out").tensors) == 3
    assert "2 weights are 8-bit floats with scales, as in base" in (tmp_path / "out/README.md").read_text()


def test_the_report_speaks_of_the_real_values_once(tmp_path: Path, fp8_pair: tuple[Path, Path]) -> None:
    """Codes have the angle that a merge in float32 has, scales have none, and a schedule counts each weight once."""
    report = merge(*fp8_pair, tmp_path / "out", dtype="base", t_for={"m.*.weight": 0.2})
    wide = merge(*fp8_pair, tmp_path / "wide", dtype="float32", t_for={"m.*.weight": 0.2})
    ours, theirs = ({t["name"]: t for t in r.tensors} for r in (report, wide))
    for name in ("m.0.weight", "m.1.weight"):
        assert ours[name]["dtype"] == "F8_E4M3"
        assert ours[name]["settings"] == ours[f"{name}_scale_inv"]["settings"] == {"t": 0.2}
        assert ours[name]["angle_degrees"] == theirs[name]["angle_degrees"]
        assert ours[f"{name}_scale_inv"]["scales_of"] == name
        assert "angle_degrees" not in ours[f"{name}_scale_inv"]
    assert report.num_scheduled == wide.num_scheduled == 2
    assert report.summary.median_degrees == wide.summary.median_degrees


def test_the_plan_is_what_is_written(tmp_path: Path, fp8_pair: tuple[Path, Path]) -> None:
    words = [*map(str, fp8_pair), str(tmp_path / "out"), "--dtype", "base", "--max-shard-size", "2kB"]
    command = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge", *words]
    plain = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    assert "8 bits    2 weights, quantised again as in base" in plain.stdout
    plan = json.loads(subprocess.run([*command, "--dry-run", "--json"], capture_output=True, check=True).stdout)
    subprocess.run(command, capture_output=True, check=True)
    assert len(plan["shards"]) > 1
    for shard in plan["shards"]:
        assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["bytes"]
    single = merge(*fp8_pair, tmp_path / "single", dtype="base").outputs[0]
    assert same_bytes(load_folder(tmp_path / "out"), load_folder(single))


def test_what_is_not_merged_is_the_bases_byte_for_byte(tmp_path: Path, fp8_pair: tuple[Path, Path]) -> None:
    """t = 0; what --exclude and --on-missing keep; and what both mean alike, in whatever blocks FT has it."""
    base, ft = fp8_pair
    before = load_folder(base)
    merge(base, ft, tmp_path / "zero", 0, dtype="base")
    assert same_bytes(load_folder(tmp_path / "zero"), before)
    merge(base, ft, tmp_path / "kept", 0.5, dtype="base", exclude=["m.0.weight"])
    kept = load_folder(tmp_path / "kept")
    changed = {name for name in before if before[name].tobytes() != kept[name].tobytes()}
    assert changed == {"m.1.weight", "m.1.weight_scale_inv", "norm.weight"}
    alike = {"m.0.weight": read(base, "m.0.weight"), "norm.weight": before["norm.weight"]}
    merge(base, save_model(tmp_path / "alike", alike), tmp_path / "out", 0.5, dtype="base", on_missing="base")
    assert same_bytes(load_folder(tmp_path / "out"), before)
    for out in ("zero", "kept"):
        assert [found.problems for found in verify(tmp_path / out, fp8_pair)] == [()]


def test_at_t_1_the_finetunes_bytes_are_taken_where_they_fit(tmp_path: Path) -> None:
    """Of the same grid and types; of others, its values are quantised as BASE's are."""
    base, ft = fp8_model(tmp_path / "base", 1), fp8_model(tmp_path / "ft", 2)
    other, plain = fp8_model(tmp_path / "other", 2, (8, 8)), plain_model(tmp_path / "plain", 2)
    merge(base, ft, tmp_path / "a", 1, dtype="base")
    assert same_bytes(load_folder(tmp_path / "a"), load_folder(ft))
    for number, third in enumerate((other, plain)):
        merge(base, third, tmp_path / f"out{number}", 1, dtype="base")
        out = load_folder(tmp_path / f"out{number}")
        values = read(third, "m.0.weight").astype(np.float64)
        expected = quantise(values, (16, 16), CODES["F8_E4M3"], SCALES["F32"])
        assert same_bytes(
            {n: a for n, a in out.items() if "m.0." in n},
            dict(zip(("m.0.weight", "m.0.weight_scale_inv"), expected, strict=True)),
        )
        assert [found.problems for found in verify(tmp_path / f"out{number}", (base, third))] == [()]


def test_scales_of_activations_are_the_bases_and_told(tmp_path: Path) -> None:
    """Static calibration is of one model: it is copied, whatever FT has, and a warning says so."""
    ours = {"m.0.input_scale": np.full(1, 0.25, np.float32), "m.0.output_scale": np.array(2.0, np.float32)}
    theirs = {"m.0.input_scale": np.full(1, 0.5, np.float32)}
    pair = [
        save_model(tmp_path / name, {**packed(matrices(k), (16, 16)), **scales}, config=config_of((16, 16)))
        for k, (name, scales) in enumerate((("base", ours), ("ft", theirs)))
    ]
    report = merge(*pair, tmp_path / "out", dtype="base")
    assert same_bytes({n: a for n, a in load_folder(tmp_path / "out").items() if n in ours}, ours)
    told = [text for text in report.warnings if text.startswith("2 scales of activations are copied from base")]
    assert "m.0.input_scale, m.0.output_scale" in told[0]
    for full in (False, True):
        assert [found.problems for found in verify(tmp_path / "out", (pair[0], pair[1]), full=full)] == [()]


def test_files_from_the_finetune_must_speak_of_the_same_format(tmp_path: Path) -> None:
    base, ft, plain = fp8_model(tmp_path / "b", 1), fp8_model(tmp_path / "f", 2), plain_model(tmp_path / "p", 2)
    with pytest.raises(MergeToolError, match=r"files_from=\"ft\": config\.json of p does not describe the 8 bits"):
        merge(base, plain, tmp_path / "out", dtype="base", files_from="ft")
    assert not (tmp_path / "out").exists()
    merge(base, ft, tmp_path / "out", dtype="base", files_from="ft")
    assert (tmp_path / "out/config.json").read_bytes() == (ft / "config.json").read_bytes()


def test_a_finetune_in_8_bits_alone_gives_what_the_base_has(tmp_path: Path) -> None:
    base, ft = plain_model(tmp_path / "p", 2), fp8_model(tmp_path / "f", 1)
    merge(base, ft, tmp_path / "out", dtype="base")
    assert {a.dtype for a in load_folder(tmp_path / "out").values()} == {BF16}
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()


def test_codes_with_something_added_to_them_are_refused(tmp_path: Path) -> None:
    """An adapter over BASE's 8 bits; over FT's it is merged."""
    base = fp8_model(tmp_path / "base", 1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"m.0.lora_A.weight": normal(5, 2, 40), "m.0.lora_B.weight": normal(6, 50, 2)}
    save_file({f"base_model.model.{n}": a for n, a in factors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(MergeToolError, match=r"base\+adapter has 1 tensor in 8 bits with something added.*m\.0\.wei"):
        merge(f"{base}+{adapter}", base, tmp_path / "out", dtype="base")
    merge(base, adapter, tmp_path / "out", dtype="base")
    before, after = load_folder(base), load_folder(tmp_path / "out")
    assert {n for n in before if before[n].tobytes() != after[n].tobytes()} == {"m.0.weight", "m.0.weight_scale_inv"}


def test_rows_by_token_go_with_weights_in_8_bits(tmp_path: Path) -> None:
    """--vocab: embeddings have no scales in practice; a weight beside them is what it is without --vocab."""
    pair, tokens = [], (["<s>", "a", "b"], ["<s>", "b", "a", "c"])
    for seed, words in enumerate(tokens):
        tensors = packed({"m.0.weight": normal(seed, 50, 40)}, (16, 16))
        tensors["model.embed_tokens.weight"] = normal(seed, len(words), 40).astype(BF16)
        config = config_of((16, 16), vocab_size=len(words), tie_word_embeddings=True)
        side_files = {"tokenizer.json": tokenizer(words)}
        pair.append(save_model(tmp_path / f"m{seed}", tensors, config=config, side_files=side_files))
    merge(*pair, tmp_path / "out", 0.4, dtype="base", vocab="union")
    merge(*pair, tmp_path / "plain", 0.4, dtype="base", exclude=["embed_tokens"])
    out, plain = load_folder(tmp_path / "out"), load_folder(tmp_path / "plain")
    assert out.pop("model.embed_tokens.weight").shape == (4, 40)
    del plain["model.embed_tokens.weight"]
    assert same_bytes(out, plain)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == config_of((16, 16), vocab_size=4, tie_word_embeddings=True)
    for full in (False, True):
        assert [found.problems for found in verify(tmp_path / "out", (pair[0], pair[1]), full=full)] == [()]


@pytest.mark.parametrize("shape", [(), (0, 4)])
def test_scalars_and_empty_weights_with_a_scale_are_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"w": np.ones(shape, DTYPES["F8_E4M3"]), "w_scale": np.array(0.5, np.float32)}
    base = save_model(tmp_path / "b", {**tensors, "x": normal(1, 3)}, config={})
    ft = save_model(tmp_path / "f", {"w": np.full(shape, 3.0, np.float32), "x": normal(2, 3)})
    merge(base, ft, tmp_path / "out", 1, dtype="base")
    assert np.allclose(read(tmp_path / "out", "w"), np.full(shape, 3.0))


# ----------------------------------------------------------------------------- memory, order, interruption


def large_pair(tmp_path: Path) -> tuple[Path, Path]:
    """Matrices of several tiles, one of them with blocks that cross tiles, and experts."""
    shapes = {"a.w": (700, 1500), "b.w": (3, 130, 300), "c.w": (40, 40), "d.w": (1, 300_000)}
    sides = []
    for seed, name in ((1, "base"), (2, "ft")):
        tensors: dict[str, Array] = {}
        for key, shape in shapes.items():
            values = normal(seed, *shape).astype(np.float64)
            tensors[key], tensors[f"{key}_scale_inv"] = quantise(values, (100, 200), CODES["F8_E4M3"], SCALES["BF16"])
        sides.append(save_model(tmp_path / name, tensors, config=config_of((100, 200)), shards=seed))
    return sides[0], sides[1]


def test_bytes_do_not_depend_on_memory_jobs_or_sharding(tmp_path: Path) -> None:
    """Read once or thrice, by one worker or several, in one file or many, at one t or among others."""
    base, ft = large_pair(tmp_path)
    merge(base, ft, tmp_path / "a", 0.4, dtype="base", jobs=2)
    words = [str(base), str(ft), str(tmp_path / "b"), "--t", "0.4", "--dtype", "base", "--memory", "64MB", "-j", "1"]
    subprocess.run([sys.executable, "-m", "merge_tool", "merge", *words], capture_output=True, check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    merge(base, ft, tmp_path / "many", [0, 0.4, 0.7, 1], dtype="base", jobs=4, max_shard_bytes=100_000)
    assert same_bytes(load_folder(tmp_path / "a"), load_folder(tmp_path / "many/t-0.4"))
    merge(base, ft, tmp_path / "c", 0.7, dtype="base", jobs=3)
    assert same_bytes(load_folder(tmp_path / "c"), load_folder(tmp_path / "many/t-0.7"))
    assert same_bytes(load_folder(base), load_folder(tmp_path / "many/t-0"))
    assert same_bytes(load_folder(ft), load_folder(tmp_path / "many/t-1"))
    for full in (False, True):
        found = verify(tmp_path / "many", (base, ft), full=full)
        assert [one.problems for one in found] == [(), (), (), ()]


@pytest.mark.parametrize("scales_bytes", [10**6, 0])
def test_codes_begin_with_what_the_passes_of_the_scales_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales_bytes: int
) -> None:
    """A weight that does not fit the memory is read three times where its scales can be kept, and five times
    elsewhere: the same bytes."""
    shape = (700, 512)  # three tiles
    base = save_model(tmp_path / "b", packed({"a.weight": normal(1, *shape)}, (8, 8)), config=config_of((8, 8)))
    ft = save_model(tmp_path / "f", {"a.weight": normal(2, *shape)})
    merge(base, ft, tmp_path / "usual", 0.4, dtype="base")
    large, read_some, counted = base / "model.safetensors", LocalFile._read_some, [0]

    def counting(self: LocalFile, offset: int, buffer: memoryview) -> int:
        count = read_some(self, offset, buffer)
        counted[0] += count if self.path.samefile(large) and len(buffer) > 10_000 else 0
        return count

    monkeypatch.setattr(LocalFile, "_read_some", counting)
    monkeypatch.setattr("merge_tool.plan.memory._arena_bytes", lambda plan, room: 0)
    monkeypatch.setattr("merge_tool.plan.memory._stored_scales_bytes", lambda plan: scales_bytes)
    merge(base, ft, tmp_path / "out", 0.4, dtype="base", jobs=1)
    codes = shape[0] * shape[1]
    assert counted[0] // codes == (3 if scales_bytes else 5)
    assert same_bytes(load_folder(tmp_path / "out"), load_folder(tmp_path / "usual"))


def test_an_interrupted_merge_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """With codes and scales of one weight in two shards, stopped after each of many steps."""
    base, ft = large_pair(tmp_path)
    merge(base, ft, tmp_path / "whole", 0.4, dtype="base", max_shard_bytes=100_000)

    def stopping(after: int) -> Callable[[int, str], None]:
        left = iter(range(after))

        def count(nbytes: int, name: str) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        return count

    stopped = 0
    for after in range(2, 60, 3):
        try:
            merge(base, ft, tmp_path / "out", 0.4, dtype="base", max_shard_bytes=100_000, on_progress=stopping(after))
        except KeyboardInterrupt:
            stopped += 1
            continue
        break
    assert stopped > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def write_huge(path: Path, rows: int, columns: int, seed: int) -> Path:
    """A file of one large matrix in blocks of 128 x 128, and one in rows, in little memory: the same bytes over."""
    blocks = (-(-rows // 128), -(-columns // 128))
    infos = [
        TensorInfo("a.weight", "F8_E4M3", (rows, columns), 0),
        TensorInfo("a.weight_scale_inv", "F32", blocks, 0),
        TensorInfo("b.weight", "F8_E4M3", (8 * columns, 64), 0),
        TensorInfo("b.weight_scale", "F32", (8 * columns, 1), 0),
    ]
    header, placed = build_header(infos, {"format": "pt"})
    chance = np.random.default_rng(seed)
    codes = chance.standard_normal(1 << 20).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).tobytes()
    scales = (1e-3 * (1 + chance.random(1 << 12))).astype(np.float32).tobytes()
    with path.open("wb") as file:
        file.write(header)
        for info in placed:
            left, block = info.nbytes, codes if info.dtype == "F8_E4M3" else scales
            while left:
                left -= file.write(block[: min(left, len(block))])
    return path


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("huge8")
    pair = tuple(write_huge(folder / f"{k}.safetensors", 9_000, 4_100, k) for k in (1, 2))
    yield pair[0], pair[1]
    for path in pair:
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
@pytest.mark.parametrize(
    ("ts", "jobs"),
    [
        ("0.4", "1"),
        pytest.param("0.4", "8", marks=pytest.mark.slow),
        pytest.param("0.2,0.4,0.6,0.8,1", "4", marks=pytest.mark.slow),
    ],
)
def test_a_large_tensor_is_quantised_below_the_least_budget(
    huge: tuple[Path, Path], tmp_path: Path, ts: str, jobs: str
) -> None:
    """148 MB of values each side in 64 MB, and the estimate within a fifth."""
    words = [*map(str, huge), str(tmp_path / "out"), "--t", ts, "--dtype", "base", "--memory", "64MB", "-j", jobs]
    command = [sys.executable, "-m", "merge_tool", "merge", *words, "--json"]
    planned = json.loads(subprocess.run([*command, "--dry-run"], capture_output=True, check=True).stdout)
    done = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert done["peak_bytes"] < 64_000_000
    assert abs(planned["expected_peak_bytes"] - done["peak_bytes"]) < 0.2 * done["peak_bytes"]
    for path in (tmp_path / "out").rglob("*.safetensors"):
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_eight_thousand_tensors_in_8_bits_stay_below_the_least_budget(tmp_path: Path) -> None:
    """4,000 weights and their scales."""
    pair = []
    for seed in (1, 2):
        codes, scales = quantise(normal(seed, 8, 16).astype(np.float64), (128, 128), CODES["F8_E4M3"], SCALES["F32"])
        names = [f"model.layers.{n // 100}.mlp.experts.{n % 100}.down_proj.weight" for n in range(4_000)]
        tensors = {**dict.fromkeys(names, codes), **{f"{name}_scale_inv": scales for name in names}}
        pair.append(save_model(tmp_path / f"m{seed}", tensors, config=config_of((128, 128))))
    words = [*map(str, pair), str(tmp_path / "out"), "--dtype", "base", "--memory", "64MB", "--json"]
    done = subprocess.run([sys.executable, "-m", "merge_tool", "merge", *words], capture_output=True, check=True)
    assert json.loads(done.stdout)["peak_bytes"] < 64_000_000


def test_a_layout_has_room_for_the_largest_of_every_group(tmp_path: Path) -> None:
    """In blocks of one element there is a float64 for each and every output, which the budget must hold."""
    values = normal(1, 400, 500)
    codes, scales = quantise(values[:1, :1].astype(np.float64), (1, 1), CODES["F8_E4M3"], SCALES["F32"])
    tensors = {"w": np.broadcast_to(codes, (400, 500)), "w_scale_inv": np.broadcast_to(scales, (400, 500))}
    base = save_model(tmp_path / "b", tensors, config=config_of((1, 1)))
    ft = save_model(tmp_path / "f", {"w": values})
    layouts = [
        plan_recipe(pair_recipe(base, ft, ts, dtype="base"), tmp_path / "out", memory_bytes=10**9).layout
        for ts in ((0.5,), (0.2, 0.5, 0.8))
    ]
    assert layouts[0].state_bytes == 200_000 * 12
    assert layouts[1].state_bytes == 3 * layouts[0].state_bytes
    assert layouts[1].temporary_bytes - layouts[0].temporary_bytes == 2 * layouts[0].state_bytes


# ------------------------------------------------------------------------------------------ verification


@pytest.mark.parametrize("name", ["m.0.weight", "m.0.weight_scale_inv", "m.1.weight", "m.1.weight_scale_inv"])
@pytest.mark.parametrize("full", [False, True])
def test_a_changed_code_or_scale_is_found_against_the_parents(
    tmp_path: Path, fp8_pair: tuple[Path, Path], name: str, full: bool
) -> None:
    """Of tensors this small every element and every row of scales is in the sample."""
    merge(*fp8_pair, tmp_path / "out.safetensors", dtype="base", report_path=tmp_path / "report.json")
    tensors = {n: a.copy() for n, a in load_file(tmp_path / "out.safetensors").items()}
    tensors[name].view(np.uint8).ravel()[0] ^= 1
    save_file(tensors, tmp_path / "out.safetensors", {"format": "pt"})
    found = verify(tmp_path / "out.safetensors", fp8_pair, full=full, sample=1, report_path=tmp_path / "report.json")
    assert any("is not the merge of these parents" in problem for problem in found[0].problems)


def test_a_false_word_on_equal_parents_is_found_by_a_sample(tmp_path: Path) -> None:
    """`equal` in the line of codes, or of scales, where the parents are not."""
    base, ft = fp8_model(tmp_path / "base", 1), fp8_model(tmp_path / "ft", 2)
    merge(base, ft, tmp_path / "out.safetensors", dtype="base", report_path=tmp_path / "report.json")
    lines = (tmp_path / "report.json").read_text().splitlines(keepends=True)
    for name in ("m.0.weight", "m.0.weight_scale_inv"):
        changed = [
            line.replace('"equal": false', '"equal": true') if f'"{name}", "sh' in line else line for line in lines
        ]
        (tmp_path / "lie.json").write_text("".join(changed))
        (found,) = verify(tmp_path / "out.safetensors", (base, ft), report_path=tmp_path / "lie.json")
        assert any("equal" in problem for problem in found.problems)


# ------------------------------------------------------------------------------------------ transformers


def test_transformers_reads_the_output(tmp_path: Path) -> None:
    """Another implementation of the format loads what was written, to the values that we read."""
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(**sizes, num_hidden_layers=1, vocab_size=64, head_dim=16)
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / f"p{seed}")
        plain = load_folder(tmp_path / f"p{seed}")
        tensors = {n: a for n, a in plain.items() if "proj" not in n}
        tensors |= packed({n: a.astype(np.float32) for n, a in plain.items() if "proj" in n}, (16, 16))
        content = json.loads((tmp_path / f"p{seed}/config.json").read_text())
        content |= {"quantization_config": {**DEEPSEEK, "weight_block_size": [16, 16]}}
        pair.append(save_model(tmp_path / f"q{seed}", tensors, config=content))
    merge(*pair, tmp_path / "out", dtype="base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        dtype=torch.bfloat16,
    ).state_dict()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        for name in checkpoint.tensors:
            ours = read(tmp_path / "out", name).astype(BF16).astype(np.float32)
            assert np.array_equal(ours, loaded[name].float().numpy())
