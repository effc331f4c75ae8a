"""8-bit floats with scales: read as what they mean, whatever the scales' grid; other quantised formats refused."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BF16, DTYPES, Array, contents, load_folder, save_file, save_model
from merge_tool import CheckpointError, DataError, MismatchError, merge, open_checkpoint
from merge_tool.checkpoint.quantised import _METHODS
from merge_tool.compare.diff import diff
from merge_tool.models.side_files import without_quantization_config
from merge_tool.verification.verify import verify
from oracle import float64_merge

F8 = DTYPES["F8_E4M3"]
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIG = {"architectures": ["StableLmForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": 8}


def quantise(values: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """Codes and scales as DeepSeek's own: the largest of every block becomes 448. Block by block, in loops."""
    rows, columns = values.shape[-2:]
    codes = np.zeros(values.shape, F8)
    scales = np.zeros((*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1])), np.float32)
    for place in np.ndindex(scales.shape):
        *lead, i, j = place
        cut = (*lead, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        scales[place] = max(np.abs(values[cut]).max() / 448, 1e-12)
        codes[cut] = (values[cut] / scales[place]).astype(F8)
    return codes, scales


def meaning(codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """The real values, by whole arrays: every scale repeated over its block."""
    wide = np.repeat(np.repeat(scales.astype(np.float32), block[0], -2), block[1], -1)
    return codes.astype(np.float32) * wide[..., : codes.shape[-2], : codes.shape[-1]]


def normal(seed: int, *shape: int) -> Array:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def read(folder: Path, name: str) -> Array:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.read_new(name, 0, checkpoint.tensors[name].numel)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_any_grid_is_codes_times_scales(tmp_path_factory: Any, data: Any) -> None:
    """Sizes that are no multiples of the block, experts behind each other, scales of four types; float32 products."""
    block = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    kind = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu]))
    codes, scales = quantise(normal(1, *shape), block)
    scales = scales.astype(kind)
    config = {"quantization_config": {**DEEPSEEK, "weight_block_size": list(block)}}
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    folder = save_model(tmp_path_factory.mktemp("f"), tensors, config=config)
    start = data.draw(st.integers(0, codes.size))
    stop = data.draw(st.integers(start, codes.size))
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        found = checkpoint.read_new("a.weight", start, stop)
    assert np.array_equal(found, meaning(codes, scales, block).ravel()[start:stop])


def test_a_tensor_larger_than_what_is_in_hand_is_read_right(tmp_path: Path) -> None:
    codes, scales = quantise(normal(2, 300, 700), (128, 128))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    folder = save_model(tmp_path / "m", tensors, config={"quantization_config": DEEPSEEK})
    assert np.array_equal(read(folder, "a.weight"), meaning(codes, scales, (128, 128)).ravel())


LAYOUTS: dict[str, tuple[dict[str, Any], str, Any, Any]] = {
    "fbgemm, a row": ({"quant_method": "fbgemm_fp8"}, "_scale", (1, 60), lambda s: s),
    "compressed-tensors, a row": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        "_scale",
        (1, 60),
        lambda s: s.astype(BF16),
    ),
    "compressed-tensors, a block": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [16, 16]}}},
        },
        "_scale",
        (16, 16),
        lambda s: s,
    ),
    "a row, flat": ({"quant_method": "fp8"}, "_scale", (1, 60), lambda s: s.ravel()),
    "the tensor, a scalar": ({"quant_method": "fp8"}, "_scale", (40, 60), lambda s: s.reshape(())),
    "the tensor, of one element": ({"quant_method": "fp8"}, "_scale_inv", (40, 60), lambda s: s.reshape(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_grids_are_known_by_their_shapes(tmp_path: Path, layout: str) -> None:
    config, suffix, block, reshape = LAYOUTS[layout]
    codes, scales = quantise(normal(3, 40, 60), block)
    kept = reshape(scales)
    tensors = {"a.weight": codes, f"a.weight{suffix}": kept, "a.input_scale": np.ones(1, np.float32)}
    folder = save_model(tmp_path / "m", tensors, config={"quantization_config": config})
    assert np.array_equal(read(folder, "a.weight"), meaning(codes, kept.reshape(scales.shape), block).ravel())
    with open_checkpoint(folder) as checkpoint:
        assert (
            "1 scales of activations are not merged (only an output in BASE's 8 bits has any, BASE's): a.i"
            in checkpoint.notices[-1]
        )


def test_a_single_file_without_config_has_the_usual_blocks(tmp_path: Path) -> None:
    codes, scales = quantise(normal(4, 130, 140), (128, 128))
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "x.safetensors")
    assert np.array_equal(read(tmp_path / "x.safetensors", "a.weight"), meaning(codes, scales, (128, 128)).ravel())


def test_the_values_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """Another implementation of the same format, where it is right: sizes that are multiples of the block."""
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(**sizes, num_hidden_layers=1, vocab_size=64, head_dim=16)
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    tensors: dict[str, Array] = {}
    for name, array in load_folder(tmp_path / "plain").items():
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(array.astype(np.float32), (16, 16))
        else:
            tensors[name] = array
    settings = {**DEEPSEEK, "weight_block_size": [16, 16]}
    content = json.loads((tmp_path / "plain/config.json").read_text()) | {"quantization_config": settings}
    folder = save_model(tmp_path / "m", tensors, config=content)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 14
        for name in checkpoint.tensors:
            assert np.array_equal(
                read(folder, name).astype(BF16).astype(np.float32), loaded[name].float().ravel().numpy()
            )


# ---------------------------------------------------------------------------------------------- merges


def quantised_model(folder: Path, values: dict[str, Array], **options: Any) -> tuple[Path, dict[str, Array]]:
    """A folder with every matrix in 8 bits, in blocks of 16 x 16, and what its tensors mean."""
    tensors, meant = {}, {}
    for name, array in values.items():
        if array.ndim == 2:
            codes, scales = quantise(array, (16, 16))
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            meant[name] = meaning(codes, scales, (16, 16))
        else:
            tensors[name] = meant[name] = array.astype(BF16)
    config = {**CONFIG, "quantization_config": {**DEEPSEEK, "weight_block_size": [16, 16]}, "last": 1}
    return save_model(folder, tensors, config=config, **options), meant


def values(seed: int) -> dict[str, Array]:
    return {"m.0.weight": normal(seed, 50, 40), "m.1.weight": normal(seed + 10, 16, 33), "norm.weight": normal(seed, 7)}


def plain_model(folder: Path, tensors: dict[str, Array]) -> Path:
    return save_model(folder, {name: array.astype(BF16) for name, array in tensors.items()}, config=CONFIG)


@pytest.mark.parametrize("which", ["both", "finetune", "base"])
def test_a_merge_is_that_of_the_real_values_in_bfloat16(tmp_path: Path, which: str) -> None:
    """Whichever side is quantised: no scales and no quantization_config in the output, which verifies in full."""
    meant: list[dict[str, Array]] = []
    folders = []
    for number, side in enumerate(("base", "finetune")):
        if which in ("both", side):
            folder, real = quantised_model(tmp_path / side, values(number), shards=number + 1)
        else:
            folder = plain_model(tmp_path / side, values(number))
            real = {name: array.astype(BF16) for name, array in values(number).items()}
        folders.append(folder)
        meant.append(real)
    merge(*folders, tmp_path / "out", t=0.3)
    merged = load_folder(tmp_path / "out")
    assert merged.keys() == values(0).keys()
    for name, array in merged.items():
        assert array.dtype == BF16
        expected = float64_merge(meant[0][name], meant[1][name], 0.3)
        assert np.abs(array.astype(float) - expected).max() <= np.abs(expected).max() * 2**-8
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {**CONFIG, "last": 1} if which != "finetune" else config == CONFIG
    assert not verify(tmp_path / "out", tuple(folders), full=True)[0].problems
    assert len(diff(*folders).tensors) == 3
    assert diff(*folders).unlike == ()


def test_the_merge_of_quantised_models_is_that_of_their_values(tmp_path: Path) -> None:
    """Bit for bit the merge of float32 checkpoints that hold what the codes mean, written as bfloat16."""
    pairs = [quantised_model(tmp_path / f"q{k}", values(k)) for k in (0, 1)]
    plain = [save_model(tmp_path / f"p{k}", real, config=CONFIG) for k, (_, real) in enumerate(pairs)]
    merge(*(folder for folder, _ in pairs), tmp_path / "a", t=0.6)
    merge(*plain, tmp_path / "b", t=0.6, dtype="bfloat16")
    a, b = load_folder(tmp_path / "a"), load_folder(tmp_path / "b")
    assert all(a[name].tobytes() == b[name].tobytes() for name in b)


def test_what_is_kept_is_written_as_its_value(tmp_path: Path) -> None:
    """--exclude: BASE's codes alone would be another tensor."""
    base, meant = quantised_model(tmp_path / "base", values(0))
    ft, _ = quantised_model(tmp_path / "ft", values(1))
    merge(base, ft, tmp_path / "out", exclude=["m.0."])
    kept = load_folder(tmp_path / "out")["m.0.weight"]
    assert np.array_equal(kept, meant["m.0.weight"].astype(BF16))


def test_bytes_do_not_depend_on_memory_or_jobs(tmp_path: Path) -> None:
    """In 64 MB, with tensors that are read twice, as in plenty."""
    folders = [
        quantised_model(tmp_path / f"q{k}", {"w": normal(k, 900, 3000), "v": normal(k, 9, 9)})[0] for k in (0, 1)
    ]
    merge(*folders, tmp_path / "a", jobs=2)
    words = ["merge", *map(str, folders), str(tmp_path / "b"), "--memory", "64MB", "--jobs", "1"]
    done = subprocess.run([sys.executable, "-m", "merge_tool", *words], capture_output=True, text=True, check=True)
    assert 30 < float(done.stdout.split("peak memory ")[1].split(" MB")[0]) < 64
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn"])
def test_other_8_bits_than_the_bases_are_refused_with_what_to_do(tmp_path: Path, dtype: str) -> None:
    """Never a bfloat16 model in place of the 8-bit one that was asked for."""
    base, ft = quantised_model(tmp_path / "base", values(0))[0], plain_model(tmp_path / "ft", values(1))
    words = [sys.executable, "-m", "merge_tool", "merge", base, ft, tmp_path / "out", "--dtype", dtype]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"dtype is '{dtype}': 8 bits are written only as BASE has them, by --dtype base. Otherwise" in done.stderr
    assert not (tmp_path / "out").exists()


def test_scales_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    codes, scales = quantise(normal(0, 40, 40), (16, 16))

    def refusal(tensors: dict[str, Array], **config: Any) -> str:
        folder = save_model(tmp_path / f"m{len(list(tmp_path.iterdir()))}", tensors, config=config)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        return str(caught.value)

    settings = {**DEEPSEEK, "weight_block_size": [16, 16]}
    both = {"a.weight": codes, "a.weight_scale_inv": scales}
    wrong = refusal({**both, "a.weight_scale_inv": scales[:2]}, quantization_config=settings)
    assert "'a.weight_scale_inv' has shape [2, 3], which scales neither the whole of 'a.weight' [40, 40]" in wrong
    assert "blocks of 128 x 128" in refusal(both)
    bare = refusal({**both, "b.weight": codes}, quantization_config=settings)
    assert "1 tensor of 8-bit floats without scales, 1 with scales: b.weight" in bare
    odd = refusal(both, quantization_config={**settings, "weight_block_size": [16]})
    assert "weight_block_size is [16], expected two sizes" in odd
    lone = refusal({"a.weight": normal(0, 4, 4), "a.weight_scale_inv": scales}, quantization_config=settings)
    assert "8-bit floats without the scales" in lone


def test_nan_codes_are_refused_like_any_nan(tmp_path: Path) -> None:
    codes, scales = quantise(normal(0, 40, 40), (16, 16))
    codes.view(np.uint8)[3, 3] = 0x7F
    config = {"quantization_config": {**DEEPSEEK, "weight_block_size": [16, 16]}}
    base = save_model(tmp_path / "b", {"w": codes, "w_scale_inv": scales}, config=config)
    with pytest.raises(DataError, match=r"w in b/model\.safetensors: element 123 is nan"):
        merge(base, plain_model(tmp_path / "f", {"w": normal(1, 40, 40)}), tmp_path / "out")


@pytest.mark.filterwarnings("error")
def test_scales_that_overflow_are_refused_like_any_infinity(tmp_path: Path) -> None:
    codes, scales = quantise(normal(0, 40, 40), (16, 16))
    config = {"quantization_config": {**DEEPSEEK, "weight_block_size": [16, 16]}}
    tensors = {"w": codes, "w_scale_inv": np.full_like(scales, 3e38)}
    base = save_model(tmp_path / "b", tensors, config=config)
    with pytest.raises(DataError, match=r"w in b/model\.safetensors: element \d+ is -?inf"):
        merge(base, plain_model(tmp_path / "f", {"w": normal(1, 40, 40)}), tmp_path / "out")


# ---------------------------------------------------------------------------------------- the configuration

REMOVED = {
    '{"a": 1, "quantization_config": {"x": [1, {"y": 2}]}, "b": 2}': '{"a": 1, "b": 2}',
    '{\n  "a": 1,\n  "quantization_config": {"x": "}"}\n}\n': '{\n  "a": 1\n}\n',
    '{"quantization_config": {"x": 1}}': "{}",
    '{"quantization_config": {"x": 1},\r\n "b": 2}': '{"b": 2}',
    '{"text_config": {"quantization_config": {}, "c": 1}, "quantization_config": {}}': '{"text_config": {"c": 1}}',
    '{"x": {"quantization_config": {}}, "y": "quantization_config"}': None,
    '{"quantization_config": null, "b": 2}': None,
    '{"a": 1, "quantization_config": {}, "quantization_config": {}}': '{"a": 1}',
    '{"quantization_config": {}, "quantization_config": {}, "é": 1}': '{"é": 1}',
}


@pytest.mark.parametrize("text", REMOVED)
def test_only_the_quantization_config_leaves_the_configuration(text: str) -> None:
    """Every other byte stays; what is left is JSON."""
    found = without_quantization_config(text.encode()).decode()
    assert found == (text if REMOVED[text] is None else REMOVED[text])
    json.loads(found)


# ------------------------------------------------------------------------------------- formats that are refused

U8, I8, I32, F16 = (np.zeros((4, 4), kind) for kind in (np.uint8, np.int8, np.int32, np.float16))
REFUSED: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "GPTQ": (
        {"a.qweight": I32, "a.qzeros": I32, "a.scales": F16, "a.g_idx": I32},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        "Merge the original weights",
    ),
    "AWQ": (
        {"a.qweight": I32, "a.qzeros": I32, "a.scales": F16},
        {"quant_method": "awq", "bits": 4},
        "Merge the original weights",
    ),
    "bitsandbytes": (
        {
            "a.weight": U8,
            "a.weight.absmax": F16,
            "a.weight.quant_map": F16,
            "a.weight.quant_state.bitsandbytes__nf4": U8,
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "model.dequantize()",
    ),
    "bitsandbytes 8-bit": (
        {"a.weight": I8, "a.SCB": F16, "a.weight_format": U8},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "model.dequantize()",
    ),
    "MXFP4": (
        {"e.gate_up_proj_blocks": U8, "e.gate_up_proj_scales": U8},
        {"quant_method": "mxfp4"},
        "Mxfp4Config(dequantize=True)",
    ),
    "HQQ": ({"a.W_q": U8, "a.scale": F16, "a.zero": F16}, {"quant_method": "hqq"}, "Merge the original weights"),
    "AQLM": ({"a.codes": I8, "a.codebooks": F16, "a.scales": F16}, {"quant_method": "aqlm"}, "codebooks"),
    "compressed-tensors": (
        {"a.weight_packed": I32, "a.weight_scale": F16, "a.weight_shape": I32},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "run_compressed=False",
    ),
    "torchao": (
        {"a._weight_qdata": I8, "a._weight_scale": F16},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        "torchao",
    ),
    "EETQ": ({"a.weight": I8, "a.weight_scales": F16}, {"quant_method": "eetq"}, "Merge the original weights"),
    "NVFP4": (
        {"a.weight": U8, "a.weight_scale": normal(7, 4, 1).astype(F8), "a.weight_scale_2": F16, "a.input_scale": F16},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "two 4-bit floats in a byte",
    ),
    "INT8": ({"a.weight": I8, "a.weight_scale": F16}, {"quant_method": "int8"}, "8-bit integers with a scale"),
    "ModelOpt": (
        {"a.weight": U8, "a.weight_scale": F16, "a.pre_quant_scale": F16},
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "of NVIDIA's Model Optimizer",
    ),
    "ModelOpt-FP8": (
        {"a.weight": normal(7, 4, 4).astype(F8), "a.weight_scale": F16[0, :1], "a.input_scale": F16[0, :1]},
        {"quant_method": "modelopt"},
        "Take quantization_config out of config.json",
    ),
    "MLX": (
        {"a.weight": I8.view(np.uint32), "a.scales": F16, "a.biases": F16},
        None,
        "mlx_lm.convert --hf-path FOLDER --mlx-path OUT -d",
    ),
    "quanto": (
        {"a.weight._data": I8, "a.weight._scale": F16},
        {"quant_method": "quanto"},
        "Merge the original weights",
    ),
}


BY_CONFIG_ONLY = {"quanto", "ModelOpt", "ModelOpt-FP8"}
CASES = [(kind, True) for kind in REFUSED] + [(kind, False) for kind in REFUSED.keys() - BY_CONFIG_ONLY]


@pytest.mark.parametrize(("kind", "with_config"), sorted(CASES))
def test_other_quantised_formats_are_refused_by_name(tmp_path: Path, kind: str, with_config: bool) -> None:
    """By the configuration and, without one, by the tensors' names: what it is, why not, what to do."""
    tensors, settings, todo = REFUSED[kind]
    folder = save_model(tmp_path / "m", tensors, config=_config(settings) if with_config else {})
    with pytest.raises(CheckpointError) as caught:
        merge(folder, folder, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"m: is quantised by {kind.split()[0]} (")
    assert todo in message
    assert message.count("\n") == 0
    assert not (tmp_path / "out").exists()


def _config(settings: Any) -> dict[str, Any]:
    """MLX has a key of its own."""
    return {"quantization_config": settings} if settings else {"quantization": {"group_size": 64, "bits": 4}}


@pytest.mark.parametrize(
    "names",
    [
        ("q.weight", "q.scale"), ("q.weight", "other"), ("q.codes", "q.scales"), ("q.codes", "q.codes_absmax"),
        ("experts.up", "experts.up_scale_inv"), ("q.weight", "q.biases"), ("codes", "scales"), ("q.packed", "q.zeros"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_codes_of_a_format_without_a_name_are_refused_on_either_side(
    tmp_path: Path, names: tuple[str, str], dtype: Any
) -> None:
    """Integers that are a weight or have scales beside them; --on-mismatch base does not allow them."""
    codes, scales = np.random.default_rng(0).integers(0, 99, (4, 8)).astype(dtype), normal(4, 2, 1).astype(np.float32)
    plain = save_model(tmp_path / "plain", {names[0]: normal(4, 8, 1).astype(np.float32), names[1]: scales}, config={})
    packed = save_model(tmp_path / "packed", {names[0]: codes, names[1]: scales}, config={})
    for pair in ((plain, packed), (packed, plain), (packed, packed)):
        with pytest.raises(CheckpointError, match="packed: is quantised by"):
            merge(*pair, tmp_path / "out", on_mismatch="base")


@pytest.mark.parametrize(
    "tensors",
    [
        {"bert.embeddings.position_ids": np.arange(8)[None], "bert.embeddings.norm.weight": np.ones(3)},
        {"bn.num_batches_tracked": np.array(7), "bn.weight": np.ones(3), "bn.running_var": np.ones(3)},
        {"attn.relative_position_index": np.arange(9).reshape(3, 3), "attn.relative_position_bias_table": np.ones(3)},
        {"logit_scale": np.ones(1), "ids": np.arange(9).reshape(3, 3)},
    ],
)
def test_integers_of_ordinary_models_are_no_codes(tmp_path: Path, tensors: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "m", tensors, config={})
    merge(folder, folder, tmp_path / "out")


def test_integers_in_a_weights_place_are_not_kept_beside_the_layers_other_parts(tmp_path: Path) -> None:
    """Without a name or scales to know them by: neither is --on-mismatch base suggested, nor does it allow them."""
    floats, codes = (
        normal(4, 8, 1).astype(np.float32),
        np.random.default_rng(0).integers(0, 99, (4, 1)).astype(np.uint32),
    )
    base = save_model(tmp_path / "base", {"experts.up": floats, "norm": np.ones(3, np.float32)}, config={})
    ft = save_model(tmp_path / "ft", {"experts.up": codes, "norm": np.ones(3, np.float32)}, config={})
    for pair, on_mismatch in product(((base, ft), (ft, base)), ("error", "base")):
        with pytest.raises(MismatchError, match=r"experts\.up: .*\n") as caught:
            merge(*pair, tmp_path / "out", on_mismatch=on_mismatch)
        assert "1 tensor holds integers in one model, perhaps the codes of a quantised layer" in str(caught.value)
        assert "--on-mismatch base" not in str(caught.value)
    merge(base, ft, tmp_path / "out", exclude=["experts"])


def test_modelopts_fp8_is_read_once_nothing_calls_it_otherwise(tmp_path: Path) -> None:
    """As the refusal says: without quantization_config its scales are found by their names."""
    codes, scale = normal(8, 4, 4).astype(F8), np.full(1, 0.5, np.float32)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.input_scale": scale}
    model = open_checkpoint(save_model(tmp_path / "m", tensors, config={}))
    assert model.tensors.keys() == {"a.weight"}
    expected = codes.astype(np.float32).reshape(-1) * 0.5
    assert model.read_new("a.weight", 0, 16).tobytes() == expected.tobytes()


def test_every_format_that_we_know_by_name_has_a_test() -> None:
    known = {name.split()[0].lower() for name in REFUSED} | {"fp8"}
    assert _METHODS.keys() <= known
