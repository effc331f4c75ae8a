"""Tiny replicas of what the scribe's recipe loads: two old StableLM repositories and all eight data sets.

Names, file formats, columns and types are the real ones; sizes and contents are not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from tests.train_fixtures import WORDS, make_model, make_tokenizer

LAYERS = 32  # as the real one: 356 tensors
MEMPHIS, STABLELM = "euclaise/Memphis-CoT-3B", "stabilityai/stablelm-3b-4e1t"


def make_hub(root: Path) -> Path:
    """The folder to serve: `models/` and `datasets/`."""
    for seed, repo in enumerate((MEMPHIS, STABLELM)):
        make_old_stablelm(root / "models" / repo, seed)
    for repo, make in DATA_SETS.items():
        folder = root / "datasets" / repo
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"# {repo}\n")
        make(folder, random.Random(repo))
    return root


def make_old_stablelm(folder: Path, seed: int) -> None:
    """A `stablelm_epoch` repository: old keys, an auto_map to code that is not there, shards, no pad token."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "max_position_embeddings": 512}
    model = make_model(seed, dtype=torch.bfloat16, **sizes)
    model.save_pretrained(folder, max_shard_size="80KB")
    make_tokenizer().save_pretrained(folder)
    c = model.config
    config = {
        "architectures": ["StableLMEpochForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig",
            "AutoModelForCausalLM": "modeling_stablelm_epoch.StableLMEpochForCausalLM",
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "model_type": "stablelm_epoch",
        "norm_eps": 1e-05,
        "num_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rope_pct": 0.25,
        "rope_theta": 10000,
        "rotary_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)


# ---- the data sets ---------------------------------------------------------------------------------------


def _words(numbers: random.Random, count: int = 5) -> str:
    return " ".join(numbers.choices(WORDS, k=count))


def _parquet(folder: Path, rows: list[dict[str, Any]], split: str = "train", schema: Any = None) -> None:
    (folder / "data").mkdir(exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), folder / f"data/{split}-00000-of-00001.parquet")


def _rows(count: int, make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(number) for number in range(count)]


def _tiny_cot(folder: Path, r: random.Random) -> None:
    _parquet(folder, _rows(240, lambda n: {
        "rationale": _words(r), "target": str(n % 7), "source": "gsm8k", "prompt": _words(r),
    }))  # fmt: skip


def _reddit(folder: Path, r: random.Random) -> None:
    for split, count in (("train", 130), ("test", 20)):
        _parquet(folder, _rows(count, lambda n: {
            "post_title": _words(r, 3), "post_text": _words(r) if n % 5 else "", "post_scores": n,
            "comment_text": _words(r), "comment_score": 2 * n,
        }), split)  # fmt: skip


def _writing_prompts(folder: Path, r: random.Random) -> None:
    _parquet(folder, _rows(130, lambda n: {
        "body": _words(r, 8 if n % 10 else 400), "comment_score": n, "prompt": f"[WP] {_words(r)}", "post_score": n,
    }))  # fmt: skip


def _mathqa(folder: Path, r: random.Random) -> None:
    _parquet(folder, _rows(130, lambda n: {
        "options": "a ) 1 , b ) 2", "correct": "a", "annotated_formula": f"add({n}, 1)", "problem": f"{n} and one?",
        "rationale": _words(r), "program": f"a = {n}\nb = 1\nprint(a + b)",
    }))  # fmt: skip


def _booksum(folder: Path, r: random.Random) -> None:
    """CSV; the lengths are counts of tokens; cells hold quotes, commas and line breaks."""
    for name, count in (("train", 80), ("validation", 10), ("test", 10)):
        rows = _rows(count, lambda n: {
            "bid": n, "book_id": f"book {n}", "chapter_path": f"all/{n}.txt",
            "chapter": f'"{_words(r, 3)}",\n{_words(r)}',
            "chapter_length": float(500 - n), "summary_name": "Chapter 1", "summary_text": _words(r),
            "summary_length": float(n), "source": "novelguide",
        })  # fmt: skip
        pa.csv.write_csv(pa.Table.from_pylist(rows), folder / f"{name}.csv")


def _mathoverflow(folder: Path, r: random.Random) -> None:
    """Scores are strings, and not all above 10."""
    _parquet(folder, _rows(150, lambda n: {
        "parent_url": f"https://mathoverflow.net/questions/{n}", "parent_score": str(n),
        "parent_body": f"<p>{_words(r)}</p>",
        "parent_user": "a", "parent_title": _words(r, 3),
        "body": f"<p>{_words(r)}</p>", "score": str(n % 160 - 4),
        "user": "b", "answer_id": str(n), "__index_level_0__": n,
    }))  # fmt: skip


def _coedit(folder: Path, r: random.Random) -> None:
    _parquet(folder, _rows(80, lambda n: {
        "task": "gec", "id": str(n), "original_instruction": "Fix grammar", "instruction": "Correct the errors.",
        "input": _words(r), "output": _words(r),
    }))  # fmt: skip


def _oasst2(folder: Path, r: random.Random) -> None:
    turn = lambda role: {"role": role, "content": _words(r)}  # noqa: E731
    for split, count in (("train", 70), ("test", 10)):
        rows = _rows(count, lambda n: {"messages": [turn("user"), turn("assistant")] * (1 + n % 2)})
        _parquet(folder, rows, split)


DATA_SETS: dict[str, Callable[[Path, random.Random], None]] = {
    "euclaise/TinyCoT": _tiny_cot,
    "euclaise/reddit-instruct": _reddit,
    "euclaise/WritingPrompts_curated": _writing_prompts,
    "euclaise/mathqa_programs": _mathqa,
    "pszemraj/booksum-short": _booksum,
    "euclaise/mathoverflow-accepted": _mathoverflow,
    "BEE-spoke-data/coedit-reworded-deduped": _coedit,
    "sablo/oasst2_curated": _oasst2,
}
