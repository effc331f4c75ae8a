"""Verified responses -> what a cycle learns from.

A *unit* is a list of rows that stay together in a micro-batch: a pair (the chosen response, then rejected ones),
with the gold response beside it if that is learned; or one response that is only learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.chat import Segment
from train.contrast.generate import Response
from train.contrast.options import ContrastConfig
from train.contrast.questions import Question, response_segments
from train.errors import TrainError

CHOSEN, REJECTED, BESIDE = "chosen", "rejected", "beside"
ROLES = (CHOSEN, REJECTED, BESIDE)  # their numbers in units.npy
LEARNED = {"chosen": (CHOSEN,), "right": (CHOSEN, BESIDE), "gold": (BESIDE,), "sources": ()}  # by ce_on
Unit = list[tuple[str, Question, Response | None]]  # (role, question, its gold response if None)


def make_units(
    judged: Iterable[tuple[Question, Sequence[Response], Sequence[bool]]], contrast: ContrastConfig
) -> tuple[list[Unit], Counter[str]]:
    """The units of a cycle, and counts of what became of the responses."""
    units: list[Unit] = []
    counts = Counter[str]()
    for question, responses, verdicts in judged:
        right, wrong = (_unique(responses, verdicts, side) for side in (True, False))
        pairs = [[r, *wrong] for r in right if wrong] if contrast.pairs == "all" else [*zip(right, wrong, strict=False)]
        for chosen, *rejected in pairs:
            ranked = [(CHOSEN, question, chosen), *((REJECTED, question, r) for r in rejected)]
            gold = [(BESIDE, question, None)] if contrast.ce_on == "gold" else []
            units.append([*(ranked if contrast.rank_weight else () if gold else ranked[:1]), *gold])
        alone = right[len(pairs) :] if contrast.ce_on == "right" else []
        units += [[(BESIDE, question, response)] for response in alone]
        counts.update(
            questions=1, questions_solved=any(verdicts), questions_all_right=all(verdicts), samples=len(responses),
            right=sum(verdicts), unfinished=sum(not r.is_finished for r in responses), unique=len(right) + len(wrong),
            pairs=len(pairs), unused=len(right) + len(wrong) - len({r for p in pairs for r in p}) - len(alone),
        )  # fmt: skip
    return units, counts


def _unique(responses: Sequence[Response], verdicts: Sequence[bool], side: bool) -> list[Response]:
    """Those of one verdict, each text once, apart from white space."""
    found = {" ".join(r.text.split()): r for r, ok in zip(responses, verdicts, strict=True) if ok == side}
    return list(found.values())


def write_units(folder: Path, units: Sequence[Unit], form: str, tokenizer: Any, longest: int) -> list[dict[str, Any]]:
    """Tokens, marks and roles of all rows as arrays. Units with a row that is too long, or empty, are left out; the
    others are returned as plain values."""
    kept: list[dict[str, Any]] = []
    ids, learned, table = [], [], []
    for unit in units:
        texts = [_segments(question, response, form, tokenizer) for _, question, response in unit]
        tokens = [[tokenizer(s.text, add_special_tokens=False)["input_ids"] for s in row] for row in texts]
        if max(sum(map(len, row)) for row in tokens) > longest or not all(row[-1] for row in tokens):
            continue
        for row, segments, (role, *_) in zip(tokens, texts, unit, strict=True):
            ids += [np.concatenate([np.asarray(part, np.int32) for part in row])]
            learned += [np.concatenate([np.full(len(p), s.learned) for p, s in zip(row, segments, strict=True)])]
            table += [(len(kept), ROLES.index(role))]
        rows = [{"role": role, "text": row[-1].text} for (role, *_), row in zip(unit, texts, strict=True)]
        kept.append({"question": unit[0][1].number, "rows": rows})
    np.save(folder / "ids.npy", np.concatenate([np.empty(0, np.int32), *ids]))
    np.save(folder / "learned.npy", np.concatenate([np.empty(0, bool), *learned]))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, ids)], dtype=np.int64))
    np.save(folder / "units.npy", np.array(table, np.int64).reshape(-1, 2))
    return kept


def _segments(question: Question, response: Response | None, form: str, tokenizer: Any) -> list[Segment]:
    if response is None:
        return [Segment(question.prompt, False), Segment(question.gold, True)]
    return response_segments(question, response.text, response.is_finished, form, tokenizer)


def warnings(counts: Counter[str], contrast: ContrastConfig) -> Iterator[str]:
    """What a user must know of a cycle's responses. Raises TrainError when there is nothing to learn."""
    share = counts["right"] / max(1, counts["samples"])
    said = f"{counts['right']:,} of {counts['samples']:,} samples are right ({counts['unfinished']:,} did not end)"
    if not counts["units"] or (contrast.rank_weight and not counts["pairs"]):
        raise TrainError(
            f"There are no pairs to learn from: {said}. Compare samples/ with contrast.verify.extract; raise "
            "temperature or samples for responses that differ, max_new_tokens for responses that end."
        )
    if share > 0.95:
        yield f"Warning: {said}: above 95 %, few questions still teach anything. Ask harder ones."
    if share < 0.05:
        yield f"Warning: {said}: below 5 %. Compare samples/ with contrast.verify.extract, or do more SFT first."
