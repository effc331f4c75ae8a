"""One model's names in two checkpoints: prefixes of wrappers, names that libraries changed, tied heads and embeddings.
Names are paired only if that is unambiguous, from names, shapes and config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import text_configs
from merge_tool.errors import counted, shown
from merge_tool.models.naming import COPIES, is_embedding, is_head, own_name


@dataclass(slots=True)
class Renaming:
    """`ft_names`: FT's names for some of BASE's tensors. `copies`: FT's heads and other copies that BASE ties and does
    not store, and the tensor that BASE uses instead."""

    ft_names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def explained(self) -> set[str]:
        """FT's names that are accounted for."""
        return {*self.ft_names.values(), *self.copies}


def find_renaming(base: Checkpoint, ft: Checkpoint) -> Renaming:
    """Pair the tensors whose names differ, if there is only one way to pair them."""
    renaming = Renaming()
    lacking, extra = base.tensors.keys() - ft.tensors.keys(), ft.tensors.keys() - base.tensors.keys()
    if not lacking and not extra:
        return renaming
    if lacking and extra:
        renaming.ft_names |= _without_wrappers(base, ft, lacking, extra)
    for head in sorted(lacking - renaming.ft_names.keys()):
        if is_head(head) and (embedding := tied_embedding(ft, base.tensors[head].shape)):
            renaming.ft_names[head] = embedding
    for head in sorted(extra - set(renaming.ft_names.values())):
        if is_head(head) and (embedding := tied_embedding(base, ft.tensors[head].shape)):
            renaming.copies[head] = embedding
    for name in sorted(lacking - renaming.ft_names.keys()):
        if copies := _lone_copies(base, ft, name):
            renaming.ft_names[name] = copies[0]
            renaming.copies |= {copy: name for copy in copies[1:] if copy in extra}
            renaming.copies.pop(copies[0], None)
    renaming.ft_names |= _copies(base, ft, lacking - renaming.ft_names.keys())
    renaming.copies |= _copies(ft, base, extra - renaming.explained)
    return renaming


def _lone_copies(base: Checkpoint, ft: Checkpoint, name: str) -> list[str]:
    """What FT calls a tensor that it holds under the names of its copies only; the best first. Of a tied model,
    safetensors.torch.save_model leaves one name, be it the head's."""
    info = base.tensors[name]
    copies = [n for n in ft.tensors if COPIES.get(own_name(n)) == own_name(name)]
    copies = sorted(n for n in copies if ft.tensors[n].shape == info.shape)
    if not is_embedding(name) or own_name(name) in COPIES:
        return copies
    if says_tied(ft.config or {}) is False or any(is_embedding(n) and own_name(n) not in COPIES for n in ft.tensors):
        return copies
    if says_tied(ft.config or {}) is None and any(map(is_head, base.tensors)) and not says_tied(base.config or {}):
        return copies  # BASE's two ends are two tensors: FT lacks one of them
    heads = [n for n in ft.tensors if is_head(n)]
    alike = [n for n in base.tensors if is_embedding(n) and own_name(n) not in COPIES]
    fit = len(heads) == 1 and alike == [name] and ft.tensors[heads[0]].shape[1:] == info.shape[1:]
    return [*copies, *heads] if fit else copies


def _copies(here: Checkpoint, there: Checkpoint, lacking: Iterable[str]) -> dict[str, str]:
    """For tensors that only `here` has: the tensor of `there` that they are copies of. If `here` has that tensor, too,
    it has the same shape."""
    own, other = Names(here.tensors), Names(there.tensors)
    copies = {}
    for name in sorted(lacking):
        one_with = COPIES.get(own_name(name), "")
        tensor, twin = other.find(one_with), own.find(one_with)
        shape = here.tensors[twin].shape if twin else there.tensors[tensor].shape if tensor else None
        if tensor and here.tensors[name].shape == shape:
            copies[name] = tensor
    return copies


class Names:
    """A checkpoint's names, to be looked up with or without wrappers."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        unique = _unique_cores(self.names)
        self._by_core = {core: name for name in self.names if (core := own_name(name)) in unique}

    def find(self, name: str) -> str | None:
        """The same name, or the only name that differs in nothing but wrappers."""
        return name if name in self.names else self._by_core.get(own_name(name))


def _without_wrappers(
    base: Checkpoint, ft: Checkpoint, lacking: Collection[str], extra: Collection[str]
) -> dict[str, str]:
    """BASE's name -> FT's name, if on each side only one name has this core."""
    unique_base, unique_ft = (_unique_cores(model.tensors) for model in (base, ft))
    theirs = {core: name for name in extra if (core := own_name(name)) in unique_ft}
    renamed = {name: theirs.get(core) for name in lacking if (core := own_name(name)) in unique_base}
    return {name: other for name, other in sorted(renamed.items()) if other is not None}


def _unique_cores(names: Iterable[str]) -> set[str]:
    return {core for core, count in Counter(map(own_name, names)).items() if count == 1}


def tied_embedding(model: Checkpoint, shape: tuple[int, ...]) -> str | None:
    """The input embedding that is also this model's output head, with rows as long as those of a head of this `shape`.
    None if the config denies tying, or if several embeddings are possible."""
    if says_tied(model.config or {}) is False or any(map(is_head, model.tensors)):
        return None
    embeddings = (name for name in model.tensors if is_embedding(name))
    candidates = [n for n in embeddings if len(model.tensors[n].shape) == 2 and model.tensors[n].shape[1:] == shape[1:]]
    if len(candidates) > 1:
        candidates = [name for name in candidates if model.tensors[name].shape == shape]
    if len(candidates) > 1:  # leave out the copies
        candidates = [name for name in candidates if own_name(name) not in COPIES]
    return candidates[0] if len(candidates) == 1 else None


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings in config.json, in all parts about text; None if it is missing or contradictory."""
    said = {tied for part in text_configs(config) if isinstance(tied := part.get("tie_word_embeddings"), bool)}
    return said.pop() if len(said) == 1 else None


def renaming_warnings(base: Checkpoint, ft: Checkpoint, renaming: Renaming, unchosen: Collection[str]) -> Iterator[str]:
    """A warning for every pair that was resolved."""
    prefixes: dict[tuple[str, str], list[str]] = {}
    otherwise: list[str] = []
    for name, other in renaming.ft_names.items():
        core = own_name(name)
        if name in unchosen:
            continue
        if core != own_name(other):
            yield f"{shown(name)} is not in {ft.name}, {_instead(name, other)} of its own, as {base.name}."
        elif not (name.endswith(core) and other.endswith(core)):
            otherwise.append(name)
        else:
            prefixes.setdefault((other.removesuffix(core), name.removesuffix(core)), []).append(name)
    for (theirs, ours), names in prefixes.items():
        yield (
            f"{counted(len(names), 'tensor has', 'tensors have')} the prefix '{shown(theirs)}' in {ft.name}, "
            f"'{shown(ours)}' in {base.name}: "
            f"{shown(renaming.ft_names[names[0]])} is merged with {shown(names[0])}, and so on."
        )
    if otherwise:
        yield (
            f"{counted(len(otherwise), 'tensor has', 'tensors have')} older or newer names in {ft.name}: "
            f"{shown(renaming.ft_names[otherwise[0]])} "
            f"is merged with {shown(otherwise[0])}, and so on."
        )
    for copy, tensor in renaming.copies.items():
        if copy in unchosen:
            if tensor not in unchosen:
                yield (
                    f"{shown(copy)} is not chosen, but {base.name} and the output use {shown(tensor)} in its place, "
                    f"which is merged. To keep {base.name}'s values there, give --exclude {shown(tensor)}, too."
                )
            continue
        what, why = f"has {shown(tensor)} in its place", "one with it in such models"
        if is_head(copy):
            what = f"ties its head to {shown(tensor)}"
            why = "a copy, says its config" if says_tied(ft.config or {}) else "what it learned apart is lost"
        yield f"{base.name} {what}, and so does the output: {shown(copy)} of {ft.name} is left out ({why})."


def _instead(name: str, other: str) -> str:
    if is_head(name):
        return f"whose head is tied: merged with its input embedding {shown(other)}. The output has a head"
    return f"which has {shown(other)} in its place: merged with that. The output has a tensor"
