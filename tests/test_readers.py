"""Every file of a user's that is read: damaged or unreadable, it gives one error of ours, or is passed over.

No traceback, and no path but those that the user gave.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from merge_tool import merge, merge_models
from merge_tool.cli import merge_tool
from merge_tool.errors import RecipeError
from test_lora import save_adapter
from test_vocab import BASE_TOKENS, FT_TOKENS, model, tokenizer

SIDE_FILES = {
    "generation_config.json": '{"eos_token_id": 1}',
    "tokenizer_config.json": '{"chat_template": "{{ x }}"}',
    "chat_template.jinja": "{{ y }}",
    "modules.json": '[{"path": "1_Pooling"}]',
    "model_index.json": '{"unet": ["diffusers", "X"]}',
    "special_tokens_map.json": "{}",
    "README.md": "---\nlicense: mit\n---\n\n# A model\n",
}
MERGE, UNION = ["merge", "base", "ft", "out"], ["merge", "base", "ft", "union", "--vocab", "union"]
RUN, VERIFY = ["run", "recipe.yaml", "run"], ["verify", "done", "--against", "base", "base"]
AGAIN, SWEEP = ["merge", "base", "base", "done"], ["sweep", "base", "base", "sweep", "--eval", "true", "--t", "0.5"]
ADAPTED = ["merge", "base+adapter", "base", "adapted"]
WHICH: dict[str, list[list[str]]] = {  # the files, and who reads them
    "base/config.json": [UNION, ["inspect", "base"], ["diff", "base", "ft"]],
    "base/model.safetensors.index.json": [MERGE, ["inspect", "base"]],
    "base/tokenizer.json": [UNION, RUN],
    **{f"base/{name}": [UNION, RUN] for name in SIDE_FILES},
    "adapter/adapter_config.json": [ADAPTED, ["diff", "base+adapter", "base"]],
    "recipe.yaml": [RUN],
    "done/merge_report.json": [AGAIN, [*AGAIN, "--report", "copy.json"], VERIFY, ["verify", "done"]],
    "done/SHA256SUMS": [AGAIN, VERIFY],
    "done/README.md": [VERIFY],
    "done/config.json": [VERIFY],
    "half/.slerp-merge/journal.jsonl": [["merge", "base", "base", "half"]],
    "sweep/sweep.jsonl": [SWEEP],
}
ODD_KEYS = (
    "weight_map", "model", "added_tokens", "vocab_size", "tie_word_embeddings", "text_config", "quantization_config",
    "eos_token_id", "r", "unet", "chat_template", "torch_dtype", "architectures", "lora_alpha", "rank_pattern",
    "record", "begun", "scores", "inputs", "options", "t", "method", "tensors", "facts",
)  # fmt: skip
DAMAGE: dict[str, bytes] = {
    "nothing": b"",
    "no UTF-8": b'{"a": "\xff\xfe"}\n',
    "another kind": b"[1, 2]\n",
    "deep": b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"\n",
    "no JSON": b'{"a": 1,\n{{{ %s\n',
    "odd values": json.dumps({key: [[], {}] for key in ODD_KEYS}).encode() + b"\n",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    root = tmp_path_factory.mktemp("whole")
    base = model(root / "base", 5, tokenizer(BASE_TOKENS))
    model(root / "ft", 5, tokenizer(FT_TOKENS))
    for folder in ("base", "ft"):
        for name, text in SIDE_FILES.items():
            (root / folder / name).write_text(text)
        (root / folder / "model.safetensors").rename(root / folder / "model-00001-of-00001.safetensors")
        names = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.norm.weight")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (root / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = {"lm_head.lora_A.weight": np.ones((4, 8), np.float32), "lm_head.lora_B.weight": np.ones((5, 4), np.float32)}
    save_adapter(root / "adapter", lora)
    recipe: dict[str, Any] = {"merge_method": "linear", "tokenizer_source": "union", "chat_template": "auto"}
    recipe["models"] = [{"model": name, "parameters": {"weight": 1}} for name in ("base", "ft")]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(base, base, root / "done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_tool.output.work_folder.WorkFolder.publish", lambda self, check_bytes: ["stopped here"])
        merge(base, base, root / "half")
    (root / "sweep").mkdir()
    return root


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(words: list[str], place: Path) -> str:
    """Run a command, which may succeed or fail: with an error of ours."""
    found = CliRunner().invoke(merge_tool, words)
    assert found.exception is None or isinstance(found.exception, SystemExit), (words, found.exc_info)
    assert str(place) not in found.output
    assert "None" not in found.output
    assert "Errno" not in found.output
    assert found.exit_code == 0 or (words[0] == "verify" and not found.stderr) or "Error: " in found.stderr
    return found.output


def sweep_first(place: Path) -> None:
    """A sweep in which one t has its score; `true` prints none, so it is put there by hand."""
    CliRunner().invoke(merge_tool, SWEEP)
    with (place / "sweep/sweep.jsonl").open("a") as file:
        file.write('{"t": 0.5, "scores": {"loss": 1.0}}\n')


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", WHICH)
def test_a_damaged_file_is_an_error_of_ours(place: Path, name: str, damage: str) -> None:
    if name.startswith("sweep"):
        sweep_first(place)
    (place / name).write_bytes(DAMAGE[damage])
    for words in WHICH[name]:
        check(words, place)
    if name.startswith("sweep"):
        first, second = (place / name).read_bytes(), (place / name)
        second.write_bytes(first + DAMAGE[damage])
        check(SWEEP, place)


@contextmanager
def unreadable(victim: Path, *, when: str) -> Iterator[None]:
    """Opening one file fails, or reading it; as the system says it, with the whole path or with none."""
    real_open, real_os_open = io.open, os.open

    class Broken(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        readline = readinto = __next__ = read  # type: ignore[assignment]

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
        mode = args[0] if args else kwargs.get("mode", "r")
        if isinstance(path, int) or Path(path).absolute() != victim or set(mode) & set("wa+x"):
            return real_open(path, *args, **kwargs)
        if when == "opened":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(victim))
        return Broken() if "b" in mode else io.TextIOWrapper(Broken())

    def wrapped_os(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not isinstance(path, int) and Path(os.fsdecode(path)).absolute() == victim and not flags & os.O_CREAT:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(victim))
        return real_os_open(path, flags, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", wrapped)
        patch.setattr("builtins.open", wrapped)
        patch.setattr(os, "open", wrapped_os)
        yield


@pytest.mark.parametrize("when", ["opened", "read"])
@pytest.mark.parametrize("name", [name for name in WHICH if name != "base/tokenizer.json"])
def test_a_file_that_cannot_be_read_is_an_error_of_ours(place: Path, name: str, when: str) -> None:
    if name.startswith("sweep"):
        sweep_first(place)
    for words in WHICH[name]:
        with unreadable(place / name, when=when):
            check(words, place)


def test_a_template_that_cannot_be_read_is_named_without_its_folders(place: Path) -> None:
    (place / "base/chat_template.jinja").write_bytes(b"\xff")
    said = check(RUN, place)
    assert "Error: base/chat_template.jinja: cannot be read (it is not utf-8 text, at byte 0)." in said


def test_a_report_that_was_damaged_does_not_pass_for_a_finished_merge(place: Path) -> None:
    report = place / "done/merge_report.json"
    for text in (report.read_text()[:-20], report.read_text().replace('"equal"', '"same"')):
        report.write_text(text)
        assert "merge_report.json: cannot be read (" in check(AGAIN, place)
    check([*AGAIN, "--overwrite"], place)
    assert "verified" in check(VERIFY, place)


def test_a_reader_that_is_killed_says_what_it_read_and_why_perhaps(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a system that is out of memory."""
    monkeypatch.setattr("merge_tool.apart._START", "import os; os.kill(os.getpid(), 9)  # {module}")
    said = check(UNION, place)
    assert "base/tokenizer.json and ft/tokenizer.json: reading it was ended by signal 9" in said
    assert "for lack of memory" in said


def test_a_line_of_a_report_that_is_damaged_is_named(place: Path) -> None:
    report = place / "done/merge_report.json"
    lines = report.read_text().splitlines(keepends=True)
    number = next(k for k, line in enumerate(lines) if '"name": "lm_head.weight"' in line)
    for damage in (lines[number].replace("  {", " {"), lines[number].replace("}", "")):
        report.write_text("".join([*lines[:number], damage, *lines[number + 1 :]]))
        assert f"line {number + 1} is not as it was written" in check(VERIFY, place)


def test_names_that_the_system_refuses_are_our_errors(place: Path) -> None:
    long = "x" * 300
    for words in (
        ["diff", long, "base"],
        ["diff", "base", long],
        ["diff", "base", "ft", "--plot", f"{long}/x.png"],
        ["diff", "base", "ft", "--plot", f"{long}.png"],
        ["verify", long],
        ["verify", "done", "--against", "base", long],
        ["inspect", long],
        ["merge", "base", long, "o"],
        ["run", long, "o"],
    ):
        assert "Error: " in check(words, place)


def test_a_recipe_of_python_objects_is_an_error_of_ours(place: Path) -> None:
    with pytest.raises(RecipeError, match="holds what YAML cannot"):
        merge_models({"merge_method": "linear", "models": [{"model": place / "base"}]}, place / "o")
