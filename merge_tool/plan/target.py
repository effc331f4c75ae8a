"""A merge's output path: a folder or one file, beside its inputs and never over them; or a repository of the Hub.
Checks paths; writes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from merge_tool.checkpoint.addresses import is_store, store_url
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import OutputError, RecipeError, reason, shown
from merge_tool.models.side_files import WORK
from merge_tool.plan.overlap import lies_in

HUB = "hub:"
_REPO = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """A merge's output: a folder, or exactly one .safetensors file. With `repo` a repository of the Hub, or a folder of
    an object store (`s3://bucket/folder`): `path` is then the folder where shards wait for their upload, and
    `most_shard_bytes` the size that an earlier run gave them."""

    path: Path
    repo: str = ""
    most_shard_bytes: int | None = None

    @property
    def name(self) -> str:
        """What the user calls the output."""
        if not self.repo:
            return shown(self.path)
        return shown(self.repo) if is_store(self.repo) else f"{HUB}{self.repo}"

    @property
    def is_file(self) -> bool:
        return not self.repo and self.path.suffix == ".safetensors"

    @property
    def work(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial") if self.is_file else self.path / WORK

    @property
    def single_file(self) -> str | None:
        return self.path.name if self.is_file else None


def is_remote(out: str | Path) -> bool:
    """Whether an output is a repository of the Hub or a folder of an object store, rather than a path."""
    text = out.as_posix() if isinstance(out, Path) else out
    return text.startswith(HUB) or is_store(out_text(text))


def out_text(out: str | Path) -> str:
    """An output as it was typed: a Path makes one / of the two in s3://bucket."""
    text = out.as_posix() if isinstance(out, Path) else out
    return re.sub(r"^(s3|gs|az):/(?=[^/])", r"\1://", text)


def repo_of(out: str | Path) -> str:
    """The repository that `hub:org/name` means. Raises OutputError."""
    text = out.as_posix() if isinstance(out, Path) else out
    if (match := _REPO.fullmatch(text)) is None:
        raise OutputError(f"{shown(text)}: is no repository of the Hub. Write hub:org/name.")
    if text.endswith(".safetensors"):
        raise OutputError(f"{shown(text)}: a repository holds a folder, not one file. Leave out .safetensors.")
    return match[1]


def remote_target(out: str | Path, work: Path | None = None) -> Target:
    """The target for `hub:org/name` or `s3://bucket/folder`. Shards wait in a folder in `work`, or by itself in the
    folder that the Hub's own client keeps for other programs: HF_ASSETS_CACHE, or `assets` in HF_HOME. Raises
    OutputError."""
    text = out_text(out)
    repo = store_url(text) if is_store(text) else repo_of(out)
    if is_store(text) and is_weight_file(repo):
        raise OutputError(f"{shown(repo)}: an output there is a folder, not one file. Leave out {Path(repo).suffix}.")
    if work is None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
        assets = os.environ.get("HF_ASSETS_CACHE") or f"{home}/assets"
        work = Path(os.path.expandvars(assets)).expanduser() / "slerp-merge"
    return Target(work / repo.replace("://", "--").replace("/", "--"), repo)


def check_target(target: Target, inputs: Iterable[Path]) -> None:
    """Raise OutputError if writing to `target` could touch an input, or if it is of the wrong kind."""
    path = target.path
    if not target.is_file and is_weight_file(path.name):
        gguf = " (llama.cpp: convert_hf_to_gguf.py)" if path.suffix.lower() in (".gguf", ".ggml") else ""
        raise OutputError(
            f"{shown(path)}: only safetensors are written: into a folder, or into one file if OUT ends in "
            f".safetensors. Give {shown(path.with_suffix(''))}, then convert that{gguf}."
        )
    try:
        shared = next((source for source in inputs if lies_in(path, source) or lies_in(source, path)), None)
        is_folder, exists, is_link = path.is_dir(), path.exists(), path.is_symlink()
    except (OSError, RuntimeError, ValueError) as e:
        raise OutputError(f"{shown(path)}: cannot be used ({reason(e)}).") from e
    if shared is not None:
        raise shared_with(path, shared)
    if target.is_file and is_folder:
        raise OutputError(f"{shown(path)}: is a folder, but a name ending in .safetensors asks for a file.")
    if not target.is_file and exists and not is_folder:
        raise OutputError(f"{shown(path)}: is a file, expected a folder, or a name ending in .safetensors.")
    existing_folder(path)
    if is_link and not exists:
        raise OutputError(f"{shown(path)}: is a link that leads nowhere. Remove it, or choose another folder.")


def shared_with(out: Path, source: Path) -> OutputError:
    """The error for an output that is an input, or is inside or around an input."""
    return OutputError(
        f"{shown(out)}: the output is, or lies inside or around, the input {shown(source)} (one folder may have two "
        "names: by a link, a mount, or on a disk that ignores case). Choose another folder."
    )


def check_report_path(path: Path, num_outputs: int, target: Target, inputs: Iterable[Path]) -> None:
    """Raise RecipeError or OutputError if the report cannot be written at `path`."""
    where = f"--report {shown(path)}"
    if num_outputs > 1:
        raise RecipeError(f"{where}: one report for one output; with several, each output folder has its own.")
    try:
        is_harmful = any(lies_in(path, other) for other in (*inputs, target.path, target.work))
        is_folder, has_parent = path.is_dir(), path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as e:
        raise OutputError(f"{where}: cannot be used ({reason(e)}).") from e
    if is_folder or not has_parent:
        raise OutputError(f"{where}: {'is a folder' if is_folder else 'its folder is missing'}. Choose a file's path.")
    if is_harmful:
        raise OutputError(f"{where}: lies inside an input or the output. Choose a path beside them.")


def held_bytes(folder: Path) -> int:
    """The bytes of all files in a folder. A worker on another host may just be renaming one."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            return 0

    return sum(map(size, folder.rglob("*")))


def existing_folder(path: Path) -> Path:
    """The path itself, or its nearest parent that exists. Raises OutputError if there is none: a drive that is missing
    (`E:\\`) is its own parent."""
    path = start = path.absolute()
    while not path.exists():
        if path == path.parent:
            raise OutputError(f"{shown(start)}: there is no {shown(path)}. Mount that disk, or choose another OUT.")
        path = path.parent
    return path
