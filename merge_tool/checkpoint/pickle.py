"""Pickled weights (`.bin`, `.pt`, `.pth`, `.ckpt`) -> where their tensors lie in the file. Nothing is unpickled here.

`unpickle.py` unpickles in a process of its own: importing torch takes 200 MB and a second, and the merge needs that
memory. The tensors' bytes are then read from the file by position, as for safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_tool.apart import ask
from merge_tool.checkpoint.header import DTYPE_BITS, TensorInfo
from merge_tool.checkpoint.lookalikes import START_BYTES, lookalike
from merge_tool.checkpoint.source import LocalFile
from merge_tool.checkpoint.strided import StridedTensor
from merge_tool.errors import CheckpointError, shown


@dataclass(frozen=True, slots=True)
class PickledFile:
    """One file's content: tensors at their offsets (`strided`: in another order of elements), and a digest of that
    list."""

    tensors: tuple[TensorInfo, ...]
    strided: Mapping[str, StridedTensor]
    digest: str
    notices: tuple[str, ...]


def read_pickles(files: Sequence[LocalFile], max_bytes: int) -> list[PickledFile]:
    """The tensors of each file. `max_bytes` bounds their description, as it bounds a safetensors header.

    Raises CheckpointError for files that are damaged, that hold more than weights, and where torch is missing.
    """
    for file in files:
        _check_start(file)
    answers = _ask([(os.fspath(file.path), shown(file.name)) for file in files], max_bytes)
    if refused := next((answer["refused"] for answer in answers if "refused" in answer), None):
        raise CheckpointError(refused)
    return [_parse(file, answer) for file, answer in zip(files, answers, strict=True)]


def _check_start(file: LocalFile) -> None:
    start = bytearray(min(START_BYTES, file.size))
    file.read_into(0, memoryview(start))
    if what := lookalike(bytes(start)):
        raise CheckpointError(f"{shown(file.name)}: {what}.")
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{shown(file.name)}: is no file of torch.save (neither zip nor pickle). It may be damaged: fetch it again."
        )


def _ask(paths: list[tuple[str, str]], max_bytes: int) -> list[dict[str, Any]]:
    """The answers of `unpickle.main`."""
    answers, _ = ask(
        "merge_tool.checkpoint.unpickle",
        paths,
        what=paths[0][1],
        error=CheckpointError,
        hint="The file may be damaged, or memory short: its structure is read by torch, in about 300 MB.",
        keep_errors=True,
    )
    if (nbytes := len(json.dumps(answers))) > max_bytes:
        raise CheckpointError(
            f"{paths[0][1]}: describing its tensors takes {nbytes:,} bytes, more than fits the memory budget. Give at "
            f"least --memory {(100_000_000 + 8 * nbytes) // 1_000_000}MB."
        )
    return answers  # type: ignore[no-any-return]


def _parse(file: LocalFile, answer: Mapping[str, Any]) -> PickledFile:
    tensors, strided = [], {}
    for name, dtype, shape, strides, offset in answer["tensors"]:
        info = TensorInfo(sys.intern(name), sys.intern(dtype), tuple(shape), offset)
        _check_inside(file, info, strides)
        tensors.append(info)
        if strides is not None:
            strided[info.name] = StridedTensor(info, file, tuple(strides))
    digest = hashlib.sha256(json.dumps(answer["tensors"]).encode()).hexdigest()
    notices = tuple(f"{shown(file.name)}: {notice}" for notice in answer["notices"])
    return PickledFile(tuple(tensors), strided, digest, notices)


def _check_inside(file: LocalFile, info: TensorInfo, strides: Sequence[int] | None) -> None:
    """Raise CheckpointError if a tensor would end behind the file's end."""
    reach = info.nbytes
    if strides is not None:
        last = sum((n - 1) * stride for n, stride in zip(info.shape, strides, strict=True))
        reach = (last + 1) * DTYPE_BITS[info.dtype] // 8
    if info.numel and info.offset + reach > file.size:
        raise CheckpointError(
            f"{shown(file.name)}: tensor '{shown(info.name)}' would end at byte {info.offset + reach:,}, the file has "
            f"{file.size:,}. It is damaged, or changed while we read it."
        )
