"""Save and resume, atomically: a folder appears whole under its name or not at all.

A checkpoint is an ordinary Hugging Face folder (so it can be evaluated or merged as it is) with three files
beside it: the optimizer's state, the random number generators, and `state.json`. No pickle anywhere. Weights
and state are written one tensor at a time, gathered from all processes as they come, so nobody holds the
whole model; nothing in the files depends on the number of processes but the generators.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.errors import TrainError
from train.optim import Optimizer
from train.world import World

PARTIAL, TRASH = ".partial-", ".trash-"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is neither a weight nor optimizer state."""

    step: int  # finished steps, skipped ones included
    tokens: int = 0  # labelled, over all processes
    skipped: int = 0
    skipped_in_a_row: int = 0
    eval_loss: float | None = None  # at this step; decides which checkpoint is the best


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


def publish_folder(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Let `write` fill a hidden folder beside `folder`, sync it to disk, and give it its name.

    All processes call it; only the first touches the disk. Raises TrainError, in every process, when the
    disk is full or not writable; the hidden folder is then removed.
    """
    hidden = folder.with_name(PARTIAL + folder.name)
    try:
        first_writes(world, hidden, lambda: _fresh(hidden))
        write(hidden)
        first_writes(world, hidden, lambda: _publish(hidden, folder))
    except TrainError:
        if world.is_first:
            shutil.rmtree(hidden, ignore_errors=True)
        raise


def first_writes(world: World, folder: Path, action: Callable[[], None]) -> None:
    """Do `action` in the first process; when the disk refuses, raise TrainError in every process."""
    error = _attempt(action) if world.is_first else None
    shown = folder.with_name(folder.name.removeprefix(PARTIAL))
    world.fail_together(
        error and f"cannot save {shown}: {error}. Earlier checkpoints are untouched; make room and run it again"
    )


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as e:
        return e.strerror or str(e)
    except SafetensorError as e:  # how that library reports a full disk
        return str(e)
    return None


def _fresh(hidden: Path) -> None:
    if hidden.exists():
        shutil.rmtree(hidden)
    hidden.mkdir(parents=True)


def _publish(hidden: Path, folder: Path) -> None:
    for file in hidden.iterdir():
        _sync(file)
    _sync(hidden)
    hidden.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(folder: Path, model: Any, tokenizer: Any, world: World, max_shard_bytes: int) -> None:
    """An ordinary Hugging Face folder: safetensors shards, config, tokenizer. All processes call it."""
    from transformers.core_model_loading import revert_weight_conversion

    # Under the names that the family publishes, where transformers has others in memory.
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
        first_writes(world, folder, lambda: _write_text(path, json.dumps(index, indent=2) + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


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


# ---- finding and keeping -------------------------------------------------------------------------------


def checkpoint_path(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (output / "checkpoints").glob("step-*") if output.is_dir() else ()
    return sorted(folder for folder in found if (folder / "state.json").is_file())


def read_progress(folder: Path) -> Progress:
    """Where the run stood when `folder` was saved."""
    state = json.loads((folder / "state.json").read_text())
    return Progress(**{key: state[key] for key in Progress.__dataclass_fields__})


def prune(output: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints and the one with the lowest evaluation loss."""
    folders = list_checkpoints(output)
    keep = set(folders[-keep_last:])
    keep.update([min(scored)[1]] if (scored := _scored(folders)) else [])
    for folder in folders:
        if folder not in keep:
            trash = folder.rename(folder.with_name(TRASH + folder.name))  # never half a folder under its name
            shutil.rmtree(trash)


def lowest_eval_loss(output: Path) -> float:
    """Of the checkpoints that are there; infinite where none was evaluated."""
    return min(_scored(list_checkpoints(output)), default=(math.inf, output))[0]


def _scored(folders: Iterable[Path]) -> list[tuple[float, Path]]:
    """(evaluation loss, folder) of those that have a finite one."""
    losses = ((read_progress(folder).eval_loss, folder) for folder in folders)
    return [(loss, folder) for loss, folder in losses if loss is not None and math.isfinite(loss)]


def sweep(output: Path) -> None:
    """Remove what a killed process left behind."""
    for parent in (output, output / "checkpoints"):
        for pattern in (PARTIAL, TRASH):
            for left in parent.glob(pattern + "*"):
                shutil.rmtree(left)


# ---- resuming ------------------------------------------------------------------------------------------


def load_training_state(
    folder: Path, optimizer: Optimizer, generators: dict[str, torch.Generator], world: World
) -> bool:
    """Optimizer and generators as saved in `folder`. False when the number of processes differs, so that
    the generators start anew (the weights and the data order do not depend on it)."""
    state = json.loads((folder / "state.json").read_text())
    files = _TensorFiles(folder, "optimizer")
    optimizer.load(state["updates"], lambda name, like: _placed(files.read(name), like))
    if state["world_size"] != world.size:
        return False
    with safe_open(folder / "generators.safetensors", "pt") as file:
        for key, generator in generators.items():
            generator.set_state(file.get_tensor(f"{key}|{world.rank}"))
    return True


def _placed(whole: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor on `like`'s device, sharded as it is; a scalar is the same everywhere."""
    if whole is None:
        return None
    whole = whole.to(like.device)
    if whole.ndim == 0 or not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    shards: Any = like
    return distribute_tensor(whole, shards.device_mesh, shards.placements)


class _TensorFiles:
    """Reads named tensors from `stem.safetensors` or its shards."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob(f"{stem}*.safetensors"))]
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor | None:
        return self._home[name].get_tensor(name) if name in self._home else None


def check_same_run(output: Path, asked: dict[str, Any], free: Sequence[str]) -> None:
    """Raise TrainError listing what differs between `asked` and the run that `output` holds.

    Keys in `free` may change between sessions; they do not move a weight.
    """
    path = output / "run.json"
    if not path.exists():
        return
    stored = json.loads(path.read_text())
    asked = json.loads(json.dumps(asked))
    keys = [k for k in sorted({*stored, *asked}) if k not in free and stored.get(k) != asked.get(k)]
    if keys:
        lines = [line for k in keys for line in _changes(k, stored.get(k), asked.get(k))]
        if "data" in keys and "sources" not in keys:
            lines.append("  (the rows of a source, its tokenizer or how they are read changed: `data` are digests)")
        raise TrainError(
            f"{output} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Put them back to resume it, or choose another output."
        )


def _changes(key: str, before: Any, now: Any) -> list[str]:
    """Every leaf that differs: `sources[0].take: 10 -> 20`."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{key}.{k}", before.get(k), now.get(k)) for k in sorted({*before, *now})]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(f"{key}[{k}]", a, b) for k, (a, b) in enumerate(zip(before, now, strict=True))]
    else:
        return [f"  {key}: {_short(before)} -> {_short(now)}"]
    return [line for name, a, b in pairs if a != b for line in _changes(name, a, b)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
