"""The chat template that a recipe asks for: the text by name, the files that hold it, as transformers renders it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import language_model, save_model
from merge_tool import RecipeError
from merge_tool.api import merge_models
from merge_tool.recipe.templates import TEMPLATES
from test_vocab import tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYo\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Yo</s> [INST] Bye [/INST]",
}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three models of one vocabulary without templates."""
    return [
        save_model(
            tmp_path / name, language_model(k, vocab=4),
            side_files={"tokenizer.json": tokenizer(["<s>", "</s>", "a", "b"], {"<s>": 0, "</s>": 1})},
        )
        for k, name in enumerate("abc")
    ]  # fmt: skip


def merged(models: list[Path], out: Path, template: str) -> tuple[Path, tuple[str, ...]]:
    listed = [{"model": str(path), "parameters": {"weight": 1}} for path in models]
    report = merge_models({"merge_method": "linear", "models": listed, "chat_template": template}, out)
    return out, tuple(text for text in report.warnings if "chat_template" in text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name_are_the_published_formats(models: list[Path], tmp_path: Path, name: str) -> None:
    """Turn by turn, as transformers reads them from the output."""
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (models[0] / "tokenizer_config.json").write_text(json.dumps(config))
    out, told = merged(models, tmp_path / "out", name)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    found = loaded.apply_chat_template([SYSTEM, *TURNS], tokenize=False, add_generation_prompt=True)
    assert found == EXPECTED[name]
    assert len(told) == (name in ("chatml", "exaone", "llama3"))  # whose tokens this vocabulary does not have
    short = loaded.apply_chat_template(TURNS, tokenize=False)
    starts = {"exaone": "[|system|][|endofturn|]\n[|user|]Hi\n", "mistral": "<s> [INST] Hi [/INST]"}
    assert short.startswith(starts.get(name, ""))
    assert "Be brief" not in short


def test_a_template_is_written_as_given_wherever_the_tokenizer_has_one(models: list[Path], tmp_path: Path) -> None:
    """In chat_template.jinja and tokenizer_config.json, of which nothing else changes; an older file goes."""
    config = '{\n  "a": 1,\n  "chat_template": [{"name": "default", "template": "old"}],\n  "b": "ü"\n}'
    (models[0] / "tokenizer_config.json").write_text(config)
    (models[0] / "chat_template.json").write_text('{"chat_template": "older"}')
    asked = "{{ messages[0]['content'] }} \n ü"
    out, told = merged(models, tmp_path / "out", asked)
    assert (out / "chat_template.jinja").read_bytes() == asked.encode()
    new = json.dumps(asked, ensure_ascii=False)
    assert (out / "tokenizer_config.json").read_text() == '{\n  "a": 1,\n  "chat_template": ' + new + ',\n  "b": "ü"\n}'
    assert not (out / "chat_template.json").exists()
    assert not told
    assert merged(models, tmp_path / "out", asked)[0] == out  # already complete: the same files once more


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({}, None),
        ({"b": "B"}, "B"),
        ({"a": "A", "b": "B", "c": "B"}, "B"),
        ({"b": "B", "c": "C"}, "B"),
        ({"a": "A", "b": "B"}, "A"),
    ],
)
def test_auto_is_what_most_models_have(
    models: list[Path], tmp_path: Path, templates: dict[str, str], expected: str | None
) -> None:
    """Of as many, the donor's, else the first; in whichever file it stands."""
    for (name, text), file in zip(templates.items(), ("chat_template.jinja", "json", "config"), strict=False):
        content: Any = {"json": {"chat_template": text}, "config": {"chat_template": f" {text}\n"}}.get(file)
        place = {"json": "chat_template.json", "config": "tokenizer_config.json"}.get(file, file)
        (tmp_path / name / place).write_text(text if content is None else json.dumps(content))
    out, _ = merged(models, tmp_path / "out", "auto")
    written = out / "chat_template.jinja"
    assert (written.read_text() if written.exists() else None) == expected


def test_a_word_that_is_no_template_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line \d+: chat_template is 'chatlm' .did you mean 'chatml'"):
        merged(models, tmp_path / "out", "chatlm")
    assert not (tmp_path / "out").exists()
