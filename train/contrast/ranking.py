"""The ranking loss over length-normalised log-probabilities: tensors in, a sum out.

s(y) is the mean log q over a response's labelled tokens. A pair costs softplus(s(rejected) - s(chosen)); with several
rejected responses, -log(p_c / (p_c + mean p_j)) with p = exp(s), which is the same for one. Beside it stands the
(MixCE) cross-entropy of the rows that are learned. Both denominators are those of the whole global step: the pairs'
is inside `scale`, the tokens' is the caller's.

The form is that of PRO (Song et al., arXiv 2306.17492), with one rank above all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Ranking:
    """What a batch's rows are to each other. Rows are numbers below the batch's; all tensors are on one device."""

    learned: Tensor  # [rows] bool: the cross-entropy counts
    chosen: Tensor  # [pairs] int64: a row
    rejected: Tensor  # [pairs, most] int64: rows; -1 for none
    scale: Tensor  # [pairs] float32: the pair's factor in the sum

    def to(self, device: torch.device) -> Ranking:
        return Ranking(*(t.to(device) for t in (self.learned, self.chosen, self.rejected, self.scale)))


def ranking_loss(log_q: Tensor, labels: Tensor, ranking: Ranking, mixing_ratio: float) -> tuple[Tensor, Tensor]:
    """(sum, labelled tokens of learned rows) from log q and labels, both [rows, tokens]; log q is 0 without a label.

    The sum is the MixCE of the learned rows plus each pair's loss times its scale (float32, or as log q is).
    """
    learned, is_labelled = log_q[ranking.learned], labels != -100
    weight = mixing_ratio + (1 - mixing_ratio) * learned.detach().exp()
    total, count = -(weight * learned).sum(), is_labelled[ranking.learned].sum()
    if not len(ranking.chosen):
        return total, count
    s = log_q.sum(1) / is_labelled.sum(1).clamp_min(1)
    is_there = ranking.rejected >= 0
    others = s[ranking.rejected.clamp_min(0)].masked_fill(~is_there, float("-inf"))
    rejected = others.logsumexp(1) - is_there.sum(1).log()
    return total + (ranking.scale * functional.softplus(rejected - s[ranking.chosen])).sum(), count
