"""One model's names in two checkpoints: prefixes of wrappers, names that libraries changed, heads and embeddings that
are tied. Only what is unambiguous is resolved; names, shapes and config.json are all there is to see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import shown

# What model classes and training wrappers put before a tensor's own name, one or several of them.
_WRAPPERS = frozenset({
    "model", "transformer", "language_model", "text_model", "base_model", "module", "backbone", "gpt_neox", "bert",
    "roberta", "distilbert", "deberta", "electra", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
})  # fmt: skip
_MOST_WRAPPERS = 8
# Buffers that follow from the configuration: some versions of a library store them, others do not.
_DERIVED = re.compile(
    r"(?:^|\.)(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|embeddings\.token_type_ids"
    r"|[0-9]+\.(?:attn|attention|attn\.attention)\.(?:bias|masked_bias))$"
)
_HEADS = frozenset({
    "lm_head.weight", "embed_out.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight",
    "vocab_projector.weight", "generator_lm_head.weight",
})  # fmt: skip
# What checkpoints of one library call otherwise: those made from TensorFlow's, and torch's older weight norm.
_ALIASES = {
    "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias",
    "weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1",
}  # fmt: skip
_ALIAS = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(map(re.escape, _ALIASES))})$")
_COPIES = {  # what some checkpoints hold beside the tensor that it is one with
    "encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.decoder.bias": "lm_head.bias", "cls.predictions.decoder.bias": "cls.predictions.bias",
}  # fmt: skip
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight")


@dataclass(slots=True)
class Renaming:
    """`ft_names`: what some of BASE's tensors are called in FT. `copies`: FT's heads and other copies that BASE has no
    place for, tied as it is, and the tensor that BASE uses."""

    ft_names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def explained(self) -> set[str]:
        """FT's names that are accounted for."""
        return {*self.ft_names.values(), *self.copies}


def find_renaming(base: Checkpoint, ft: Checkpoint) -> Renaming:
    """Pair up what has no namesake, as far as there is one way to do it."""
    found = Renaming()
    lacking, extra = base.tensors.keys() - ft.tensors.keys(), ft.tensors.keys() - base.tensors.keys()
    if not lacking and not extra:
        return found
    if lacking and extra:
        found.ft_names |= _without_wrappers(base, ft, lacking, extra)
    for head in sorted(lacking - found.ft_names.keys()):
        if is_head(head) and (embedding := tied_embedding(ft, base.tensors[head].shape)):
            found.ft_names[head] = embedding
    for head in sorted(extra - set(found.ft_names.values())):
        if is_head(head) and (embedding := tied_embedding(base, ft.tensors[head].shape)):
            found.copies[head] = embedding
    found.ft_names |= _copies(base, ft, lacking - found.ft_names.keys())
    found.copies |= _copies(ft, base, extra - found.explained)
    return found


def _copies(here: Checkpoint, there: Checkpoint, lacking: Iterable[str]) -> dict[str, str]:
    """For what only `here` has: the tensor there that it is one with, if that is here, too, and of its shape."""
    own, other = Names(here.tensors), Names(there.tensors)
    found = {}
    for name in sorted(lacking):
        one_with = _COPIES.get(_core(name), "")
        place, twin = other.find(one_with), own.find(one_with)
        if place and twin and here.tensors[name].shape == here.tensors[twin].shape:
            found[name] = place
    return found


def _core(name: str) -> str:
    """A tensor's own name, without wrappers, as libraries have it now.

    >>> _core("base_model.model.model.layers.0.mlp.up_proj.weight"), _core("model")
    ('layers.0.mlp.up_proj.weight', 'model')
    """
    for _ in range(_MOST_WRAPPERS):
        first, dot, rest = name.partition(".")
        if not dot or first not in _WRAPPERS:
            break
        name = rest
    return _ALIAS.sub(lambda found: _ALIASES[found[0]], name)


class Names:
    """A checkpoint's names, to look one up whatever wrappers it has."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        unique = _unique_cores(self.names)
        self._by_core = {core: name for name in self.names if (core := _core(name)) in unique}

    def find(self, name: str) -> str | None:
        """The name itself, or the only one that differs in its wrappers at most."""
        return name if name in self.names else self._by_core.get(_core(name))


def _without_wrappers(
    base: Checkpoint, ft: Checkpoint, lacking: Collection[str], extra: Collection[str]
) -> dict[str, str]:
    """BASE's name -> FT's, where both are all that have this core on their side."""
    unique_base, unique_ft = (_unique_cores(model.tensors) for model in (base, ft))
    theirs = {core: name for name in extra if (core := _core(name)) in unique_ft}
    found = {name: theirs.get(core) for name in lacking if (core := _core(name)) in unique_base}
    return {name: other for name, other in sorted(found.items()) if other is not None}


def _unique_cores(names: Iterable[str]) -> set[str]:
    return {core for core, count in Counter(map(_core, names)).items() if count == 1}


def is_derived(name: str) -> bool:
    """Whether a tensor is a buffer that a model makes itself when it is loaded: frequencies, positions, masks.

    >>> [is_derived(f"h.0.attn.{name}") for name in ("rotary_emb.inv_freq", "bias", "c_attn.bias")]
    [True, True, False]
    """
    return _DERIVED.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of an output head's weight."""
    return _core(name) in _HEADS


def tied_embedding(model: Checkpoint, shape: tuple[int, ...]) -> str | None:
    """The input embedding that is this model's output head, too; None if its config denies that or several might be."""
    if says_tied(model.config or {}) is False or any(map(is_head, model.tensors)):
        return None
    found = [n for n, info in model.tensors.items() if _EMBEDDING.search(n) and len(info.shape) == 2]
    if len(found) > 1:
        found = [name for name in found if model.tensors[name].shape == shape]
    if len(found) > 1:  # what the others are copies of
        found = [name for name in found if _core(name) not in _COPIES]
    return found[0] if len(found) == 1 else None


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """What config.json says of tie_word_embeddings, in all its parts about text; None if nothing, or both."""
    said = {tied for part in text_configs(config) if isinstance(tied := part.get("tie_word_embeddings"), bool)}
    return said.pop() if len(said) == 1 else None


def renaming_warnings(base: Checkpoint, ft: Checkpoint, found: Renaming, unchosen: Collection[str]) -> Iterator[str]:
    """What was resolved, said aloud."""
    prefixes: dict[tuple[str, str], list[str]] = {}
    otherwise: list[str] = []
    for name, other in found.ft_names.items():
        core = _core(name)
        if name in unchosen:
            continue
        if core != _core(other):
            yield f"{shown(name)} is not in {ft.name}, {_in_place(name, other)} of its own, as {base.name}."
        elif not (name.endswith(core) and other.endswith(core)):
            otherwise.append(name)
        else:
            prefixes.setdefault((other.removesuffix(core), name.removesuffix(core)), []).append(name)
    for (theirs, ours), names in prefixes.items():
        yield (
            f"{len(names):,} tensors have the prefix '{shown(theirs)}' in {ft.name}, '{shown(ours)}' in {base.name}: "
            f"{shown(found.ft_names[names[0]])} is merged with {shown(names[0])}, and so on."
        )
    if otherwise:
        yield (
            f"{len(otherwise):,} tensors have older or newer names in {ft.name}: {shown(found.ft_names[otherwise[0]])} "
            f"is merged with {shown(otherwise[0])}, and so on."
        )
    for copy, tensor in found.copies.items():
        if copy in unchosen:
            continue
        what, why = f"has {shown(tensor)} in its place", "one with it in such models"
        if is_head(copy):
            what = f"ties its head to {shown(tensor)}"
            why = "a copy, says its config" if says_tied(ft.config or {}) else "what it learned apart is lost"
        yield f"{base.name} {what}, and so does the output: {shown(copy)} of {ft.name} is left out ({why})."


def _in_place(name: str, other: str) -> str:
    if is_head(name):
        return f"whose head is tied: merged with its input embedding {shown(other)}. The output has a head"
    return f"which has {shown(other)} in its place: merged with that. The output has a tensor"
