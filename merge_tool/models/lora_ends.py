"""What an adapter does to a model whose head is its embedding: is it still one tensor, or are these two from now on?

The live model decides. PEFT wraps the module that it trains. The other module keeps the matrix that both shared, unless
the adapter says `ensure_weight_tying`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import MismatchError, shown
from merge_tool.models.heads import Tie, check_untied, find_tie, named_head
from merge_tool.models.lora_config import Settings
from merge_tool.models.lora_names import AdapterTensor
from merge_tool.models.naming import is_head
from merge_tool.models.renaming import Names


@dataclass(frozen=True, slots=True)
class Ends:
    """The tied embedding and head of a model with an adapter.

    `head` is the head's name where it is a tensor of its own now, else None. It begins as the embedding: as the adapter
    stores that if `follows`, else as the model has it. `skipped` are modules of the adapter that only repeat what the
    embedding's say.
    """

    tie: Tie | None = None
    head: str | None = None
    follows: bool = False
    skipped: frozenset[str] = frozenset()


def find_ends(base: Checkpoint, names: Names, settings: Settings, tensors: Iterable[AdapterTensor]) -> Ends:
    """Raises MismatchError where the head must be a tensor of its own and its name is not known."""
    tie = find_tie(base)
    if tie is None:
        return Ends()
    parts = [part for part in tensors if part.leaf == "weight"]
    embedding = [part for part in parts if names.find(f"{part.module}.weight") == tie.embedding]
    head = [part for part in parts if is_head(f"{part.module}.weight")]
    if not embedding and not head:
        return Ends(tie)
    tokens = [any(part.is_tokens for part in side) for side in (embedding, head)]
    if tokens[0] and not tokens[1] and any(part.is_factor or settings.saves(part.module) for part in head):
        raise MismatchError(
            f"{shown(head[0].module)} is trained, and so are rows of {shown(tie.embedding)}, to which {base.name} ties "
            "it. What peft computes for both is not read; merge the adapter with peft."
        )
    trained = (p.is_tokens or p.is_factor or settings.saves(p.module) for p in (*embedding, *head))
    keeps_tie = settings.keeps_tie and bool(head)  # peft stores both ends where it ties them, as it does not for GPT-2
    repeats = keeps_tie or not any(trained) or tokens == [True, False]
    if embedding and repeats:
        return Ends(tie, skipped=frozenset(part.module for part in head) if tie.copy is None else frozenset())
    name = tie.copy or (f"{head[0].module}.weight" if head else named_head(base, tie.embedding))
    if name is not None and tie.copy is None:
        check_untied(base, tie.embedding)
    whole = [part for part in embedding if not part.is_factor]
    follows = bool(whole) and not settings.saves(whole[0].module)
    return Ends(tie, head=name, follows=follows)


def ends_notice(name: str, base: Checkpoint, ends: Ends) -> str:
    """What the user is told of a head that the adapter makes a tensor of its own."""
    assert ends.tie is not None
    return (
        f"{name} trains one end of {base.name}, which ties its head to {shown(ends.tie.embedding)}. As in the live "
        f"model, the two are different tensors then: the result has a head of its own, {shown(ends.head)}."
    )
