"""An adapter's configuration: adapter_config.json -> Settings. An adapter with another effect than those of LoRA, DoRA
and trainable tokens is refused by name: applied in part, it would be another model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_tool.checkpoint.elsewhere import find_elsewhere
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import files_below
from merge_tool.checkpoint.source import LocalFile
from merge_tool.checkpoint.weight_files import ADAPTER_WEIGHTS, adapter_files
from merge_tool.errors import CheckpointError, listed, shown

CONFIG = "adapter_config.json"
_PEFT_MERGES = "Merge it with peft (merge_and_unload, then save_pretrained) and give that folder."

_NOTHING_TO_MERGE = {  # trained inputs of the model, not changes of its weights
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
_BY_INPUT = {"XLORA", "POLY"}
_REFUSED = {  # settings of LoRA with another effect than W + scale * B A
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "arrow_config": "Arrow, which chooses among adapters by the input",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "enable_lora": "merged linear layers of peft before 0.3",
}
# Parameters of all experts of a layer, in the order in which modules define them, and peft wraps them.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_HARMLESS_INITS = {"True", "False", "true", "false", "None", "gaussian", "eva", "orthogonal"}
_KNOWN = {
    *_REFUSED, "layer_replication", "target_parameters", "use_dora", "trainable_token_indices", "token_indices",
    "init_weights", "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "lora_bias", "bias", "init_lora_weights", "base_model_name_or_path", "modules_to_save", "target_modules",
    "exclude_modules", "lora_dropout", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "merge_weights",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings in adapter_config.json that matter here, and the names of the files beside it that have the
    `weights`: the adapter's own, and perhaps whole tensors that were trained beside it."""

    file: LocalFile
    sha256: str
    where: str
    weights: tuple[str, ...]
    rank: int
    alpha: float
    root_scaled: bool
    transposed: bool
    base_name: str
    ranks: Mapping[str, Any] = field(default_factory=dict)
    alphas: Mapping[str, Any] = field(default_factory=dict)
    saved_modules: tuple[str, ...] = ()
    rescales: bool = False  # DoRA: every row has a length of its own
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by module, or the end of its name
    parameters: tuple[str, ...] = ()  # of modules that are no layers, experts
    keeps_tie: bool = False  # whether embedding and head stay one where they are one
    unknown: tuple[str, ...] = ()

    def saves(self, module: str) -> bool:
        """Whether a module is trained as a whole (modules_to_save)."""
        return any(module == saved or module.endswith(f".{saved}") for saved in self.saved_modules)

    def targets(self, parameter: str) -> bool:
        """Whether the adapter has factors for a parameter of a module's own (target_parameters)."""
        return any(f".{parameter}".endswith(f".{target}") for target in self.parameters)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The tokens whose rows are trained in a module; None if there are none."""
        return next((rows for end, rows in self.tokens.items() if f".{module}".endswith(end)), None)

    def rank_of(self, module: str) -> int:
        return int(_number(self.where, "rank_pattern", _by_pattern(self.ranks, module, self.rank)))

    def scale_of(self, module: str) -> float:
        alpha = _number(self.where, "alpha_pattern", _by_pattern(self.alphas, module, self.alpha))
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root_scaled else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, or its end from a dot on, as in peft."""
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}") or re.match(rf"(.*\.)?({pattern})$", module[:500]):
            return value
    return default


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {key} is '{shown(value)}', expected a number.")
    return value


def read_settings(folder: Folder) -> Settings:
    where = f"{folder.name}/{CONFIG}"
    weights = _weights_files(folder)
    config = folder.load_json(CONFIG)
    _refuse(folder.name, config)
    has_factors = config.get("peft_type") != "TRAINABLE_TOKENS"
    rank, alpha = (_number(where, key, config.get(key) if has_factors else 1) for key in ("r", "lora_alpha"))
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    for key, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        _check_patterns(where, key, patterns)
    if rank != int(rank) or rank < 1 or any(value < 1 or value != int(value) for value in ranks.values()):
        raise CheckpointError(f"{where}: a rank is not a whole number above 0.")
    path = folder.regular(CONFIG)
    saved = config.get("modules_to_save")
    saved = tuple(map(str, saved)) if isinstance(saved, list) else ()
    unknown = tuple(sorted(key for key, value in config.items() if key not in _KNOWN and value))
    return Settings(
        file=LocalFile(path, where),
        sha256=hashlib.sha256(folder.read(CONFIG)).hexdigest(),
        where=where,
        weights=weights,
        rank=int(rank),
        alpha=alpha,
        root_scaled=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
        base_name=str(config.get("base_model_name_or_path") or ""),
        ranks=ranks,
        alphas=alphas,
        saved_modules=saved,
        rescales=bool(config.get("use_dora")),
        tokens=_tokens(where, config),
        parameters=tuple(map(str, config.get("target_parameters") or ())),
        keeps_tie=bool(config.get("ensure_weight_tying")),
        unknown=unknown,
    )


def _weights_files(folder: Folder) -> tuple[str, ...]:
    if not folder.has(CONFIG):
        listing = folder.listing()
        if what := find_elsewhere(
            folder.name, [*listing, *files_below(folder, listing)], has_safetensors=False, of_hub=folder.is_of_hub
        ):
            raise CheckpointError(f"{folder.name}: {what}")
        raise CheckpointError(f"{folder.name}: has no {CONFIG}, so it is no adapter. Give a folder that peft saved.")
    names = adapter_files(folder.name, folder.listing(), of_hub=folder.is_of_hub)
    if not names:
        raise CheckpointError(
            f"{folder.name}: has {CONFIG} but no {ADAPTER_WEIGHTS[0]}. Finish the download, or save it again."
        )
    return tuple(names)


def _tokens(where: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows are trained, by the end of the modules' names; "" for whatever module has such rows."""
    key = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    value = config.get(key) or {}
    by_module = value if isinstance(value, dict) else {"": value}
    for rows in by_module.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise CheckpointError(f"{where}: {key} is '{shown(value)}', expected numbers of tokens.")
        if len({*rows}) < len(rows):
            raise CheckpointError(f"{where}: {key} has a token twice; which row is right is not known.")
    return {name: tuple(rows) for name, rows in by_module.items()}


def _check_patterns(where: str, key: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {key} is '{shown(patterns)}', expected names with their values.")
    for pattern, value in patterns.items():
        _number(where, key, value)
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:  # may take forever to match
            raise CheckpointError(
                f"{where}: {key}: '{shown(pattern)}' repeats too much. Write the layers' names there."
            )
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as e:
            raise CheckpointError(
                f"{where}: {key}: '{shown(pattern)}' is not a regular expression ({shown(e)})."
            ) from e


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the adapter's effect is a sum of products with a scale."""
    kind = str(config.get("peft_type") or "nameless")
    if kind in _NOTHING_TO_MERGE:
        raise CheckpointError(f"{name}: is a {kind} adapter: it has inputs of its own and no weights to merge.")
    if kind in _BY_INPUT:
        raise CheckpointError(f"{name}: is a {kind} adapter, which weighs its parts by the input: it has no merge.")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise CheckpointError(f"{name}: peft_type in {CONFIG} is {shown(kind)}; only LORA is read. {_PEFT_MERGES}")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{name}: uses {what}, which is not read. {_PEFT_MERGES}")
    odd = [str(target) for target in config.get("target_parameters") or () if not _is_read(str(target))]
    if odd:
        raise CheckpointError(
            f"{name}: target_parameters in {CONFIG} names {listed(odd)}; only {' and '.join(EXPERT_PARAMETERS)} of "
            f"experts and weights of layers are read. {_PEFT_MERGES}"
        )
    if ranges := config.get("layer_replication"):
        raise CheckpointError(f"{name}: {_replication(ranges)}")
    init = str(config.get("init_lora_weights", True))
    if init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{name}: was initialised by '{shown(init)}', which changes BASE's weights as well, or may do so: "
            "applied to BASE as it is, it would be another model. Convert it to plain LoRA when saving it "
            "(path_initial_model_for_weight_conversion), or merge it with peft onto the base that it was trained with."
        )


def _is_read(parameter: str) -> bool:
    return parameter.rpartition(".")[2] in ("weight", *EXPERT_PARAMETERS)


def _replication(ranges: Any) -> str:
    """The message for layer_replication: how to make the model that the adapter was trained on."""
    what = f"repeats layers of its model (layer_replication in {CONFIG})"
    pairs = [pair for pair in ranges if _is_range(pair)] if isinstance(ranges, list) else []
    if not pairs or len(pairs) < len(ranges):
        return f"{what}, and its value '{shown(ranges)}' is no list of ranges such as [[0, 16], [8, 24]]. Correct it."
    lines = [f"  - sources: [{{model: MODEL, layer_range: [{start}, {stop}]}}]" for start, stop in pairs]
    steps = "\n  ".join(
        [
            "1. Write stack.yaml, with the adapter's model as MODEL:",
            *(f"     {line}" for line in ("merge_method: passthrough", "slices:", *lines)),
            "2. merge-tool run stack.yaml STACK",
            f"3. Copy the adapter's folder, and delete layer_replication from {CONFIG} in the copy.",
            "4. Give STACK+COPY, or STACK as BASE and COPY as FT.",
        ]
    )
    return f"{what}. A stack with the same layers, and the adapter on it, are the same model:\n  {steps}"


def _is_range(pair: Any) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
    return is_pair and 0 <= pair[0] < pair[1]
