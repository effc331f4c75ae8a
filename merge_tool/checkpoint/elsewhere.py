"""Folders whose weights are elsewhere, or in pieces that another program must put together first: by the names of
files, which folder to give or which command to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import listed

PIPELINE = "model_index.json"  # the index of a diffusers pipeline: several models, each in its own folder
_CONFIG = "adapter_config.json"
_ZERO = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_.*|mp_rank_[0-9]+.*_model_states\.pt")
_STEPS = re.compile(r"(?:checkpoint|step|epoch|global_step)[-_]?([0-9]+)")
_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Where:
    """A folder by its name, or a model of the Hub by its id, whose folders have no ids: what to write in a command.
    `typed` is the folder as the user wrote it."""

    name: str
    of_hub: bool
    typed: str = ""

    @property
    def path(self) -> str:
        return "FOLDER" if self.of_hub else self.typed or self.name

    def inside(self, folder: str) -> str:
        fetch = f"hf download {self.name} --local-dir FOLDER, then " if self.of_hub else ""
        return f"{fetch}{self.path}/{folder}"


def find_elsewhere(
    name: str, listing: Sequence[str], *, has_safetensors: bool, of_hub: bool = False, typed: str = ""
) -> str | None:
    """What a folder is that is no model itself, and the next step; None if nothing is known. `typed` is its path as the
    user wrote it.

    `listing` has the files of the folder and, with a /, of the folders in it. With `has_safetensors`, only what these
    can be is looked at.
    """
    where = Where(name, of_hub, typed)
    top = [file for file in listing if "/" not in file]
    below: dict[str, list[str]] = {}
    for file in listing:
        folder, slash, rest = file.partition("/")
        if slash:
            below.setdefault(folder, []).append(rest)
    if any(file.endswith(("adapters.safetensors", "adapters.npz")) for file in top):
        return (
            "is an adapter of MLX (adapters.safetensors). Give MODEL+ADAPTER, with adapter_config.json in its folder. "
            f"Or make a model of it: mlx_lm.fuse --model MODEL --adapter-path {where.path} --save-path FUSED (with "
            "--dequantize, if MODEL is quantised), and give FUSED."
        )
    if has_safetensors:
        return None
    if any(file.endswith(".distcp") for file in top):
        return _fsdp(where.path)
    if any(map(_ZERO.fullmatch, top)):
        return (
            "holds pieces of a model that DeepSpeed has spread over its processes. In the folder above it: "
            "python zero_to_fp32.py . OUT, and give OUT."
        )
    if any(is_weight_file(file) and not _is_state(file) for file in top):
        return None
    if PIPELINE in top:
        return _pipeline(where, below)
    if "zero_to_fp32.py" in top or any(any(map(_ZERO.fullmatch, files)) for files in below.values()):
        return (
            "holds pieces of a model that DeepSpeed has spread over its processes. Put them together: "
            f"python {where.path}/zero_to_fp32.py {where.path} OUT, and give OUT."
        )
    if pieces := sorted(folder for folder, files in below.items() if any(f.endswith(".distcp") for f in files)):
        models = [folder for folder in pieces if "optim" not in folder]
        return _fsdp(where.inside((models or pieces)[0]))
    return _in_folders(where, below)


def _fsdp(folder: str) -> str:
    return (
        "holds pieces of a model that FSDP has spread over its processes (.distcp). Put them together: "
        f"accelerate merge-weights {folder} OUT, and give OUT."
    )


def _in_folders(where: Where, below: dict[str, list[str]]) -> str | None:
    """Where the folders in a folder are models or adapters."""
    if {*_MODEL} & {*below.get("final", ())}:
        return f"no weights found. Its folder `final` is what mixce-train leaves: give {where.inside('final')}."
    if saved := [folder for folder in below.get("checkpoints", ()) if _STEPS.fullmatch(folder)]:
        last = where.inside(f"checkpoints/{max(saved, key=_step)}")
        return f"no weights found: it is the folder of a training that has no result yet. Its last checkpoint: {last}."
    adapters = [folder for folder, files in below.items() if _CONFIG in files]
    models = [folder for folder, files in below.items() if folder not in adapters and {*_MODEL} & {*files}]
    steps = [folder for folder in (*models, *adapters) if _STEPS.fullmatch(folder)]
    if steps:
        steps.sort(key=_step)
        what = "adapter" if steps[-1] in adapters else "model"
        return (
            f"no weights found: it is the folder of a training, with {what}s in {listed(steps)}. Give one of these, "
            f"for example the last: {_of_base(where.inside(steps[-1]), is_adapter=what == 'adapter')}."
        )
    if adapters and not models:
        paths = [_of_base(where.inside(folder), is_adapter=True) for folder in sorted(adapters)]
        return f"no weights found, but adapters in {listed(sorted(adapters))}. Give one of these: {paths[0]}."
    if models:
        return (
            f"no weights found, but models in {listed(sorted(models))}"
            f"{f' and adapters in {listed(sorted(adapters))}' if adapters else ''}. Give one of these: "
            f"{where.inside(min(models))}."
        )
    return None


def _step(folder: str) -> int:
    match = _STEPS.fullmatch(folder)
    return int(match[1]) if match else -1


def _of_base(path: str, *, is_adapter: bool) -> str:
    return f"MODEL+{path}" if is_adapter and " " not in path else path


def _pipeline(where: Where, below: dict[str, list[str]]) -> str:
    """The message for a diffusers pipeline: which of its folders to give."""
    parts = sorted(folder for folder, files in below.items() if any(map(is_weight_file, files)))
    what = f"is a pipeline of diffusers ({PIPELINE}), of several models. Give the folder of one of them"
    if not parts:
        return f"{what}; none is here yet: finish the download."
    fetch = f"hf download {where.name} --local-dir FOLDER, then " if where.of_hub else ""
    return f"{what}: {fetch}{listed((f'{where.path}/{part}' for part in parts), 20)}."


def _is_state(file: str) -> bool:
    return re.match(r"optimizer|scheduler|scaler|rng_state|random_state|training_args", file) is not None
