"""`MergePlan`: every decision that is made before a weight is read. Every output byte has its offset, and every tensor
its job.

Objects are small and shared: 100,000 tensors are normal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.arrays import TILE
from merge_tool.checkpoint.header import TensorInfo, header_bytes
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import listed, shown
from merge_tool.methods.steps import MergeSpec, Method, seed_key, tile_elements
from merge_tool.plan.scaled import Scaling
from merge_tool.recipe.recipe import Recipe, label_t


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """The parameters of a tensor in one output: `shared` has one value for all inputs, `each` one per input. It is one
    object for all tensors whose parameters are the same."""

    shared: Mapping[str, Any]
    each: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One output tensor: its shard and offset, and its inputs. `number` counts jobs over the whole plan.

    `sides` are the numbers of the models that `sources` belong to; the first source is the base, if the method
    `has_base`. `exact` tensors (integers, booleans) have no values between two: they are copied when equal. `values`
    are the parameters in each output; without them a single source is copied, byte for byte, and `note` says why. With
    `scaling` the result is written as 8-bit codes, or as their scales.
    """

    number: int
    out: TensorInfo
    sources: Sequence[TensorSource]
    sides: tuple[int, ...]
    values: tuple[Values, ...] = ()
    has_base: bool = False
    exact: bool = False
    note: str = ""
    scaling: Scaling | None = None

    @property
    def first(self) -> TensorSource:
        return self.sources[0]

    @property
    def num_inputs(self) -> int:
        """The number of tensors that are merged, without the base of a method that has one."""
        return len(self.sources) - self.has_base

    @property
    def is_copied(self) -> bool:
        return not self.values and not self.exact

    @property
    def is_scales(self) -> bool:
        """Whether the output is scales, and the inputs are the values that they belong to."""
        return self.scaling is not None and self.out.name != self.first.info.name

    @property
    def numel(self) -> int:
        """The number of elements of each input: as many as the output has, except for scales."""
        return self.first.info.numel

    @property
    def input_nbytes(self) -> int:
        return sum(source.info.nbytes for source in self.sources)

    def spec(self, seed: int, output: int = 0) -> MergeSpec:
        """The spec that the method gets for this tensor in one output."""
        values = self.values[output]
        return MergeSpec(
            shape=self.first.info.shape,
            num_inputs=self.num_inputs,
            has_base=self.has_base,
            shared=values.shared,
            each=values.each,
            key=seed_key(seed, self.out.name),
        )


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, its size in bytes, and its tensors in file order."""

    number: int
    file_name: str
    size: int
    jobs: tuple[TensorJob, ...]
    metadata: Mapping[str, str]

    def header(self) -> bytearray:
        return header_bytes((job.out for job in self.jobs), self.metadata)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The decisions: the method, the parameters of each output, and the shards that each output has.

    `names` are the models' names; `facts` decide the output's bytes, as far as headers show it. `layers` has for each
    output layer the donor's layer, if they are not the same; `num_layers` is the number of the output's layers, if
    config.json has it. `text` is the recipe's text as written to the output. `num_scheduled` tensors have
    parameters of their own, by a pattern or along the layers. `is_scaled`: BASE and the output have 8-bit floats with
    scales.
    """

    recipe: Recipe
    method: Method
    names: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    stem: str
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    num_layers: int | None = None
    text: str = ""
    chat_template: str = ""
    num_scheduled: int = 0
    is_scaled: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The sub-folder of each output: `t-0.3` and so on, or an empty text if there is one output."""
        return self.recipe.labels

    @property
    def seed(self) -> int:
        return self.recipe.options.seed

    @property
    def keeps_base_on_mismatch(self) -> bool:
        return self.recipe.options.on_mismatch == "base"

    def is_weighted(self, job: TensorJob) -> bool:
        """Whether a tensor is merged by two weights, rather than by a method's steps."""
        return bool(job.values) and self.method.is_weighted(job.num_inputs, has_base=job.has_base)

    def has_steps(self, job: TensorJob) -> bool:
        return self.method.steps is not None and bool(job.values) and not self.is_weighted(job)

    def is_summed(self, job: TensorJob) -> bool:
        """Whether a tensor is a sum with coefficients that are known before it is read: its inputs are added one by
        one."""
        return self.method.coefficients is not None and self.has_steps(job)

    def may_take_passes(self, job: TensorJob) -> bool:
        """Whether a tensor may need more than one pass over its inputs before it is merged."""
        return self.has_steps(job) or job.scaling is not None

    def tile(self, job: TensorJob) -> int:
        """The number of elements in a tile of this tensor."""
        if not self.has_steps(job):
            return TILE
        spec = job.spec(self.seed)
        return tile_elements(spec, self.method.granularity(spec))

    def jobs(self) -> Iterator[TensorJob]:
        for shard in self.shards:
            yield from shard.jobs

    @property
    def num_tensors(self) -> int:
        return sum(len(shard.jobs) for shard in self.shards)

    @property
    def num_quantised(self) -> int:
        """How many tensors are merged and written as codes of 8 bits with scales."""
        return sum(job.scaling is not None and not job.is_scales for job in self.jobs())

    @property
    def num_kept(self) -> int:
        """How many tensors are copied from one model, not merged."""
        return sum(job.is_copied for job in self.jobs())

    @property
    def num_parameters(self) -> int:
        return sum(job.out.numel for job in self.jobs())

    @property
    def input_bytes(self) -> int:
        return sum(job.input_nbytes for job in self.jobs())

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs' weight files."""
        return len(self.labels) * sum(shard.size for shard in self.shards)

    @property
    def config_dtype(self) -> str | None:
        """The dtype code that config.json should name now, if the merge changed it."""
        if self.recipe.dtype_code is None:
            changed = any(job.scaling is None and job.out.dtype != job.first.stored_dtype for job in self.jobs())
            return "BF16" if changed else None
        return self.recipe.dtype_code

    @property
    def index_name(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    def index(self) -> bytes | None:
        """The index file's bytes, as transformers writes it; None for a single shard."""
        if len(self.shards) == 1:
            return None
        weight_map = {job.out.name: shard.file_name for shard in self.shards for job in shard.jobs}
        total_size = sum(job.out.nbytes for job in self.jobs())
        metadata = {"total_parameters": self.num_parameters, "total_size": total_size}
        content = {"metadata": metadata, "weight_map": weight_map}
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    def facts_of(self, output: int) -> dict[str, Any]:
        """The facts of a merge with this output alone, for the report of one of several outputs."""
        return {**self.facts, **words_of([self.recipe.outputs[output].words])}

    def digest_of(self, output: int) -> str:
        """SHA-256 over everything that decides an output's bytes, as far as headers show it."""
        return digest_of(self.facts_of(output))


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 over the facts of a merge."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def words_of(outputs: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The parameters in which outputs differ, as facts: {"t": ["0.3", "0.5"]}."""
    return {key: [label_t(words[key]) for words in outputs] for key in outputs[0]}


_TEXT = "recipe_sha256"  # the fact that stands for a recipe's text


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two merges' facts, in words: `t was 0.4, now 0.5`."""
    words = ((key, _in_words(before.get(key)), _in_words(now.get(key))) for key in {**now, **before})
    parts = [
        "the recipe changed" if key == _TEXT else f"{key} was {old}, now {new}" for key, old, new in words if old != new
    ]
    models = [key for key, value in now.items() if isinstance(value, dict)]
    changed = [key for key in models if before.get(key) != now[key] and not any(p.startswith(f"{key} ") for p in parts)]
    return [*parts, *(f"the files of {key} changed" for key in changed)]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):  # a model
        return shown(value.get("name"))
    if isinstance(value, list | tuple):
        return listed(value, 10) or "none"
    return "none" if value is None else f"{value:,}" if type(value) is int else shown(value)
