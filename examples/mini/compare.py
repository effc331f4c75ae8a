"""Perplexity of base, finetune and merge on both texts: what was learned, what was forgotten. compare.py FOLDER"""

import argparse
import inspect
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
texts = {"prose": "\n\n".join(topics.values())[:20_000], "code": inspect.getsource(argparse)[:20_000]}
print(f"{'perplexity on':16}" + "".join(f"{name:>10}" for name in texts))
for name in ("base", "ft", "merged"):
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    row = []
    for text in texts.values():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        batch = ids[: len(ids) // 128 * 128].reshape(-1, 128)
        with torch.no_grad():
            logits = model(batch[:, :-1]).logits
        row.append(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).exp().item())
    print(f"{name:16}" + "".join(f"{value:10.1f}" for value in row))
