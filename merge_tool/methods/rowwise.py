"""Being written."""

from __future__ import annotations

from merge_tool.methods.steps import Given, Steps


def della(given: Given) -> Steps:
    raise NotImplementedError


def della_linear(given: Given) -> Steps:
    raise NotImplementedError


def nearswap(given: Given) -> Steps:
    raise NotImplementedError


def arcee_fusion(given: Given) -> Steps:
    raise NotImplementedError
