"""PEFT LoRA adapters: a model and an adapter folder -> one Checkpoint, whose tensors are computed as they are read.

`MODEL+ADAPTER` names such a model; an adapter folder alone, as FT, is applied to BASE. An adapter's configuration and
names are checked, before a weight is read; low_rank computes the sums. An adapter whose effect is not W + scale *
B A is refused by name: applied in part, it would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merge_tool.checkpoint.addresses import is_address, is_url
from merge_tool.checkpoint.alike import share_entries
from merge_tool.checkpoint.folder import Folder, distinct_names, is_there, meant_path
from merge_tool.checkpoint.header import MAX_HEADER_BYTES
from merge_tool.checkpoint.hub import hub_id, local_path
from merge_tool.checkpoint.reader import Checkpoint, CheckpointFile, open_local, open_one_file
from merge_tool.checkpoint.source import ByteSource
from merge_tool.checkpoint.weight_files import ADAPTER_WEIGHTS, MLX_WEIGHTS, adapter_files, kind_beside
from merge_tool.errors import CheckpointError, listed, reason, shown
from merge_tool.models.heads import untied_config
from merge_tool.models.lora_config import CONFIG, Settings, adapter_prefix, read_settings
from merge_tool.models.lora_match import Matcher
from merge_tool.models.lora_names import holds_factors

Coming = Mapping[Path, Mapping[str, ByteSource]]  # by folder, the weights that are still to be fetched
NOTHING: Coming = {}

# ---------------------------------------------------------------------------------------------- names


def parts(ref: str | Path) -> tuple[str, ...]:
    """A model and the adapters that follow it: `MODEL+ADAPTER` is two parts. A path that exists is one part, even with
    a + in its name. Texts, because their form says whether they are local: a Path has no `./` and no last `/`."""
    text = str(ref)
    if is_there(text) or is_url(text):
        return (text,)
    for plus in reversed([match.start() for match in re.finditer(r"\+", text)]):
        model, adapter = text[:plus], text[plus + 1 :]
        if _may_exist(adapter) and _may_exist((before := parts(model))[0]) and _may_exist(before[-1]):
            return (*before, adapter)
    return (text,)


def _may_exist(ref: str | Path) -> bool:
    return str(ref) != "" and (is_there(ref) or is_address(ref) or hub_id(ref) is not None)


def known_parts(ref: str | Path) -> tuple[str, ...]:
    """As `parts`. Raises CheckpointError for a name with a + that is neither one existing path nor several."""
    paths = parts(ref)
    if len(paths) == 1 and "+" in str(ref) and not _may_exist(ref):
        raise CheckpointError(
            f"{shown(ref)}: no such file or folder, and no MODEL+ADAPTER whose parts exist.{meant_path(lacking(ref))}"
        )
    return paths


def lacking(ref: str | Path) -> str:
    """The first part of a MODEL+ADAPTER that is not there; the whole text if all are."""
    return next((part for part in str(ref).split("+") if part and not _may_exist(part)), str(ref))


def local_parts(ref: str | Path) -> tuple[Path, ...]:
    """As `parts`; fetches models and adapters of the Hub. Raises FetchError."""
    return tuple(local_path(part) for part in known_parts(ref))


def is_adapter(path: Path, coming: Coming = NOTHING) -> bool:
    """Whether a folder holds an adapter and no model."""
    names = ("model.safetensors", "model.safetensors.index.json")
    have = coming.get(path, {})
    has_config = is_there(path / CONFIG) and (path / CONFIG).is_file()
    return has_config and not any(name in have or is_there(path / name) for name in names)


# ---------------------------------------------------------------------------------------------- opening


def open_model(
    ref: str | Path,
    *,
    coming: Coming = NOTHING,
    max_header_bytes: int = MAX_HEADER_BYTES,
    mergeable: bool = True,
    as_stored: bool = False,
    names: Mapping[Path, str] | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """As open_checkpoint, for `MODEL+ADAPTER`, too. `coming` has by name the weights that are still to be fetched;
    `names` how models and adapters are called in messages, where that is not by their folder's name."""
    model, *adapters = local_parts(ref)
    if adapters and is_adapter(model, coming):
        raise CheckpointError(f"{shown(model.name)}: is an adapter, expected a model before the +: MODEL+ADAPTER.")
    as_stored = as_stored and not adapters
    have, names = coming.get(model, {}), names or distinct_names((model, *adapters))
    if mergeable and is_adapter(model, coming):
        _refuse_trained_beside(Folder(model))
    checkpoint = open_local(
        model,
        have,
        name=names.get(model, ""),
        max_header_bytes=max_header_bytes,
        mergeable=mergeable,
        as_stored=as_stored,
        variant=variant,
    )
    if mergeable and checkpoint.folder is not None and not is_adapter(model, coming):
        checkpoint = checkpoint.with_notices((*checkpoint.notices, *_unused(checkpoint.folder, checkpoint)))
    for adapter in adapters:
        checkpoint = apply_adapter(checkpoint, adapter, name=names.get(adapter, ""), max_header_bytes=max_header_bytes)
    return checkpoint


def _refuse_trained_beside(folder: Folder) -> None:
    """An adapter that is merged factor by factor, without a model: nothing may belong to it but its factors."""
    if beside := adapter_files(folder.name, folder.listing(), of_hub=folder.is_of_hub)[1:]:
        raise CheckpointError(
            f"{folder.name}: has {listed(beside)} beside the adapter, whole tensors that take the place of a model's. "
            "Give MODEL+ADAPTER."
        )


def _unused(folder: Folder, model: Checkpoint) -> Iterator[str]:
    """Warnings about trained weights beside a model that are no part of it."""
    listing = [name for name in folder.listing() if name not in model.weight_files]
    for file in listing:
        if what := kind_beside(file):
            yield f"{folder.name}: {shown(file)} is not merged: its name is that of {what}."
    if adapters := [name for name in ADAPTER_WEIGHTS if name in listing]:
        yield (
            f"{folder.name}: has both a model and an adapter; {adapters[0]} is not applied. If the model needs it, "
            "give MODEL+ADAPTER, each in a folder of its own."
        )


def open_models(
    refs: Sequence[str | Path],
    *,
    coming: Coming = NOTHING,
    max_header_bytes: int = MAX_HEADER_BYTES,
    mergeable: bool = True,
    variant: str | None = None,
) -> list[Checkpoint]:
    """BASE and the others; an adapter folder alone is applied to BASE. If all are adapter folders, they are opened as
    adapters."""
    paths = [local_parts(ref) for ref in refs]
    names = distinct_names(path for several in paths for path in several)
    alone = [len(path) == 1 and is_adapter(path[0], coming) for path in paths]
    of_peft = [len(path) == 1 and path[0].is_file() and path[0].name in ADAPTER_WEIGHTS for path in paths]
    if any(of_peft) and not all(of_peft):  # two files of adapters are merged like any two files
        raise _is_adapters_file(paths[of_peft.index(True)][0])
    if alone[0] and not all(alone):
        other = shown(names[paths[alone.index(False)][0]])
        raise CheckpointError(
            f"{shown(names[paths[0][0]])}: BASE is an adapter, but {other} is a model. Give MODEL+ADAPTER for BASE."
        )
    models: list[Checkpoint] = []
    for ref, path, is_alone in zip(refs, paths, alone, strict=True):
        if is_alone and not alone[0]:
            models.append(apply_adapter(models[0], path[0], name=names[path[0]], max_header_bytes=max_header_bytes))
        else:
            model = open_model(
                ref,
                coming=coming,
                max_header_bytes=max_header_bytes,
                mergeable=mergeable,
                names=names,
                variant=variant,
            )
            models.append(model)
            share_entries(models)
    files = [not one and _is_lora_file(path, model) for one, path, model in zip(alone, paths, models, strict=True)]
    if files[0] and not all(files):
        raise CheckpointError(
            f"{shown(models[0].name)}: BASE is a LoRA file, but {shown(models[files.index(False)].name)} is a model. "
            "Give MODEL+FILE for BASE."
        )
    if any(files) and not files[0]:
        from merge_tool.models.lora_files import apply_file  # for these alone

        models = [
            apply_file(models[0], model) if is_one else model for model, is_one in zip(models, files, strict=True)
        ]
    if alone[0] or files[0]:
        notice = (
            f"{' and '.join(model.name for model in models)} are adapters: their factors are merged one by one, which "
        )
        notice += "is not the merge of the models. To merge the models, give MODEL+ADAPTER for each."
        models[0] = models[0].with_notices((*models[0].notices, notice))
    _drop_repeated(models)
    return models


def _is_lora_file(path: Sequence[Path], model: Checkpoint) -> bool:
    if len(path) > 1 or not holds_factors(model.tensors):
        return False
    from merge_tool.models.lora_files import is_lora_file  # for these alone

    return is_lora_file(model)


def _is_adapters_file(file: Path) -> CheckpointError:
    return CheckpointError(f"{shown(file)}: is the file of an adapter. Give its folder: {shown(file.parent)}.")


def _drop_repeated(models: list[Checkpoint]) -> None:
    """Drop warnings that an earlier model has already given: two inputs may share a base or an adapter."""
    seen: set[str] = set()
    for k, model in enumerate(models):
        if not seen.isdisjoint(model.notices):
            models[k] = model.with_notices(tuple(notice for notice in model.notices if notice not in seen))
        seen.update(model.notices)


def apply_adapter(
    base: Checkpoint, path: Path, *, name: str = "", max_header_bytes: int = MAX_HEADER_BYTES
) -> Checkpoint:
    """`base` with the adapter of the folder at `path`, or with a LoRA file of an image model.

    Raises CheckpointError for a folder that is no LoRA adapter or cannot be merged, MismatchError with every tensor of
    the adapter that does not fit `base`.
    """
    if path.name in ADAPTER_WEIGHTS and path.is_file():
        raise _is_adapters_file(path)
    if not is_there(path / CONFIG):
        from merge_tool.models import lora_files  # for these alone

        if (file := lora_files.find_lora_file(path)) is not None:
            return lora_files.apply_file(base, lora_files.open_lora_file(file, name, max_header_bytes))
    try:
        folder = Folder(path, name)
        if folder.has(MLX_WEIGHTS) and folder.has(CONFIG) and not any(map(folder.has, ADAPTER_WEIGHTS)):
            from merge_tool.models.lora_mlx import apply_mlx  # for these alone

            return apply_mlx(base, folder, max_header_bytes)
        settings = read_settings(folder)
        weights = [open_one_file(folder, name, max_header_bytes=max_header_bytes) for name in settings.weights]
    except OSError as e:
        raise CheckpointError(f"{shown(path)}: cannot be read ({reason(e)}).") from e
    if empty := [file.name for file in weights if not file.tensors]:
        raise CheckpointError(f"{empty[0]}: holds no tensors.")
    matched = Matcher(base, folder.name, settings, weights)
    matched.match()
    prefix = adapter_prefix(base)
    files = (
        *(replace(file, file_name=f"{prefix}/{file.file_name}") for opened in weights for file in opened.files),
        CheckpointFile(f"{prefix}/{CONFIG}", settings.file, settings.sha256),
    )
    notices = (
        *base.notices,
        *(notice for opened in weights for notice in opened.notices),
        *_notices(base, folder, settings),
        *matched.notices,
    )
    brought = folder if folder.has("tokenizer.json") else None
    config = untied_config(base.config) if matched.ends.head is not None and base.config is not None else None
    return base.with_made(f"{base.name}+{folder.name}", files, matched.made, notices, brought, config)


def _notices(base: Checkpoint, folder: Folder, settings: Settings) -> Iterator[str]:
    trained_on = settings.base_name
    if trained_on and trained_on.rstrip("/").rpartition("/")[2].lower() != base.name.rpartition("/")[2].lower():
        yield f"{folder.name} was trained on {shown(trained_on)}, says its {CONFIG}; it is applied to {base.name}."
    if settings.unknown:
        yield f"{folder.name}/{CONFIG}: settings that are not known here are ignored: {listed(settings.unknown)}."
