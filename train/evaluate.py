"""Held-out loss and sample texts: measurements that do not change the model.

Evaluation is plain cross-entropy, whatever the mixing ratio, so that runs can be compared. It draws no random number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from train.batches import Mixture
from train.config import TrainConfig
from train.model import LossModel
from train.watch import Watch
from train.world import World


@torch.no_grad()
def evaluate(model: LossModel, mixture: Mixture, world: World, watch: Watch, step: int) -> float | None:
    """Plain cross-entropy (nats per labelled token) per source, recorded; the mean over sources, or None."""
    nll = held_out_nll(model, mixture, world)
    if not nll:
        return None
    watch.record("eval", step, nll=nll, perplexity={k: math.exp(min(v, 700)) for k, v in nll.items()})
    watch.say(f"step {step}: " + ", ".join(f"{k} {v:.4f} nats/token" for k, v in nll.items()))
    return sum(nll.values()) / len(nll)


@torch.no_grad()
def held_out_nll(model: LossModel, mixture: Mixture, world: World) -> dict[str, float]:
    """Plain cross-entropy (nats per labelled token) of each source with held-out rows."""
    model.eval()
    nll: dict[str, float] = {}
    for source in mixture.sources:
        if not len(source.held_out):
            continue
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in mixture.held_out_batches(source, world.rank):
            loss, count = model(batch.to(world.device), 1.0)
            total += torch.stack([loss.double(), count.double()])
        loss_sum, tokens = world.sum(total).tolist()
        nll[source.title] = loss_sum / tokens
    model.train()
    return nll


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, config: TrainConfig, world: World, watch: Watch, output: Path, step: int
) -> None:
    """Greedy continuations of the sample prompts, appended to samples.jsonl (one process only)."""
    if config.sample_prompts and world.size > 1:
        watch.say("Note: samples are not generated on several processes.")
    if not config.sample_prompts or world.size > 1:
        return
    model.eval()
    for prompt in config.sample_prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(world.device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=config.sample_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
        with open(output / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        watch.say(f"sample: {prompt!r} -> {text!r}")
    model.train()
