"""A model folder or a .safetensors file -> Checkpoint: names, shapes, and elements by range.

Reads only headers until `read` is called. No tables of architectures: tensors are known by their names. Checkpoints
that cannot be merged value by value (quantised codes, types below a byte) are refused here, by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from merge_tool.arrays import NUMPY_DTYPES, STORED_DTYPES, Array, as_bytes
from merge_tool.checkpoint.folder import Folder, is_pickle, meant_path
from merge_tool.checkpoint.fp8 import SCALES, Scaled, find_scaled, without_quantization
from merge_tool.checkpoint.header import MAX_HEADER_BYTES, TensorInfo, parse_header
from merge_tool.checkpoint.hub import local_path
from merge_tool.checkpoint.lookalikes import START_BYTES, lookalike
from merge_tool.checkpoint.pickle import read_pickles
from merge_tool.checkpoint.quantised import why_quantised
from merge_tool.checkpoint.source import ByteSource, LocalFile, TensorSource
from merge_tool.checkpoint.weight_files import find_weights, unread_format, variants_beside
from merge_tool.errors import CheckpointError, HeaderError, counted, listed, reason, shown
from merge_tool.files import leads_out


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One file of a checkpoint: its bytes, and the SHA-256 of its header, or of a pickle's list of tensors."""

    file_name: str
    source: ByteSource
    header_sha256: str


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A TensorSource whose elements are stored in a file as they are read. `written_as`: the dtype of the tensor that
    this one replaces."""

    info: TensorInfo
    file: ByteSource
    written_as: str | None = None

    @property
    def stored_dtype(self) -> str:
        return self.written_as or self.info.dtype

    @property
    def where(self) -> str:
        return self.file.name

    @property
    def files(self) -> tuple[ByteSource]:
        return (self.file,)

    def read_into(self, start: int, values: Array) -> None:
        self.file.read_into(self.info.offset + start * values.itemsize, as_bytes(values))

    def acquire(self) -> None:
        self.file.acquire()

    def release(self) -> None:
        self.file.release()

    def prefetch(self, start: int, stop: int) -> None:
        self.file.prefetch(*self._byte_range(start, stop))

    def forget(self, start: int, stop: int) -> None:
        self.file.forget(*self._byte_range(start, stop))

    def _byte_range(self, start: int, stop: int) -> tuple[int, int]:
        itemsize = STORED_DTYPES[self.info.dtype].itemsize
        return self.info.offset + start * itemsize, (stop - start) * itemsize

    def extra_bytes(self, count: int) -> int:
        return 0


class Checkpoint:
    """The tensors of one model on disk.

    `tensors` maps every name to its TensorInfo; `config` is config.json, or None; `metadata` the files' `__metadata__`;
    `folder` is None for a single file; `notices` are warnings for the user. `made` has the sources of tensors whose
    elements are computed as they are read (dequantised, for example); their TensorInfo is as read. `scaled` has the
    weights that are 8-bit floats with scales. The tokenizer is in `tokenizer_folder`, which may be an adapter's. If
    tensors were replaced, `stored` is the checkpoint before that.
    """

    def __init__(
        self,
        name: str,
        folder: Folder | None,
        files: tuple[CheckpointFile, ...],
        tensors: dict[str, TensorInfo],
        file_of: dict[str, int],
        metadata: dict[str, str],
        config: dict[str, Any] | None,
        index_name: str | None = None,
        notices: tuple[str, ...] = (),
        made: Mapping[str, TensorSource] | None = None,
        tokenizer_folder: Folder | None = None,
        scaled: Scaled | None = None,
    ) -> None:
        self.name, self.folder, self.files = name, folder, files
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.metadata, self.config, self.notices = metadata, config, notices
        self.index_name = index_name
        self.stored: Checkpoint | None = None
        self._file_of = file_of  # empty when there is one file
        self._made = made or {}
        self.tokenizer_folder = tokenizer_folder or folder
        self.scaled = scaled

    @property
    def weight_files(self) -> frozenset[str]:
        """The names of the files that hold the tensors, and of their index."""
        return frozenset(file.file_name for file in self.files) | {self.index_name or "model.safetensors.index.json"}

    def source(self, name: str) -> TensorSource:
        """Where the elements of tensor `name` come from."""
        if (made := self._made.get(name)) is not None:
            return made
        return FileTensor(self.tensors[name], self.files[self._file_of.get(name, 0)].source)

    def stored_dtype(self, name: str) -> str:
        """The dtype in which a merge writes tensor `name` by default."""
        made = self._made.get(name)
        return made.stored_dtype if made is not None else self.tensors[name].dtype

    def with_made(
        self,
        name: str,
        files: tuple[CheckpointFile, ...],
        made: Mapping[str, TensorSource],
        notices: tuple[str, ...],
        tokenizer_folder: Folder | None = None,
        config: dict[str, Any] | None = None,
        without: Collection[str] = (),
    ) -> Checkpoint:
        """This checkpoint with the tensors of `made` replaced or added, and `without` some; `files` are read for them,
        too. `config` is what config.json must say of them, if it says otherwise."""
        changed = copy(self)
        changed.name, changed.files, changed.notices = name, (*self.files, *files), notices
        kept = {key: info for key, info in self.tensors.items() if key not in without} if without else self.tensors
        changed.tensors = {**kept, **{key: source.info for key, source in made.items()}}
        changed._made = {**self._made, **made}
        changed.tokenizer_folder = tokenizer_folder or self.tokenizer_folder
        changed.config = self.config if config is None else config
        changed.stored = self.stored or self
        return changed

    def with_notices(self, notices: tuple[str, ...]) -> Checkpoint:
        """This checkpoint with other notices."""
        changed = copy(self)
        changed.notices = notices
        return changed

    def read(self, name: str, start: int, stop: int, out: Array) -> Array:
        """Elements [start, stop) of a tensor, flat, in its own dtype, into `out` of that dtype and length."""
        info = self.tensors[name]
        dtype = NUMPY_DTYPES[info.dtype]
        if out.dtype != dtype or out.shape != (stop - start,) or not 0 <= start <= stop <= info.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {info.numel} do not fit the given array")
        self.source(name).read_into(start, out)
        return out

    def read_new(self, name: str, start: int, stop: int) -> Array:
        """As `read`, into a new array."""
        return self.read(name, start, stop, np.empty(stop - start, NUMPY_DTYPES[self.tensors[name].dtype]))

    def with_real_values(self, scaled: Scaled, made: Mapping[str, TensorSource]) -> Checkpoint:
        """The same files, with 8-bit floats that have scales read as real values; the scales are then not listed as
        tensors. `made` are the other sources of tensors."""
        changed, infos = copy(self), {name: source.info for name, source in scaled.made.items()}
        left_out = scaled.left_out
        changed.tensors = {name: infos.get(name, info) for name, info in self.tensors.items() if name not in left_out}
        changed.notices = (*self.notices, *scaled.notices(self.name))
        changed.config = without_quantization(self.config)
        changed._made, changed.scaled = {**made, **scaled.made}, scaled
        return changed

    def close(self) -> None:
        """Nothing stays open between reads; exists so that a Checkpoint can be used with `with`."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_checkpoint(
    ref: str | Path, *, max_header_bytes: int = MAX_HEADER_BYTES, mergeable: bool = True, as_stored: bool = False
) -> Checkpoint:
    """Open a model folder, a .safetensors file or a model of the Hub (`org/name`, `org/name@revision`) and read its
    headers. A local path that exists wins; a model of the Hub that is not in the Hub's cache is fetched. 8-bit floats
    with scales are read as real values, unless `as_stored`.

    Raises FetchError if a model of the Hub cannot be fetched; CheckpointError if there is no checkpoint, or if
    `mergeable` and the checkpoint cannot be merged (quantised, odd dtypes); HeaderError if a file is damaged.
    """
    path = local_path(ref)
    return open_local(path, {}, max_header_bytes=max_header_bytes, mergeable=mergeable, as_stored=as_stored)


def open_local(
    path: Path,
    coming: Mapping[str, ByteSource],
    *,
    name: str = "",
    max_header_bytes: int = MAX_HEADER_BYTES,
    mergeable: bool = True,
    as_stored: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """As open_checkpoint, for a local path; `coming` has by name the weights that are still to be fetched into the
    folder, `name` is for messages, `variant` chooses among files (fp16)."""
    try:
        if path.is_dir():
            checkpoint = _open_folder(Folder(path, name), coming, max_header_bytes, variant, shown(path))
        elif path.is_file():
            checkpoint = _open_file(path, name or path.name, max_header_bytes)
        elif path.exists():
            raise CheckpointError(f"{shown(path)}: is neither a folder nor a regular file.")
        else:
            raise CheckpointError(f"{shown(path)}: no such file or folder.{meant_path(path)}")
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{shown(path)}: cannot be read ({reason(e)}).") from e
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.name}: holds no tensors.")
    if not as_stored:
        checkpoint = _with_real_values(checkpoint, strict=mergeable)
    if mergeable:
        check_mergeable(checkpoint)
    return checkpoint


def open_one_file(folder: Folder, file_name: str, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Checkpoint:
    """One file of weights in a folder; the folder's other files are ignored."""
    return _alone(LocalFile(folder.path(file_name), f"{folder.name}/{file_name}"), file_name, max_header_bytes)


def _open_file(path: Path, name: str, max_header_bytes: int) -> Checkpoint:
    if path.suffix.lower() == ".json":
        raise CheckpointError(f"{name}: is no file of weights. Give its folder: {shown(path.parent)}.")
    if path.suffix.lower() in {".yaml", ".yml"}:
        raise CheckpointError(f"{name}: is no model. A recipe is merged by merge-tool run RECIPE.yaml OUT.")
    if path.suffix.lower() in {".gguf", ".ggml"}:
        raise CheckpointError(f"{name}: {unread_format([path.name])}")
    return _alone(LocalFile(path.resolve(), name), path.name, max_header_bytes)


def _alone(source: LocalFile, file_name: str, max_header_bytes: int) -> Checkpoint:
    made: dict[str, TensorSource] = {}
    notices: list[str] = []
    file, tensors, metadata = _read_files([file_name], [source], max_header_bytes, made, notices)[0]
    infos = {info.name: info for info in tensors}
    return Checkpoint(
        name=source.name,
        folder=None,
        files=(file,),
        tensors=infos,
        file_of={},
        metadata=metadata,
        config=None,
        index_name=None,
        notices=tuple(notices),
        made=made,
    )


def _open_folder(
    folder: Folder,
    coming: Mapping[str, ByteSource],
    max_header_bytes: int,
    variant: str | None = None,
    typed: str = "",
) -> Checkpoint:
    listing = sorted({*(entry.name for entry in folder.root.iterdir()), *coming})
    notices: list[str] = []
    weight_map: dict[str, str] = {}
    found = [*listing, *files_below(folder, listing)]
    names, index = find_weights(folder.name, found, of_hub=folder.is_of_hub, variant=variant, typed=typed)
    if index:
        weight_map = _load_weight_map(folder, index)
    shards = names or sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if shard not in coming and not folder.has(shard)]:
        raise CheckpointError(
            f"{folder.name}/{index}: names {counted(len(missing), 'missing shard')}: {listed(missing)}. "
            "Finish the download, or save the model again."
        )
    if names and f"{names[0]}.index.json" in listing:
        notices.append(f"{folder.name} has both {names[0]} and an index: {names[0]} is used, as transformers does.")
    if beside := [one for one in variants_beside(index or names[0], listing) if one != variant]:
        notices.append(
            f"{folder.name} has {listed(beside)} beside its plain weights, which are merged. --variant {beside[0]} "
            "takes the other."
        )
    if len(names) > 1:
        notices.append(f"{folder.name} has {len(names):,} shards and no index: all their tensors are read.")
    made: dict[str, TensorSource] = {}
    sources = [coming.get(shard) or LocalFile(folder.path(shard), f"{folder.name}/{shard}") for shard in shards]
    parsed = _read_files(shards, sources, max_header_bytes, made, notices)
    tensors, file_of = _collect(folder, shards, parsed, weight_map, notices)
    metadata: dict[str, str] = {}
    for _, _, of_file in parsed:
        metadata = {**of_file, **metadata}
    config = folder.load_json("config.json") if "config.json" in listing else None
    files = tuple(file for file, _, _ in parsed)
    return Checkpoint(
        name=folder.name,
        folder=folder,
        files=files,
        tensors=tensors,
        file_of=file_of,
        metadata=metadata,
        config=config,
        index_name=index,
        notices=tuple(notices),
        made=made,
    )


def files_below(folder: Folder, listing: Sequence[str]) -> list[str]:
    """The files in the folders of a folder without safetensors, which may say where its weights are."""
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in listing):
        return []
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.root.glob("*/*"))


def _load_weight_map(folder: Folder, index: str) -> dict[str, str]:
    weight_map = folder.load_json(index, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{folder.name}/{index}: has no weight_map from tensor names to file names.")
    if not weight_map:
        raise CheckpointError(f"{folder.name}/{index}: its weight_map is empty.")
    if outside := next((name for name in weight_map.values() if leads_out(name)), None):
        raise CheckpointError(f"{folder.name}/{index}: names {shown(outside)}, which is not a path inside the folder.")
    return weight_map


_Parsed = tuple[CheckpointFile, list[TensorInfo], dict[str, str]]


def _read_files(
    names: list[str], sources: Sequence[ByteSource], max_bytes: int, made: dict[str, TensorSource], notices: list[str]
) -> list[_Parsed]:
    """The tensors of every file; all pickles are opened in one process. Tensors of pickles that are views are added to
    `made`."""
    both = zip(names, sources, strict=True)
    pickles = [source for name, source in both if is_pickle(name) and isinstance(source, LocalFile)]
    pickled = iter(read_pickles(pickles, max_bytes) if pickles else ())
    parsed = []
    for name, source in zip(names, sources, strict=True):
        if not is_pickle(name):
            parsed.append(_read_header(source, name, max_bytes))
            continue
        pickle = next(pickled)
        made.update(pickle.strided)
        notices += pickle.notices
        parsed.append((CheckpointFile(name, source, pickle.digest), list(pickle.tensors), {}))
    return parsed


def _read_header(source: ByteSource, file_name: str, max_header_bytes: int) -> _Parsed:
    where = shown(source.name)
    start = bytearray(min(START_BYTES, source.size))
    source.read_into(0, memoryview(start))
    length = int.from_bytes(start, "little")
    possible = min(source.size - START_BYTES, MAX_HEADER_BYTES)
    if length > possible and (what := lookalike(bytes(start))):
        raise HeaderError(f"{where}: {what}.")
    if len(start) < START_BYTES:
        raise HeaderError(f"{where}: has {source.size} bytes, too few for a safetensors file; fetch it again.")
    if start.startswith(b"PK\x03\x04") and 8 + length > source.size:
        raise HeaderError(f"{where}: is a zip or pickle file, not a safetensors file.")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{where}: its header would have {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed; "
            "this is not a safetensors file."
        )
    if 8 + length > source.size:
        raise HeaderError(
            f"{where}: truncated: its header needs {8 + length:,} bytes, the file has {source.size:,}. Fetch it again."
        )
    if length > max_header_bytes:
        raise CheckpointError(
            f"{where}: its header has {length:,} bytes, more than fits the memory budget. "
            f"Give at least --memory {(100_000_000 + 8 * length) // 1_000_000}MB."
        )
    raw = bytearray(length)
    source.read_into(8, memoryview(raw))
    digest = hashlib.sha256(raw).hexdigest()
    tensors, metadata = parse_header(bytes(raw), file_size=source.size, where=where)
    return CheckpointFile(file_name, source, digest), tensors, metadata


def _collect(
    folder: Folder,
    shards: list[str],
    parsed: list[_Parsed],
    weight_map: dict[str, str],
    notices: list[str],
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Every tensor once, and the number of its file. A tensor that the index does not list is included."""
    tensors: dict[str, TensorInfo] = {}
    file_of: dict[str, int] = {}
    unlisted: list[str] = []
    for number, (shard, (_, infos, _)) in enumerate(zip(shards, parsed, strict=True)):
        for info in infos:
            listed_in = weight_map.get(info.name, shard if not weight_map else None)
            if listed_in is not None and listed_in != shard:
                continue  # a second copy; the index names the one to use
            if info.name in tensors:
                why = "the index names neither" if weight_map else "there is no index to choose"
                raise CheckpointError(
                    f"{folder.name}: tensor '{shown(info.name)}' is in two shards and {why}. Save the model again."
                )
            if listed_in is None:
                unlisted.append(info.name)
            tensors[info.name] = info
            if len(parsed) > 1:
                file_of[info.name] = number
    if lacking := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{folder.name}: the index names {counted(len(lacking), 'tensor')} that the shard lacks: "
            f"{listed(lacking)}. "
            "Index and shards are not of one model; fetch them again."
        )
    if unlisted:
        notices.append(
            f"{folder.name}: {counted(len(unlisted), 'tensor is', 'tensors are')} in the shards but not in the "
            f"index: {listed(unlisted)}. "
            "They are merged too."
        )
    return tensors, file_of


# --------------------------------------------------------------------------- what is not as it lies there


def _with_real_values(checkpoint: Checkpoint, *, strict: bool) -> Checkpoint:
    """The same checkpoint with 8-bit floats that have scales read as real values; the scales are then not listed as
    tensors. If codes and scales do not fit, raises CheckpointError; if not `strict`, returns the checkpoint unchanged.
    """
    sources = {name: checkpoint.source(name) for name in checkpoint.tensors} if _may_be_scaled(checkpoint) else {}
    try:
        scaled = find_scaled(checkpoint.name, checkpoint.config, sources)
    except CheckpointError:
        if strict:
            raise
        return checkpoint
    if scaled is None:
        return checkpoint
    made = {name: source for name, source in sources.items() if not isinstance(source, FileTensor)}
    return checkpoint.with_real_values(scaled, made)


def _may_be_scaled(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(SCALES) for name in checkpoint.tensors)


def check_mergeable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for quantised checkpoints and for dtypes whose values cannot be merged."""
    if reason := why_quantised(checkpoint.config, checkpoint.tensors):
        raise CheckpointError(f"{checkpoint.name}: {reason}")
    if empty := [name for name, info in checkpoint.tensors.items() if info.shape == (0,) and name.endswith("weight")]:
        raise CheckpointError(
            f"{checkpoint.name}: {counted(len(empty), 'weight is', 'weights are')} empty: {listed(empty)}. DeepSpeed "
            "(ZeRO-3) or FSDP saved the model without gathering its pieces. Where the training's folder has "
            "zero_to_fp32.py: python zero_to_fp32.py . OUT, and give OUT. Otherwise save the model again, gathered."
        )
    if unreadable := [t for t in checkpoint.tensors.values() if t.dtype not in NUMPY_DTYPES]:
        first = unreadable[0]
        raise CheckpointError(
            f"{checkpoint.name}: tensor '{shown(first.name)}' has dtype {first.dtype}, which cannot be merged "
            f"({counted(len(unreadable), 'such tensor')}). Supported: {', '.join(NUMPY_DTYPES)}."
        )
