"""Plain values, as YAML gives them -> a dataclass of ours, by the types that its fields are annotated with.

Only types, unknown keys and missing keys are judged here; `config.py` judges ranges.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from train.errors import TrainError

# What transformers' Trainer, TRL and others call our keys.
ALIASES = {
    "learning_rate": "lr", "per_device_train_batch_size": "micro_batch", "micro_batch_size": "micro_batch",
    "batch_size": "micro_batch", "train_batch_size": "global_batch", "global_batch_size": "global_batch",
    "gradient_accumulation_steps": "global_batch", "num_train_epochs": "epochs", "num_epochs": "epochs",
    "max_length": "sequence_length", "max_seq_length": "sequence_length", "sequence_len": "sequence_length",
    "cutoff_len": "sequence_length", "block_size": "sequence_length", "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule", "warmup_ratio": "warmup", "warmup_steps": "warmup", "optim": "optimizer",
    "adam_beta1": "betas", "adam_beta2": "betas", "max_norm": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "gradient_checkpointing": "activation_checkpointing", "bf16": "dtype", "fp16": "dtype", "torch_dtype": "dtype",
    "attn_implementation": "attention", "flash_attention": "attention", "torch_compile": "compile",
    "neftune_noise_alpha": "neftune_alpha", "eval_steps": "eval_every", "save_steps": "save_every",
    "push_to_hub": "push_to", "hub_model_id": "push_to",
    "save_total_limit": "keep_last", "output_dir": "output", "model_name_or_path": "model", "base_model": "model",
    "model_id": "model", "dataset": "sources", "datasets": "sources", "data": "sources", "train_dataset": "sources",
    "resume_from_checkpoint": "resume", "sample_packing": "packing", "random_seed": "seed", "eta": "mixing_ratio",
    "mixce_ratio": "mixing_ratio", "chat_template": "format", "test_size": "held_out", "val_set_size": "held_out",
    "limit": "take", "max_samples": "take", "subset": "name", "config_name": "name", "column": "messages",
}  # fmt: skip


def build(cls: Any, data: Any, where: str = "") -> Any:
    """`data` as a `cls`. Raises TrainError that names the key by its path below `where`."""
    if not isinstance(data, Mapping):
        raise TrainError(f"{where or 'The config'} is {describe(data)}, expected keys with values.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise TrainError(unknown_key(str(key), hints, where))
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in data:
            raise TrainError(f"{_join(where, item.name)} is missing. It has no default: give it a value.")
    return cls(**{key: _convert(value, hints[key], _join(where, key)) for key, value in data.items()})


def unknown_key(key: str, known: Mapping[str, Any] | Sequence[str], where: str = "") -> str:
    """The message for a key that does not exist, naming the nearest one that does."""
    near = [ALIASES[key]] if ALIASES.get(key) in known else difflib.get_close_matches(key, list(known), 1, 0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(known)}."
    return f"{_join(where, key)!r} is not a key. {hint}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type says; raises TrainError when it is something else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _convert(value, inner[0], where)
    if origin is Literal:
        if value not in args:
            raise TrainError(f"{where} is {value!r}, expected one of {', '.join(map(str, args))}.")
        return value
    if origin is tuple:
        return _convert_sequence(value, args, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    return _convert_scalar(value, hint, where)


def _convert_sequence(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TrainError(f"{where} is {describe(value)}, expected a list.")
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(value):
        raise TrainError(f"{where} has {len(value)} entries, expected {len(hints)}.")
    return tuple(_convert(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True)))


def _convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, str):
        value = _number(value)  # YAML reads 1e-5 as a string
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise TrainError(f"{where} is {describe(value)}, expected {_NAMES[kind]}.")
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def describe(value: Any) -> str:
    """A value and its type, for messages."""
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
