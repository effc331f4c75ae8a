"""A cycle's responses: appended, one line a question, then published in order. What is there is not sampled again.

Each process appends to a file of its own in `.samples/`, so any number of processes goes on from any other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from train.contrast.generate import Response, Voice, blocks, seed_of
from train.contrast.options import ContrastConfig
from train.contrast.questions import Question, read_lines, to_lines, write_lines
from train.errors import TrainError
from train.output import first_writes, publish_folder
from train.world import World

Seeded = list[tuple[Question, int]]


def sample_responses(
    folder: Path, questions: Sequence[Question], seed: int, cycle: int, model: str, load: Callable[[], Voice],
    contrast: ContrastConfig, world: World,
) -> None:  # fmt: skip
    """Sample the responses that are missing, and publish all as `folder`. `load` gives the model to sample from by
    transformers, `model` its name for another engine."""
    parts = folder.with_name(".samples")
    first_writes(world, parts, lambda: parts.mkdir(parents=True, exist_ok=True))
    known = set(world.first(lambda: [*_parts(parts)]))
    todo = [(q, seed_of(seed, cycle, q)) for q in questions if q.number not in known]
    if todo and contrast.engine == "vllm":
        world.first(lambda: _by_vllm(parts, todo, contrast, model))
    elif todo:
        _by_transformers(parts / f"{world.rank}.jsonl", questions, dict(todo), load(), world)
    world.gather(None)  # until all have written

    def write(hidden: Path) -> None:
        found = _parts(parts) if world.is_first else {}
        order = [q.number for q in questions] if world.is_first else []
        first_writes(world, hidden, lambda: write_lines(hidden / "responses.jsonl", [found[n] for n in order]))

    publish_folder(folder, write, world)
    first_writes(world, folder, lambda: shutil.rmtree(parts))


def read_responses(folder: Path) -> dict[int, list[Response]]:
    """Of each question, by its number."""
    lines = read_lines(folder / "responses.jsonl")
    return {line["question"]: [Response(**response) for response in line["responses"]] for line in lines}


def _parts(parts: Path) -> dict[int, dict[str, object]]:
    """The whole lines of all processes' files."""
    return {line["question"]: line for path in sorted(parts.glob("*.jsonl")) for line in read_lines(path)}


def _by_transformers(
    path: Path, questions: Sequence[Question], todo: dict[Question, int], voice: Voice, world: World
) -> None:
    size = voice.contrast.sample_batch // voice.contrast.samples
    mine = [b for b in blocks(questions, voice.tokenizer, size) if any(q in todo for q in b)][world.rank :: world.size]
    bar = tqdm(
        total=sum(map(len, mine)), unit="question", desc="samples", disable=not world.is_first,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    tokens, started = 0, time.perf_counter()
    try:
        write_lines(path, read_lines(path) if path.exists() else [])  # without a line that a kill has cut
        with bar, open(path, "a", encoding="utf-8") as file:
            for block in mine:
                # The whole block, as in a session that nobody stopped: its questions decide each other's padding.
                responses, count = voice.respond(block, [todo.get(q, 0) for q in block])
                pairs = [(q, found) for q, found in zip(block, responses, strict=True) if q in todo]
                file.write(to_lines([{"question": q.number, "responses": list(map(asdict, f))} for q, f in pairs]))
                file.flush()
                tokens += count
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
                bar.update(len(block))
    except OSError as e:
        raise TrainError(f"{path}: cannot be written ({e.strerror}). Make room, then start again.") from e


def _by_vllm(parts: Path, todo: Seeded, contrast: ContrastConfig, model: str) -> None:
    """In a process of its own, so that vLLM's memory ends with it. Not run here: no machine of ours has vLLM."""
    questions = [{"number": q.number, "prompt": q.prompt, "seed": seed} for q, seed in todo]
    settings = {
        "n": contrast.samples, "temperature": contrast.temperature, "top_p": contrast.top_p, "stop": contrast.stop,
        "max_tokens": contrast.max_new_tokens,
    }  # fmt: skip
    out = str(parts / "vllm.jsonl")
    write_lines(parts / "request", [{"model": model, "out": out, "questions": questions, "settings": settings}])
    command = [sys.executable, "-m", "train.contrast.vllm_engine", str(parts / "request")]
    if code := subprocess.run(command, check=False).returncode:
        raise TrainError(f"vLLM ended with code {code}, see above. Repair it, or set contrast.engine: transformers.")
