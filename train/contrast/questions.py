"""The questions of a stage, kept as text in `questions/`, and JSON lines, in which all phases keep what they found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.chat import USER, BadRow, ChatTemplate, Segment
from train.config import SourceConfig, Template, TrainConfig
from train.contrast.options import ContrastConfig
from train.errors import TrainError
from train.sources import fill, open_rows, render_row

TITLE = "questions"  # as the name of a source


@dataclass(frozen=True)
class Question:
    """`prompt` is what the model is shown, `text` the question in it, `gold` the data's response with its end."""

    number: int  # of the row, from 0
    prompt: str
    text: str
    gold: str
    answer: str


def write_questions(folder: Path, config: TrainConfig, contrast: ContrastConfig, tokenizer: Any) -> None:
    """`train.jsonl` and `held_out.jsonl`. Raises TrainError for a row that is no question, and when none fits."""
    q, room = contrast.questions, config.sequence_length - contrast.max_new_tokens
    source = SourceConfig(
        path=q.path, name=q.name, split=q.split, revision=q.revision, label=TITLE, where=q.where, shuffle=q.shuffle,
        sort=q.sort, held_out=q.held_out, format=q.format,
        templates=(Template(prompt=q.prompt, response=q.answer, rationale=q.rationale),),
    )  # fmt: skip
    rows = open_rows(source)
    learned, held_out, _ = rows.split(source, config.seed)
    for part, rows_of in (("train", learned[: q.take]), ("held_out", held_out)):
        numbers = [int(number) for number in rows_of]
        found = []
        for number, row in zip(numbers, rows.select(numbers) if numbers else [], strict=True):
            try:
                (example,) = render_row(source, row, tokenizer)
                prompt, gold = example.segments
                found.append(Question(number, prompt.text, fill(q.prompt, row), gold.text, fill(q.answer, row)))
            except (BadRow, ValueError) as e:
                reason = e if isinstance(e, BadRow) else "it has no answer. Leave it out by `where`."
                raise TrainError(f"Source {TITLE}, row {number + 1}: {reason}") from e
        fit = [q for q, length in zip(found, prompt_lengths(found, tokenizer), strict=True) if length <= room]
        if numbers and not fit:
            raise TrainError(
                f"Source {TITLE}: none of {len(numbers)} fits: sequence_length {config.sequence_length} - "
                f"max_new_tokens {contrast.max_new_tokens} leaves {room} tokens. Raise one or lower the other."
            )
        write_lines(folder / f"{part}.jsonl", [asdict(question) for question in fit])


def read_questions(folder: Path, part: str) -> list[Question]:
    """`part` is train or held_out."""
    return [Question(**line) for line in read_lines(folder / f"{part}.jsonl")]


def prompt_lengths(questions: Sequence[Question], tokenizer: Any) -> list[int]:
    """In tokens."""
    prompts = [question.prompt for question in questions]
    return [len(ids) for ids in (tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else [])]


def response_segments(question: Question, text: str, is_finished: bool, form: str, tokenizer: Any) -> list[Segment]:
    """A response as training reads it: with the end of a turn, if it ended."""
    if form == "chat-template" and is_finished:
        turns = [{"role": "user", "content": question.text}, {"role": "assistant", "content": text}]
        return ChatTemplate(tokenizer, TITLE).render(turns).segments
    return [Segment(question.prompt, False), Segment(text.rstrip() + (f"\n{USER}" if is_finished else ""), True)]


def to_lines(values: Sequence[Any]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.write_text(to_lines(values), encoding="utf-8")


def read_lines(path: Path) -> list[Any]:
    """Every whole line: a kill can cut the last one, which has no end then."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
