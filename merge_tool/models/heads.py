"""Models whose output head is their input embedding: which tensor that is, and the same model with a head of its own.

An untied model is read as if its embedding stood in its files under the head's name, too. So whoever merges models
needs to know of nothing but two tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.checkpoint.sub_configs import is_of_text, is_sub_config
from merge_tool.errors import MismatchError, RecipeError, shown
from merge_tool.models.naming import COPIES, head_of, is_embedding, is_head, is_in_layer, own_name, predicts_tokens
from merge_tool.models.renaming import says_tied, tied_embedding

# Models that scale what goes into a tied head: an untied head would have to be another matrix.
_SCALING = frozenset({"t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop", "t5gemma"})


@dataclass(frozen=True, slots=True)
class Tie:
    """A tied head: the embedding that it is; `copy` is the head's name where the checkpoint has a copy of it."""

    embedding: str
    copy: str | None


def find_tie(model: Checkpoint) -> Tie | None:
    """The tied head of a model; None if it has none, or if that is not clear."""
    names = [name for name in model.tensors if is_embedding(name) and len(model.tensors[name].shape) == 2]
    heads = [name for name in model.tensors if is_head(name)]
    if not heads:
        embeddings = {tied_embedding(model, model.tensors[name].shape) for name in names} - {None}
        return Tie(embeddings.pop(), None) if len(embeddings) == 1 else None  # type: ignore[arg-type]  # None is left out
    names = [n for n in names if model.tensors[n].shape == model.tensors[heads[0]].shape and own_name(n) not in COPIES]
    if says_tied(model.config or {}) and len(heads) == len(names) == 1:
        return Tie(names[0], heads[0])
    return None


def lone_head(model: Checkpoint) -> str | None:
    """The head under whose name a tied model has the matrix that is its embedding, too; None for other models."""
    heads = [name for name in model.tensors if is_head(name)]
    if len(heads) != 1 or says_tied(model.config or {}) is False:
        return None
    shape = model.tensors[heads[0]].shape
    alike = [name for name, info in model.tensors.items() if info.shape == shape and not is_in_layer(name)]
    return heads[0] if alike == heads else None


def architecture(model: Checkpoint) -> str:
    """The class that config.json names first; nothing if it names none."""
    named = (model.config or {}).get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def why_tied(model: Checkpoint, embedding: str) -> str:
    """Why a head cannot be a tensor of its own here; nothing if it can."""
    if (model.config or {}).get("model_type") in _SCALING:
        return "scales what goes into its tied head"
    if own_name(embedding) in COPIES.values():
        return "has an encoder and a decoder that share it as well"
    return ""


def check_untied(model: Checkpoint, embedding: str, head: str | None = "") -> None:
    """Raise MismatchError where a tied head cannot be a tensor of its own, or where its name is not known (None)."""
    why = why_tied(model, embedding) or ("calls its head by an unknown name" if head is None else "")
    if why:
        raise MismatchError(
            f"{model.name}: its head is tied to {shown(embedding)} and needs to be a tensor of its own here, but "
            f"{architecture(model) or 'the model'} {why}. Untie it with transformers first, and give that folder."
        )


def named_head(model: Checkpoint, embedding: str) -> str | None:
    """What a tied model's head is called where it is a tensor of its own; None if the model has no head at all.

    Raises MismatchError as `check_untied`.
    """
    what = architecture(model)
    if not predicts_tokens(what):
        return None
    head = head_of(embedding, what)
    check_untied(model, embedding, head)
    return head


def renamed(source: TensorSource, name: str) -> TensorSource:
    """The same elements under another name."""
    changed: TensorSource = replace(source, info=replace(source.info, name=name))  # type: ignore[type-var]
    return changed


def own_bias(model: Checkpoint, head: str) -> dict[str, TensorSource]:
    """The bias that a head needs where it is a tensor of its own, and that is a copy of another one where it is tied
    (BERT's decoder): nothing for other heads."""
    module, _, last = head.removesuffix(".weight").rpartition(".")
    bias, copy = f"{module}.bias", f"{module}.decoder.bias"
    if last != "decoder" or bias not in model.tensors or copy in model.tensors:
        return {}
    return {copy: renamed(model.source(bias), copy)}


def untied_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json of a model whose head is a tensor of its own."""
    return {**_with_ties(config or {}, ()), "tie_word_embeddings": False}


def _with_ties(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    changed = dict(config)
    for key, value in config.items():
        if is_sub_config(key, value):
            changed[key] = _with_ties(value, (*keys, key))
        elif key == "tie_word_embeddings" and is_of_text(keys):
            changed[key] = False
    return changed


def with_own_head(model: Checkpoint, tie: Tie, head: str, notices: Sequence[str] = ()) -> Checkpoint:
    """A tied model with its embedding as the head, too."""
    made = ({} if tie.copy else {head: renamed(model.source(tie.embedding), head)}) | own_bias(model, head)
    all_notices = (*model.notices, *notices)
    return model.with_made(model.name, (), made, all_notices, config=untied_config(model.config))


def untie(models: Sequence[Checkpoint], first: int, merged: frozenset[int], *, is_requested: bool) -> list[Checkpoint]:
    """The models, the first with a head of its own if that is requested, or if one of those to be merged has one.

    Raises RecipeError where it is requested of a model that ties no head; MismatchError as `named_head`.
    """
    untied, tie = list(models), find_tie(models[first])
    if tie is None:
        if is_requested and not any(map(is_head, models[first].tensors)):
            raise RecipeError(
                f"--untie: {models[first].name} has no input embedding that is its head, too, as far as names and "
                "config.json tell. Leave --untie out."
            )
        return untied
    base, others = models[first], [models[k] for k in sorted(merged - {first})]
    own = {name: model for model in others for name in own_heads(model) if _fits(model, name, base, tie)}
    if not own and not is_requested:
        return untied
    head = tie.copy
    if head is None and own:
        check_untied(base, tie.embedding)
        head = head_of(tie.embedding, architecture(base)) or next(iter(own))
    elif head is None:
        head = named_head(base, tie.embedding)
    if head is None:
        raise RecipeError(f"--untie: {architecture(base)} has no output head. Leave --untie out.")
    notices = () if tie.copy or not own or is_requested else (
        f"{base.name} ties its head to {shown(tie.embedding)}, {next(iter(own.values())).name} has a head of its own: "
        f"the output has one, too, merged from these two ({shown(head)}).",
    )  # fmt: skip
    untied[first] = with_own_head(base, tie, head, notices)
    return untied


def own_heads(model: Checkpoint) -> list[str]:
    """The heads of a model that says that they are not its embedding."""
    if says_tied(model.config or {}) is not False:
        return []
    return [name for name in model.tensors if is_head(name)]


def _fits(model: Checkpoint, head: str, base: Checkpoint, tie: Tie) -> bool:
    return model.tensors[head].shape[1:] == base.tensors[tie.embedding].shape[1:]
