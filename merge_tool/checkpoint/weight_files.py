"""Which files of a folder are its weights, by their names: a model's, or an adapter's. Or why there are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from merge_tool.checkpoint.elsewhere import find_elsewhere
from merge_tool.checkpoint.folder import is_pickle, is_weight_file
from merge_tool.errors import CheckpointError, listed, shown
from merge_tool.files import leads_out

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # what peft writes, and wrote; the first wins
MLX_WEIGHTS = "adapters.safetensors"
TRAINED_BESIDE = (  # whole tensors that LLaVA trains beside an adapter
    "non_lora_trainables.bin", "non_lora_trainables.safetensors", "mm_projector.bin", "mm_projector.safetensors",
)  # fmt: skip
_STATE_FILES = re.compile(  # of a training
    r"(optimizer|scheduler|scaler|rng_state|random_states?_|training_args|sampler|dl_state_dict)[^/]*", re.IGNORECASE
)
_KINDS_BESIDE = (  # what lies beside an adapter or a model and is neither
    (re.compile(r"(value|v|reward|score)_head.*"), "a value head, which the language model does not use"),
    (re.compile(r"new_embeddings.*"), "embeddings of tokens that were added to the vocabulary"),
    (re.compile(r"non_lora_trainables.*|mm_projector.*"), "tensors that were trained beside an adapter"),
)
_WHOLE_MODEL = re.compile(r"(pytorch_model|model|consolidated|tf_model|flax_model)\b.*")
_INDEX = re.compile(r"\.index(?:\.[A-Za-z0-9_]+)?\.json$")
_VARIANT = re.compile(
    r"(.+?)\.(?:([A-Za-z][A-Za-z0-9_]*)(?:-[0-9]+-of-[0-9]+)?\.(?:safetensors|bin)"
    r"|(?:safetensors|bin)\.index\.([A-Za-z0-9_]+)\.json)"
)
_SHARD = re.compile(r"(.+)-0*([0-9]+)-of-0*([0-9]+)(\.[a-z]+)")  # model-00001-of-00003.safetensors


def find_weights(
    name: str, listing: Sequence[str], *, of_hub: bool = False, variant: str | None = None, typed: str = ""
) -> tuple[list[str], str | None]:
    """The files of weights, or the index that names them: safetensors before pickles, as transformers does; of either,
    model.safetensors (pytorch_model.bin) first, then its index, else the only one of its kind, else all shards
    (model-00001-of-00003.safetensors and so on), if they are complete.

    With a `variant` (fp16), the files that have it in their names, if there are any. `name` is the folder's name, for
    messages, `typed` its path as the user wrote it. Files in sub-folders of the listing serve to say where weights are.
    Raises CheckpointError when there is neither.
    """
    everything, listing = listing, [file for file in listing if "/" not in file]
    if variant is not None and variant in map(_variant_of, listing):
        listing = [file for file in listing if _variant_of(file) == variant]
    safetensors = [file for file in listing if file.endswith(".safetensors") or ".safetensors.index." in file]
    has_model = bool({"model.safetensors", "model.safetensors.index.json"} & {*safetensors})
    if not has_model:
        has_some = bool(safetensors)
        if what := find_elsewhere(name, everything, has_safetensors=has_some, of_hub=of_hub, typed=typed):
            raise CheckpointError(f"{name}: {what}")
    if safetensors:
        return _choose(name, safetensors, "model.safetensors", ".safetensors")
    states = [file for file in listing if is_pickle(file) and not _STATE_FILES.match(file)]
    states += [file for file in listing if ".bin.index." in file]
    if states:
        return _choose(name, states, "pytorch_model.bin", ".bin")
    if others := [file for file in listing if is_weight_file(file)]:
        raise CheckpointError(f"{name}: {unread_format(others)}")
    numbers = [int(match[1]) for file in listing if (match := re.fullmatch(r"checkpoint-([0-9]{1,12})", file))]
    inside = f" Its folder checkpoint-{max(numbers)} is a training's last: give that." if numbers else ""
    raise CheckpointError(
        f"{name}: no weights found, expected model.safetensors or model.safetensors.index.json.{inside}"
    )


def adapter_files(name: str, listing: Sequence[str], *, of_hub: bool = False) -> list[str]:
    """The files of weights that an adapter's folder consists of, the adapter's own first.

    Raises CheckpointError for other weights beside the adapter: without them it may be another model.
    """
    own = [file for file in ADAPTER_WEIGHTS if file in listing]
    if not own and (what := find_elsewhere(name, listing, has_safetensors=False, of_hub=of_hub)):
        raise CheckpointError(f"{name}: {what}")
    beside = [file for file in TRAINED_BESIDE if file in listing]
    known = {*ADAPTER_WEIGHTS, *beside[:1]}
    others = [file for file in sorted(listing) if "/" not in file and is_weight_file(file) and file not in known]
    if others := [file for file in others if not _STATE_FILES.match(file)]:
        what = kind_beside(others[0])
        is_model = what is None and _WHOLE_MODEL.match(others[0]) is not None
        what = what or ("perhaps a whole model" if is_model else "weights that are not the adapter's own")
        way = f"hf download {name} --local-dir FOLDER, and move it out of FOLDER" if of_hub else "move it elsewhere"
        raise CheckpointError(
            f"{name}: has {listed(others)} beside the adapter: {what}. It is not read, and without it the adapter may "
            "be another model. "
            + ("If it is the adapter's base, give MODEL+ADAPTER, each in a folder of its own. " if is_model else "")
            + f"To go on without it, {way}."
        )
    return own[:1] + beside[:1] if own else []


def kind_beside(file: str) -> str | None:
    """What a file of weights is that no model consists of, by its name; None for other files."""
    if not is_weight_file(file):
        return None
    return next((what for pattern, what in _KINDS_BESIDE if pattern.fullmatch(file)), None)


def _choose(name: str, files: list[str], usual: str, suffix: str) -> tuple[list[str], str | None]:
    indexes = [file for file in files if _INDEX.search(file)]
    singles = [file for file in files if file not in indexes]
    if usual in singles:
        return [usual], None
    if f"{usual}.index.json" in indexes:
        return [], f"{usual}.index.json"
    if len(indexes) == 1:
        return [], indexes[0]
    if not indexes and (plain := _without_variant(singles, suffix)):
        return [plain], None
    if not indexes and (shards := _all_shards(name, singles)):
        return shards, None
    if len(singles) == 1 and not indexes:
        return singles, None
    kind = f"{suffix} files" if suffix == ".safetensors" else "pickled files of weights"
    variants = sorted({variant for file in files if (variant := _variant_of(file))})
    way = (
        f"Choose one: --variant {variants[0]}" if variants else "Name one file instead of the folder, or add its index"
    )
    raise CheckpointError(
        f"{name}: has {len(singles)} {kind} but neither {usual} nor one index ({listed(indexes or singles)}). {way}."
    )


def _variant_of(file: str) -> str | None:
    """The variant in a file's name: fp16 in x.fp16.safetensors, x.fp16-00001-of-00002.safetensors and
    x.safetensors.index.fp16.json; None for other files."""
    match = _VARIANT.fullmatch(file)
    return match and (match[2] or match[3])


def variants_beside(chosen: str, listing: Sequence[str]) -> list[str]:
    """The variants of a file of weights, or of an index, that lie beside it in the same format."""
    stem, end = re.fullmatch(r"(.*?)(\.safetensors|\.bin|)(?:\.index\.json)?", chosen).groups()  # type: ignore[union-attr]
    found = (_VARIANT.fullmatch(file) for file in listing if file.endswith(end))
    return sorted({match[2] for match in found if match and match[2] and match[1] == stem})


def _without_variant(files: Sequence[str], suffix: str) -> str | None:
    """The file whose name all the others have with a variant in it (x.safetensors beside x.fp16.safetensors): the one
    that diffusers loads unless it is asked for a variant."""
    plain = min(files, key=len, default="")
    variant = re.compile(re.escape(plain.removesuffix(suffix)) + r"\.[A-Za-z0-9_-]+" + re.escape(suffix))
    return plain if len(files) > 1 and all(file == plain or variant.fullmatch(file) for file in files) else None


def _all_shards(name: str, files: Sequence[str]) -> list[str]:
    """The shards of one model, if the files are nothing else. Raises CheckpointError where some are missing."""
    files = [file for file in files if kind_beside(file) is None]
    matches = [_SHARD.fullmatch(file) for file in files]
    models = {(match[1], int(match[3]), match[4]) for match in matches if match}
    if None in matches or len(models) != 1:
        return []
    ((_, count, _),) = models
    numbers = [int(match[2]) for match in matches if match]
    if lacking := sorted({*range(1, count + 1)} - {*numbers}):
        raise CheckpointError(
            f"{name}: has {listed(files)}, but {'shards' if len(lacking) > 1 else 'shard'} {listed(lacking)} of "
            f"{count:,} are missing, and so is an index. Finish the download, or save the model again."
        )
    return sorted(files) if len(numbers) == count else []


def unread_format(names: Sequence[str]) -> str:
    """The message for a folder whose weights are only in formats that are not read: the reason and the next step."""
    if any(name.lower().endswith((".gguf", ".ggml")) for name in names):
        return (
            f"GGUF weights ({listed(names)}) are not read: they are packed for inference, most of them in blocks of "
            "few bits. Merge the original safetensors and convert the result (llama.cpp: convert_hf_to_gguf.py)."
        )
    if all(_STATE_FILES.match(name) for name in names):
        return f"no weights found, only a training's state ({listed(names)}). Give the folder that holds the model."
    return (
        f"only weights in formats that are not read ({listed(names)}). Convert them first: load with transformers, "
        "then save_pretrained(FOLDER) writes safetensors."
    )


def weight_map_files(index: Any) -> list[str]:
    """The weights files that an index names, sorted; ValueError when it names none."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise ValueError("it has no weight_map from tensor names to file names")
    if outside := next((name for name in weight_map.values() if leads_out(name)), None):
        raise ValueError(f"it names {shown(outside)}, which is not a path inside the folder")
    return sorted(set(weight_map.values()))
