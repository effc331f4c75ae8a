"""A few tokens of several models for one prompt, side by side: the check that everyone makes by hand.

Each model is loaded whole, by transformers, in a process of its own that ends before the next one begins. The most
likely token is taken each time, so the same models say the same again. No code of a model is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.apart import answer, ask
from merge_tool.checkpoint.folder import is_weight_file
from merge_tool.errors import CheckpointError, EvaluationError, MergeToolError, RecipeError, install, shown, sized
from merge_tool.models.lora import is_adapter, local_parts
from merge_tool.plan.system_memory import available_bytes

DEFAULT_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """What one model wrote behind the prompt; or `problem` says why it wrote nothing."""

    model: str
    text: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return f"({self.problem})" if self.problem else shown(self.text, 2000)


def answers(models: Sequence[str | Path], prompt: str, *, max_new_tokens: int = DEFAULT_TOKENS) -> tuple[Answer, ...]:
    """What each of `models` (folders or ids of the Hub) writes behind `prompt`, one model in memory at a time.

    A model that cannot be tried (an adapter, a file without a configuration, more weights than memory) has a `problem`.
    Raises RecipeError without torch and transformers, and for an empty prompt.
    """
    check_can_answer(prompt)
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    return tuple(_answer(str(model), prompt, max_new_tokens) for model in models)


def check_can_answer(prompt: str) -> None:
    """Raise RecipeError unless models can be tried with this prompt."""
    if not prompt.strip():
        raise RecipeError("The prompt is empty. Give the beginning of a text, as in --try 'Once upon a time'.")
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise RecipeError(f"--try needs {' and '.join(missing)}: {install('train')}.")


def _answer(model: str, prompt: str, max_new_tokens: int) -> Answer:
    try:
        path, *adapters = local_parts(model)
        if adapters or is_adapter(path):
            return Answer(model, problem="not tried: an adapter; a merge that has it in it can be")
        if not (path / "config.json").is_file():
            return Answer(model, problem="not tried: no folder with a config.json")
        needed, free = _weights_bytes(path), available_bytes()
        if free is not None and needed > free:
            return Answer(
                model, problem=f"not tried: its weights take {sized(needed)}, {sized(free)} of memory are free"
            )
        question = {"model": str(path), "prompt": prompt, "max_new_tokens": max_new_tokens}
        text, _ = ask(
            "merge_tool.compare.prompting",
            question,
            what=shown(model),
            error=EvaluationError,
            hint="",
            keep_errors=True,
        )
    except MergeToolError as e:
        return Answer(model, problem=str(e))
    return Answer(model, text=text)


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and is_weight_file(path.name))


# ---------------------------------------------------------------------------------- in a process of its own


def _reply(question: Any) -> tuple[Any, Iterable[bytes]]:
    import torch
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = question["model"]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ids = tokenizer(question["prompt"], return_tensors="pt").input_ids.to(model.device)
        settings = {"do_sample": False, "max_new_tokens": question["max_new_tokens"]}
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return tokenizer.decode(written[0][ids.shape[1] :], skip_special_tokens=True), ()
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError) as e:
        first = str(e).strip().partition("\n")[0]
        raise CheckpointError(f"transformers cannot run it: {shown(first, 300)}") from e


def main() -> None:
    """Answer one prompt by one model."""
    answer(_reply)
