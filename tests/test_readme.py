"""What only the README promises: it is short, its figures stand in the documents, its first pair is a real Llama."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from merge_tool import merge

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE_PAIR = ROOT / "examples/make_tiny_pair.py"


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_figures_of_its_promises_stand_in_the_pages_that_they_link_to() -> None:
    rows = re.findall(r"^\| \*\*.*$", README.partition("## What it promises")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        pages = "".join((ROOT / link).read_text(encoding="utf-8") for link in re.findall(r"\]\(([^)#]+\.md)", row))
        figures = re.findall(r"\*\*([\d.,]+)", row)
        assert figures, row
        assert pages, row
        for figure in figures:
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", pages), f"{figure}: {row}"


@pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own
def test_transformers_loads_the_pair_and_the_merge(tmp_path: Path) -> None:
    """Model and tokenizer, without a key missing or unexpected; what was merged speaks as something between the two."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    subprocess.run([sys.executable, MAKE_PAIR, tmp_path], check=True)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "merged", t=0.4)
    logits = []
    for name in ("base", "merged", "ft"):
        model, told = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not any(told.values()), told
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(tokenizer) == model.config.vocab_size
        for text in ("Grüße, 世界!\n", "two  words"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        with torch.no_grad():
            logits.append(model.float()(**tokenizer("a test", return_tensors="pt")).logits)
    base, merged, ft = logits
    near, far = (merged - base).norm(), (merged - ft).norm()
    assert 0 < near < far < (ft - base).norm()  # t = 0.4 is a bit nearer to the base


def test_the_python_example_is_short_and_runs(tmp_path: Path) -> None:
    script = ROOT / "examples/merge_in_python.py"
    assert len(script.read_text().splitlines()) < 25
    subprocess.run([sys.executable, MAKE_PAIR, tmp_path], check=True)
    command = [sys.executable, script, tmp_path / "base", tmp_path / "ft", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("39 tensors in ")
    assert subprocess.run([*command[:-1], tmp_path], capture_output=True).returncode == 1


def test_nothing_names_this_workplace() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        text = (ROOT / name).read_bytes()
        assert b"/wo" + b"rk/" not in text, name
        assert b"../sha" + b"red" not in text, name
