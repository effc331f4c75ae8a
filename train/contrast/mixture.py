"""Batches of units by step number; beside them, with `ce_on: sources`, batches of the sources.

Every process knows the whole global step, so it knows the denominators without asking the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.batches import Batch, Mixture, collate
from train.config import TrainConfig
from train.contrast.options import ContrastConfig
from train.contrast.pairs import LEARNED, REJECTED, ROLES
from train.contrast.ranking import Ranking
from train.data import Examples

Rows = NDArray[np.int64]


class PairMixture(Mixture):
    """The units in `folder`, for one process of `world_size`. A global batch is that many units."""

    def __init__(
        self, folder: Path, contrast: ContrastConfig, sources: Sequence[Any], config: TrainConfig, *rest: int
    ) -> None:
        ids, learned, offsets, units = (np.load(folder / f"{n}.npy") for n in ("ids", "learned", "offsets", "units"))
        self._examples, self._contrast = Examples(ids, learned, offsets), contrast
        self._units: list[Rows] = np.split(np.arange(len(units)), np.flatnonzero(np.diff(units[:, 0])) + 1)
        self._is_rejected = units[:, 1] == ROLES.index(REJECTED)
        self._is_learned = np.isin(units[:, 1], [ROLES.index(role) for role in LEARNED[contrast.ce_on]])
        # The first token of a row is predicted from nothing.
        self._labelled = np.array([learned[a + 1 : b].sum() for a, b in pairwise(offsets)])
        whole = int(config.epochs * len(self._units)) // config.sequences_per_step(rest[1])
        super().__init__(sources, replace(config, max_steps=config.max_steps or max(1, whole)), *rest)

    def step_batches(self, step: int, rank: int) -> list[Batch]:
        """This process's micro-batches of a step (from 0)."""
        units = [self._unit(step * self._rows_per_step + k) for k in range(self._rows_per_step)]
        beside = []
        if self._contrast.ce_on == "sources":
            beside = [super(PairMixture, self).step_batches(step, r) for r in range(self._world_size)]
        tokens = sum(int((b.labels != -100).sum()) for batches in beside for b in batches)
        tokens += sum(int(self._labelled[unit][self._is_learned[unit]].sum()) for unit in units)
        # Divided by the labelled tokens, the sum is then CE / tokens + beta * ranking / pairs.
        scale = self._contrast.rank_weight * tokens / max(1.0, sum(map(self._weight, units)))
        mine, size = units[rank :: self._world_size], self._config.micro_batch
        batches = [self._pairs(mine[start : start + size], scale) for start in range(0, len(mine), size)]
        return batches + (beside[rank] if beside else [])

    def _unit(self, number: int) -> Rows:
        epoch, place = divmod(number, len(self._units))
        order = np.random.default_rng((self._config.seed, 6, epoch)).permutation(len(self._units))
        return self._units[int(order[place])]

    def _weight(self, unit: Rows) -> float:
        """Of a unit's pair in the ranking loss."""
        if not self._is_rejected[unit].any():
            return 0.0
        return float(self._labelled[unit[0]]) if self._contrast.rank_rows == "tokens" else 1.0

    def _pairs(self, units: Sequence[Rows], scale: float) -> Batch:
        rows = np.concatenate(units)
        starts = np.cumsum([0, *map(len, units)])
        ranked = [(int(start), unit) for start, unit in zip(starts, units, strict=False) if self._weight(unit)]
        places = [start + np.flatnonzero(self._is_rejected[unit]) for start, unit in ranked]
        rejected = torch.full((len(ranked), max(map(len, places), default=1)), -1)
        for pair, found in enumerate(places):
            rejected[pair, : len(found)] = torch.from_numpy(found)
        ranking = Ranking(
            learned=torch.from_numpy(self._is_learned[rows]),
            chosen=torch.tensor([start for start, _ in ranked], dtype=torch.int64),
            rejected=rejected,
            scale=torch.tensor([scale * self._weight(unit) for _, unit in ranked]),
        )
        return replace(collate([[("pairs", self._examples, int(r))] for r in rows], self._pad_id), ranking=ranking)
