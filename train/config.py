"""What the user asks: YAML and flags -> a frozen TrainConfig, or one error naming the key.

Never torch, never a network: a config is judged by itself, before anything is loaded. Every key is a field
of a dataclass below with its default; `CHECKS` holds the ranges. Unknown keys name their neighbour.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from train.errors import TrainError

Cast = Literal["int", "float", "str"]
Op = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]


@dataclass(frozen=True)
class Where:
    """Keep a row when `column op value` holds; `cast` converts the column first (scores may be strings)."""

    column: str
    op: Op
    value: Any
    cast: Cast | None = None


@dataclass(frozen=True)
class Sort:
    """Order of the rows, before `take`; stable, so that a `shuffle` decides between equals."""

    column: str
    descending: bool = False
    cast: Cast | None = None


@dataclass(frozen=True)
class Template:
    """One example per row: Python-style `{column}` fields; `{{` and `}}` are braces."""

    prompt: str = ""
    response: str = ""
    rationale: str | None = None  # format tinycot only: between the prompt and the response
    text: str | None = None  # format text only: all of it is learned


@dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture; `docs/training.md` explains each key."""

    path: str  # a local .jsonl, .json, .csv or .parquet file, a folder, or a hub data set
    name: str | None = None  # hub: the configuration
    split: str = "train"
    revision: str | None = None
    label: str | None = None  # how reports call it; default: the path's last part
    where: tuple[Where, ...] = ()
    shuffle: int | None = None  # seed
    sort: Sort | None = None
    take: int | None = None  # examples, counted after dropping those that do not fit
    held_out: float = 0  # rows (1 or more) or a share of them (below 1), for evaluation
    weight: float = 1.0  # passes over this source in one epoch of the mixture
    format: Literal["memphis-chat", "tinycot", "chat-template", "text"] = "memphis-chat"
    templates: tuple[Template, ...] = ()
    messages: str | None = None  # a column of {role, content} lists, instead of templates

    @property
    def title(self) -> str:
        return self.label or Path(self.path).name


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. Sizes in tokens or sequences as named, fractions in [0, 1], seeds are integers."""

    model: str  # a local folder or a hub id (`org/name`, or with its revision `org/name@revision`)
    output: str  # the folder for checkpoints, metrics and the result
    sources: tuple[SourceConfig, ...]
    revision: str | None = None  # of the model, when it is a hub id
    # the loss
    mixing_ratio: float = 0.5
    fused_loss: bool = True
    # batches
    sequence_length: int = 4096
    packing: bool = True
    micro_batch: int = 1  # sequences a process computes at once
    global_batch: int | None = None  # sequences per optimizer step, over all processes
    global_batch_tokens: int | None = None  # the same, in tokens (a multiple of sequence_length)
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    # the optimizer
    optimizer: Literal["adalite", "adamw"] = "adalite"
    lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.2  # share of all steps
    adalite_lambda: float = 0.01
    weight_decay: float = 0.0  # AdamW, on matrices only
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    fused_backward: bool = False
    stochastic_rounding: bool = True  # of bfloat16 weights
    # the model
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool = True
    freeze_embeddings: bool = True
    neftune_alpha: float = 0.0
    compile: bool = False
    # watching and keeping
    eval_every: int | None = None  # steps; the last step is always evaluated when rows are held out
    eval_batches: int | None = None  # micro-batches per source; default all
    save_every: int | None = None  # steps; default every half hour; the best evaluation and signals also save
    keep_last: int = 2
    resume: bool | None = None  # default: when the output holds a checkpoint
    max_shard_bytes: int = 4_000_000_000
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64

    def sequences_per_step(self, world_size: int) -> int:
        """The global batch in sequences, over all processes; default: one micro-batch each."""
        if self.global_batch_tokens is not None:
            return self.global_batch_tokens // self.sequence_length
        return self.global_batch or self.micro_batch * world_size


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """TrainConfig from a YAML file, with `overrides` (top-level keys, already parsed) on top.

    Raises TrainError naming the key, what was found, what was expected.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise TrainError(f"cannot read the config {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise TrainError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise TrainError(f"{path} holds {_kind(data)}, expected keys and values such as `model: FOLDER`")
    return build_config({**data, **(overrides or {})})


def build_config(data: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig from plain values: types, ranges and contradictions are checked, no more."""
    config: TrainConfig = _split_revision(_build(TrainConfig, data, ""))
    _check_ranges(config)
    _check_together(config)
    for number, source in enumerate(config.sources):
        _check_source(source, f"sources[{number}]")
    return config


def _split_revision(config: TrainConfig) -> TrainConfig:
    """`model: org/name@revision` as the two keys it stands for; a local path that exists wins."""
    name, at, revision = config.model.partition("@")
    if not at or name.count("/") != 1 or Path(config.model).exists():
        return config
    if not revision or config.revision not in (None, revision):
        raise TrainError(f"model is {config.model!r} and revision {config.revision!r}: give one revision, in one place")
    return dataclasses.replace(config, model=name, revision=revision)


# ---- plain values -> dataclasses ---------------------------------------------------------------------


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise TrainError(f"{where or 'the config'} is {_kind(data)}, expected keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise TrainError(unknown_key(str(key), hints, where))
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in data:
            raise TrainError(f"{_join(where, item.name)} is missing; it has no default")
    return cls(**{key: _convert(value, hints[key], _join(where, key)) for key, value in data.items()})


def unknown_key(key: str, known: Mapping[str, Any] | Sequence[str], where: str = "") -> str:
    """The message for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(key, list(known), 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
    return f"unknown key {_join(where, key)!r}: {hint}"


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
            raise TrainError(f"{where} is {value!r}, expected one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _convert_sequence(value, args, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    return _convert_scalar(value, hint, where)


def _convert_sequence(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TrainError(f"{where} is {_kind(value)}, expected a list")
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(value):
        raise TrainError(f"{where} has {len(value)} entries, expected {len(hints)}")
    return tuple(_convert(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True)))


def _convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, str):
        value = _number(value)  # YAML reads 1e-5 as a string
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise TrainError(f"{where} is {_kind(value)}, expected {_NAMES[kind]}")
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _kind(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# ---- ranges and contradictions -----------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mixing_ratio": (lambda v: 0 <= v <= 1, "from 0 (self-reinforcement) to 1 (cross-entropy)"),
    "sequence_length": (lambda v: v >= 2, "at least 2"),
    "micro_batch": (lambda v: v >= 1, "at least 1"),
    "global_batch": (lambda v: v >= 1, "at least 1"),
    "global_batch_tokens": (lambda v: v >= 1, "at least 1"),
    "epochs": (lambda v: 0 < v < 1e6, "above 0"),
    "max_steps": (lambda v: v >= 1, "at least 1"),
    "seed": (lambda v: 0 <= v < 2**53, "from 0 to 2**53 - 1"),
    "lr": (lambda v: 0 < v < 10, "above 0 and below 10"),
    "warmup": (lambda v: 0 <= v <= 1, "a share of all steps from 0 to 1 (20 % is 0.2)"),
    "adalite_lambda": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "weight_decay": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "betas": (lambda v: all(0 <= b < 1 for b in v), "two numbers from 0 to below 1"),
    "max_grad_norm": (lambda v: v > 0, "above 0 (leave it out for no clipping)"),
    "neftune_alpha": (lambda v: 0 <= v < 1e4, "0 (off) or above"),
    "eval_every": (lambda v: v >= 1, "at least 1"),
    "eval_batches": (lambda v: v >= 1, "at least 1"),
    "save_every": (lambda v: v >= 1, "at least 1"),
    "keep_last": (lambda v: v >= 1, "at least 1"),
    "max_shard_bytes": (lambda v: v >= 1, "at least 1"),
    "sample_tokens": (lambda v: v >= 1, "at least 1"),
    "sources": (lambda v: len(v) > 0, "at least one source"),
}


def _check_ranges(config: TrainConfig) -> None:
    for key, (is_right, expected) in CHECKS.items():
        value = getattr(config, key)
        if value is not None and not is_right(value):
            raise TrainError(f"{key} is {value}, expected {expected}")


def _check_together(config: TrainConfig) -> None:
    """Contradictions between keys that are each fine alone."""
    if config.global_batch is not None and config.global_batch_tokens is not None:
        raise TrainError("global_batch and global_batch_tokens are both given: keep one")
    tokens = config.global_batch_tokens
    if tokens is not None and tokens % config.sequence_length:
        raise TrainError(
            f"global_batch_tokens is {tokens}, expected a multiple of sequence_length {config.sequence_length}"
        )
    if config.fused_backward and config.max_grad_norm is not None:
        raise TrainError(
            "fused_backward frees each gradient before the global norm is known, so max_grad_norm cannot "
            "apply: remove one of the two"
        )
    if config.optimizer == "adalite" and (config.weight_decay or config.betas != TrainConfig.betas):
        raise TrainError("weight_decay and betas are AdamW's, and optimizer is adalite: remove them or set adamw")
    titles = [source.title for source in config.sources]
    twice = next((t for t in titles if titles.count(t) > 1), None)
    if twice is not None:
        raise TrainError(f"two sources are called {twice!r}: give each its own `label`")


def check_batch(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per process and step; raises TrainError when the global batch does not divide."""
    rows, unit = config.sequences_per_step(world_size), config.micro_batch * world_size
    if rows % unit:
        raise TrainError(
            f"the global batch is {rows} sequences, expected a multiple of micro_batch {config.micro_batch} "
            f"x {world_size} processes = {unit}"
        )
    if config.fused_backward and rows != unit:
        raise TrainError(
            f"fused_backward applies each gradient at once, so it cannot accumulate {rows // unit} "
            f"micro-batches: set micro_batch to {rows // world_size} or turn fused_backward off"
        )
    return rows // unit


def _check_source(source: SourceConfig, where: str) -> None:
    if source.take is not None and source.take < 1:
        raise TrainError(f"{where}.take is {source.take}, expected at least 1")
    if not 0 < source.weight <= 1000:
        raise TrainError(f"{where}.weight is {source.weight}, expected passes per epoch above 0, at most 1000")
    if not source.held_out >= 0 or (source.held_out >= 1 and source.held_out != int(source.held_out)):
        raise TrainError(f"{where}.held_out is {source.held_out}, expected a share below 1 or a number of rows")
    for number, test in enumerate(source.where):
        if test.op in ("in", "not in") and not isinstance(test.value, list):
            raise TrainError(f"{where}.where[{number}].value is {_kind(test.value)}, expected a list for {test.op!r}")
    if (source.messages is None) == (not source.templates):
        raise TrainError(f"{where} needs either `templates` or `messages`, and not both")
    if source.messages is not None and source.format not in ("memphis-chat", "chat-template"):
        raise TrainError(f"{where}.format is {source.format}, expected memphis-chat or chat-template for messages")
    for number, template in enumerate(source.templates):
        _check_template(source.format, template, f"{where}.templates[{number}]")


def _check_template(fmt: str, template: Template, where: str) -> None:
    needed = {"text": ("text",), "tinycot": ("prompt", "rationale", "response")}.get(fmt, ("prompt", "response"))
    for key in ("prompt", "response", "rationale", "text"):
        given = bool(getattr(template, key))
        if given != (key in needed):
            verb = "is missing" if key in needed else "has no place"
            raise TrainError(f"{where}.{key} {verb} in format {fmt}, which takes {', '.join(needed)}")
