"""Being written."""

from __future__ import annotations

from merge_tool.methods.steps import Given, Steps


def task_arithmetic(given: Given) -> Steps:
    raise NotImplementedError


def ties(given: Given) -> Steps:
    raise NotImplementedError


def dare_linear(given: Given) -> Steps:
    raise NotImplementedError


def dare_ties(given: Given) -> Steps:
    raise NotImplementedError


def breadcrumbs(given: Given) -> Steps:
    raise NotImplementedError


def breadcrumbs_ties(given: Given) -> Steps:
    raise NotImplementedError


def sce(given: Given) -> Steps:
    raise NotImplementedError
