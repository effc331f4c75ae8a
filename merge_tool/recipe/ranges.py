"""Ranges of numbers: START:STOP:STEP, both ends included, exact in decimals."""

from __future__ import annotations

from decimal import Decimal

from merge_tool.errors import shown

_MOST = 10_000  # numbers of a range


class BadRange(Exception):
    """Why a text of numbers is not a range."""


def parse_range(text: str) -> list[float]:
    """The numbers of a range, or the one number that the text is. Raises BadRange, ValueError, ArithmeticError.

    >>> parse_range("0:0.3:0.1"), parse_range("0.5")
    ([0.0, 0.1, 0.2, 0.3], [0.5])
    """
    if ":" not in text:
        return [float(text)]
    if text.count(":") != 2:
        raise BadRange(f"'{shown(text)}' has {text.count(':') + 1} parts, expected 3")
    start, stop, step = (Decimal(part.strip()) for part in text.split(":"))
    if step == 0:
        raise BadRange(f"the step of '{shown(text)}' is 0")
    steps = (stop - start) / step
    if steps < 0:
        raise BadRange(f"'{shown(text)}' is empty: steps of {step} do not lead from {start} to {stop}")
    if steps >= _MOST:
        raise BadRange(f"'{shown(text)}' has more than {_MOST:,} values")
    return [float(start + k * step) for k in range(int(steps) + 1)]
