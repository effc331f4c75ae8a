"""Responses by transformers: batches of questions, each question with random numbers of its own.

A question's responses depend on its seed and on its batch. Batches are the same in every session and with any number
of processes, so the responses are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopPLogitsWarper as TopP

from train.contrast.options import ContrastConfig
from train.contrast.questions import Question, prompt_lengths


@dataclass(frozen=True)
class Response:
    """`text` ends before the stop text. `is_finished`: the model ended it; else max_new_tokens did."""

    text: str
    is_finished: bool


def blocks(questions: Sequence[Question], tokenizer: Any, size: int) -> list[list[Question]]:
    """Questions that are answered together: of similar length, the longest first (memory fails early)."""
    lengths = prompt_lengths(questions, tokenizer)
    order = sorted(range(len(questions)), key=lambda i: (-lengths[i], questions[i].number))
    return [[questions[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def seed_of(seed: int, cycle: int, question: Question) -> int:
    """63 bits."""
    return int(np.random.SeedSequence((seed, cycle, question.number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Voice:
    """A model that answers. `seeds` of questions ask for `samples` responses each; without them, for the greedy one."""

    model: Any
    tokenizer: Any
    pad_id: int
    contrast: ContrastConfig

    @torch.inference_mode()
    def respond(self, questions: Sequence[Question], seeds: Sequence[int]) -> tuple[list[list[Response]], int]:
        """The responses to each question, and the number of tokens written."""
        count = self.contrast.samples if seeds else 1
        prompts = self.tokenizer([q.prompt for q in questions], add_special_tokens=False)["input_ids"]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts]).repeat_interleave(count, 0)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(count, 0)
        ends = self._ends()
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.contrast.max_new_tokens, do_sample=False, pad_token_id=self.pad_id,
            eos_token_id=ends or None, stop_strings=self.contrast.stop, repetition_penalty=1.0,
        )  # fmt: skip
        drawing = LogitsProcessorList([Drawing(seeds, count, self.contrast)] if seeds else [])
        written = self.model.generate(
            ids.to(self.model.device), attention_mask=mask.to(self.model.device), generation_config=settings,
            logits_processor=drawing, tokenizer=self.tokenizer,
        )  # fmt: skip
        rows = written[:, width:].tolist()
        found = [self._read(row, ends) for row in rows]
        return [found[k : k + count] for k in range(0, len(rows), count)], sum(map(len, rows))

    def _ends(self) -> list[int]:
        """The tokens that end a text, by the tokenizer and by the model's generation_config.json."""
        known = self.model.generation_config.eos_token_id
        found = [self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
        return sorted({int(token) for token in found if token is not None})

    def _read(self, row: list[int], ends: Sequence[int]) -> Response:
        length = next((k for k, token in enumerate(row) if token in ends), len(row))
        text = self.tokenizer.decode(row[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        before, stop, _ = text.partition(self.contrast.stop) if self.contrast.stop else (text, "", "")
        return Response(before, bool(stop) or length < len(row))


class Drawing(LogitsProcessor):
    """Leaves one token of each row: drawn at the temperature from the top_p, by a number of the question's own
    generator (transformers draws all rows from one)."""

    def __init__(self, seeds: Sequence[int], count: int, contrast: ContrastConfig) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: on all devices alike
        self._count, self._temperature = count, Temperature(contrast.temperature)
        self._top_p = TopP(contrast.top_p) if contrast.top_p < 1 else None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        wide: Any = self._temperature(input_ids, scores.float())
        shares: Tensor = (wide if self._top_p is None else self._top_p(input_ids, wide)).softmax(1).cumsum(1)
        drawn = torch.cat([torch.rand(self._count, generator=g) for g in self._generators]).to(shares.device)
        # The first token at which the sum of the shares passes the number drawn; a token without a share never is.
        chosen = torch.searchsorted(shares, (drawn * shares[:, -1]).unsqueeze(1), right=True)
        return torch.full_like(wide, float("-inf")).scatter_(1, chosen.clamp_max(shares.shape[1] - 1), 0.0)
