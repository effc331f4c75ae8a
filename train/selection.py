"""Which rows of a data set are used, and in which order: the parts of a config that sources and questions share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Cast = Literal["int", "float", "str"]
Op = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]


@dataclass(frozen=True)
class Where:
    """Keep a row when `column op value` holds; `cast` converts the column first (scores may be strings)."""

    column: str
    op: Op
    value: Any
    cast: Cast | None = None


@dataclass(frozen=True)
class Sort:
    """Order of the rows, before `take`; stable, so that a `shuffle` decides between equals."""

    column: str
    descending: bool = False
    cast: Cast | None = None
