"""YAML and flags -> a frozen TrainConfig, or one error that names the key.

A config is judged by itself, before anything is loaded: no torch and no network here. Each key is a field of a
dataclass; the docstring says what it means and, in brackets, what a default of None stands for. The help and the tables
of docs/training.md are made of these lines. `CHECKS` holds the ranges.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from train.contrast.options import ContrastConfig, check_contrast
from train.errors import TrainError
from train.plain import build, describe
from train.selection import Sort, Where


@dataclass(frozen=True)
class Template:
    """One example per row: Python-style `{column}` fields; `{{` and `}}` are braces."""

    prompt: str = ""
    response: str = ""
    rationale: str | None = None  # format tinycot only: between the prompt and the response
    text: str | None = None  # format text only: all of it is learned


@dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture.

    path: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder, or the id of a data set on the Hub
    name: configuration of a data set on the Hub
    split: split of a data set on the Hub
    revision [latest]: revision of a data set on the Hub
    label [last part of path]: name of the source in reports; two sources cannot share one
    where [all rows]: list of `{column, op, value, cast}`; a row is kept when every test holds. `op` is `==`, `!=`, `<`,
        `<=`, `>`, `>=`, `in` or `not in`. `cast` (`int`, `float`, `str`) converts the column first, since scores may be
        strings. An empty cell fails every test but `!=` and `not in`
    shuffle [file order]: seed to shuffle the rows with
    sort: `{column, descending, cast}`, applied after `shuffle`. Equal rows keep their order; rows with an empty cell
        come last
    take [all]: number of examples, after the templates; only examples that fit `sequence_length` count
    held_out: rows kept for evaluation, a number (1 or more) or a share (below 1) of the rows that `where` keeps
    on_bad_row: what to do with a row that cannot become text: stop and name it, or skip and count it
    special_tokens_in_data: whether text in the data that spells a special token (`<|endoftext|>`) is read as that
        `token`, counted, or as ordinary `text`
    weight: passes over this source per epoch of the mixture; 0.5 is one half in this epoch, the other half in the next.
        With 0 nothing is learned from it, and its held-out rows (if `held_out` is 0: all, or `take`) are evaluated
    judge: evaluate answers, too: the model continues the held-out prompts greedily, and what it writes is right by the
        last `number` in it, by the letter that it chooses (`choice`: a letter at its beginning, as `(B)`, else the last
        single one), by all its words (`exact`: apart from white space, case and a full stop), or by a function of your
        own, `MODULE:FUNCTION`, which gets the written and the expected text
    format: how a row becomes text, see Formats
    templates: list of `{prompt, response}` (tinycot: also `rationale`; text: only `text`) with `{column}` fields. Each
        template makes one example per row; white space at the ends is removed
    messages: column that holds lists of `{role, content}`, instead of templates. A chat template gets each message
        whole, with its `tool_calls`, `reasoning_content` and so on
    tools: column that holds the tools of a conversation, for the chat template: a list of JSON schemas, or its text
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    label: str | None = None
    where: tuple[Where, ...] = ()
    shuffle: int | None = None
    sort: Sort | None = None
    take: int | None = None
    held_out: float = 0
    on_bad_row: Literal["error", "skip"] = "error"
    special_tokens_in_data: Literal["token", "text"] = "token"
    weight: float = 1.0
    judge: str | None = None
    format: Literal["memphis-chat", "tinycot", "chat-template", "text"] = "memphis-chat"
    templates: tuple[Template, ...] = ()
    messages: str | None = None
    tools: str | None = None

    @property
    def title(self) -> str:
        return self.label or Path(self.path).name

    @property
    def is_evaluated(self) -> bool:
        return bool(self.held_out) or not self.weight


@dataclass(frozen=True)
class Lora:
    """An adapter is trained, and the model itself frozen. Needs peft.

    rank: columns of an adapter's two matrices
    alpha: the adapter is multiplied by alpha / rank
    targets: names of the modules that get an adapter (`q_proj`), or all-linear: every matrix but the output head
    dropout: of an adapter's input
    output: the result: the adapter's folder, which slerp-merge takes as FT, or the model with the adapter merged
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    output: Literal["adapter", "merged"] = "adapter"


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    model: a local folder (used when it exists) or a Hub id, `org/name` or `org/name@revision`
    output: folder for everything that the run writes
    sources [required, but with contrast]: the data mixture, see Sources
    revision [latest]: revision of a model on the Hub
    mixing_ratio: eta of MixCE; 1 is cross-entropy, 0 is pure self-reinforcement
    fused_loss: compute the loss without an array of tokens x vocabulary. A model whose logits need more than its output
        matrix is refused, with the advice to turn this off
    sequence_length: in tokens; longer examples are dropped and counted, never cut
    packing: put several examples in one sequence; they do not attend to each other, and positions restart at 0.
        With false, one padded example in a row
    micro_batch: sequences that one process computes at once
    global_batch [one micro-batch per process]: sequences per optimizer step, over all processes; a multiple of
        `micro_batch` x processes
    global_batch_tokens: the same in tokens; a multiple of `sequence_length`
    global_batch_examples: the same in examples. They are packed among themselves, so a step has the gradient of
        `packing: false` at this `global_batch` (a sum, divided once), in fewer sequences
    epochs: passes over the mixture, also fractions; only whole global batches are used
    max_steps: a fixed number of steps, instead of `epochs`
    seed: decides the order of the data, the held-out rows and all random numbers
    optimizer: the update rule
    lr: the highest learning rate
    schedule: the learning rate after the warm-up
    warmup: share of all steps in which the learning rate rises
    adalite_lambda: Adalite only; pulls the norm of each tensor towards 1
    weight_decay: AdamW only; on matrices only
    betas: AdamW only
    max_grad_norm [no clipping]: clips the global norm of the gradients
    accumulate_in: precision of the sum of a step's gradients over its micro-batches. float32 takes 4 bytes per trained
        parameter; several processes each hold the whole sum, and exchange it once a step. With bfloat16, a bfloat16
        model takes 2 bytes (the sum of 128 micro-batches was off by 1 %), and several processes exchange after every
        micro-batch and hold their shares
    fused_backward: update each weight, and free its gradient, as soon as the backward pass has it; without accumulation
        and without clipping
    stochastic_rounding: of bfloat16 weights
    dtype: auto is bfloat16 on a GPU that has it, and float32 on CPU (bfloat16 was about 2 times slower there)
    device: auto is the GPU if there is one
    attention: the implementation in transformers; `flash_attention_2` was not run here
    activation_checkpointing: compute decoder layers again in the backward pass: less memory, more time
    lora: `{rank, alpha, targets, dropout, output}`, see LoRA: train an adapter, and no weight of the model
    freeze_embeddings: do not train the input and output embeddings
    neftune_alpha: NEFTune noise; Memphis-CoT used 10
    compile: `torch.compile` each decoder layer
    eval_every [at the end]: steps between evaluations of the held-out rows
    eval_batches [all]: micro-batches per source and evaluation
    save_every [half an hour]: steps between checkpoints. A signal, and an evaluation better than all before, save too
    keep_last: checkpoints kept, besides the best one
    final: the result: the weights of the `last` step, of the `best` evaluation by `best_by`, or the `average` of the
        last `average_of` checkpoints
    best_by: the metric that says which evaluation is the best: `nll` (held-out loss, the mean over the sources),
        `nll/SOURCE` or `accuracy/SOURCE`
    average_of: checkpoints in the average, the last step's among them; needs `save_every`
    stop_after [no early stop]: stop after this many evaluations in a row that are not better than the best before
    report_to [tensorboard, if installed]: list of `tensorboard`, `wandb` and `trackio`; metrics.jsonl is always written
    push_to: `hub:ORG/NAME`, a model repository of the Hub that gets `final`, in one commit; one that is not there is
        made, a private one. Whether you may write there is asked before the training
    resume [when there is a checkpoint]: true insists on a checkpoint, false refuses to go on from one
    max_shard_bytes: of a weights file; saving holds one such shard in host memory at a time
    sample_prompts: texts that each evaluation continues greedily, taken as written
    sample_tokens: length of these continuations
    contrast: iterative training on the model's own verified answers, in place of plain finetuning: see docs/contrast.md
    """

    model: str
    output: str
    sources: tuple[SourceConfig, ...] = ()
    revision: str | None = None
    mixing_ratio: float = 0.5
    fused_loss: bool = True
    sequence_length: int = 4096
    packing: bool = True
    micro_batch: int = 1
    global_batch: int | None = None
    global_batch_tokens: int | None = None
    global_batch_examples: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    optimizer: Literal["adalite", "adamw"] = "adalite"
    lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.2
    adalite_lambda: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    accumulate_in: Literal["float32", "bfloat16"] = "float32"
    fused_backward: bool = False
    stochastic_rounding: bool = True
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool = True
    lora: Lora | None = None
    freeze_embeddings: bool = True
    neftune_alpha: float = 0.0
    compile: bool = False
    eval_every: int | None = None
    eval_batches: int | None = None
    save_every: int | None = None
    keep_last: int = 2
    final: Literal["last", "best", "average"] = "last"
    best_by: str = "nll"
    average_of: int = 3
    stop_after: int | None = None
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = None
    push_to: str | None = None
    resume: bool | None = None
    max_shard_bytes: int = 4_000_000_000
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    contrast: ContrastConfig | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch, at most: a pair has several."""
        return self.micro_batch * (self.contrast.unit_rows if self.contrast else 1)

    def sequences_per_step(self, world_size: int) -> int:
        """The global batch in sequences, over all processes; default: one micro-batch each. Of examples: at most."""
        if self.global_batch_tokens is not None:
            return self.global_batch_tokens // self.sequence_length
        return self.global_batch or self.global_batch_examples or self.micro_batch * world_size

    def accumulates(self, world_size: int) -> bool:
        """Whether a step has several micro-batches."""
        return self.sequences_per_step(world_size) > self.micro_batch * world_size


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """TrainConfig from a YAML file, with `overrides` (top-level keys, already parsed) on top.

    Raises TrainError naming the key, what was found, what was expected.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise TrainError(f"{path}: the config cannot be read ({e.strerror}). Check the path.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise TrainError(f"{path}: is not valid YAML. {e}") from e
    if not isinstance(data, dict):
        raise TrainError(f"{path}: holds {describe(data)}, expected keys with values such as `model: FOLDER`.")
    return build_config({**data, **(overrides or {})})


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: the first value would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if lines.setdefault(name, line) != line:
                raise yaml.YAMLError(f"Line {line}: {name!r} is given twice, first in line {lines[name]}.")
        return super().construct_mapping(node, deep)


def build_config(data: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig from plain values: types, ranges and contradictions are checked, no more."""
    config: TrainConfig = _split_revision(build(TrainConfig, data))
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
        raise TrainError(
            f"model is {config.model!r} and revision is {config.revision!r}. Give one revision, in one place."
        )
    return dataclasses.replace(config, model=name, revision=revision)


# ---- ranges and contradictions -----------------------------------------------------------------------

_COUNTS = (
    "micro_batch", "global_batch", "global_batch_tokens", "global_batch_examples", "max_steps", "eval_every",
    "eval_batches", "save_every", "keep_last", "max_shard_bytes", "sample_tokens", "average_of", "stop_after",
)  # fmt: skip
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (lambda v: v >= 1, "at least 1")),
    "mixing_ratio": (lambda v: 0 <= v <= 1, "from 0 (self-reinforcement) to 1 (cross-entropy)"),
    "sequence_length": (lambda v: v >= 2, "at least 2"),
    "epochs": (lambda v: 0 < v < 1e6, "above 0"),
    "seed": (lambda v: 0 <= v < 2**53, "from 0 to 2**53 - 1"),
    "lr": (lambda v: 0 < v < 10, "above 0 and below 10"),
    "warmup": (lambda v: 0 <= v <= 1, "a share of all steps from 0 to 1 (20 % is 0.2)"),
    "adalite_lambda": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "weight_decay": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "betas": (lambda v: all(0 <= b < 1 for b in v), "two numbers from 0 to below 1"),
    "max_grad_norm": (lambda v: v > 0, "above 0 (leave it out for no clipping)"),
    "neftune_alpha": (lambda v: 0 <= v < 1e4, "0 (off) or above"),
    "push_to": (lambda v: re.fullmatch(r"hub:[\w.-]+/[\w.-]+", v) is not None, "hub:ORG/NAME"),
    "sample_prompts": (lambda v: all(text.strip() for text in v), "texts that are not empty"),
}


def _check_ranges(config: TrainConfig) -> None:
    for key, (is_right, expected) in CHECKS.items():
        value = getattr(config, key)
        if value is not None and not is_right(value):
            raise TrainError(f"{key} is {value}, expected {expected}.")


def _check_together(config: TrainConfig) -> None:
    """Contradictions between keys that are each fine alone."""
    if config.contrast is not None:
        check_contrast(config.contrast)
        if config.contrast.ce_on == "sources" and config.fused_backward:
            raise TrainError("fused_backward cannot add up the pairs' gradient and the sources'. Turn it off.")
        refused = {
            "lora": config.lora,
            "stop_after": config.stop_after,
            "global_batch_examples": config.global_batch_examples,
        }
        for key in [*(k for k, v in refused.items() if v is not None), *["final: best"] * (config.final == "best")]:
            raise TrainError(f"{key} does not go with contrast. Remove it (global_batch counts pairs).")
    if not config.sources and (config.contrast is None or config.contrast.ce_on == "sources"):
        raise TrainError("sources is missing or empty, expected at least one source.")
    sizes = [k for k in ("global_batch", "global_batch_tokens", "global_batch_examples") if getattr(config, k)]
    if len(sizes) > 1:
        raise TrainError(f"{' and '.join(sizes)} are both given. Give one of them.")
    if config.fused_backward and config.global_batch_examples:
        raise TrainError("fused_backward needs one micro-batch a step; global_batch_examples gives any number of them.")
    tokens = config.global_batch_tokens
    if tokens is not None and tokens % config.sequence_length:
        raise TrainError(
            f"global_batch_tokens is {tokens}, expected a multiple of sequence_length {config.sequence_length}."
        )
    if config.fused_backward and config.max_grad_norm is not None:
        raise TrainError(
            "fused_backward frees each gradient before the global norm is known, so max_grad_norm cannot be applied. "
            "Remove one of the two."
        )
    if config.optimizer == "adalite" and (config.weight_decay or config.betas != TrainConfig.betas):
        raise TrainError("weight_decay and betas are for AdamW only. Remove them, or set optimizer: adamw.")
    if config.lora is not None:
        _check_lora(config, config.lora)
    if config.sources and not any(source.weight for source in config.sources) and config.contrast is None:
        raise TrainError("Every source has weight 0, so nothing would be learned. Give one a weight.")
    _check_choice(config)
    titles = [source.title for source in config.sources]
    twice = next((t for t in titles if titles.count(t) > 1), None)
    if twice is not None:
        raise TrainError(f"Two sources are called {twice!r}. Give each its own `label`.")


def _check_lora(config: TrainConfig, lora: Lora) -> None:
    if lora.rank < 1 or lora.alpha < 1 or not lora.targets or not 0 <= lora.dropout < 1:
        raise TrainError("lora has rank and alpha of at least 1, targets, and a dropout from 0 to below 1.")
    if config.final == "average":
        raise TrainError("final: average is for whole models: a mean of adapters' matrices is not the mean adapter.")


def _check_choice(config: TrainConfig) -> None:
    """What final, best_by and stop_after need of the evaluations and checkpoints."""
    known = {f"nll/{source.title}" for source in config.sources if source.is_evaluated}
    known |= {"nll"} if known else set()
    known |= {f"accuracy/{source.title}" for source in config.sources if source.judge}
    chosen = next((k for k in ("final", "stop_after") if getattr(config, k) not in ("last", "average", None)), None)
    if (chosen or config.best_by != TrainConfig.best_by) and config.best_by not in known:
        expected = ", ".join(sorted(known)) or "a source with held_out, to have any metric"
        raise TrainError(f"best_by is {config.best_by!r}, expected {expected}.")
    for key, value, needed in (
        ("stop_after", config.stop_after, "eval_every"),
        ("final: average", config.final == "average" or None, "save_every"),
    ):
        if value is not None and getattr(config, needed) is None:
            raise TrainError(f"{key} needs {needed}. Set it.")


def check_batch(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per process and step, at most; raises TrainError when the global batch does not divide."""
    rows, unit = config.sequences_per_step(world_size), config.micro_batch * world_size
    if config.global_batch_examples:
        return -(-rows // unit)
    if rows % unit:
        raise TrainError(
            f"The global batch is {rows} sequences, expected a multiple of micro_batch {config.micro_batch} "
            f"x {world_size} processes = {unit}."
        )
    if config.fused_backward and rows != unit:
        raise TrainError(
            f"fused_backward applies each gradient at once, so it cannot accumulate {rows // unit} micro-batches. "
            f"Set micro_batch to {rows // world_size}, or turn fused_backward off."
        )
    return rows // unit


def _check_source(source: SourceConfig, where: str) -> None:
    if source.take is not None and source.take < 1:
        raise TrainError(f"{where}.take is {source.take}, expected at least 1.")
    if not 0 <= source.weight <= 1000:
        raise TrainError(f"{where}.weight is {source.weight}, expected passes per epoch from 0 to 1000.")
    if source.judge is not None and (not source.is_evaluated or source.format == "text"):
        raise TrainError(f"{where}.judge needs held-out prompts: held_out, or weight: 0, and a format with a prompt.")
    if not source.held_out >= 0 or (source.held_out >= 1 and source.held_out % 1):
        raise TrainError(f"{where}.held_out is {source.held_out}, expected a share below 1 or a whole number of rows.")
    for number, test in enumerate(source.where):
        if test.op in ("in", "not in") and not isinstance(test.value, list):
            problem = f"{where}.where[{number}].value is {describe(test.value)}"
            raise TrainError(f"{problem}, expected a list for {test.op!r}.")
    if (source.messages is None) == (not source.templates):
        raise TrainError(f"{where} needs either `templates` or `messages`, and not both.")
    if source.special_tokens_in_data == "text" and source.format == "chat-template":
        raise TrainError(
            f"{where}.special_tokens_in_data is text, but a chat template writes its special tokens as text."
        )
    if source.tools is not None and source.format != "chat-template":
        raise TrainError(f"{where}.tools is for chat-template, the format is {source.format}.")
    if source.messages is not None and source.format not in ("memphis-chat", "chat-template"):
        raise TrainError(f"{where}.format is {source.format}, expected memphis-chat or chat-template for messages.")
    for number, template in enumerate(source.templates):
        _check_template(source.format, template, f"{where}.templates[{number}]")


def _check_template(fmt: str, template: Template, where: str) -> None:
    needed = {"text": ("text",), "tinycot": ("prompt", "rationale", "response")}.get(fmt, ("prompt", "response"))
    for key in ("prompt", "response", "rationale", "text"):
        is_set = bool(getattr(template, key))
        if is_set != (key in needed):
            verb = "is missing" if key in needed else "has no place"
            raise TrainError(f"{where}.{key} {verb} in format {fmt}, which takes {', '.join(needed)}.")
