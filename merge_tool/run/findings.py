"""A run's finding for each tensor, and its form in journal and report. Floats in hex are read back exactly. With its
finding, a tensor can be merged again without repeating the passes: `verify` does so, tile by tile.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from merge_tool.methods.inner import PairSums

Results: TypeAlias = "float | list[Results]"  # of a pass: a number, or lists of them
_MOST_KEPT = 256  # numbers; if a tensor's passes give more, they are made again instead
_DEEPEST = 8  # lists in lists; a pass finds at most 2, and each output has a list of passes


@dataclass(frozen=True, slots=True)
class Finding:
    """The run's finding for one tensor.

    `sums` are those of two weighted tensors. `equal`: all inputs hold the same bytes, and the result is those.
    `kept_base`: integers that differ, so the base's are kept. `passes` has the results of the method's passes in their
    order, for each output with parameters of its own; None if there were no passes, or if the results are too large.
    """

    sums: PairSums | None = None
    equal: bool = False
    kept_base: bool = False
    passes: Results | None = None


class Findings:
    """The findings of many tensors by their number, a few dozen bytes each. Iterable over numbers; add and get."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._sums = array("d")
        self._flags = bytearray()
        self._rare: dict[int, PairSums] = {}  # those with a scale or a refinement
        self._values = array("d")  # of all passes, one tensor's after another
        self._places = array("q", [0])  # where each tensor's values begin, and where the last one's end
        self._shape_of = array("i")  # the index of each tensor's shape; -1 without passes
        self._shapes: list[tuple[Any]] = []  # few: a method's passes are alike for all tensors

    def add(self, number: int, finding: Finding) -> None:
        sums = finding.sums
        self._numbers[number] = len(self._flags)
        self._flags.append((sums is not None) | finding.equal << 1 | finding.kept_base << 2)
        self._sums.extend((sums.xx, sums.xd, sums.dd) if sums else (0.0, 0.0, 0.0))
        if sums is not None and (sums.scale != 1.0 or sums.refined):
            self._rare[number] = sums
        shape = None if finding.passes is None else (_flatten(finding.passes, self._values),)
        self._places.append(len(self._values))
        if shape is not None and shape not in self._shapes:
            self._shapes.append(shape)
        self._shape_of.append(-1 if shape is None else self._shapes.index(shape))

    def __getitem__(self, number: int) -> Finding:
        row = self._numbers[number]
        flags = self._flags[row]
        sums = None
        if flags & 1:
            xx, xd, dd = self._sums[3 * row : 3 * row + 3]
            sums = self._rare.get(number) or PairSums(xx, xd, dd)
        passes = None
        if self._shape_of[row] >= 0:
            (shape,) = self._shapes[self._shape_of[row]]
            passes = _unflatten(shape, iter(self._values[self._places[row] : self._places[row + 1]]))
        return Finding(sums, bool(flags & 2), bool(flags & 4), passes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def _flatten(results: Results, values: array[float]) -> Any:
    """Append the numbers to `values`; returns their shape: None for a number, a tuple for a list."""
    if isinstance(results, float):
        values.append(results)
        return None
    return tuple(_flatten(part, values) for part in results)


def _unflatten(shape: Any, values: Iterator[float]) -> Results:
    return next(values) if shape is None else [_unflatten(part, values) for part in shape]


def keep_results(results: Any) -> Results | None:
    """The results of passes as they are stored: numbers in lists; None if there are too many."""
    plain = _plain(results)
    return plain if _count(plain) <= _MOST_KEPT else None


def _plain(results: Any) -> Results:
    if hasattr(results, "tolist"):  # an array, or one of its numbers
        results = results.tolist()
    return [_plain(part) for part in results] if isinstance(results, (list, tuple)) else float(results)


def _count(results: Results) -> int:
    return 1 if isinstance(results, float) else sum(map(_count, results))


# ------------------------------------------------------------------------------------- journal and report


def to_record(finding: Finding) -> dict[str, Any]:
    """A finding as journal and report store it: floats in hex."""
    record: dict[str, Any] = {"equal": finding.equal, "kept_base": finding.kept_base}
    if finding.sums is not None:
        record["sums"] = hex_sums(finding.sums)
    if finding.passes is not None:
        record["passes"] = hex_results(finding.passes)
    return record


def from_record(record: Mapping[str, Any]) -> Finding:
    """The finding that to_record stored. Raises KeyError, TypeError or ValueError for any other record."""
    sums, passes = record.get("sums"), record.get("passes")
    return Finding(
        sums=_parse_sums(sums) if sums else None,
        equal=record["equal"],
        kept_base=record["kept_base"],
        passes=None if passes is None else _parse_results(passes),
    )


def hex_results(results: Results) -> Any:
    return results.hex() if isinstance(results, float) else [hex_results(part) for part in results]


def _parse_results(stored: Any, depth: int = 0) -> Results:
    if depth > _DEEPEST:
        raise ValueError("lists in lists in lists: passes find no such thing")
    return float.fromhex(stored) if isinstance(stored, str) else [_parse_results(part, depth + 1) for part in stored]


def hex_sums(sums: PairSums) -> dict[str, Any]:
    stored: dict[str, Any] = {"xx": sums.xx.hex(), "xd": sums.xd.hex(), "dd": sums.dd.hex()}
    if sums.scale != 1.0:
        stored["scale"] = sums.scale.hex()
    if sums.refined:
        sign, factor, yy, ee = sums.refined
        stored["refined"] = {"sign": sign, "factor": factor.hex(), "yy": yy.hex(), "ee": ee.hex()}
    return stored


def _parse_sums(stored: Mapping[str, Any]) -> PairSums:
    xx, xd, dd = (float.fromhex(stored[key]) for key in ("xx", "xd", "dd"))
    refined = None
    if more := stored.get("refined"):
        refined = (more["sign"], *(float.fromhex(more[key]) for key in ("factor", "yy", "ee")))
    return PairSums(xx=xx, xd=xd, dd=dd, scale=float.fromhex(stored.get("scale", "0x1p0")), refined=refined)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two (the statistics module costs 1 MB)."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
