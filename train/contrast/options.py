"""The `contrast:` block of a config: what each key means, and which values contradict each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from train.errors import TrainError
from train.selection import Sort, Where


@dataclass(frozen=True)
class QuestionsConfig:
    """The questions that the model answers.

    path: as of a source: a file, a folder, or the id of a data set on the Hub
    prompt: template of the question, with `{column}` fields
    answer: template of the right answer
    rationale: template of a worked answer, for `ce_on: gold` in format tinycot
    format: how a question and its response become text, as of a source. The response of tinycot is its rationale and
        its answer
    name: as of a source
    split: as of a source
    revision [latest]: as of a source
    where [all rows]: as of a source
    shuffle [file order]: as of a source
    sort: as of a source
    take [all]: number of questions that are asked in each cycle
    held_out: rows kept for the evaluation, a number (1 or more) or a share (below 1)
    """

    path: str
    prompt: str
    answer: str
    rationale: str | None = None
    format: Literal["tinycot", "memphis-chat", "chat-template"] = "tinycot"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    where: tuple[Where, ...] = ()
    shuffle: int | None = None
    sort: Sort | None = None
    take: int | None = None
    held_out: float = 0


@dataclass(frozen=True)
class VerifyConfig:
    """How a response is found right or wrong; a response that did not end is wrong.

    extract [the whole response]: regular expression; the last match is the answer, or its first group if it has one. No
        match is wrong
    compare: `exact`, `number` or `choice`, as a source's `judge`; MODULE:FUNCTION (called with the answer found and the
        right one, returns true or false) or a COMMAND (gets JSON lines of `question`, `prompt`, `response`, `found`,
        `answer`, and prints 1 or 0 for each; no shell sees it)
    """

    extract: str | None = None
    compare: str = "exact"


@dataclass(frozen=True)
class ContrastConfig:
    """The iterative stage; each cycle samples, verifies, pairs, trains as the other keys say, and averages.

    questions: what is asked, see Questions
    verify: how responses are judged, see Verify
    cycles: 3 is published
    samples: responses for each question; 8 is published
    temperature: 0.5 is published
    top_p: 0.8 is published
    max_new_tokens: of a response; 512 is published
    stop [### User:]: text that ends a response, besides the end-of-text token; published likewise
    engine: `vllm`, where installed, is a process of its own; it was not run here
    sample_batch: responses that one process generates at once
    pairs: `unique` is published: each response is used once, and extras are discarded. `all`: each right response
        against all wrong ones of its question
    rank_weight: beta, the weight of the ranking loss; not published
    rank_rows: whether each pair counts alike, or by the tokens of its chosen response, as in the original code
    ce_on: cross-entropy on the `chosen` responses (published), on all `right` ones, on the `gold` rationale of each
        pair's question, or on the `sources`
    merge_t: share of the new weights in the SLERP after each cycle; 0.99 is published
    """

    questions: QuestionsConfig
    verify: VerifyConfig
    cycles: int = 3
    samples: int = 8
    temperature: float = 0.5
    top_p: float = 0.8
    max_new_tokens: int = 512
    stop: str | None = "### User:"
    engine: Literal["transformers", "vllm"] = "transformers"
    sample_batch: int = 64
    pairs: Literal["unique", "all"] = "unique"
    rank_weight: float = 0.3
    rank_rows: Literal["equal", "tokens"] = "equal"
    ce_on: Literal["chosen", "right", "gold", "sources"] = "chosen"
    merge_t: float = 0.99

    @property
    def unit_rows(self) -> int:
        """The most rows that stay together in a micro-batch."""
        ranked = (self.samples if self.pairs == "all" else 2) if self.rank_weight else 1
        return ranked + (self.ce_on == "gold")


def check_contrast(contrast: ContrastConfig) -> None:
    """Raise TrainError for a value that cannot be, or a contradiction."""
    questions, verify = contrast.questions, contrast.verify
    ranges = {
        **{k: (getattr(contrast, k) >= 1, "at least 1") for k in ("cycles", "samples", "max_new_tokens")},
        "sample_batch": (contrast.sample_batch >= contrast.samples, f"at least samples, {contrast.samples}"),
        "temperature": (0 < contrast.temperature < 10, "above 0 and below 10"),
        "top_p": (0 < contrast.top_p <= 1, "above 0, at most 1"),
        "rank_weight": (0 <= contrast.rank_weight < 1e4, "0 (no ranking) or above"),
        "merge_t": (0 < contrast.merge_t <= 1, "a share of the new weights above 0, at most 1"),
        "stop": (contrast.stop != "", "text (null for none)"),
        "questions.take": (questions.take is None or questions.take >= 1, "at least 1"),
        "questions.held_out": (
            questions.held_out >= 0 and (questions.held_out < 1 or not questions.held_out % 1),
            "a share below 1 or a whole number of rows",
        ),
    }
    for key, (is_right, expected) in ranges.items():
        if not is_right:
            value = getattr(questions if key.startswith("questions.") else contrast, key.rpartition(".")[2])
            raise TrainError(f"contrast.{key} is {value!r}, expected {expected}.")
    if contrast.ce_on == "sources" and not contrast.rank_weight:
        raise TrainError("contrast.ce_on is sources and rank_weight is 0, so no response is learned from. Change one.")
    if contrast.ce_on == "gold" and questions.format == "tinycot" and not questions.rationale:
        raise TrainError("contrast.ce_on is gold, which needs contrast.questions.rationale: the column of rationales.")
    try:
        re.compile(verify.extract or "")
    except re.error as e:
        raise TrainError(f"contrast.verify.extract is {verify.extract!r}, not a regular expression ({e}).") from e
    if not verify.compare.strip():
        raise TrainError(
            "contrast.verify.compare is empty, expected exact, number, choice, MODULE:FUNCTION or COMMAND."
        )
