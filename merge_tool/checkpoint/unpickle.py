"""The only module that imports torch, and only in a process of its own: the tensors of a pickled file and their
offsets.

torch unpickles with `weights_only=True`, which builds tensors and plain containers and refuses everything else. No
bytes of tensors are read. The answer is names, dtypes, shapes, strides and offsets in the file, from which the merge
reads by position as it does from safetensors. Protocol: paths as JSON on stdin, an answer a file as JSON on stdout.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from merge_tool.apart import answer
from merge_tool.errors import CheckpointError, counted, install, listed, reason, shown

ZIP_MAGIC = b"PK\x03\x04"
_OLDEST_TORCH = (2, 6)  # before, weights_only could be made to run code (CVE-2025-32434)
_KNOWN_TORCH = "2.6 to 2.13"
_LARGEST_PICKLE = 100_000_000  # bytes without the tensors'; as for safetensors' headers
_DEEPEST = 3  # state dicts inside of dicts: {"checkpoint": {"model": {...}}}
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")  # in torch's messages: what it refused
_SAVED_ALONE = (
    "If you trust it, save the weights alone: "
    'torch.save(torch.load(FILE, weights_only=False)["state_dict"], "weights.pt") or the like, which runs whatever '
    "code the file holds."
)

_DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "bool": "BOOL",
}


class _Refused(Exception):
    """The problem, without the file's name."""


def main() -> None:
    """The answer for every path: {"tensors": [...], "notices": [...]}, or {"refused": message}."""
    warnings.simplefilter("ignore")
    answer(lambda paths: ([describe(path, where) for path, where in paths], ()))


def describe(path: str, where: str) -> dict[str, Any]:
    """The tensors of the file at `path` (`where` in messages), or the reason for not reading it."""
    try:
        return tensors_in(path)
    except _Refused as e:
        return {"refused": f"{where}: {e}"}
    except CheckpointError as e:
        return {"refused": str(e)}
    except MemoryError:
        return {"refused": f"{where}: there is not enough memory to read it."}
    except OSError as e:
        return {"refused": f"{where}: cannot be read ({reason(e)})."}


def tensors_in(path: str) -> dict[str, Any]:
    """Every tensor of the state dict as [name, dtype, shape, strides or None, offset in bytes], and notices."""
    torch = _import_torch()
    with open(path, "rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
    entries = _zip_entries(path) if is_zip else None
    regions: list[tuple[int, int, int]] = []
    loaded = _load_zip(torch, path, regions) if is_zip else _load_legacy(torch, path, regions)
    notices: list[str] = []
    state = _state_dict(torch, loaded, notices)
    mapped = _Mapped(regions, entries)
    tensors = [_describe(torch, name, value, mapped) for name, value in state.items()]
    return {"tensors": tensors, "notices": notices}


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as e:
        raise _Refused(
            f"is pickled, and reading it takes PyTorch, which cannot be imported ({shown(e)}). "
            f"Install it: {install('train')}, or pip install torch."
        ) from e
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise _Refused(
            f"is pickled, and the PyTorch here ({shown(torch.__version__)}) can be made to run code by such a file: "
            f"{'.'.join(map(str, _OLDEST_TORCH))} or later is needed. Install it: pip install --upgrade torch."
        )
    return torch


# ------------------------------------------------------------------------------------------------ unpickling


def _load_zip(torch: Any, path: str, regions: list[tuple[int, int, int]]) -> Any:
    """The object that torch loads from the file. `regions` gets the addresses at which torch mapped the file, so that a
    tensor's address gives its offset."""
    map_file = torch.UntypedStorage.from_file

    def from_file(*args: Any, **options: Any) -> Any:
        mapped = map_file(*args, **options)
        regions.append((mapped.data_ptr(), mapped.nbytes(), 0))
        return mapped

    torch.UntypedStorage.from_file = from_file
    try:
        return _load(torch, path, mmap=True)
    finally:
        torch.UntypedStorage.from_file = map_file


def _load_legacy(torch: Any, path: str, regions: list[tuple[int, int, int]]) -> Any:
    """As `_load_zip`, for files from before torch 1.6: the tensors' bytes are skipped, not read."""
    with open(path, "rb") as file:
        return _load(torch, _SkippingFile(file, regions))


def _load(torch: Any, file: Any, **options: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except (MemoryError, OSError, _Refused):
        raise
    except Exception as e:  # torch, its unpickler and zip reader raise errors of many types; each means: not loaded
        raise _Refused(_why(e)) from e


def _why(error: Exception) -> str:
    if match := _GLOBAL.search(str(error)):
        return f"holds more than weights: {shown(match[1])}, which torch's weights_only refuses to make. {_SAVED_ALONE}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inner = next((line for line in lines if "WeightsUnpickler error:" in line), None)
    said = inner.split("error:")[-1].strip() if inner else next(iter(lines), "")
    said = said or type(error).__name__
    return (
        f"torch cannot load it with weights_only ({shown(said)}). It may be damaged, no file of torch.save, or made to "
        "run code when opened; none was run."
    )


class _SkippingFile:
    """A file whose large pieces are skipped: their memory stays untouched, and `regions` gets their addresses and
    offsets."""

    def __init__(self, file: BinaryIO, regions: list[tuple[int, int, int]]) -> None:
        self._file, self._regions = file, regions
        self._size = file.seek(0, 2)
        file.seek(0)

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _LARGEST_PICKLE:
            raise _Refused(f"its pickle asks for {count:,} bytes in one piece; it is damaged.")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_LARGEST_PICKLE)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int | None:
        import ctypes

        position, count = self._file.tell(), len(buffer)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._regions.append((address, count, position))
        if count <= 4096:  # a length, or a tensor too small to skip
            return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]
        count = max(0, min(count, self._size - position))
        self._file.seek(position + count)
        return count


# -------------------------------------------------------------------------------------- which dict, which bytes


def _state_dict(torch: Any, loaded: Any, notices: list[str], depth: int = _DEEPEST) -> Mapping[str, Any]:
    """The names and tensors of the model in the unpickled object. Raises _Refused if more than one dict could be the
    model."""
    if not isinstance(loaded, Mapping):
        kind = "one tensor without a name" if torch.is_tensor(loaded) else f"a {type(loaded).__name__}"
        raise _Refused(f"holds {kind}, expected a state dict (names and tensors). Save model.state_dict().")
    inner = [key for key, value in loaded.items() if isinstance(key, str) and _holds_tensors(torch, value, depth)]
    has_own = any(torch.is_tensor(value) for value in loaded.values())
    if not inner and not has_own:
        raise _Refused(f"holds no tensors under names; its keys are {listed(loaded, 8)}. Save model.state_dict().")
    if not inner:
        return _named_tensors(torch, loaded, notices)
    chosen = inner if len(inner) == 1 and not has_own else [key for key in inner if key in _STATE_KEYS]
    if len(chosen) != 1:
        own = " and tensors of its own" if has_own else ""
        raise _Refused(
            f"which of its dicts is the model is not clear: it has {listed(chosen or inner, 8)}{own}. Save the one to "
            'merge alone: torch.save(torch.load(FILE)["NAME"], "weights.pt").'
        )
    left = [key for key in loaded if key != chosen[0]]
    beside = f"; not read: {listed(left, 8)}" if left else ""
    notices.append(f"the weights under '{shown(chosen[0])}' are taken{beside}.")
    return _state_dict(torch, loaded[chosen[0]], notices, depth - 1)


def _holds_tensors(torch: Any, value: Any, depth: int) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    named = ((key, item) for key, item in value.items() if isinstance(key, str))
    return any(torch.is_tensor(item) or _holds_tensors(torch, item, depth - 1) for _, item in named)


def _named_tensors(torch: Any, content: Mapping[Any, Any], notices: list[str]) -> Mapping[str, Any]:
    if unnamed := [key for key, value in content.items() if torch.is_tensor(value) and not isinstance(key, str)]:
        raise _Refused(f"has {counted(len(unnamed), 'tensor')} under a name that is no string: {listed(unnamed)}.")
    if other := [key for key, value in content.items() if not torch.is_tensor(value)]:
        notices.append(
            f"{counted(len(other), 'entry that is no tensor is', 'entries that are no tensors are')} left out: "
            f"{listed(other)}."
        )
    return {key: value for key, value in content.items() if torch.is_tensor(value)}


class _Mapped:
    """From a tensor's address to its offset in the file, by the regions of the file that are in memory."""

    def __init__(self, regions: list[tuple[int, int, int]], entries: Mapping[int, int] | None) -> None:
        self.regions = {address: (size, offset) for address, size, offset in regions}
        self.addresses = sorted(self.regions)
        self.entries = entries

    def offset(self, address: int) -> int:
        from bisect import bisect_right

        index = bisect_right(self.addresses, address) - 1
        start = self.addresses[index] if index >= 0 else 0
        size, offset = self.regions.get(start, (0, 0))
        if not start <= address < start + size:
            import torch

            raise _Refused(
                f"torch {shown(torch.__version__)} does not map its tensors where torch {_KNOWN_TORCH} does. Install "
                "such a version, or save the weights as safetensors."
            )
        return offset + address - start

    def storage(self, storage: Any) -> int:
        """The offset of a storage, which must be in one piece, and in one record of a zip file."""
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        offset = self.offset(begin)
        if self.offset(end - 1) != offset + storage.nbytes() - 1:
            raise _Refused("its tensors do not lie in one piece; it is damaged.")
        if self.entries is not None and self.entries.get(offset, 0) < storage.nbytes():
            raise _Refused("its tensors are not where the zip file's directory says; it is damaged.")
        return offset


def _describe(torch: Any, name: str, tensor: Any, mapped: _Mapped) -> list[Any]:
    what = f"tensor '{shown(name)}'"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise _Refused(f"{what} is sparse, nested or quantised by torch, which cannot be merged. Save it dense.")
    if tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
        raise _Refused(f"{what} has no plain values ({shown(tensor.device)}). Save a clone of it.")
    if name == "__metadata__" or (not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name)):
        raise _Refused(f"{what} has a name that safetensors cannot have. Rename it.")
    dtype, shape = _dtype_code(tensor.dtype), list(tensor.shape)
    if dtype is None:
        raise _Refused(f"{what} has dtype {shown(tensor.dtype)}, which cannot be merged.")
    if tensor.numel() == 0:
        return [name, dtype, shape, None, 0]
    offset = mapped.storage(tensor.untyped_storage()) + tensor.storage_offset() * tensor.element_size()
    return [name, dtype, shape, None if tensor.is_contiguous() else list(tensor.stride()), offset]


def _dtype_code(dtype: Any) -> str | None:
    integers = {f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    return (_DTYPE_CODES | integers).get(str(dtype).removeprefix("torch."))


# ------------------------------------------------------------------------------------------------ the zip file


def _zip_entries(path: str) -> dict[int, int]:
    """The offsets and sizes of the records in torch's zip file, from the zip directory."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            _check_records(archive)
            return dict(_data_places(archive, file))
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as e:
        raise _Refused(f"is not a whole zip file ({shown(e)}). Fetch or save it again.") from e


def _check_records(archive: zipfile.ZipFile) -> None:
    infos = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    if "data.pkl" not in infos:
        raise _Refused(f"is a zip file, but not one of torch's: it holds {listed(sorted(infos))}.")
    if "constants.pkl" in infos:
        raise _Refused(
            "is a TorchScript archive, which holds code as well. Save its weights alone: "
            'torch.save(torch.jit.load(FILE).state_dict(), "weights.pt"). torch.jit.load runs that code: do it with '
            "files that you trust. If the names "
            "differ from the other model's, give --names-from."
        )
    if infos["data.pkl"].file_size > _LARGEST_PICKLE:
        raise _Refused(f"its pickle has {infos['data.pkl'].file_size:,} bytes, at most {_LARGEST_PICKLE:,} are read.")
    if packed := [name for name, info in infos.items() if info.compress_type != zipfile.ZIP_STORED]:
        raise _Refused(f"has compressed records ({listed(packed)}), which torch.save does not write. Save it again.")
    order = infos.get("byteorder")
    if order is not None and (order.file_size > 6 or archive.read(order) != b"little"):
        raise _Refused("was saved on a big-endian machine, which is not read. Save it again on a usual one.")


def _data_places(archive: zipfile.ZipFile, file: BinaryIO) -> Iterator[tuple[int, int]]:
    for info in archive.infolist():
        file.seek(info.header_offset + 26)  # the size of the local header, whose extra field is padding
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        yield info.header_offset + 30 + name_length + extra_length, info.file_size
