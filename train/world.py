"""The processes of one run: which one this is, how many there are, what they exchange, and the signals that stop them.

Rank and world size are read from the environment here, once, and passed on. One process needs no process group; several
(under torchrun) use NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import TrainError

T = TypeVar("T")
# One process tokenises while the others wait for it.
_PATIENCE = timedelta(hours=4)


class World:
    """Rank, size and device, with the collectives that the loop needs; each is a no-op for one process."""

    def __init__(self, rank: int, size: int, device: torch.device, owns_group: bool = False) -> None:
        self.rank, self.size, self.device, self.owns_group = rank, size, device, owns_group

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes; overwrites and returns `values`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, everywhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """Do `action` in the first process; its result, or its TrainError, everywhere."""
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except TrainError as e:
                error = str(e)
        self.fail_together(error)
        return cast(T, self.share(result))

    def fail_together(self, error: str | None) -> None:
        """Raise the first process's error, if it has one, in every process."""
        error = self.share(error)
        if error is not None:
            raise TrainError(error)


def open_world(device: str) -> World:
    """Join the other processes (none without torchrun). `device` is auto, cpu or cuda.

    Raises TrainError when CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("device is cuda, but torch finds no CUDA device. Set device to auto or cpu.")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    owns_group = size > 1 and not dist.is_initialized()
    if owns_group:
        device_id = here if kind == "cuda" else None  # NCCL connects at once, and not at the first exchange
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE, device_id=device_id)
    return World(int(os.environ.get("RANK", "0")), size, here, owns_group)


def close_world(world: World) -> None:
    """Leave the process group that `open_world` joined; one that was there before stays."""
    if world.owns_group:
        dist.destroy_process_group()


class StopSignals:
    """SIGTERM and SIGINT set `requested`; the loop saves after the step. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
