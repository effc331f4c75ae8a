"""Held-out loss, answers and sample texts: measurements that do not change the model.

The loss is plain cross-entropy, whatever the mixing ratio, so that runs can be compared. No random number is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.batches import Mixture
from train.compare import Comparison
from train.config import TrainConfig
from train.data import Source
from train.judge import solved
from train.model import LossModel
from train.watch import Watch
from train.world import World


@torch.no_grad()
def evaluate(
    model: LossModel,
    mixture: Mixture,
    tokenizer: Any,
    config: TrainConfig,
    judges: Mapping[str, Comparison],
    world: World,
    watch: Watch,
    step: int,
) -> dict[str, float]:
    """The metrics of the held-out examples, recorded: `nll` (nats per labelled token, the mean over the
    sources), `nll/SOURCE`, and `accuracy/SOURCE` of sources with a judge. Empty without held-out examples."""
    held = [source for source in mixture.sources if len(source.held_out)]
    if not held:
        return {}
    model.eval()
    nll = {source.title: source_nll(model, mixture, source, world) for source in held}
    judged = [source for source in held if source.title in judges]
    accuracy = {s.title: solved(model, tokenizer, s, judges[s.title], config) for s in judged}
    model.train()
    extra = {"accuracy": accuracy} if accuracy else {}
    perplexity = {title: math.exp(min(value, 700)) for title, value in nll.items()}
    watch.record("eval", step, nll=nll, perplexity=perplexity, **extra)
    shown = [f"{title} {value:.4f} nats/token" for title, value in nll.items()]
    shown += [f"{title} {value:.1%} solved" for title, value in accuracy.items()]
    watch.say(f"step {step}: " + ", ".join(shown))
    named = {"nll": nll, "accuracy": accuracy}
    each = {f"{kind}/{title}": value for kind, values in named.items() for title, value in values.items()}
    return {"nll": sum(nll.values()) / len(nll), **each}


@torch.no_grad()
def source_nll(model: LossModel, mixture: Mixture, source: Source, world: World) -> float:
    """Plain cross-entropy of the held-out examples, in nats per labelled token."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in mixture.held_out_batches(source, world.rank):
        loss, count = model(batch.to(world.device), 1.0)
        total += torch.stack([loss.double(), count.double()])
    loss_sum, tokens = world.sum(total).tolist()
    return float(loss_sum / tokens)


@torch.no_grad()
def sample(
    model: LossModel, tokenizer: Any, config: TrainConfig, world: World, watch: Watch, output: Path, step: int
) -> None:
    """Greedy continuations of the sample prompts, appended to samples.jsonl by the first process."""
    model.eval()
    for prompt in config.sample_prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(model.generate(tokenizer, ids, config.sample_tokens)[0])
        if world.is_first:
            with open(output / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        watch.say(f"sample: {prompt!r} -> {text!r}")
    model.train()
