"""The process that samples by vLLM: python -m train.contrast.vllm_engine REQUEST. Not run here.

It sees a model's name and prompts, nothing else, and appends lines as `samples.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BLOCK = 1024  # questions between two writes


def main(path: Path) -> None:
    """Answer the questions of a request."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    request = json.loads(path.read_text(encoding="utf-8"))
    engine, questions = LLM(model=request["model"]), request["questions"]
    tokenizer = engine.get_tokenizer()
    with open(request["out"], "a", encoding="utf-8") as file:
        for start in range(0, len(questions), BLOCK):
            block = questions[start : start + BLOCK]
            settings = [SamplingParams(**request["settings"], seed=q["seed"]) for q in block]
            ids = [tokenizer(q["prompt"], add_special_tokens=False)["input_ids"] for q in block]
            outputs = engine.generate([{"prompt_token_ids": row} for row in ids], settings)
            for question, output in zip(block, outputs, strict=True):
                responses = [{"text": o.text, "is_finished": o.finish_reason == "stop"} for o in output.outputs]
                file.write(json.dumps({"question": question["number"], "responses": responses}) + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
