"""Models of different architectures are refused before other mismatches, which would only follow from this difference.

An architecture is known by its name in config.json. Old and new names of one architecture are the same, and so are a
language model and the vision-language model that holds it. A model without such a name is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.checkpoint.sub_configs import is_of_text, sub_configs
from merge_tool.errors import MismatchError, shown
from merge_tool.recipe.recipe import Recipe

# Names without case, `_` and `-`. On the left is an old name of an architecture, or the name of a model whose
# config.json mixes the settings of its language model with its own.
_SAME = {
    "refinedweb": "falcon", "refinedwebmodel": "falcon", "rw": "falcon", "stablelmepoch": "stablelm",
    "yi": "llama", "phimsft": "phi", "mixformersequential": "phi", "llavallama": "llama", "llavamistral": "mistral",
    "llavaqwen": "qwen2", "llavaqwen2": "qwen2", "qwen2vl": "qwen2", "qwen25vl": "qwen2", "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3moe",
}  # fmt: skip
_TASK = re.compile(r"(For[A-Z]\w*|WithLMHead\w*|LMHead\w*|DoubleHeads\w*|(Text)?Model)$")


def check_architectures(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if models that are merged have different architectures, unless the recipe allows it."""
    if recipe.options.allow_different_architectures:
        return
    numbers = sorted({*recipe.sources, recipe.first})
    known = [(models[k], names) for k in numbers if (names := architectures(models[k].config or {}))]
    if all(names & other for k, (_, names) in enumerate(known) for _, other in known[:k]):
        return
    each = ", ".join(f"{model.name} is {_in_words(model.config or {})}" for model, _ in known)
    raise MismatchError(
        f"The architectures differ: {each}. Tensors of different architectures do not mean the same, even where names "
        "and shapes agree, so their merge is noise. Give models of one architecture.\n"
        "To merge them anyway: --allow-different-architectures."
    )


def architectures(config: Mapping[str, Any]) -> frozenset[str]:
    """The names of a model's architecture, from its own configuration and from its language model's.

    >>> architectures({"architectures": ["LLaMAForCausalLM"]}) == architectures({"model_type": "llama"})
    True
    >>> sorted(architectures({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}))
    ['gemma3']
    """
    return frozenset(map(_plain, _names(config)))


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    for place, part in sub_configs(config):
        if not is_of_text(place):
            continue
        if isinstance(kind := part.get("model_type"), str) and kind:
            yield kind
        if isinstance(classes := part.get("architectures"), list):
            yield from (_TASK.sub("", name) for name in classes if isinstance(name, str) and _TASK.sub("", name))


def _plain(name: str) -> str:
    text = re.sub(r"[_-]", "", name.lower())
    text = text.removesuffix("model").removesuffix("text") or text
    return _SAME.get(text, text)


def _in_words(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    kind = config.get("model_type")
    return shown(f"{kind} ({name})" if kind and name else kind or name, 100)
