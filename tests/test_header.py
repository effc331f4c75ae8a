"""The header parser against the safetensors library, in both directions, and against hostile headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from checkpoints import DTYPES, save_file
from merge_tool.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    build_header,
    parse_header,
)
from merge_tool.checkpoint.reader import open_checkpoint
from merge_tool.errors import CheckpointError, HeaderError, shown


def parse(header: Any, data_bytes: int = 8) -> list[TensorInfo]:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, file_size=8 + len(raw) + data_bytes, where="x.safetensors")[0]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    NAMES.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=8
)


@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=1))
@settings(max_examples=150, deadline=None)
def test_headers_are_the_librarys_own_bytes(tmp_path_factory: Any, tensors: dict[str, Any], metadata: Any) -> None:
    """What we build the library would have written; what the library writes we read."""
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    save_file({name: np.zeros(shape, DTYPES[code]) for name, (code, shape) in tensors.items()}, path, metadata or None)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    built, placed = build_header([TensorInfo(n, code, shape, 0) for n, (code, shape) in tensors.items()], metadata)
    assert raw[: 8 + length] == built
    parsed, found = parse_header(raw[8 : 8 + length], file_size=len(raw), where="x")
    assert sorted(parsed, key=lambda t: t.name) == sorted(placed, key=lambda t: t.name)
    assert found == metadata


def test_file_order_is_the_librarys_for_every_pair_of_dtypes(tmp_path: Path) -> None:
    tensors = {f"{place}-{code}": np.zeros(3, dtype) for place, (code, dtype) in enumerate(DTYPES.items())}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    infos = [TensorInfo(n, n.split("-")[1], (3,), 0) for n in tensors]
    assert raw.startswith(build_header(infos, {"format": "pt"})[0])


@pytest.mark.parametrize("spaced", [True, False])
def test_other_writers_spacing_and_key_order_are_read(spaced: bool) -> None:
    header = {"b": {"data_offsets": [0, 4], "shape": [1, 1], "dtype": "F32"}, "a": entry(offsets=[4, 12])}
    raw = json.dumps(header, indent=2 if spaced else None).encode() + b"   "
    assert [t.name for t in parse_header(raw, file_size=8 + len(raw) + 12, where="x")[0]] == ["b", "a"]


def test_tensors_may_be_listed_in_any_order() -> None:
    """The list is theirs, the order is that of the bytes."""
    places = {"c": (8, 12), "a": (0, 8), "b": (12, 16)}
    header = {name: entry(shape=[(stop - start) // 4], offsets=[start, stop]) for name, (start, stop) in places.items()}
    found = parse(header, 16)
    assert [info.name for info in found] == ["a", "c", "b"]
    assert [info.offset - found[0].offset for info in found] == [0, 8, 12]


HOSTILE: dict[str, Any] = {
    "not JSON": b"{hello",
    "empty": b"",
    "a list": b"[]",
    "a number": b"3",
    "space first": b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "two objects": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}{}',
    "trailing comma": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}',
    "not UTF-8": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "half a surrogate": b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "raw control character in a name": b'{"a\n":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "duplicate names": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "duplicate escaped names": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "duplicate keys in an entry": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "duplicate metadata": b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "metadata not strings": {"__metadata__": {"k": 1}, "a": entry()},
    "metadata a list": {"__metadata__": [], "a": entry()},
    "entry not an object": {"a": [1, 2]},
    "missing key": {"a": {"dtype": "F32", "shape": [2]}},
    "extra key": {"a": {**entry(), "extra": 1}},
    "unknown dtype": {"a": entry("F99")},
    "dtype not a string": {"a": entry(32)},
    "shape a number": {"a": entry(shape=2)},
    "negative size": {"a": entry(shape=[-2])},
    "negative zero": b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
    "boolean size": {"a": entry(shape=[True, 2])},
    "fractional size": b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
    "exponent": b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}',
    "NaN": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "Infinity": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
    "huge integer": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "leading zero": b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}',
    "wrong size for shape": {"a": entry(shape=[3])},
    "overflowing product": {"a": entry(shape=[2**62, 2**62])},
    "huge size beside a zero": {"a": entry(shape=[0, 2**63], offsets=[0, 0])},
    "three offsets": {"a": entry(offsets=[0, 4, 8])},
    "offsets backwards": {"a": entry(offsets=[8, 0])},
    "does not start at 0": {"a": entry(shape=[1], offsets=[4, 8])},
    "a hole": {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[0], offsets=[8, 8])},
    "overlap": {"a": entry(offsets=[0, 8]), "b": entry(offsets=[4, 12])},
    "out of file": {"a": entry(shape=[4], offsets=[0, 16])},
    "bytes behind the tensors": {"a": entry(shape=[1], offsets=[0, 4])},
    "sub-byte that is no whole byte": {"a": entry("F4", [1], [0, 0])},
    "deeply nested": b'{"a":' + b"[" * 100_000,
    "deeply nested metadata": b'{"__metadata__":' + b'{"a":' * 100_000,
    "an endless entry": b'{"a":{"dtype":"F32","shape":[' + b"0," * 200_000 + b"0]}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_by_name(name: str) -> None:
    with pytest.raises(HeaderError, match=r"^x\.safetensors: ") as caught:
        parse(HOSTILE[name])
    assert "again" in str(caught.value) or "UTF-8" in str(caught.value)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_headers_never_crash_and_never_mislead(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whatever we accept the library accepts too, with the same tensors."""
    good = json.dumps({"__metadata__": {"format": "pt"}, "a": entry("F32", [1, 2]), "b": entry("U8", [3], [8, 11])})
    raw = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"0", b"1", b"9", b"-", b"[", b"]", b"{", b"}", b",", b'"', b" ", b"e", b"\\", b"\x00"])
        )
    try:
        tensors = parse(bytes(raw), 11)
    except HeaderError:
        return
    path = tmp_path_factory.mktemp("m") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(11))
    with safe_open(str(path), framework="numpy") as opened:
        assert sorted(opened.keys()) == sorted(t.name for t in tensors)
        for info in tensors:
            view = opened.get_slice(info.name)
            assert (tuple(view.get_shape()), view.get_dtype()) == (info.shape, info.dtype)


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"123456\0", "has 7 bytes, too few"),
        (struct.pack("<Q", 2**63) + b"{}", "9,223,372,036,854,775,808 bytes, at most 100,000,000"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), "at most 100,000,000 are allowed"),
        (struct.pack("<Q", 100) + b"{}", "truncated: its header needs 108 bytes, the file has 10"),
        (b"PK\x03\x04" + bytes(20), "not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "x.safetensors", raw))


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(10.0), "b": np.zeros((3, 3), np.float32)}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(raw)):
        with pytest.raises(HeaderError):
            open_checkpoint(write(tmp_path / "y.safetensors", raw[:length]))
    with pytest.raises(HeaderError, match="longer than its header says"):
        open_checkpoint(write(tmp_path / "y.safetensors", raw + b"!"))


def test_terminal_codes_in_names_are_never_printed_raw() -> None:
    with pytest.raises(HeaderError) as caught:
        parse({"evil\x1b[2J\n": entry("F99")})
    assert "\x1b" not in str(caught.value)
    assert "evil\\x1b[2J\\n" in str(caught.value)
    assert shown("x" * 300).endswith("… (300 characters)")


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    """Other writers pad to nothing; the library reads them, and so do we."""
    raw = json.dumps({"a": entry("F32", [2], [0, 8])}).encode()
    raw += b" " * ((3 - len(raw)) % 8)
    values = np.array([1.5, -2.5], np.float32)
    path = write(tmp_path / "x.safetensors", struct.pack("<Q", len(raw)) + raw + values.tobytes())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["a"].offset % 4 == 3
        assert checkpoint.read("a", 0, 2, np.empty(2, np.float32)).tolist() == [1.5, -2.5]


@pytest.mark.parametrize("code", DTYPE_BITS)
def test_every_dtype_has_the_librarys_bits(tmp_path: Path, code: str) -> None:
    """The library opens eight elements in as many bytes as one has bits, and refuses one byte less or more."""

    def opens(num_bytes: int) -> bool:
        head = json.dumps({"x": entry(code, (8,), (0, num_bytes))}).encode()
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(head)) + head + bytes(num_bytes))
        try:
            with safe_open(tmp_path / "x", framework="numpy"):
                return True
        except SafetensorError:
            return False

    assert [n for n in range(1, 70) if opens(n)] == [DTYPE_BITS[code]]
