"""What to do with a merged model, for its card: load it, convert it, serve it, upload it."""

from __future__ import annotations

from collections.abc import Iterator

_CAUSAL = "ForCausalLM"


def next_steps(architecture: str, *, has_code: bool, is_quantised: bool) -> Iterator[str]:
    """The card's section about the tools that can use this model. `architecture` is the class that config.json names;
    it is empty if there is none."""
    yield "## What next"
    yield "`OUT` is this model's folder or, after an upload, its id on the Hub."
    if architecture:
        yield f"```python\n{_snippet(architecture, has_code=has_code)}\n```"
    yield "\n".join(_lines(architecture, has_code=has_code, is_quantised=is_quantised))


def _snippet(architecture: str, *, has_code: bool) -> str:
    is_causal = architecture.endswith(_CAUSAL)
    loader = "AutoModelForCausalLM" if is_causal else "AutoModel"
    more = ", trust_remote_code=True" if has_code else ""
    lines = [
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("OUT", dtype="auto"{more})',
        f'tokenizer = AutoTokenizer.from_pretrained("OUT"{more})',
    ]
    if is_causal:
        lines += [
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    return "\n".join(lines)


def _lines(architecture: str, *, has_code: bool, is_quantised: bool) -> Iterator[str]:
    if architecture.endswith(_CAUSAL):
        if not is_quantised:
            yield (
                "- GGUF, for llama.cpp, Ollama and LM Studio: `python convert_hf_to_gguf.py OUT --outfile model.gguf` "
                "in a checkout of llama.cpp, then `llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M`."
            )
            yield "- LM Studio: `lms import model-Q4_K_M.gguf`."
        yield f"- vLLM: `vllm serve OUT{' --trust-remote-code' if has_code else ''}`."
    yield (
        "- Upload: `merge-tool push OUT hub:ORG/NAME` (files as the merge made them), or `hf upload ORG/NAME OUT`. "
        "Then add to this card there what the model is for, and what you measured."
    )
