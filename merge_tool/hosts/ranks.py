"""The number of this worker, and of all workers, from the environment that schedulers and launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from merge_tool.errors import RecipeError, shown


@dataclass(frozen=True, slots=True)
class Rank:
    """This process is number `rank` (from 0) of `size`; `size` is None if the environment does not have it."""

    rank: int
    size: int | None
    where: str


def rank_of(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank of this process; None if the environment has no rank.

    torchrun sets RANK and WORLD_SIZE, also inside a Slurm step, and counts before all others. Open MPI sets
    OMPI_COMM_WORLD_*, srun SLURM_PROCID and SLURM_NTASKS, a job array SLURM_ARRAY_TASK_*, an indexed job of Kubernetes
    JOB_COMPLETION_INDEX. A rank of 1 worker is ignored. Raises RecipeError for numbers that contradict each other.
    """
    found = [rank for rank in _all(environment) if rank.size != 1]
    if found and found[0].where == "RANK":
        return found[0]
    if len({(rank.rank, rank.size) for rank in found}) > 1:
        ranks = ", ".join(f"{rank.where} is {rank.rank} of {rank.size or '?'}" for rank in found)
        raise RecipeError(f"The environment names several ranks: {ranks}. Give --part I --of N.")
    return found[0] if found else None


def _all(environment: Mapping[str, str]) -> list[Rank]:
    pairs = [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ]
    found = []
    for name, size in pairs:
        if name in environment and size in environment:
            found.append(_checked(Rank(_number(environment, name), _number(environment, size), name)))
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
        rank, count = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step, "SLURM_ARRAY_TASK_COUNT"
        tasks = _number(environment, count) if count in environment else None
        found.append(_checked(Rank(rank, tasks, "SLURM_ARRAY_TASK_ID")))
    if "JOB_COMPLETION_INDEX" in environment:
        found.append(Rank(_number(environment, "JOB_COMPLETION_INDEX"), None, "JOB_COMPLETION_INDEX"))
    return found


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = -1
    if number < 0:
        raise RecipeError(f"{name} is '{shown(text)}' in the environment, expected a number. Give --part I --of N.")
    return number


def _checked(rank: Rank) -> Rank:
    if rank.size is not None and not 0 <= rank.rank < rank.size:
        raise RecipeError(
            f"{rank.where} is {rank.rank} of {rank.size}, expected 0 to {rank.size - 1}. Give --part I --of N."
        )
    return rank


def pieces_of(parts: tuple[tuple[int, ...], ...], rank: int, size: int | None) -> list[int]:
    """The pieces of worker `rank` of `size` (default: as many as there are parts): its parts' pieces, in order. More
    workers than parts leave some without any. Raises RecipeError for a rank out of range."""
    size = len(parts) if size is None else size
    if size < 1:
        raise RecipeError(f"The number of workers is {size}, expected at least 1.")
    if not 0 <= rank < size:
        raise RecipeError(f"The part is {rank} of {size}, expected 0 to {size - 1}.")
    return [number for part in parts[rank::size] for number in part]
