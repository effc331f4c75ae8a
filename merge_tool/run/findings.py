"""What a run finds out about each tensor, and how the journal and the report store it: floats in hex, exactly."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.methods.inner import PairSums


@dataclass(frozen=True, slots=True)
class Finding:
    """What the run found out about one tensor."""

    sums: PairSums | None
    equal: bool
    kept_base: bool


class Findings:
    """The findings of many tensors by their number, a few dozen bytes each. Iterable over numbers; add and get."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._sums = array("d")
        self._flags = bytearray()
        self._rare: dict[int, PairSums] = {}  # those with a scale or a refinement

    def add(self, number: int, finding: Finding) -> None:
        sums = finding.sums
        self._numbers[number] = len(self._flags)
        self._flags.append((sums is not None) | finding.equal << 1 | finding.kept_base << 2)
        self._sums.extend((sums.xx, sums.xd, sums.dd) if sums else (0.0, 0.0, 0.0))
        if sums is not None and (sums.scale != 1.0 or sums.refined):
            self._rare[number] = sums

    def __getitem__(self, number: int) -> Finding:
        place = self._numbers[number]
        flags = self._flags[place]
        sums = None
        if flags & 1:
            xx, xd, dd = self._sums[3 * place : 3 * place + 3]
            sums = self._rare.get(number) or PairSums(xx, xd, dd)
        return Finding(sums, bool(flags & 2), bool(flags & 4))

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def to_record(number: int, sums: PairSums | None, equal: bool, kept_base: bool) -> dict[str, Any]:
    """A finding as the journal stores it: floats in hex, so that they come back exactly."""
    record: dict[str, Any] = {"number": number, "equal": equal, "kept_base": kept_base}
    if sums is not None:
        record["sums"] = hex_sums(sums)
    return record


def from_record(record: Mapping[str, Any]) -> Finding:
    found = record.get("sums")
    return Finding(_parse_sums(found) if found else None, record["equal"], record["kept_base"])


def hex_sums(sums: PairSums) -> dict[str, Any]:
    found: dict[str, Any] = {"xx": sums.xx.hex(), "xd": sums.xd.hex(), "dd": sums.dd.hex()}
    if sums.scale != 1.0:
        found["scale"] = sums.scale.hex()
    if sums.refined:
        sign, factor, yy, ee = sums.refined
        found["refined"] = {"sign": sign, "factor": factor.hex(), "yy": yy.hex(), "ee": ee.hex()}
    return found


def _parse_sums(found: Mapping[str, Any]) -> PairSums:
    xx, xd, dd = (float.fromhex(found[key]) for key in ("xx", "xd", "dd"))
    refined = None
    if more := found.get("refined"):
        refined = (more["sign"], *(float.fromhex(more[key]) for key in ("factor", "yy", "ee")))
    return PairSums(xx, xd, dd, float.fromhex(found.get("scale", "0x1p0")), refined)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two (the statistics module costs 1 MB)."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
