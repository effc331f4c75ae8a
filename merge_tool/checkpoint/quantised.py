"""Checkpoints in quantised formats that are not read: the format, the reason, and the next step. By names only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.sub_configs import sub_configs
from merge_tool.errors import shown

_ORIGINAL = "Merge the original weights, and quantise the result."
_FEW_BITS = "codes of few bits with a scale and a zero for each group: between two codes there is no third to round to"

# quant_method in config.json -> (the format's name, why it is not merged, what to do).
_METHODS: Mapping[str, tuple[str, str, str]] = {
    "gptq": ("GPTQ", _FEW_BITS, _ORIGINAL),
    "awq": ("AWQ", f"{_FEW_BITS}, and its channels are scaled by the calibration of each model", _ORIGINAL),
    "bitsandbytes": (
        "bitsandbytes",
        "codes of 4 or 8 bits, packed, with the largest value of each block or row beside them",
        "Use the original weights, or load it with transformers, model.dequantize(), save_pretrained(FOLDER).",
    ),
    "mxfp4": (
        "MXFP4",
        "two 4-bit floats in a byte, with a shared exponent for each 32",
        "Load it with transformers and Mxfp4Config(dequantize=True), then save_pretrained(FOLDER), and merge that.",
    ),
    "hqq": ("HQQ", _FEW_BITS, _ORIGINAL),
    "aqlm": ("AQLM", "numbers of entries in codebooks that each model has of its own", _ORIGINAL),
    "eetq": ("EETQ", "8-bit integers in the order of a kernel, with a scale for each column", _ORIGINAL),
    "torchao": (
        "torchao",
        "tensors of torchao's own classes, whose layout its versions change",
        "Merge the original weights, and quantise the result; or dequantise it with torchao first.",
    ),
    "nvfp4": (
        "NVFP4",
        "two 4-bit floats in a byte, with an 8-bit float for each 16 as their scale and another scale for the tensor",
        _ORIGINAL,
    ),
    "int8": ("INT8", "8-bit integers with a scale for each row or tensor, which is another in each model", _ORIGINAL),
    "modelopt": ("ModelOpt", "codes of one of the formats of NVIDIA's Model Optimizer", _ORIGINAL),
    "modelopt-fp8": (
        "ModelOpt-FP8",
        "8-bit floats, whose scales are not read under this name",
        "Take quantization_config out of config.json: the scales are then found by their names. Or merge the original "
        "weights, and quantise the result.",
    ),
    "compressed-tensors": (
        "compressed-tensors",
        "integer, packed or sparse codes; its float-quantized format is the one that is read",
        "Load it with transformers and CompressedTensorsConfig(run_compressed=False), then save_pretrained(FOLDER).",
    ),
    "mlx": (
        "MLX",
        "codes of 2 to 8 bits packed into 32, with a scale and perhaps a bias for each group",
        f"{_ORIGINAL} Or dequantise it first: mlx_lm.convert --hf-path FOLDER --mlx-path OUT -d.",
    ),
    "fp8": (
        "FP8",
        "8-bit floats without the scales that belong to them, or with others than one for a tensor, row or block",
        "Fetch it again, or merge the original weights.",
    ),
}
_OTHER = "codes, whose values only its own kernels know"

_Names = Mapping[str, TensorInfo]


def _end(*ends: str) -> Callable[[_Names], str | None]:
    return lambda tensors: next((name for name in tensors if name.endswith(ends)), None)


def _both(end: str, other: str, codes: str) -> Callable[[_Names], str | None]:
    """A tensor of dtype `codes` whose name ends in `end`, beside a tensor whose name ends in `other` instead."""
    return lambda tensors: next(
        (
            n
            for n, t in tensors.items()
            if n.endswith(end) and t.dtype == codes and n.removesuffix(end) + other in tensors
        ),
        None,
    )


def _gptq(tensors: _Names) -> str | None:
    return _end(".qweight")(tensors) if _end(".g_idx")(tensors) else None


def _nvfp4(tensors: _Names) -> str | None:
    weight = _both(".weight", ".weight_scale", "U8")(tensors)
    return weight if weight and tensors[f"{weight}_scale"].dtype == "F8_E4M3" else None


# The formats by names of tensors, for checkpoints without a config, in this order.
_SIGNS: tuple[tuple[str, Callable[[_Names], str | None]], ...] = (
    ("gptq", _gptq),
    ("awq", _end(".qweight", ".qzeros")),
    ("bitsandbytes", _end(".absmax", ".quant_map", ".nested_absmax", ".SCB")),
    ("mxfp4", _both("_blocks", "_scales", "U8")),
    ("hqq", _end(".W_q")),
    ("aqlm", _end(".codebooks")),
    ("eetq", _both(".weight", ".weight_scales", "I8")),
    ("torchao", _end("_weight_qdata", ":_weight_qdata")),
    ("nvfp4", _nvfp4),
    ("compressed-tensors", _end(".weight_packed", ".weight_zero_point", ".bitmask")),
    ("int8", _both("", "_scale", "I8")),
    ("mlx", _both(".weight", ".scales", "U32")),
)
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_SCALE = re.compile(  # the name of scales, and what they scale: a tensor, or a module
    r"(?:(.*?)[._]+)?(?:scales?(?:_inv)?|absmax|q?zeros|zero_points?|biases|codebooks?|quant_(?:map|state)|scb)", re.I
)
_WIDE_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LONE = ("_scale_inv", "_scale", ".quant_map", ".scale_weight", "scaled_fp8")  # ends of the names of lone scales
_SCALES = (".weight_scale", ".weight_scale_inv", ".input_scale", ".output_scale", ".k_scale", ".v_scale")


def why_quantised(config: Mapping[str, Any] | None, tensors: _Names) -> str | None:
    """The message for a quantised checkpoint: its format, the sign of it, why it is not merged, and what to do; None
    for others."""
    for _, settings in sub_configs(config or {}):
        if quantisation := settings.get("quantization_config"):
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            sign = f"quantization_config in config.json{f', method {shown(method)}' if method else ''}"
            if str(method).lower().startswith("modelopt"):
                method = _of_modelopt(quantisation, tensors)
            return _sentence(str(method) if method else _method_by_names(tensors)[0], sign)
        for key, method in (("quantization", "mlx"), ("compression_config", "compressed-tensors")):
            if isinstance(settings.get(key), dict) and settings[key]:
                return _sentence(method, f"{key} in config.json")
    method, tensor = _method_by_names(tensors)
    if tensor is not None:
        return _sentence(method, f"tensor '{shown(tensor)}'")
    if (scales := _lone_scales(tensors)) is not None:
        return _sentence("fp8", f"scales in tensor '{shown(scales)}'")
    if (codes := _codes(tensors)) is not None:
        return _sentence("a format without a known name", f"{tensors[codes].dtype} in tensor '{shown(codes)}'")
    return None


def is_integer_weight(info: TensorInfo) -> bool:
    """Whether a tensor is a matrix of integers: in a weight's place these are codes, as no layer computes with them."""
    return info.dtype in _INTEGERS and len(info.shape) > 1


def _codes(tensors: _Names) -> str | None:
    """Integers that are a weight or have scales beside them: no model counts or lists anything in these places."""
    if not any(info.dtype in _INTEGERS for info in tensors.values()):
        return None
    scales = (_SCALE.fullmatch(name[-500:]) for name, info in tensors.items() if info.dtype in _WIDE_FLOATS)
    scaled = {match[1] or "" for match in scales if match}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        is_weight = leaf.endswith("weight") and is_integer_weight(info)
        has_scales = info.dtype in _INTEGERS and info.numel > 1 and (name in scaled or module in scaled)
        if is_weight or (has_scales and not _SCALE.fullmatch(leaf)):
            return name
    return None


def _of_modelopt(settings: Mapping[str, Any], tensors: _Names) -> str:
    """Which of the tool's formats: by the algorithm that it names, or by the tensors."""
    algorithm = str(settings.get("quant_algo") or "").upper()
    if "NVFP4" in algorithm or (not algorithm and _nvfp4(tensors)):
        return "nvfp4"
    is_fp8 = algorithm.startswith("FP8") or (
        not algorithm and any(t.dtype.startswith("F8_E4") for t in tensors.values())
    )
    return "modelopt-fp8" if is_fp8 else "modelopt"


def _sentence(method: str, sign: str) -> str:
    name, why, todo = _METHODS.get(method.lower(), (shown(method), _OTHER, _ORIGINAL))
    return f"is quantised by {name} ({sign}). It holds {why}, so a merge of two would be a wrong model. {todo}"


def _method_by_names(tensors: _Names) -> tuple[str, str | None]:
    return next(((method, name) for method, sign in _SIGNS if (name := sign(tensors)) is not None), ("unknown", None))


def _lone_scales(tensors: _Names) -> str | None:
    has_fp8 = any(info.dtype.startswith("F8_") for info in tensors.values())
    for name in tensors:
        if not name.endswith(_LONE):
            continue
        companion = next((name.removesuffix(s) for s in ("_scale_inv", "_scale") if name.endswith(s)), None)
        is_named_so = name.endswith(_SCALES)
        if (
            companion is not None
            and companion in tensors
            and (is_named_so or tensors[companion].dtype not in _WIDE_FLOATS)
        ):
            return name
        if (has_fp8 and is_named_so) or name.endswith((".quant_map", ".scale_weight")) or name == "scaled_fp8":
            return name
    return None
