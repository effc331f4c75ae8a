"""What a checkpoint holds, written and read: weights, optimizer state, random numbers, where the run stood.

A checkpoint is an ordinary Hugging Face folder, so it can be evaluated or merged as it is, with three more files: the
optimizer's state, the random number generators, and `state.json`. There is no pickle. Weights and state are gathered
from all processes and written tensor by tensor, so no process holds the whole model. Only the generators depend on the
number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.adapter import adapter_tensors
from train.errors import DELETE_CHECKPOINT, TrainError
from train.optim import Optimizer
from train.output import first_writes, publish_folder
from train.world import World


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is neither a weight nor optimizer state."""

    step: int  # finished steps, skipped ones included
    tokens: int = 0  # labelled, over all processes
    skipped: int = 0
    skipped_in_a_row: int = 0
    score: float | None = None  # of an evaluation at this step, the lower the better
    since_best: int = 0  # evaluations in a row that were not better than the best before


# ---- writing -------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: Any,
    optimizer: Optimizer,
    progress: Progress,
    generators: dict[str, torch.Generator],
    world: World,
    max_shard_bytes: int,
) -> None:
    """Write everything needed to go on from `progress` to `folder`; all processes call it together.

    Raises TrainError, in every process, when the disk is full or not writable; what was there before stays.
    """
    states = {key: g.get_state() for key, g in generators.items()}
    everyone = world.gather(states)

    def write(hidden: Path) -> None:
        write_model(hidden, model, tokenizer, world, max_shard_bytes)
        _write_tensors(hidden, "optimizer", optimizer.states(), world, max_shard_bytes)
        named = {f"{key}|{rank}": t for rank, mine in enumerate(everyone) for key, t in mine.items()}
        state = {**progress.__dict__, "updates": optimizer.updates(), "world_size": world.size}

        def write_rest() -> None:
            save_file(named, hidden / "generators.safetensors")
            (hidden / "state.json").write_text(json.dumps(state, indent=1))

        first_writes(world, hidden, write_rest)

    publish_folder(folder, write, world)


def write_model(folder: Path, model: Any, tokenizer: Any, world: World, max_shard_bytes: int) -> None:
    """An ordinary Hugging Face folder: safetensors shards, config, tokenizer; of a model with an adapter, the adapter's
    folder. All processes call it."""
    from transformers.core_model_loading import revert_weight_conversion

    if settings := getattr(model, "peft_config", None):
        _write_tensors(folder, "adapter_model", adapter_tensors(model), world, max_shard_bytes)
        first_writes(world, folder, lambda: settings["default"].save_pretrained(folder))
        first_writes(world, folder, lambda: tokenizer.save_pretrained(folder))
        return

    # transformers renames tensors of some families in memory; published checkpoints have the original names.
    def on_disk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(model, tensors)) if world.is_first else {}

    _write_tensors(folder, "model", model_tensors(model), world, max_shard_bytes, on_disk)

    def write_rest() -> None:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(folder)

    first_writes(world, folder, write_rest)


def model_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Named parameters (tied ones once) and persistent buffers."""
    kept = model.state_dict().keys()
    buffers = [(name, b) for name, b in model.named_buffers() if name in kept]
    return [*model.named_parameters(), *buffers]


def _write_tensors(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    world: World,
    max_shard_bytes: int,
    on_disk: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """`stem.safetensors`, or numbered shards and their index; one shard is in memory at a time."""
    shards = list(_shards(list(tensors), max_shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = folder / (
            f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        )
        stored = on_disk({key: _gathered(tensor, world) for key, tensor in shard})
        first_writes(world, folder, partial(save_file, stored, file, metadata={"format": "pt"}))
        weight_map.update(dict.fromkeys(stored, file.name))
        total += sum(t.nbytes for t in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    if len(shards) > 1:
        path = folder / f"{stem}.safetensors.index.json"
        first_writes(world, folder, lambda: path.write_text(json.dumps(index, indent=2) + "\n"))


def _shards(tensors: Sequence[tuple[str, Tensor]], most: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive groups of at most `most` bytes (a larger tensor is alone)."""
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if group and size + nbytes > most:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += nbytes
    yield group


def _gathered(tensor: Tensor, world: World) -> Tensor:
    """The whole tensor on the first process's CPU; elsewhere it is gathered and dropped."""
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    return whole.cpu().contiguous() if world.is_first else whole.new_empty(0)


# ---- a result from checkpoints -------------------------------------------------------------------------


def copy_model(checkpoint: Path, folder: Path) -> None:
    """The model of a checkpoint, without what only resuming needs. Raises OSError."""
    for file in checkpoint.iterdir():
        if file.name != "state.json" and not file.name.startswith(("optimizer", "generators")):
            shutil.copyfile(file, folder / file.name)


def average_models(checkpoints: Sequence[Path], folder: Path, weights: str) -> None:
    """The average of the models of several checkpoints, in bounded memory; of one, a copy. Raises TrainError."""
    from merge_tool import MergeToolError, average

    if len(checkpoints) == 1:
        copy_model(checkpoints[0], folder)
        return
    try:
        average(checkpoints, folder, weights=weights)
    except MergeToolError as e:
        raise TrainError(f"The checkpoints cannot be averaged: {e}") from e


# ---- resuming ------------------------------------------------------------------------------------------


def read_progress(folder: Path) -> Progress:
    """Where the run stood when `folder` was saved. Raises TrainError when its state.json is damaged."""
    state = _read_state(folder)
    return Progress(**{key: state[key] for key in Progress.__dataclass_fields__})


def load_adapter(folder: Path, model: Any) -> None:
    """The adapter that was saved in `folder`, into a model that has one. Raises TrainError."""
    try:
        files = TensorFiles(folder, "adapter_model")
        for name, parameter in adapter_tensors(model):
            parameter.data.copy_(_placed(files.read(name), parameter))
    except (TrainError, OSError, SafetensorError, RuntimeError) as e:
        raise TrainError(f"{folder}: the adapter cannot be loaded ({e}). {DELETE_CHECKPOINT}") from e


def take_weights(model: Any, loaded: Any) -> None:
    """Give the model of a run, perhaps sharded, the weights of the same model that was just loaded."""
    for (_, tensor), (_, whole) in zip(model_tensors(model), model_tensors(loaded), strict=True):
        tensor.data.copy_(_placed(whole.data, tensor))


def load_training_state(
    folder: Path, optimizer: Optimizer, generators: dict[str, torch.Generator], world: World
) -> bool:
    """Load the optimizer and the generators from `folder`. False when the number or the kind of the processes differs:
    then the generators start anew (the weights and the order of the data do not depend on them).

    Raises TrainError when what is saved is not the state of this optimizer, or is damaged.
    """
    state = _read_state(folder)
    try:
        files = TensorFiles(folder, "optimizer")
        optimizer.load(state["updates"], files.names(), lambda name, like: _placed(files.read(name), like))
        saved = TensorFiles(folder, "generators")
        is_gpu = "cuda|0" in saved.names()
        if state["world_size"] != world.size or is_gpu != ("cuda" in generators):
            return False
        for key, generator in generators.items():
            generator.set_state(saved.read(f"{key}|{world.rank}"))
    except (TrainError, OSError, SafetensorError) as e:
        raise TrainError(f"{folder}: {e}. {DELETE_CHECKPOINT}") from e
    return True


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TrainError(f"{folder}: state.json cannot be read ({e}). {DELETE_CHECKPOINT}") from e
    missing = {*Progress.__dataclass_fields__, "updates", "world_size"} - {*(state if isinstance(state, dict) else ())}
    if missing:
        raise TrainError(f"{folder}: state.json lacks {', '.join(sorted(missing))}. {DELETE_CHECKPOINT}")
    return state


def _placed(whole: Tensor, like: Tensor) -> Tensor:
    """The tensor on `like`'s device, sharded as it is; a scalar is the same everywhere."""
    whole = whole.to(like.device)
    if whole.ndim == 0 or not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    shards: Any = like
    return distribute_tensor(whole, shards.device_mesh, shards.placements)


class TensorFiles:
    """Reads named tensors from `stem.safetensors` or its shards."""

    def __init__(self, folder: Path, stem: str) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob(f"{stem}*.safetensors"))]
        self._stem, self._home = stem, {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def names(self) -> Collection[str]:
        return self._home.keys()

    def read(self, name: str) -> Tensor:
        if name not in self._home:
            raise TrainError(f"{self._stem}.safetensors lacks {name}")
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor
