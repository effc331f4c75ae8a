"""Checkpoints for tests: made of numpy arrays, saved by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, safe_open, serialize_file

Array = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
STORED = {**DTYPES, "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}  # what an output may hold, too: scales
CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "torch_dtype": "bfloat16"}


def save_file(tensors: Mapping[str, Array], path: Path, metadata: dict[str, str] | None = None) -> None:
    """The library's own writer, for every dtype that numpy or ml_dtypes has."""
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    specs = {
        name: TensorSpec(dtype=a.dtype.name, shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in arrays.items()
    }
    serialize_file(specs, str(path), metadata)


def load_file(path: Path) -> dict[str, Array]:
    """All tensors of a file, by the library's parser and our reading of the bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = np.frombuffer(raw[8 + length + begin : 8 + length + end], STORED[entry["dtype"]])
        found[name] = data.reshape(entry["shape"])
    with safe_open(str(path), framework="numpy") as opened:
        assert set(opened.keys()) == set(found)
    return found


def load_folder(folder: Path) -> dict[str, Array]:
    """All tensors of a model folder, as its index (or its only file) says."""
    index = next(folder.glob("*.safetensors.index.json"), None)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if index is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert sorted(set(weight_map.values())) == names
    found: dict[str, Array] = {}
    for name in names:
        found.update(load_file(folder / name))
    return found


def save_model(
    folder: Path,
    tensors: Mapping[str, Array],
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    side_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A Hugging Face folder of these tensors in so many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / name, metadata)
            weight_map.update(dict.fromkeys(part, name))
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config, indent=2))
    for name, content in (side_files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def as_torch(array: Array) -> Any:
    """The same values as a tensor of torch, in memory of its own."""
    import torch

    codes = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    raw = torch.from_numpy(np.frombuffer(bytearray(array.tobytes()), np.uint8)) if array.size else torch.zeros(0)
    plain = codes.get(array.dtype.name) or getattr(torch, array.dtype.name)
    return raw.to(plain).reshape(array.shape) if not array.size else raw.view(plain).reshape(array.shape)


def save_pickles(folder: Path, tensors: Mapping[str, Array], *, shards: int = 1, config: Any = None) -> Path:
    """As `save_model`, as torch pickles them: pytorch_model.bin, or its shards and index."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        torch.save({name: as_torch(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
    else:
        weight_map = {}
        for number in range(shards):
            name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            part = dict(list(tensors.items())[number::shards])
            torch.save({key: as_torch(array) for key, array in part.items()}, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config, indent=2))
    return folder


def language_model(
    seed: int, *, delta: float = 0.1, layers: int = 3, hidden: int = 32, vocab: int = 100, dtype: Any = BF16
) -> dict[str, Array]:
    """Tensors shaped like a small language model's; two seeds are `delta` apart, relatively."""
    shared, own = np.random.default_rng(7), np.random.default_rng(seed)
    tensors: dict[str, Array] = {}

    def add(name: str, *shape: int) -> None:
        values = shared.standard_normal(shape) + delta * own.standard_normal(shape)
        tensors[name] = (0.02 * values).astype(np.float32).astype(dtype)

    add("model.embed_tokens.weight", vocab, hidden)
    for n in range(layers):
        for part in "qkvo":
            add(f"model.layers.{n}.self_attn.{part}_proj.weight", hidden, hidden)
        add(f"model.layers.{n}.mlp.up_proj.weight", 3 * hidden, hidden)
        add(f"model.layers.{n}.input_layernorm.weight", hidden)
        add(f"model.layers.{n}.input_layernorm.bias", hidden)
    add("model.norm.weight", hidden)
    add("model.norm.bias", hidden)
    add("lm_head.weight", vocab, hidden)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
