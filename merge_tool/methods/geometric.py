"""Being written."""

from __future__ import annotations

from merge_tool.methods.steps import Given, Steps


def linear(given: Given) -> Steps:
    raise NotImplementedError


def nuslerp(given: Given) -> Steps:
    raise NotImplementedError


def multislerp(given: Given) -> Steps:
    raise NotImplementedError


def karcher(given: Given) -> Steps:
    raise NotImplementedError


def model_stock(given: Given) -> Steps:
    raise NotImplementedError


def passthrough(given: Given) -> Steps:
    raise NotImplementedError


def num_columns(given: Given) -> int:
    return given.numel // max(1, given.shape[0] if given.shape else 1)
