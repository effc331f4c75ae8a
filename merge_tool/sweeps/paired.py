"""Whether two models' scores of the same items differ: a paired permutation test.

If the models were equally good, each item's difference could as well have the other sign. p is the share of sign flips
whose mean is at least as far from 0 as the observed mean (R. A. Fisher, "The Design of Experiments", 1935, section 21;
for language models: R. Dror et al., https://aclanthology.org/P18-1128). Many p are corrected together by Holm's method
(S. Holm, "A simple sequentially rejective multiple test procedure", 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from merge_tool.arrays import Array

_MOST_EXACT = 13  # items that differ: all 8,192 flips are tried
_MOST_DRAWN = 500  # up to here _DRAWS random flips; with more items a normal distribution is within 0.01 of p
_DRAWS = 9_999
_BLOCK = 256  # flips at a time
_TOLERANCE = 1e-12  # relative: sums of the same numbers in another order


def p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The p of the two-sided test; 1 if no item differs. `a` and `b` have a score for each item, in one order.

    >>> p_value([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
    0.0625
    """
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    least = abs(differences.sum()) - _TOLERANCE * np.abs(differences).sum()
    if len(differences) <= _MOST_EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=len(differences))))
        return float(np.mean(np.abs(signs @ differences) >= least))
    if len(differences) <= _MOST_DRAWN:
        return _by_draws(differences, least)
    z = abs(float(differences.sum())) / math.sqrt(float(np.square(differences).sum()))
    return math.erfc(z / math.sqrt(2))


def _by_draws(differences: Array, least: float) -> float:
    """p from random flips, the observed signs among them. Every call draws the same flips."""
    random, extreme, left = np.random.default_rng(0), 0, _DRAWS
    while left:
        count = min(_BLOCK, left)
        signs = random.integers(0, 2, (count, len(differences)), np.int8)
        sums = 2.0 * (signs @ differences) - differences.sum()
        extreme += int(np.count_nonzero(np.abs(sums) >= least))
        left -= count
    return (extreme + 1) / (_DRAWS + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, corrected so that any false alarm among them is as unlikely as for a single test.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [1.0] * len(ps), 0.0
    for rank, number in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[number]))
        corrected[number] = largest
    return corrected
