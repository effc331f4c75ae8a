"""Recipe + headers -> MergePlan: every output byte's place, or every mismatch at once.

Reads no weights and writes nothing. Whatever can go wrong because of names, shapes or dtypes goes wrong here.
Objects are small and shared: 100,000 tensors are normal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from merge_tool._version import __version__
from merge_tool.checkpoint.folder import is_pickle
from merge_tool.checkpoint.header import TensorInfo, build_header, header_bytes, write_order
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import RecipeError, listed, shown
from merge_tool.matching import Matching, match_tensors, natural_key, no_match
from merge_tool.methods.steps import Given, StepsMethod
from merge_tool.recipe import OUTPUT_DTYPES, Recipe, label_t
from merge_tool.rows import rows_note
from merge_tool.scaled_plan import ScaledPlan, Scaling, plan_scaled
from merge_tool.schedule import Schedule

_PAIR = (0, 1)
_PICKLED_STEMS = frozenset({"diffusion_pytorch_model", "adapter_model"})  # the same name in both formats
_SCALES = "scales of the merged values"
_CALIBRATED = "scale of activations: the base's"
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One output tensor: where it goes, and its inputs. `number` counts jobs over the whole plan.

    `sides` are the numbers of the models that `sources` belong to, the base first if there is one. `exact` tensors
    (integers, booleans) have no values between two: they are copied when equal. `ts` has the t of each output. `given`
    is what a method of any number of models is told; without it a pair is merged, and a single source is copied, byte
    for byte: `note` says why. With `scaling` a pair is merged in real values and written as codes, or as their scales.
    """

    number: int
    out: TensorInfo
    sources: tuple[TensorSource, ...]
    sides: tuple[int, ...]
    exact: bool
    ts: tuple[float, ...]
    note: str = ""
    given: Given | None = None
    scaling: Scaling | None = None

    @property
    def base(self) -> TensorSource:
        return self.sources[0]

    @property
    def ft(self) -> TensorSource | None:
        return self.sources[1] if len(self.sources) > 1 else None

    @property
    def is_copied(self) -> bool:
        return self.given is None and len(self.sources) == 1

    @property
    def is_scales(self) -> bool:
        """Whether the output has the scales of what its inputs have the values of."""
        return self.scaling is not None and self.out.name != self.base.info.name

    @property
    def has_passes(self) -> bool:
        """Whether there may be more than one pass over its inputs before anything is merged."""
        return self.given is not None or self.scaling is not None

    @property
    def numel(self) -> int:
        """How many elements each input has: as many as the output, but for scales."""
        return self.base.info.numel

    def handed_on(self, output: int, *, equal: bool) -> TensorSource | None:
        """Of 8 bits: the codes or the scales that are taken byte for byte, if any are."""
        side = None if self.scaling is None else self.scaling.handed_on(self.ts[output], equal=equal)
        return None if side is None else side.scales if self.is_scales else side.codes

    @property
    def input_nbytes(self) -> int:
        return sum(source.info.nbytes for source in self.sources)


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
    """All that is decided: the method, one parameter t per output, and the shards that each output has."""

    recipe: Recipe
    names: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    stem: str
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    sides: tuple[str, ...] = ("base", "ft")  # what the report calls the models
    steps: StepsMethod | None = None  # what merges the jobs that have a `given`
    method_name: str = ""  # of a recipe of any number of models; so are the rest
    text: str = ""
    donor: int = 0  # the model whose side files are copied
    layers: tuple[int, ...] = ()  # which of the donor's layers each of the output's was, if they are not the same
    seed: int = 0
    chat_template: str = ""  # what the output's tokenizer has instead of its own
    is_scaled: bool = False  # whether BASE has 8-bit floats with scales and the output has them, too

    @property
    def ts(self) -> tuple[float, ...]:
        return self.recipe.ts

    @property
    def method(self) -> str:
        return self.method_name or self.recipe.method

    @property
    def is_pair(self) -> bool:
        """Whether BASE and FT are merged, at one t or several; otherwise what a recipe's `text` says."""
        return not self.method_name

    @property
    def keeps_base_on_mismatch(self) -> bool:
        return self.recipe.on_mismatch == "base"

    @property
    def labels(self) -> tuple[str, ...]:
        """The sub-folder of each output: `t-0.3` and so on, or nothing when there is one."""
        return ("",) if len(self.ts) == 1 else tuple(f"t-{label_t(t)}" for t in self.ts)

    def jobs(self) -> Iterator[TensorJob]:
        for shard in self.shards:
            yield from shard.jobs

    @property
    def num_tensors(self) -> int:
        return sum(len(shard.jobs) for shard in self.shards)

    @property
    def num_scheduled(self) -> int:
        """How many tensors have a t of their own."""
        if not self.recipe.rules:
            return 0
        return sum(not (job.is_copied or job.is_scales) and job.ts is not self.ts for job in self.jobs())

    @property
    def num_quantised(self) -> int:
        """How many tensors are merged and written as codes of 8 bits with scales."""
        return sum(job.scaling is not None and not job.is_scales for job in self.jobs())

    @property
    def num_kept(self) -> int:
        """How many tensors are the base's, not merged."""
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
        return len(self.ts) * sum(shard.size for shard in self.shards)

    @property
    def config_dtype(self) -> str | None:
        """The dtype code that config.json should name now, if the merge changed it."""
        if self.recipe.dtype in (None, "base"):
            changed = any(job.scaling is None and job.out.dtype != job.base.stored_dtype for job in self.jobs())
            return "BF16" if changed else None
        return OUTPUT_DTYPES[self.recipe.dtype]

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

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the output's bytes, as far as headers show it."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


def plan_merge(recipe: Recipe, models: Sequence[Checkpoint], *, single_file: str | None = None) -> MergePlan:
    """Plan the merge of `models` (base, finetune). `single_file` names the one file to write, if that is asked.

    Raises MismatchError with all mismatches at once; RecipeError when files are asked of a model without any, or a
    pattern matches no tensor.
    """
    base, ft = models
    matching = match_tensors(recipe, base, ft)
    if recipe.files_from == "ft" and ft.folder is None and base.folder is not None:
        raise RecipeError(f"--files-from ft: {ft.name} is a single file, it has no other files to copy.")
    stem = output_stem(base)
    scaled = plan_scaled(recipe, base, ft)
    schedule = _ScheduledTs(recipe, base, matching)
    jobs = _Jobs(models, matching, schedule, scaled)
    infos = _output_infos(recipe, base, matching, scaled)
    shards = lay_out(infos, base, stem, None if single_file else recipe.max_shard_bytes, single_file, jobs)
    facts = _facts(recipe, base, ft, stem, single_file)
    told = scaled.warnings() if scaled else ()
    warnings = (*matching.warnings, *told, *schedule.check(base.tensors))
    return MergePlan(recipe, (base.name, ft.name), shards, stem, facts, warnings, is_scaled=scaled is not None)


def lay_out(
    infos: Sequence[TensorInfo],
    donor: Checkpoint,
    stem: str,
    max_bytes: int | None,
    single_file: str | None,
    job: Callable[[int, TensorInfo], TensorJob],
) -> tuple[ShardPlan, ...]:
    """The output's files: tensors in the order of `infos`, cut into shards; `job(number, placed)` makes each one's."""
    groups = _split(infos, max_bytes)
    metadata = {**donor.metadata, "format": donor.metadata.get("format", "pt")}
    shards, number = [], 0
    for place, group in enumerate(groups):
        name = single_file or _shard_name(stem, place, len(groups))
        header, placed = build_header(group, metadata)
        jobs = tuple(job(number + k, out) for k, out in enumerate(placed))
        number += len(jobs)
        size = len(header) + sum(out.nbytes for out in placed)
        shards.append(ShardPlan(place, name, size, jobs, metadata))
    return tuple(shards)


@dataclass(frozen=True, slots=True)
class _Jobs:
    """From an output tensor to its job: what it is made of."""

    models: Sequence[Checkpoint]
    matching: Matching
    schedule: _ScheduledTs
    scaled: ScaledPlan | None
    shared: dict[str, tuple[tuple[TensorSource, TensorSource], Scaling]] = field(default_factory=dict)

    def __call__(self, number: int, out: TensorInfo) -> TensorJob:
        if self.scaled is not None:
            if (source := self.scaled.scaled.activations.get(out.name)) is not None:
                return TensorJob(number, out, (source,), (0,), False, self.schedule.base_ts, _CALIBRATED)
            if (weight := self.scaled.weights.get(out.name)) is not None:
                return self._in_8_bits(number, out, weight, self.scaled)
        return self._plain(number, out)

    def _plain(self, number: int, out: TensorInfo) -> TensorJob:
        x, ts = self.models[0].source(out.name), self.schedule(out.name)
        if (note := self.matching.kept.get(out.name)) is not None:
            return TensorJob(number, out, (x,), (0,), False, ts, note)
        exact = x.info.dtype not in FLOAT_DTYPES
        return TensorJob(number, out, (x, self._ft(out.name)), _PAIR, exact, ts, rows_note(x))

    def _in_8_bits(self, number: int, out: TensorInfo, weight: str, scaled: ScaledPlan) -> TensorJob:
        """Codes and scales have the fate of the weight that they are of."""
        ts = self.schedule(weight)
        if (note := self.matching.kept.get(weight)) is not None:
            return TensorJob(number, out, (scaled.kept(out.name),), (0,), False, ts, note)
        if weight not in self.shared:
            x, y = self.models[0].source(weight), self._ft(weight)
            self.shared[weight] = (x, y), scaled.scaling(weight, y)
        sources, scaling = self.shared[weight]
        note = "" if out.name == weight else _SCALES
        return TensorJob(number, out, sources, _PAIR, False, ts, note, scaling=scaling)

    def _ft(self, name: str) -> TensorSource:
        return self.models[1].source(self.matching.ft_names.get(name, name))


class _ScheduledTs:
    """From a tensor's name to its t in every output; and what is wrong with the rules once all names were asked."""

    def __init__(self, recipe: Recipe, base: Checkpoint, matching: Matching) -> None:
        self.ts, self.rules, self.kept = recipe.ts, recipe.rules, matching.kept
        self.schedule = Schedule(recipe.rules, base.tensors)
        self.used: set[int | None] = set()
        self.shared: dict[float, tuple[float, ...]] = {}  # one tuple for all tensors of one t

    @property
    def base_ts(self) -> tuple[float, ...]:
        """The t of what is the base's in all outputs."""
        return self.shared.setdefault(0.0, (0.0,) * len(self.ts))

    def __call__(self, name: str) -> tuple[float, ...]:
        if name in self.kept:
            return self.base_ts
        rule = self.schedule.find(name)
        self.used.add(rule)
        if rule is None:
            return self.ts
        t = self.schedule.t(rule, name)
        return self.shared.setdefault(t, (t,) * len(self.ts))

    def check(self, names: Iterable[str]) -> Iterator[str]:
        """Warnings of rules without effect; RecipeError for one that matches no tensor."""
        idle = [rule for k, rule in enumerate(self.rules) if k not in self.used]
        for rule in idle:
            if not any(map(rule.pattern.matches, names)):
                raise RecipeError(no_match(f"--t-for {shown(rule)}", rule.pattern, names))
        if None not in self.used and len(self.ts) > 1:
            raise RecipeError("Every tensor has its t from --t-for, so all outputs would be the same. Give one --t.")
        for rule in idle:
            yield (
                f"--t-for {shown(rule)} has no effect: what it matches is not merged, or has its t from one before it."
            )


def _output_infos(recipe: Recipe, base: Checkpoint, matching: Matching, scaled: ScaledPlan | None) -> list[TensorInfo]:
    """The output's tensors in natural order (layer 2 before layer 10), in the dtypes they will have."""
    kept, as_stored = matching.kept, {info.name: info for info in (scaled.infos() if scaled else ())}
    found = []
    for name in sorted(sorted({**base.tensors, **as_stored}), key=natural_key):
        if (info := as_stored.get(name)) is None:
            info, stored = base.tensors[name], base.stored_dtype(name)
            dtype = stored if name in kept else output_dtype(recipe, stored)
            info = info if dtype == info.dtype else replace(info, dtype=dtype)
        found.append(info)
    return found


def output_dtype(recipe: Recipe, dtype: str) -> str:
    """The dtype code of an output tensor whose source has `dtype`."""
    if dtype not in FLOAT_DTYPES:
        return dtype
    if recipe.dtype is None:
        return "BF16" if dtype in _FLOAT8 else dtype
    return OUTPUT_DTYPES[recipe.dtype] or dtype


def _split(infos: Sequence[TensorInfo], max_bytes: int | None) -> list[list[TensorInfo]]:
    """Consecutive groups of at most `max_bytes` of data; a larger tensor stands alone."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and max_bytes is not None and filled + info.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    return [sorted(group, key=write_order) for group in groups]


def output_stem(base: Checkpoint) -> str:
    """What the output's files are called, so that whoever loads BASE loads it: by the index, or the only file."""
    if base.folder is None:
        return "model"
    name = base.index_name or base.files[0].file_name
    if is_pickle(name.removesuffix(".index.json")):  # written as safetensors, under the name that loaders look for
        name = PurePosixPath(name.removesuffix(".index.json")).stem
        return name if name in _PICKLED_STEMS else "model"
    return name.removesuffix(".index.json").removesuffix(".safetensors")


def _shard_name(stem: str, place: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{place + 1:05d}-of-{count:05d}.safetensors"


def _facts(recipe: Recipe, base: Checkpoint, ft: Checkpoint, stem: str, single_file: str | None) -> dict[str, Any]:
    """What decides the output's bytes, in words that can be compared when a merge is resumed."""
    return {
        "version": __version__,
        "method": recipe.method,
        "t": [label_t(t) for t in recipe.ts],
        "dtype": recipe.dtype,
        "max_shard_bytes": None if single_file else recipe.max_shard_bytes,
        "files_from": recipe.files_from,
        "on_mismatch": recipe.on_mismatch,
        "one_file": single_file is not None,
        "stem": stem,
        "base": input_facts(base),
        "ft": input_facts(ft),
        **recipe.selection,
    }


def input_facts(model: Checkpoint) -> dict[str, Any]:
    """What tells one input from another, as far as headers show it."""
    files = {f.file_name: {"size": f.source.size, "header_sha256": f.header_sha256} for f in model.files}
    return {"name": model.name, "files": files}


_TEXT = "recipe_sha256"  # the fact that stands for a recipe's text


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two merges' facts differ in, in words: `t was 0.4, now 0.5`."""
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
    if isinstance(value, list):
        return listed(value, 10) or "none"
    return "none" if value is None else f"{value:,}" if type(value) is int else shown(value)
