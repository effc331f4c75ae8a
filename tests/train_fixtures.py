"""Small real things to train on: a tiny StableLM with its own tokenizer, data files, the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM

from train.config import TrainConfig, build_config

REPO = Path(__file__).parents[1]
WORDS = [
    *("red", "blue", "green", "cat", "dog", "bird", "sun", "moon", "tree"),
    *("river", "stone", "house", "one", "two", "three", "four", "five", "six"),
]


def make_tokenizer(*, pad: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens, with `<|endoftext|>` as id 0 and no pad token unless asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["### User:\n### Assistant:\n### Answer:\n### Rationale:\n"] + WORDS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    if pad:
        fast.pad_token = "<|endoftext|>"
    fast.chat_template = chat_template
    return fast


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> StableLmForCausalLM:
    """A StableLM of two layers, hidden 32, vocabulary 320, attention that matters (weights x 5)."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 320,
        "max_position_embeddings": 128,
        **overrides,
    }
    torch.manual_seed(seed)
    model = StableLmForCausalLM(StableLmConfig(**values))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(5.0 if "embed" not in name else 20.0)
    return model.to(dtype)


def save_model(folder: Path, **overrides: Any) -> Path:
    """A tiny StableLM with its tokenizer as a Hugging Face folder."""
    make_model(**overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copy_rows(count: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose response repeats the prompt: quickly learned."""
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        picks = torch.randint(len(WORDS), (3,), generator=gen).tolist()
        text = " ".join(WORDS[i] for i in picks)
        rows.append({"question": text, "answer": text, "score": str(number), "number": number})
    return rows


def config_values(model: Path, data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """A config of 12 fast float32 steps as plain values, for YAML."""
    return {
        "model": str(model),
        "output": str(output),
        "sources": [
            {
                "path": str(data),
                "held_out": 8,
                "templates": [{"prompt": "{question}", "response": "{answer}"}],
            }
        ],
        "sequence_length": 96,
        "global_batch": 4,
        "micro_batch": 2,
        "max_steps": 12,
        "optimizer": "adamw",
        "lr": 3e-3,
        "warmup": 0.1,
        "freeze_embeddings": False,
        "activation_checkpointing": False,
        **overrides,
    }


def make_config(**values: Any) -> TrainConfig:
    """A valid TrainConfig for tests of one part; nothing it names needs to exist."""
    base = {
        "model": "m",
        "output": "o",
        "sources": [{"path": "d.jsonl", "templates": [{"prompt": "{a}", "response": "{b}"}]}],
    }
    return build_config({**base, **values})


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def environment(**more: str) -> dict[str, str]:
    """No network, one thread, warnings are errors in our own module."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def run_cli(*arguments: Any, processes: int = 1, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`python -m train ...`, or the same under torchrun on several processes."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["train", *map(str, arguments)]
    kwargs.setdefault("env", environment())
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=300, check=False, **kwargs)


def read_metrics(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run_two_ranks(*configs: Path) -> subprocess.CompletedProcess[str]:
    """`finetune` of each config in turn in the same two gloo processes (imports are what costs time)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, __file__, *map(str, configs)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, timeout=300, check=False, env=environment()
    )


if __name__ == "__main__":
    from train.config import load_config
    from train.loop import finetune

    torch.distributed.init_process_group("gloo")
    for argument in sys.argv[1:]:
        finetune(load_config(argument))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # on a busy machine one of gloo's threads was seen to abort the interpreter's own way out
