"""Make what the demo trains on: problems, prose, a tokenizer and an untrained model. make_data.py FOLDER [--seed N]

The skill is addition of two numbers of three digits, with a rationale that adds digit by digit; a pair and its swapped
twin are in one split. The prose is the reference manual that every CPython carries (`pydoc_data`), held out by
whole topics: every tenth for validation, every tenth for the test. Topics repeat each other's paragraphs; each
paragraph is in one split only, and once.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import torch
from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM

SPLITS = {"train": 16_000, "validation": 200, "test": 300}  # problems
QUICK = {"train": 100, "validation": 3, "test": 3}
PIECE_TOKENS = 124  # of prose; what fits a training sequence of 128
HELD_OUT_EVERY = 10  # topics
VOCABULARY = 1024


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="Few problems: to try things out.")
def main(folder: Path, seed: int, quick: bool) -> None:
    torch.manual_seed(seed)
    counts = QUICK if quick else SPLITS
    problems = list(unique_problems(random.Random(seed), sum(counts.values())))
    tokenizer = make_tokenizer([*topics.values(), *(" ".join(row.values()) for row in problems[:2000])])
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in counts.items():
        write_rows(folder / f"skill_{split}.jsonl", problems[start : start + count])
        start += count
    for split, texts in split_prose(topics).items():
        pieces = [piece for text in texts if text.strip() for piece in cut(text, tokenizer)]
        kept = pieces[: 100 if split == "train" else 6] if quick else pieces
        write_rows(folder / f"prose_{split}.jsonl", [{"text": piece} for piece in kept])
    model = StableLmForCausalLM(
        StableLmConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, partial_rotary_factor=1.0, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "init")
    tokenizer.save_pretrained(folder / "init")


def split_prose(texts: dict[str, str]) -> dict[str, list[str]]:
    """The texts of each split; a paragraph that several texts share stays where it is met first, test before train."""
    names = sorted(texts)
    test, validation = names[5::HELD_OUT_EVERY], names[::HELD_OUT_EVERY]
    splits = {"test": test, "validation": validation, "train": sorted({*names} - {*test, *validation})}
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for split, chosen in splits.items():
        found[split] = []
        for name in chosen:
            paragraphs = {p.strip(): p for p in texts[name].split("\n\n")}
            fresh = [paragraph for key, paragraph in paragraphs.items() if key not in seen]
            seen.update(paragraphs)
            found[split].append("\n\n".join(fresh))
    return found


def unique_problems(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """`count` different problems; of a pair and its swapped twin only one."""
    seen = set()
    while len(seen) < count:
        a, b = (rng.randrange(100, 1000) for _ in range(2))
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            yield {"prompt": f"What is {a} + {b}?", "rationale": rationale(a, b), "target": str(a + b)}


def rationale(a: int, b: int) -> str:
    """Digit by digit from the right, each with the carry: 57 + 48 -> `7+8+0=15, 5+4+1=10`."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return ", ".join(steps)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token, as arithmetic wants it."""
    bpe = ByteLevelBPETokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


def cut(text: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Consecutive pieces of at most PIECE_TOKENS tokens, cut at white space."""
    words = re.findall(r"\s*\S+", text)
    piece, size = "", 0
    for word, ids in zip(words, tokenizer(words)["input_ids"], strict=True):
        if piece and size + len(ids) > PIECE_TOKENS:
            yield piece
            piece, size = "", 0
        piece, size = piece + word, size + len(ids)
    yield piece


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
