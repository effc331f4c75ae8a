"""Random recipes, read by us and by mergekit: does every tensor get the same parameters from the same tensors?

Run it with a Python that has mergekit 0.1.5 (torch and transformers with it) and ml-dtypes, from the project's root:

    PYTHONPATH=. PYTHON bench/recipe_parity.py --recipes 1000 --seed 1

Nothing is merged: mergekit's plan is compared with ours, over three tiny Llamas of 5 layers. Exits 1 at a difference.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge_tool.errors import MergeToolError
from merge_tool.methods import registry
from merge_tool.plan.expand import Expansion
from merge_tool.plan.plan import Values
from merge_tool.recipe.mergekit import parse_recipe

LAYERS = 5
MODELS = ("one", "two", "three")
# The parameters for the whole tensor and those for each input, with what their values are.
METHODS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "slerp": ({"t": float}, {}),
    "linear": ({"normalize": bool}, {"weight": float}),
    "ties": ({"lambda": float, "normalize": bool}, {"weight": float, "density": float}),
    "nuslerp": ({"nuslerp_flatten": bool}, {"weight": float}),
    "passthrough": ({}, {"scale": float}),
    "della": ({"rescale": bool}, {"weight": float, "density": float, "epsilon": float}),
}
NUM_MODELS = {"slerp": 2, "nuslerp": 2, "passthrough": 1}
FILTERS = (
    "mlp",
    "self_attn",
    "layers.1",
    "layers.1.",
    "norm",
    "*",
    None,
    "lm_head",
    "model.",
    "weight",
    "up_proj",
    ".*",
)


class Writer:
    """Recipes at random; some of them lack what their method needs."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def value(self, kind: type) -> Any:
        values = [self.scalar(kind) for _ in range(self.r.randint(1, 5))]
        return values if self.r.random() < 0.5 else values[0]

    def scalar(self, kind: type) -> Any:
        return self.r.random() < 0.5 if kind is bool else round(self.r.uniform(0, 1), 2)

    def setting(self, kind: type) -> Any:
        entries = [{"filter": self.r.choice(FILTERS), "value": self.value(kind)} for _ in range(self.r.randint(1, 4))]
        return self.r.choice([self.value(kind), entries[0], entries, entries])

    def settings(self, kinds: dict[str, type], share: float) -> dict[str, Any]:
        return {key: self.setting(kind) for key, kind in kinds.items() if self.r.random() < share}

    def slice(self, models: list[str], shared: dict[str, type], each: dict[str, type]) -> dict[str, Any]:
        length = self.r.randint(1, LAYERS - 1)
        starts = [self.r.randint(0, LAYERS - length) for _ in models]
        sources = [
            {"model": model, "layer_range": [start, start + length], "parameters": self.settings(each, 0.5)}
            for model, start in zip(models, starts, strict=True)
        ]
        return {"sources": sources, "parameters": self.settings(shared | each, 0.4)}

    def recipe(self) -> dict[str, Any]:
        method = self.r.choice(list(METHODS))
        shared, each = METHODS[method]
        models = self.r.sample(MODELS, NUM_MODELS.get(method, 3))
        body: dict[str, Any] = {"models": [{"model": m, "parameters": self.settings(each, 0.5)} for m in models]}
        if self.r.random() < 0.5:
            body = {"slices": [self.slice(models, shared, each) for _ in range(self.r.randint(1, 3))]}
        if self.r.random() < 0.2:
            body = {"modules": {"default": {**body, "parameters": self.settings(shared | each, 0.5)}}}
        if method in ("slerp", "ties", "della") or (method == "linear" and self.r.random() < 0.3):
            body["base_model"] = self.r.choice(models)
        return {"merge_method": method, **body, "parameters": self.settings(shared | each, 0.6)}


def make_models(folder: Path) -> list[str]:
    """Three tiny checkpoints in `folder`; the names of their tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in MODELS:
        model.save_pretrained(folder / name)
    return list(model.state_dict())


def mergekits(text: str) -> dict[str, Any] | None:
    """mergekit's plan, by tensor of the output; None where it refuses."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    architecture = get_architecture_info(config, options)
    out_config = _model_out_config(config, architecture, trust_remote_code=False)
    planner = MergePlanner(config, architecture, options, out_config)
    try:
        planner._plan()
    except (RuntimeError, ValueError):
        return None
    return {weight.name: task for weight, task in planner._tensors}


@dataclass(frozen=True)
class Ask:
    """What is asked for a tensor: (model, the tensor's name there), the base first where there is one."""

    base: tuple[int, str] | None
    inputs: tuple[tuple[int, str], ...]
    values: Values


def ours(text: str, names: list[str]) -> tuple[list[str], dict[str, Ask]] | None:
    """The models, and our plan, by tensor of the output; None where we refuse."""
    asks = {}
    try:
        recipe = parse_recipe(text, "recipe", registry.METHODS)
        method = registry.METHODS[recipe.method]
        expansion = Expansion(recipe, method, [names] * len(recipe.models))
        for name in expansion.names():
            tensor = expansion.tensor(name)
            sources, (values,) = expansion.sources(tensor), expansion.values(tensor)
            base = sources[0] if expansion.has_base(tensor) or method.base == "first" else None
            asks[name] = Ask(base, sources[expansion.has_base(tensor) :], values)
        expansion.check_values()
    except MergeToolError:
        return None
    return None if expansion.range_problems else ([str(ref) for ref in recipe.models], asks)


def values(models: list[str], ask: Ask, task: Any) -> list[tuple[Any, Any]]:
    """What must be the same: inputs, base and parameters, ours and mergekit's."""
    theirs = {str(model): weight.name for model, weight in task.gather_tensors.weight_info.items()}
    pairs: list[tuple[Any, Any]] = [(name, theirs[models[k]]) for k, name in ask.inputs]
    if ask.base is not None:
        pairs.append((models[ask.base[0]], str(task.base_model)))
    shared = ask.values.shared
    pairs += [(shared[key], value) for key, value in task.parameters.items() if key in shared]
    each = {str(model): found for model, found in task.input_parameters.items()}
    for key, own in ask.values.each.items():
        pairs += [(value, each[models[k]][key]) for value, (k, _) in zip(own, ask.inputs, strict=True)]
    return pairs


def same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) < 1e-14)


def compare(text: str, names: list[str], counts: Counter[str]) -> bool:
    """Whether both read `text` alike; counts what was compared."""
    theirs, own = mergekits(text), ours(text, names)
    if theirs is None or own is None:
        counts["refused by both"] += theirs is None and own is None
        return theirs is None and own is None
    models, asks = own
    pairs = [pair for name in theirs if name in asks for pair in values(models, asks[name], theirs[name])]
    counts["read alike"] += 1
    counts["values"] += len(pairs)
    return asks.keys() == theirs.keys() and all(same(a, b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    writer, counts = Writer(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        names = make_models(Path(folder))
        os.chdir(folder)
        for _ in range(given.recipes):
            text = yaml.safe_dump(writer.recipe(), sort_keys=False)
            if not compare(text, names, counts):
                raise SystemExit(f"Read differently:\n{text}")
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
