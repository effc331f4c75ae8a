"""Answers by generation: the share of a source's held-out examples that a model solves.

The prompt is an example's text up to its first learned token, and the learned text is what is expected. A judge gets
what the model wrote and what is expected, both without the next turn's header, and from `### Answer:` on where the
expected text has one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from train.chat import USER
from train.compare import Comparison, load_comparison
from train.config import TrainConfig
from train.data import Examples, Source
from train.model import LossModel
from train.sources import ANSWER

_STOP = USER.strip()


def load_judges(config: TrainConfig) -> dict[str, Comparison]:
    """The judge of each source that has one, by title. Raises TrainError for a function that cannot be imported."""
    return {s.title: load_comparison(f"{s.title}: judge", s.judge) for s in config.sources if s.judge is not None}


def answer(text: str, expected: str) -> str:
    """The part of `text` that is judged; empty if it should have an answer and has none."""
    text = text.split(_STOP)[0]
    return (text.rpartition(ANSWER)[2] if ANSWER in text else "") if ANSWER in expected else text


def solved(model: LossModel, tokenizer: Any, source: Source, judge: Comparison, config: TrainConfig) -> float:
    """The share of held-out examples whose greedy continuation satisfies the judge; `eval_batches` limits them.

    Several processes all do the same: a sharded model computes in step. Prompts of one length go together, unpadded.
    """
    examples = source.held_out
    count = min(len(examples), (config.eval_batches or len(examples)) * config.micro_batch)
    pairs = [_split(examples, number) for number in range(count)]
    new_tokens = max(len(expected) for _, expected in pairs) + 8
    right = 0
    for places in _alike([len(prompt) for prompt, _ in pairs], config, new_tokens):
        ids = torch.from_numpy(np.stack([pairs[place][0] for place in places]).astype(np.int64))
        written = model.generate(tokenizer, ids, new_tokens, [_STOP])
        for place, row in zip(places, written.tolist(), strict=True):
            expected = tokenizer.decode(pairs[place][1])
            right += bool(judge(answer(tokenizer.decode(row), expected).strip(), answer(expected, expected).strip()))
    return right / count


def _split(examples: Examples, number: int) -> tuple[Any, Any]:
    """(prompt, expected answer) of one example, as ids: the first learned stretch and what is before it."""
    span = slice(int(examples.offsets[number]), int(examples.offsets[number + 1]))
    ids, learned = examples.ids[span], examples.learned[span]
    start = max(1, int(learned.argmax()))  # a model continues at least one token
    rest = np.flatnonzero(~learned[start:])
    return ids[:start], ids[start : start + int(rest[0])] if len(rest) else ids[start:]


def _alike(lengths: list[int], config: TrainConfig, new_tokens: int) -> Iterator[list[int]]:
    """Places of prompts of one length, as many at once as a micro-batch has tokens for."""
    by_length = defaultdict(list)
    for place, length in enumerate(lengths):
        by_length[length].append(place)
    for length, places in sorted(by_length.items()):
        size = max(1, config.micro_batch * config.sequence_length // (length + new_tokens))
        yield from (places[start : start + size] for start in range(0, len(places), size))
