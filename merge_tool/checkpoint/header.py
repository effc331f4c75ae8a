"""The safetensors format: header bytes <-> TensorInfo. Opens no file and knows nothing of merging.

A file is 8 bytes (little-endian header length N), N bytes of JSON, then the tensors' bytes without holes. As strict as
the format (https://github.com/huggingface/safetensors#format): a header that this module accepts describes every byte
of the file exactly once. The header is parsed member by member: 100,000 tensors cost the text plus about 300 bytes a
tensor, and a hostile header not much more.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in CPython since 2.6, not in its stubs
from math import prod
from typing import Any, NoReturn

from merge_tool.errors import HeaderError, shown

MAX_HEADER_BYTES = 100_000_000  # the library's own limit

# Bits an element, in the order in which the library writes tensors of these dtypes.
DTYPE_BITS: Mapping[str, int] = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_WRITE_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: its dtype code, its shape, and the absolute byte `offset` in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


# ------------------------------------------------------------------------------------------ parsing

_INTEGER = r"(?:0|[1-9]\d{0,17})"
_USUAL_ENTRY = re.compile(  # as the library writes it, and nearly every file is written so
    rf'\{{"dtype":"([A-Z0-9_]{{1,16}})","shape":\[((?:{_INTEGER}(?:,{_INTEGER})*)?)\],'
    rf'"data_offsets":\[({_INTEGER}),({_INTEGER})\]\}}'
)
_USUAL_MEMBER = re.compile(rf',"([^"\\\x00-\x1f]*)":{_USUAL_ENTRY.pattern}')  # behind another one
_SPACE = re.compile(r"[ \t\n\r]*")
_NULL = re.compile(r"[ \t\n\r]*null")
_LONGEST_ENTRY = 65_536  # characters; a tensor's entry is about 100
_LARGEST_DIM = 2**63 - 1


class _Malformed(ValueError):
    """The problem without the file's name, which parse_header adds."""


def parse_header(raw: bytes, *, file_size: int, where: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors, in file order, and the metadata of a safetensors file.

    `raw` is the JSON part (the N bytes behind the 8-byte length), `file_size` the size of the whole file in
    bytes, `where` its name for messages. Raises HeaderError for anything that is not a valid header: text
    that is not JSON, duplicate names, unknown dtypes, sizes that are negative, boolean or fractional,
    offsets that overlap, leave holes or lie outside the file.
    """
    try:
        text = raw.decode("utf-8")
        spans, metadata = _parse_members(text)
        tensors = _check_layout(spans, data_offset=8 + len(raw), file_size=file_size)
    except UnicodeDecodeError as e:
        raise HeaderError(f"{where}: the header is not UTF-8 text ({e.reason} at byte {e.start}).") from e
    except _Malformed as e:
        raise HeaderError(
            f"{where}: {e}. The file is damaged or was not written as safetensors; fetch or save it again."
        ) from e
    return tensors, metadata


def _parse_members(text: str) -> tuple[list[tuple[int, int, TensorInfo]], dict[str, str]]:
    """All (begin, end, tensor with offset `begin`) of the header, relative to the data, and the metadata."""
    spans: list[tuple[int, int, TensorInfo]] = []
    metadata: dict[str, str] = {}
    names: set[str] = set()
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    if not text.startswith("{"):
        raise _Malformed("the header does not start with '{'")
    members = _Members(text, 0, "the header")

    def add(name: str) -> str:
        if name in names:
            raise _Malformed(f"the name '{shown(name)}' appears twice")
        names.add(name)
        return name

    for name in members:
        if add(name) == "__metadata__":
            metadata = members.take_strings(name)
        else:
            dtype, shape, begin, end = members.take_entry(name)
            shape = shapes.setdefault(shape, shape)
            spans.append((begin, end, TensorInfo(sys.intern(name), sys.intern(dtype), shape, begin)))
        for name, dtype, shape, begin, end in members.usual_entries():
            shape = shapes.setdefault(shape, shape)
            spans.append((begin, end, TensorInfo(sys.intern(add(name)), sys.intern(dtype), shape, begin)))
    if _skip_space(text, members.position) != len(text):
        raise _Malformed("there is text behind the header's closing brace")
    return spans, metadata


class _Members:
    """Iterates over the keys of the JSON object at `position`; the caller takes each value before the next key."""

    def __init__(self, text: str, position: int, what: str) -> None:
        self.text, self.what = text, what
        self.position = _skip_space(text, position)
        if not text.startswith("{", self.position):
            raise _Malformed(f"{what} is not a JSON object")
        self.position += 1

    def __iter__(self) -> Iterator[str]:
        self._skip()
        if self._next_is("}"):
            return
        while True:
            key = self._take_string("a key of", self.what)
            self._expect(":", "after the key", key)
            yield key
            self._skip()
            if self._next_is("}"):
                return
            self._expect(",", "after the value of", key)
            self._skip()

    def take_strings(self, name: str) -> dict[str, str]:
        """The value at `position`, an object whose values are strings. null, which the library allows, gives an empty
        one."""
        if _NULL.match(self.text, self.position):
            self.position = _skip_space(self.text, self.position) + len("null")
            return {}
        inner, strings = _Members(self.text, self.position, f"{name!r}"), {}
        for key in inner:
            if key in strings:
                raise _Malformed(f"{name} has the key '{shown(key)}' twice")
            strings[key] = inner._take_string("the value of", key)
        self.position = inner.position
        return strings

    def take_entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """The value at `position`, a tensor's entry: dtype, shape, begin and end."""
        if usual := _USUAL_ENTRY.match(self.text, self.position):
            self.position = usual.end()
            return _usual(*usual.groups())
        start = _skip_space(self.text, self.position)
        entry, length = _decode_entry(self.text[start : start + _LONGEST_ENTRY], name)
        self.position = start + length
        return _check_entry(entry, name)

    def usual_entries(self) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
        """After a value: the members behind it, with their names, as long as they are written as the library does."""
        while usual := _USUAL_MEMBER.match(self.text, self.position):
            if usual[1] == "__metadata__":
                return
            self.position = usual.end()
            name, *entry = usual.groups()
            yield name, *_usual(*entry)

    def _take_string(self, what: str, where: str) -> str:
        value: str
        self._skip()
        if not self.text.startswith('"', self.position):
            raise _Malformed(f"{what} {shown(where)} is not a string")
        try:
            value, self.position = scanstring(self.text, self.position + 1, True)
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise _Malformed(f"{what} {shown(where)} holds half of a surrogate pair") from e
        except ValueError as e:
            raise _Malformed(f"{what} {shown(where)} is not valid JSON ({e})") from e
        return value

    def _skip(self) -> None:
        self.position = _skip_space(self.text, self.position)

    def _next_is(self, sign: str) -> bool:
        if self.text.startswith(sign, self.position):
            self.position += 1
            return True
        return False

    def _expect(self, sign: str, where: str, key: str) -> None:
        self._skip()
        if not self._next_is(sign):
            raise _Malformed(f"the header is not valid JSON: expected '{sign}' {where} '{shown(key)}'")


def _usual(dtype: str, dims: str, begin: str, end: str) -> tuple[str, tuple[int, ...], int, int]:
    return dtype, tuple(map(int, dims.split(","))) if dims else (), int(begin), int(end)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode_entry(text: str, name: str) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text)
    except RecursionError as e:
        raise _Malformed(f"tensor '{shown(name)}': its entry is nested too deeply") from e
    except _Malformed as e:
        raise _Malformed(f"tensor '{shown(name)}': {e}") from e
    except ValueError as e:
        raise _Malformed(f"tensor '{shown(name)}': its entry is not valid JSON ({e})") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Malformed("a key appears twice")
    return content


def _refuse_number(literal: str) -> NoReturn:
    raise _Malformed(f"the number {shown(literal, 40)} is not a non-negative integer")


def _parse_natural(literal: str) -> int:
    if len(literal) > 19 or literal.startswith("-"):
        _refuse_number(literal)
    return int(literal)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_float=_refuse_number,
    parse_constant=_refuse_number,
    parse_int=_parse_natural,
)


def _check_entry(entry: object, name: str) -> tuple[str, tuple[int, ...], int, int]:
    where = f"tensor '{shown(name)}'"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"{where}: its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _Malformed(f"{where}: its dtype is not a string")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            raise _Malformed(f"{where}: its {what} is not a list of non-negative integers")
    if len(offsets) != 2:
        raise _Malformed(f"{where}: data_offsets has {len(offsets)} entries, not 2")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _check_layout(spans: list[tuple[int, int, TensorInfo]], *, data_offset: int, file_size: int) -> list[TensorInfo]:
    """The tensors with absolute offsets. Raises _Malformed unless they fill the file's data without holes or
    overlaps."""
    spans.sort(key=lambda span: (span[0], span[1]))
    reached, tensors = 0, []
    for begin, end, info in spans:
        if info.dtype not in DTYPE_BITS:
            raise _Malformed(f"tensor '{shown(info.name)}' has the unknown dtype '{shown(info.dtype)}'")
        if begin != reached:
            what = "overlaps the one before it" if begin < reached else "leaves a hole before it"
            raise _Malformed(f"tensor '{shown(info.name)}' {what}: it starts at {begin:,}, expected {reached:,}")
        bits = info.numel * DTYPE_BITS[info.dtype]
        if any(dim > _LARGEST_DIM for dim in info.shape) or bits % 8 or end - begin != bits // 8:
            raise _Malformed(
                f"tensor '{shown(info.name)}': shape {shown(list(info.shape))} of {info.dtype} does not take "
                f"{end - begin:,} bytes"
            )
        reached = end
        tensors.append(TensorInfo(info.name, info.dtype, info.shape, data_offset + begin))
    if data_offset + reached != file_size:
        what = "truncated" if data_offset + reached > file_size else "longer than its header says"
        raise _Malformed(f"the file is {what}: {file_size:,} bytes, expected {data_offset + reached:,}")
    return tensors


# ----------------------------------------------------------------------------------------- building


def write_order(info: TensorInfo) -> tuple[int, str]:
    """The order of tensors in a file, the same as the library's: widest dtype first, then by name."""
    return _WRITE_ORDER[info.dtype], info.name


def build_header(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytearray, list[TensorInfo]]:
    """The first bytes of a file (length, JSON, padding) and its tensors with their absolute offsets.

    The same bytes as `safetensors.serialize_file` writes for these tensors and at most one metadata entry; several
    entries are sorted here (the library's order changes from run to run).
    """
    ordered: Sequence[TensorInfo] = sorted(infos, key=write_order)
    header = header_bytes(ordered, metadata)
    placed, offset = [], len(header)
    for info in ordered:
        placed.append(TensorInfo(info.name, info.dtype, info.shape, offset))
        offset += info.nbytes
    return header, placed


def header_bytes(ordered: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytearray:
    """The first bytes of a file whose tensors are in this order. One piece of memory, because headers may have many
    MB."""
    header, begin = bytearray(b"\0\0\0\0\0\0\0\0{"), 0
    if metadata:
        header += f'"__metadata__":{_compact(dict(sorted(metadata.items())))},'.encode()
    for info in ordered:
        end = begin + info.nbytes
        shape = ",".join(map(str, info.shape))
        header += (
            f'{_compact(info.name)}:{{"dtype":"{info.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}},'
        ).encode()
        begin = end
    if header.endswith(b","):
        header.pop()
    header += b"}"
    header += b" " * (-len(header) % 8)
    header[:8] = (len(header) - 8).to_bytes(8, "little")
    return header


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
