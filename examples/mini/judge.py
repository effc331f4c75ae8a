"""Score models: exact match on the skill in %, perplexity on held-out prose. judge.py DATA SPLIT MODEL...

Prints `skill VALUE` and `prose_perplexity VALUE` for each model, in order: what `merge-tool sweep --eval` reads.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 150


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("split", type=click.Choice(["validation", "test"]))
@click.argument("models", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@torch.inference_mode()
def main(data: Path, split: str, models: tuple[Path, ...]) -> None:
    problems, prose = (rows(data / f"{kind}_{split}.jsonl") for kind in ("skill", "prose"))
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(f"skill {exact_match(model, tokenizer, problems):.2f}", flush=True)
        print(f"prose_perplexity {perplexity(model, tokenizer, [row['text'] for row in prose]):.2f}", flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_match(model: Any, tokenizer: Any, problems: list[dict[str, str]]) -> float:
    """Percentage of problems whose answer, after a rationale of the model's own, is right."""
    return 100 * sum(solved(model, tokenizer, problems)) / len(problems)


def solved(model: Any, tokenizer: Any, problems: list[dict[str, str]]) -> list[bool]:
    """Of each problem, in order, whether it is solved."""
    prompts = [f"### User:\n{row['prompt']}\n### Rationale:\n" for row in problems]
    answers = [f"{row['rationale']}\n### Answer:\n{row['target']}\n" for row in problems]
    longest = max(map(len, tokenizer(answers)["input_ids"])) + 2
    right = [False] * len(problems)
    for ids, places in same_length(tokenizer(prompts)["input_ids"]):
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False, pad_token_id=0
        )
        for place, text in zip(places, tokenizer.batch_decode(written[:, ids.shape[1] :]), strict=True):
            found = re.search(r"### Answer:\n(\d+)\n", text)
            right[place] = found is not None and found[1] == problems[place]["target"]
    return right


def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Of the texts' tokens after the first."""
    losses, counts = zip(*text_losses(model, tokenizer, texts), strict=True)
    return math.exp(sum(losses) / sum(counts))


def text_losses(model: Any, tokenizer: Any, texts: list[str]) -> list[tuple[float, int]]:
    """Of each text by itself: the summed loss of its tokens after the first, in nats, and their number. Padded on the
    right, where attention is blind."""
    ids = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
    inputs = pad_sequence(ids, batch_first=True)
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)[:, 1:]
    logits = model(inputs, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none").double().sum(1)
    return [(float(loss), len(row) - 1) for loss, row in zip(losses, ids, strict=True)]


def same_length(sequences: list[list[int]]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Batches of sequences of one length, and their places: no padding, no mask to get wrong."""
    by_length = defaultdict(list)
    for place, ids in enumerate(sequences):
        by_length[len(ids)].append(place)
    for _, places in sorted(by_length.items()):
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            yield torch.tensor([sequences[place] for place in chosen]), chosen


if __name__ == "__main__":
    main()
