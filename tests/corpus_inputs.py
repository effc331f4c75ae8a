"""Inputs of the corpus: models, adapters and tokenizers in the working folder, the same bytes on every platform.

Values come from SHAKE-128 of a key, by integers and by sums and products of float64 alone: no library's random
generator, no logarithm, no sine. Nothing of merge_tool is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints import BF16, DTYPES, STORED, Array, as_torch, save_file, save_model, save_pickles

Shapes = Mapping[str, tuple[int, ...]]
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


# ------------------------------------------------------------------------------------------- values


def raw_bits(key: str, count: int, dtype: str = "<u8") -> Array:
    """`count` unsigned integers of `dtype` that follow from the key."""
    return np.frombuffer(hashlib.shake_128(key.encode()).digest(count * np.dtype(dtype).itemsize), dtype)


def bell(key: str, *shape: int) -> Array:
    """Float64 values around 0, bell-shaped (four uniform numbers added), with a standard deviation of 1.15."""
    high, low = raw_bits(key, 2 * math.prod(shape)).reshape(2, -1)
    quarters = sum((high >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    values: Array = (quarters - 2 * 65_535) * 2.0**-15 + (low >> np.uint64(11)) * 2.0**-68
    return values.reshape(shape)


def tensors(key: str, shapes: Shapes, *, dtype: Any = F32, apart: float = 0.3, scale: float = 0.02) -> dict[str, Array]:
    """Tensors of these shapes; those of two keys differ by about `apart` of their size."""
    own = {name: apart * bell(f"{key}/{name}", *shape) for name, shape in shapes.items()}
    return {name: (scale * (bell(name, *shape) + own[name])).astype(dtype) for name, shape in shapes.items()}


def finite_bits(key: str, count: int, dtype: Any) -> Array:
    """Values of any magnitude, subnormal ones included, up to a quarter of the largest."""
    dtype = np.dtype(dtype)
    word = f"<u{dtype.itemsize}"
    finfo = ml_dtypes.finfo(dtype)
    bits = raw_bits(key, count, word)
    exponent = bits >> np.array(finfo.nmant, word) & np.array(2**finfo.nexp - 1, word)
    top = np.array(1 << (finfo.nmant + finfo.nexp - 1), word)
    return np.where(exponent >= 2**finfo.nexp - 3, bits & ~top, bits).view(dtype)


# ------------------------------------------------------------------------------------------- models


def llama(*, layers: int = 4, hidden: int = 12, vocab: int = 30, head: bool = True, large: bool = False) -> Shapes:
    """Names and shapes of a small language model; `large`: with a matrix that is longer than a tile."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (hidden // 2, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (401, 333) if large and n == 1 else (19, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return {**shapes, "lm_head.weight": (vocab, hidden)} if head else shapes


def config(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "vocab_size": 30,
        "layer_types": ["full", "sliding", "full", "sliding"], "torch_dtype": "float32", "rope_theta": 10000.0, **more,
    }  # fmt: skip


def save(name: str, content: Mapping[str, Array], *, shards: int = 1, side: Any = None, **more: Any) -> None:
    save_model(Path(name), content, shards=shards, side_files=side, config=config(**more))


def models(names: str, shapes: Shapes | None = None, **options: Any) -> Callable[[], None]:
    """Folders of these names, each sharded in its own way."""

    def make() -> None:
        for k, name in enumerate(names.split()):
            save(name, tensors(name, shapes or llama(), **options), shards=1 + k % 3)

    return make


MIXED: Mapping[str, Any] = {"mlp": BF16, "self_attn.q": F16, "self_attn.v": F64, "norm": F32}  # by part of the name


def mixed(key: str, shapes: Shapes | None = None, **options: Any) -> dict[str, Array]:
    """A language model with a float type for each kind of tensor."""
    found = tensors(key, shapes or llama(large=True), dtype=F64, **options)
    return {
        name: array.astype(next((dtype for part, dtype in MIXED.items() if part in name), F32))
        for name, array in found.items()
    }


def buffers() -> dict[str, Array]:
    """What is not a float: the same in all models."""
    return {
        "ids.i64": np.arange(-5, 300), "ids.i32": np.arange(7, dtype=np.int32).reshape(7, 1),
        "bytes.u8": np.arange(256, dtype=np.uint8), "mask.bool": np.arange(13) % 3 == 0,
    }  # fmt: skip


def several_dtypes() -> None:
    """BASE and FT with other float types than each other, 8-bit floats without scales, and buffers."""
    codes = raw_bits("codes", 60, "<u1")
    for name, eight, other in (("base", "F8_E4M3", "F8_E5M2"), ("ft", "F8_E5M2", "F8_E4M3")):
        content = mixed(name) if name == "base" else tensors(name, llama(large=True), dtype=BF16)
        content["eight.a"] = (codes % 64 + 32 + (name == "ft")).view(DTYPES[eight])
        content["eight.b"] = (codes % 64 + 40).view(DTYPES[other]).reshape(4, 15)
        save(name, {**content, **buffers()}, shards=2)


def odd_shapes() -> None:
    shapes = {
        "scalar": (), "one": (1,), "ones": (1, 1, 1), "empty": (0, 3), "empty.rows": (4, 0), "prime": (7, 13),
        "row": (1, 5), "column": (5, 1), "layers.0.cube": (3, 5, 7), "layers.1.conv": (4, 3, 3, 3),
        "layers.2.long": (3, 50_001), "layers.2.vector": (131_073,),
    }  # fmt: skip
    for name, dtype in (("base", F32), ("ft", F32), ("other", BF16)):
        more = {"empty.ids": np.zeros((0,), np.int64), "scalar.id": np.array(7), "scalar.bool": np.array(True)}
        save(name, {**tensors(name, shapes, dtype=dtype), **more})


def extremes() -> None:
    """Every magnitude of every float type, with signed zeros; float64 beyond what can be squared."""
    found: dict[str, dict[str, Array]] = {"base": {}, "ft": {}}
    for dtype in (F64, F32, F16, BF16):
        code = dtype.name
        zeros = np.array([0.0, -0.0, 0.0, -0.0], dtype)
        x = finite_bits(code, 3_000, dtype)
        word = f"<u{dtype.itemsize}"
        y = (x.view(word) ^ (raw_bits(f"{code} of ft", 3_000, word) & np.array(7, word))).view(dtype)
        found["base"][f"{code}.any"], found["ft"][f"{code}.any"] = np.append(x, zeros), np.append(y, zeros[::-1])
        tiny = np.array(ml_dtypes.finfo(dtype).smallest_subnormal, dtype).view(word)
        for name, side in found.items():
            count = 150_000 if dtype == BF16 else 200  # where float32 loses digits, one in some ten thousand shows it
            steps = raw_bits(f"{name} {code} steps", count, word) % np.array(50, word)
            side[f"{code}.subnormal"] = (tiny * steps).view(dtype)
    for name, side in found.items():
        side["float64.large"] = bell("large", 500) * 1e305 + bell(f"{name} large", 500) * 1e304
        side["float64.small"] = bell("small", 500) * 1e-305 + bell(f"{name} small", 500) * 1e-306
        save(name, side)


def angles() -> None:
    """Pairs of tensors at every kind of angle and ratio of lengths, in three float types; a third model beside."""
    a, b, c = (bell(f"direction {k}", 20, 30) for k in range(3))
    upper = np.arange(20)[:, None] < 10
    pairs = {
        "equal": (a, a), "zero.ft": (a, 0 * a), "zero.base": (0 * a, a), "zero.both": (0 * a, 0 * a),
        "opposite": (a, -a), "nearly.opposite": (a, -a + 2.0**-30 * b), "obtuse": (a, -a + 0.4 * b),
        "right.angle": (a * upper, b * ~upper), "wide": (a, b), "parallel": (a, 2 * a), "longer": (a, 1000 * a + b),
        "shorter": (a, a * 2.0**-13 + b * 2.0**-20), "much.shorter": (a, b * 2.0**-20),
        "tiny.angle": (a, a + b * 2.0**-36), "small.angle": (a, a + b * 2.0**-16),
        "nearly.parallel": (a, 3 * a + c * 2.0**-14),
    }  # fmt: skip
    for number, name in enumerate(("base", "ft", "other")):
        save(name, {
            f"{kind}.{dtype}": (*pair, pair[1] - pair[0])[number].astype(dtype)
            for kind, pair in pairs.items() for dtype in ("float64", "float32", "float16")
        })  # fmt: skip


def tiles() -> None:
    """Tensors around one, two and three tiles long."""
    shapes = {f"layers.0.t{n}": (n,) for n in (131_071, 131_072, 131_073, 262_144, 300_007)}
    for name in ("base", "ft"):
        content = tensors(name, shapes, dtype=BF16)
        content["layers.1.wide"] = tensors(name, {"wide": (700, 391)})["wide"]
        save(name, {**content, "layers.1.ids": np.arange(150_000)})


def long_float64() -> None:
    """Tensors of some tiles in the type that shows the last bit of every sum."""
    for name in ("base", "ft", "other"):
        save(name, tensors(name, {f"layers.0.t{n}": (n,) for n in (131_073, 200_001, 300_007)}, dtype=F64))


def huge() -> None:
    """A tensor that a budget of 64 MB does not hold, so that it is read twice; a small one before and behind it."""
    for name in ("base", "ft", "other"):
        content = tensors(name, {"layers.0.a": (3, 5), "layers.0.b": (1_100, 2_011), "layers.1.a": (7,)}, apart=0.5)
        save(name, content)


# ------------------------------------------------------------------- names, heads, what one side lacks


def unlike() -> None:
    """FT and a third model lack a tensor, have one of their own, other shapes, types and integers than BASE."""
    save("base", {**tensors("base", llama(), dtype=BF16), "ids": np.arange(4), "numbers": np.arange(4)}, shards=2)
    for name in ("ft", "third"):
        found: dict[str, Array] = {**tensors(name, llama(), dtype=BF16), "ids": np.arange(4) + 1}
        found["numbers"] = np.zeros(4, np.float32)
        del found["model.layers.2.input_layernorm.weight"]
        found["value_head.weight"] = np.ones(3, np.float32)
        found["lm_head.weight"] = tensors(name, {"lm_head.weight": (34, 12)}, dtype=BF16)["lm_head.weight"]
        save(name, found, shards=3)


def tied(base: bool, ft: bool) -> Callable[[], None]:
    """BASE and FT, each with its head apart or tied to its embedding."""

    def make() -> None:
        for name, is_tied in (("base", base), ("ft", ft)):
            save(name, tensors(name, llama(head=not is_tied), dtype=BF16), tie_word_embeddings=is_tied)

    return make


def renamed() -> None:
    """FT with a wrapper's prefixes, older names, buffers that follow from the configuration, and copies."""
    shapes: dict[str, tuple[int, ...]] = {
        **llama(layers=2), "model.layers.0.LayerNorm.weight": (12,), "model.layers.0.LayerNorm.bias": (12,),
        "model.conv.parametrizations.weight.original0": (4, 1), "model.conv.parametrizations.weight.original1": (4, 6),
        "model.shared.weight": (21, 12),
    }  # fmt: skip
    base, ft = (tensors(name, shapes, dtype=BF16) for name in ("base", "ft"))
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.array([1, 0.5], np.float32)
    ft["model.encoder.embed_tokens.weight"] = ft["model.shared.weight"]
    ft["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.array([1, 0.25], np.float32)
    older = {
        "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta",
        "parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v",
    }  # fmt: skip
    named = {}
    for name, array in ft.items():
        for new, old in older.items():
            name = name.replace(new, old)
        named[f"base_model.model.{name}"] = array
    save("base", base)
    save("ft", named, shards=2)


def translators() -> None:
    """Encoder and decoder that share an embedding, which each side stores under other names; FT ties its head to it."""
    shared = (21, 12)
    shapes = {"shared.weight": shared, "encoder.block.0.wi.weight": (12, 5), "decoder.block.0.wi.weight": (12, 5)}
    base, ft = (tensors(name, {**shapes, "lm_head.weight": shared}, dtype=BF16) for name in ("base", "ft"))
    del ft["lm_head.weight"]
    base["decoder.embed_tokens.weight"] = base["shared.weight"]
    ft["encoder.embed_tokens.weight"] = ft["shared.weight"]
    save("base", base)
    save("ft", ft, tie_word_embeddings=True)


def with_side_files() -> None:
    """Everything that a model folder may hold beside weights, on both sides; some of it is never copied."""
    for name, mark in (("base", "B"), ("ft", "F")):
        side = {
            "README.md": f"---\nlicense: mit\n---\n# {mark}\n", "generation_config.json": f'{{"mark": "{mark}"}}\n',
            "tokenizer.json": tokenizer(["<s>", "a", "b"]), "tokenizer_config.json": f'{{"mark": "{mark}"}}',
            "special_tokens_map.json": "{}", "modeling.py": f"mark = '{mark}'\n", "sub/template.jinja": mark,
            "training_args.bin": mark, "optimizer.pt": mark, "original/params.json": mark,
            "checkpoint-5/x.json": mark, "notes.txt": f"{mark}\r\n", "adapter_config.json": "{}",
            "modules.json": '[{"path": ""}, {"path": "2_Dense"}]', "2_Dense/model.safetensors": mark,
            "3_Other/model.safetensors": mark,
        }  # fmt: skip
        if name == "ft":
            side["only_ft.txt"] = "here"
        save(name, tensors(name, llama(), dtype=BF16), side=side, torch_dtype="bfloat16", mark=mark)


# ------------------------------------------------------------------------------- pickles, single files


def pickles(ft_shards: int = 2) -> None:
    """BASE in one pickle; FT in shards, or without any in safetensors."""
    save_pickles(Path("base"), tensors("base", llama(), dtype=BF16), config=config())
    if ft_shards:
        save_pickles(Path("ft"), tensors("ft", llama()), shards=ft_shards, config=config())
    else:
        save("ft", tensors("ft", llama()))


def pickled_views() -> None:
    """Single files of a training's checkpoint: transposed, strided and shared tensors, in both of torch's formats."""
    import torch

    for name, is_zip in (("base.pt", True), ("ft.ckpt", False)):
        a, b = (as_torch(array) for array in tensors(name, {"a": (30, 20), "b": (50, 9)}).values())
        views = {"whole": a, "shared": a, "transposed": a.t(), "rows": a[3:20], "steps": b[::2, ::3], "column": b[:, 4]}
        views |= {"half": b.half(), "bf16": a.bfloat16(), "scalar": b[0, 0].clone(), "expanded": b[:1].expand(6, 9)}
        torch.save({"state_dict": views, "epoch": 3}, name, _use_new_zipfile_serialization=is_zip)


def single_files() -> None:
    for name in ("base", "ft"):
        found = {**tensors(name, llama(layers=2), dtype=BF16), "left.alone": np.full(3, np.nan, np.float32)}
        save_file(found, Path(f"{name}.safetensors"), {"format": "pt", "made by": "us"})


# ------------------------------------------------------------------------------------------ adapters


def adapter(name: str, factors: Mapping[str, Array], *, pickled: bool = False, **settings: Any) -> None:
    """An adapter's folder as peft writes it, of safetensors or older."""
    folder = Path(name)
    folder.mkdir()
    told = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "fan_in_fan_out": False, "bias": "none", "lora_bias": False, "init_lora_weights": True, "use_dora": False,
        "base_model_name_or_path": "org/base", "modules_to_save": None, "target_modules": ["q_proj"], **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    content = {f"base_model.model.{key}": array for key, array in factors.items()}
    if pickled:
        import torch

        torch.save({key: as_torch(array) for key, array in content.items()}, folder / "adapter_model.bin")
    else:
        save_file(content, folder / "adapter_model.safetensors")


def factors(key: str, *, rank: int = 3) -> dict[str, Array]:
    """Factors of some layers and of the embedding of `llama()`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.lora_embedding_A": (rank, 30), "model.embed_tokens.lora_embedding_B": (12, rank),
    }  # fmt: skip
    for layer, rows in ((0, 19), (1, 19), (3, 19)):
        shapes[f"model.layers.{layer}.mlp.up_proj.lora_A.weight"] = (rank, 12)
        shapes[f"model.layers.{layer}.mlp.up_proj.lora_B.weight"] = (rows, rank)
    return tensors(key, shapes, apart=1.0, scale=0.2)


def adapted(*, dtype: Any = BF16, pickled: bool = False) -> None:
    """A base, a finetune, two plain adapters, one with all that peft's settings change, and two with more tokens."""
    for name, kind in (("base", dtype), ("ft", F32)):
        more = {f"model.{part}.bias": bell(name, 12).astype(kind) for part in ("norm", "layers.2.self_attn.q_proj")}
        save(name, {**tensors(name, llama(), dtype=kind), **more})
    adapter("lora", {key: array.astype(BF16) for key, array in factors("lora").items()}, pickled=pickled)
    adapter("lora2", factors("lora2", rank=37), r=37)
    found = factors("lora3", rank=3)
    square = "model.layers.2.self_attn.q_proj"
    found |= tensors("lora3", {f"{square}.lora_A.weight": (2, 12), f"{square}.lora_B.weight": (12, 2)})
    found |= {"model.norm.bias": bell("bias", 12).astype(F32), f"{square}.lora_B.bias": bell("B", 12).astype(F32)}
    found |= {"lm_head.modules_to_save.weight": tensors("lora3", {"head": (30, 12)})["head"]}
    adapter(
        "lora3", found, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={r".*\.1\.mlp\.up_proj": 7},
        bias="all", lora_bias=True, modules_to_save=["lm_head"],
    )  # fmt: skip
    for name in ("more", "more2"):
        rows = {"model.embed_tokens.base_layer.weight": (33, 12), "lm_head.modules_to_save.weight": (33, 12)}
        rows |= {"model.embed_tokens.lora_embedding_A": (3, 33), "model.embed_tokens.lora_embedding_B": (12, 3)}
        adapter(name, tensors(name, rows), fan_in_fan_out=True, modules_to_save=["lm_head"])


# ---------------------------------------------------------------------------------- 8 bits with scales


def codes_of(key: str, shape: Sequence[int], dtype: str = "F8_E4M3") -> Array:
    """Finite codes; of two keys the last two bits of the mantissa differ."""
    count = math.prod(shape)
    bits = raw_bits(f"codes of {shape}", count, "<u1") & 0xBC | raw_bits(f"{key} {shape}", count, "<u1") & 0x03
    return bits.view(DTYPES[dtype]).reshape(shape)


def scaled(key: str, block: tuple[int, int], *, scales: str = "F32", codes: str = "F8_E4M3") -> dict[str, Array]:
    """Matrices in 8 bits with a scale for each block, one block all zero, an expert stack among them; the rest in
    bfloat16."""
    found: dict[str, Array] = {}
    shapes = {"layers.0.up.weight": (50, 40), "layers.1.up.weight": (16, 33), "layers.1.experts.weight": (3, 20, 18)}
    for name, shape in shapes.items():
        found[name] = codes_of(key, shape, codes)
        grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        values = 2.0**-6 * (1 + raw_bits(f"{name} {grid}", math.prod(grid)).reshape(grid) % np.uint64(255) / 256)
        found[f"{name}_scale_inv"] = values.astype(STORED[scales])
    found["layers.0.up.weight"][:32, :10] = 0
    return {**found, **tensors(key, {"norm.weight": (7,), "layers.0.bias": (50,)}, dtype=BF16)}


def eight_bits(block: tuple[int, int], **more: Any) -> dict[str, Any]:
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return {"quantization_config": {**settings, **more}, "torch_dtype": "bfloat16"}


def fp8(*, scales: str = "F32", codes: str = "F8_E4M3", ft_block: tuple[int, int] = (32, 5)) -> Callable[[], None]:
    """BASE in 8 bits with scales of activations; FT in 8 bits, F8_E4M3 with float32's scales; a plain third model."""

    def make() -> None:
        base = scaled("base", (16, 8), scales=scales, codes=codes)
        base["layers.0.up.input_scale"] = np.array([0.5], np.float32)
        save("base", base, **eight_bits((16, 8)))
        save("ft", scaled("ft", ft_block), shards=2, **eight_bits(ft_block))
        shapes = {name: array.shape for name, array in base.items() if "_scale" not in name}
        save("plain", tensors("plain", shapes, dtype=BF16, scale=0.5), torch_dtype="bfloat16")

    return make


def fp8_layouts() -> None:
    """Scales of rows, flat and as a column, and of whole tensors, as fbgemm and compressed-tensors have them."""
    for name in ("base", "ft"):
        found: dict[str, Array] = {}
        for layer, shape in (("row", (20, 30)), ("flat", (20, 30)), ("whole", (8, 9)), ("scalar", (8, 9))):
            found[f"{layer}.weight"] = codes_of(f"{name} {layer}", shape)
            count = 20 if layer in ("row", "flat") else 1
            values = (2.0**-8 * (1 + raw_bits(f"{name} {layer} s", count) % np.uint64(99) / 128)).astype(np.float32)
            found[f"{layer}.weight_scale"] = values.reshape({"row": (20, 1), "scalar": ()}.get(layer, (count,)))
        found["norm.weight"] = bell(name, 30).astype(BF16)
        method = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
        save(name, found, quantization_config=method, torch_dtype="bfloat16")


def fp8_in_groups() -> None:
    """Blocks as compressed-tensors tells them, in the configuration of a model's text part."""
    weights = {"strategy": "block", "block_structure": [16, 8]}
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    for name in ("base", "ft"):
        text = {
            "hidden_size": 40,
            "quantization_config": {**method, "config_groups": {"group_0": {"weights": weights}}},
        }
        save(name, scaled(name, (16, 8)), text_config=text, torch_dtype="bfloat16")


def fp8_huge() -> None:
    """A weight in 8 bits that a budget of 64 MB does not hold as real values, in blocks of the usual size."""
    for name in ("base", "ft"):
        codes = codes_of(name, (1_500, 2_003))
        grid = (-(-1_500 // 128), -(-2_003 // 128))
        scales = (2.0**-6 * (1 + raw_bits(f"{name} s", math.prod(grid)) % np.uint64(99) / 128)).reshape(grid)
        content = {"a.weight": codes, "a.weight_scale_inv": scales.astype(np.float32), "norm.weight": bell(name, 9)}
        content["norm.weight"] = content["norm.weight"].astype(BF16)
        save(name, content, quantization_config={"quant_method": "fp8"}, torch_dtype="bfloat16")


# -------------------------------------------------------------------------------------- vocabularies


def tokenizer(tokens: Sequence[str], added: Sequence[str] = (), *, kind: str = "BPE", indent: int | None = 2) -> str:
    """A tokenizer.json as the tokenizers library writes it; `added` are tokens beside the model's own."""
    ids, first = {token: number for number, token in enumerate(tokens)}, tokens[:20]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model: dict[str, Any] = {
        "BPE": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "vocab": ids,
                "merges": [[a, b] for a in first for b in first if f"{a}{b}" in ids]},
        "WordPiece": {"type": "WordPiece", "unk_token": tokens[0], "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": ids},
        "Unigram": {"type": "Unigram", "unk_id": 0, "vocab": [[token, -0.5 * n] for n, token in enumerate(tokens)]},
        "WordLevel": {"type": "WordLevel", "vocab": ids, "unk_token": tokens[0]},
    }[kind]  # fmt: skip
    entries = [{"id": len(tokens) + n, "content": token, **flags} for n, token in enumerate(added)]
    if tokens[0] == "<s>":
        entries.insert(0, {"id": 0, "content": "<s>", **flags})
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": entries,
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "post_processor": None, "decoder": {"type": "ByteLevel"}, "model": model,
    }  # fmt: skip
    return json.dumps(content, indent=indent, ensure_ascii=False)


LETTERS = ["<s>", "a", "b", "ab", "ü", "c", "ac", "Ġ", "日"]  # BASE's, with some rows of padding behind them
OTHERS = ["<s>", "b", "a", "d", "ab", "ü", "ad", "日", "c"]  # moved, and others
ADDED = ["<|im_start|>", "<|im_end|>"]
THIRD = ["a", "<s>", "d", "e", "b", "日"]


def vocabulary(
    name: str, tokens: Sequence[str], added: Sequence[str] = (), *, padding: int = 0, hidden: int = 6,
    kind: str = "BPE", dtype: Any = F32, head: bool = True, indent: int | None = 2, has_tokenizer: bool = True,
    **more: Any,
) -> None:  # fmt: skip
    """A model with a row for each token in its embedding, head and head's bias."""
    rows = len(tokens) + len(added) + padding
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes |= {"lm_head.weight": (rows, hidden), "lm_head.bias": (rows,)}
    found = {key: (0.1 * bell(f"{name}/{key}", *shape)).astype(dtype) for key, shape in shapes.items()}
    text = tokenizer(tokens, added, kind=kind, indent=indent)
    side = {"tokenizer.json": text, "tokenizer_config.json": f'{{"of": "{name}"}}', "vocab.json": "{}"}
    save(name, found, side=side if has_tokenizer else None, vocab_size=rows, tie_word_embeddings=not head, **more)


def vocabularies(*, kind: str = "BPE", head: bool = True, dtype: Any = F32) -> Callable[[], None]:
    """Three models whose tokens have other numbers, some of them in one model only; and one without a tokenizer."""

    def make() -> None:
        vocabulary("base", LETTERS, padding=3, kind=kind, head=head, dtype=dtype, eos_token_id=1, indent=None)
        vocabulary("ft", OTHERS, ADDED, kind=kind, head=head, eos_token_id=[2, 10])
        vocabulary("third", THIRD, ["<|im_end|>"], kind=kind, head=head, dtype=BF16)
        vocabulary("bare", LETTERS, padding=3, head=head, has_tokenizer=False)

    return make


def large_vocabularies() -> None:
    """Embeddings longer than a tile, whose tokens are in another order."""
    words = [f"w{n}" for n in range(9_000)]
    vocabulary("base", words, padding=8, hidden=16, head=False, dtype=BF16, indent=None)
    others = [words[(n * 7_919 + 5) % 9_000] for n in range(8_700)]
    vocabulary("ft", others, [f"<{n}>" for n in range(200)], hidden=16, head=False, dtype=BF16, indent=None)


def alike() -> None:
    """Three models of one vocabulary: the base with a chat template of its own, the others with the same one."""
    old, new = {"chat_template": "old"}, {"chat_template": [{"name": "default", "template": "of the others"}]}
    for name, told in (("base", old), ("one", new), ("two", {"chat_template": "of the others"})):
        side = {
            "tokenizer.json": tokenizer(["<s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "ü", "!"]),
            "tokenizer_config.json": json.dumps({"mark": name, **told, "last": "ü"}, indent=1),
            "chat_template.json": '{"chat_template": "older"}',
        }  # fmt: skip
        if name == "base":
            side["chat_template.jinja"] = "of the base"
        save(name, tensors(name, llama(), dtype=BF16), side=side)


# ---------------------------------------------------------------------------------------- two stacks


def two_stacks() -> None:
    """A vision tower and a language model, whose layers config.json counts apart."""
    shapes: dict[str, tuple[int, ...]] = {f"visual.blocks.{k}.{part}": (5, 6) for k in range(3) for part in "abcd"}
    shapes |= {f"visual.merger.{part}.weight": (6, 5) for part in ("mlp.0", "mlp.2", "ln_q")}
    shapes |= {f"model.layers.{k}.{part}": (7, 5) for k in range(4) for part in "abcd"}
    shapes |= {"model.embed_tokens.weight": (11, 5), "model.norm.weight": (5,), "lm_head.weight": (11, 5)}
    for name in ("base", "ft"):
        text = {"num_hidden_layers": 4, "layer_types": list("fsfs"), "torch_dtype": "float32"}
        save(name, tensors(name, shapes), text_config=text, vision_config={"depth": 3, "torch_dtype": "float32"})
