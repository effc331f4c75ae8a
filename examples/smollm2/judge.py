"""Score models by perplexity: of worked answers given their problems, and of prose. judge.py DATA SPLIT MODEL...

Prints `answer_perplexity VALUE` (problems of templates that were trained on), `prose_perplexity VALUE` and
`new_template_perplexity VALUE` (answers to problems of other templates) for each model, in order: what `merge-tool
sweep --eval` reads. (Exact match is near the floor for a model of this size, so perplexity is the usable signal.)
"""

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("split", type=click.Choice(["validation", "test"]))
@click.argument("models", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@torch.inference_mode()
def main(data: Path, split: str, models: tuple[Path, ...]) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    known, new = (
        [answer_ids(tokenizer, row) for row in rows(data / f"{kind}_{split}.jsonl")] for kind in ("skill", "new_skill")
    )
    prose = [(tokenizer(row["text"])["input_ids"], 0) for row in rows(data / f"prose_{split}.jsonl")]
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(f"answer_perplexity {perplexity(model, known):.4f}", flush=True)
        print(f"prose_perplexity {perplexity(model, prose):.3f}", flush=True)
        print(f"new_template_perplexity {perplexity(model, new):.4f}", flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_ids(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], int]:
    """The ids of problem and answer, and how many of them are the problem's: tokenised apart, as in training."""
    turn = [{"role": "user", "content": row["question"]}]
    before = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt, answer = tokenizer([before, row["answer"]], add_special_tokens=False)["input_ids"]
    return prompt + answer, len(prompt)


def perplexity(model: Any, texts: list[tuple[list[int], int]]) -> float:
    """Of all tokens but the first `given` (or the very first) of each text."""
    total, count = 0.0, 0
    for ids, given in texts:
        start = max(given, 1)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        count += len(ids) - start
    return math.exp(total / count)


if __name__ == "__main__":
    main()
