"""The arrows of ARCHITECTURE.md: who may import whom, and that the merger never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS: dict[str, set[str]] = {
    "__init__": {"_version", "api", "checkpoint.reader", "errors", "memory", "models", "plan", "recipe", "run"},
    "__main__": {"cli"},
    "_version": set(),
    "errors": set(),
    "checkpoint.__init__": set(),
    "checkpoint.header": {"errors"},
    "checkpoint.source": {"checkpoint.header", "errors"},
    "checkpoint.folder": {"checkpoint.lookalikes", "errors"},
    "checkpoint.ranges": {"checkpoint.header", "errors"},
    "checkpoint.fetching": {"checkpoint.folder", "checkpoint.hub", "checkpoint.ranges", "errors"},
    "checkpoint.hub": {"checkpoint.folder", "checkpoint.source", "errors"},
    "checkpoint.unpickle": {"errors"},
    "checkpoint.strided": {"checkpoint.header", "checkpoint.source"},
    "checkpoint.lookalikes": set(),
    "checkpoint.pickle": {
        "checkpoint.header", "checkpoint.lookalikes", "checkpoint.source", "checkpoint.strided", "errors",
    },
    "checkpoint.sub_configs": set(),
    "checkpoint.grid": {"checkpoint.strided"},
    "checkpoint.fp8": {"checkpoint.grid", "checkpoint.header", "checkpoint.source", "checkpoint.sub_configs", "errors"},
    "checkpoint.quantised": {"checkpoint.header", "checkpoint.sub_configs", "errors"},
    "checkpoint.reader": {
        "checkpoint.folder", "checkpoint.fp8", "checkpoint.header", "checkpoint.hub", "checkpoint.lookalikes",
        "checkpoint.pickle", "checkpoint.quantised", "checkpoint.source", "errors",
    },
    "checkpoint.writer": {"errors"},
    "methods.__init__": {"methods.pair"},
    "methods.pair": set(),
    "methods.steps": {"methods.pair"},
    "methods.passes": {"methods.pair", "methods.steps"},
    "methods.tiles": {"methods.pair", "methods.steps"},
    "methods.geometric": {"methods.pair", "methods.steps", "methods.tiles"},
    "methods.sparse": {"methods.pair", "methods.steps", "methods.tiles"},
    "methods.rowwise": {"methods.pair", "methods.sparse", "methods.steps", "methods.tiles"},
    "methods.many": {"methods", "methods.steps"},
    "schedule": {"errors"},
    "recipe": {"errors", "methods", "schedule"},
    "naming": set(),
    "renaming": {"checkpoint.reader", "checkpoint.sub_configs", "errors", "naming"},
    "low_rank": {"checkpoint.header", "checkpoint.reader", "checkpoint.source", "methods"},
    "lora_config": {"checkpoint.folder", "checkpoint.source", "errors"},
    "lora": {
        "checkpoint.folder", "checkpoint.header", "checkpoint.hub", "checkpoint.reader", "checkpoint.source",
        "checkpoint.strided", "errors", "lora_config", "low_rank", "naming", "renaming",
    },
    "inputs": {"checkpoint.hub", "errors", "lora"},
    "recipes.settings": set(),
    "recipes.model_ref": {"errors"},
    "recipes.yaml_text": {"errors"},
    "recipes.models_recipe": {"methods.steps", "recipes.model_ref", "recipes.settings"},
    "recipes.parameters": {
        "errors", "methods.steps", "recipes.models_recipe", "recipes.settings", "recipes.yaml_text",
    },
    "recipes.named_models": {"errors", "recipes.model_ref", "recipes.yaml_text"},
    "recipes.tokenizer_ask": {"errors", "recipes.models_recipe", "recipes.named_models", "recipes.yaml_text"},
    "recipes.mergekit": {
        "errors", "methods.steps", "recipes.model_ref", "recipes.models_recipe", "recipes.named_models",
        "recipes.parameters", "recipes.settings", "recipes.templates", "recipes.tokenizer_ask", "recipes.yaml_text",
    },
    "recipes.stacks": {"errors", "schedule"},
    "recipes.expand": {
        "errors", "methods.steps", "naming", "recipes.models_recipe", "recipes.settings", "recipes.stacks", "renaming",
        "schedule",
    },
    "tokenizer_json": {"checkpoint.folder", "checkpoint.lookalikes", "errors"},
    "tokens": {"checkpoint.folder", "errors", "tokenizer_json"},
    "joined_tokens": {"checkpoint.folder", "tokenizer_json"},
    "rows": {"checkpoint.header", "checkpoint.reader", "checkpoint.source", "methods"},
    "row_tensors": {
        "checkpoint.header", "checkpoint.reader", "checkpoint.source", "errors", "naming", "renaming", "rows",
    },
    "vocab_rows": {"methods", "recipe", "rows", "tokens"},
    "vocab": {
        "checkpoint.folder", "checkpoint.reader", "checkpoint.source", "checkpoint.sub_configs", "errors", "recipe",
        "row_tensors", "side_files",
        "tokenizer_json", "tokens", "vocab_rows",
    },
    "joined_rows": {"errors", "joined_tokens", "methods", "recipes.models_recipe", "rows"},
    "joined_vocab": {
        "checkpoint.folder", "checkpoint.reader", "checkpoint.source", "errors", "joined_rows", "joined_tokens",
        "recipes.models_recipe", "row_tensors", "tokenizer_json", "vocab",
    },
    "chat_template": {"checkpoint.folder", "checkpoint.reader", "errors", "recipes.templates", "side_files"},
    "recipes.templates": set(),
    "recipes.__init__": set(),
    "matching": {
        "checkpoint.header", "checkpoint.reader", "errors", "naming", "recipe", "recipes.stacks", "renaming",
        "schedule",
    },
    "scaled_plan": {
        "checkpoint.fp8", "checkpoint.header", "checkpoint.reader", "checkpoint.source", "errors", "recipe",
    },
    "plan": {
        "_version", "checkpoint.folder", "checkpoint.header", "checkpoint.reader", "checkpoint.source", "errors",
        "matching", "methods.steps", "recipe", "rows", "scaled_plan", "schedule",
    },
    "quantise": {"checkpoint.grid", "methods"},
    "work": {
        "checkpoint.reader", "checkpoint.source", "errors", "methods", "methods.passes", "methods.steps", "plan",
        "quantise", "rows",
    },
    "memory": {"checkpoint.reader", "errors", "methods", "plan", "quantise", "work"},
    "buffers": {"checkpoint.reader", "memory", "methods", "plan"},
    "run": {
        "buffers", "checkpoint.reader", "checkpoint.source", "errors", "memory", "methods", "plan", "work", "worker",
    },
    "worker": {"errors"},
    "side_files": {"checkpoint.folder", "checkpoint.sub_configs", "errors"},
    "older": {"checkpoint.folder", "errors", "side_files"},
    "journal": {"errors"},
    "lock": {"errors"},
    "overlap": set(),
    "output": {
        "checkpoint.source", "checkpoint.writer", "errors", "journal", "lock", "older", "overlap", "plan",
        "side_files",
    },
    "report": {"_version", "errors", "methods", "plan", "recipe"},
    "card": {"_version", "errors", "methods", "plan", "recipe", "report"},
    "compare": {"checkpoint.reader", "inputs", "lora", "methods"},
    "config_fit": {
        "checkpoint.header", "checkpoint.reader", "naming", "renaming", "row_tensors", "side_files", "vocab",
    },
    "prepare": {
        "chat_template", "checkpoint.reader", "config_fit", "errors", "inputs", "lora", "memory", "methods", "output",
        "overlap", "parents", "plan", "recipe", "row_tensors", "side_files", "vocab",
    },
    "parents": {
        "checkpoint.folder", "checkpoint.reader", "checkpoint.sub_configs", "errors", "row_tensors", "tokenizer_json",
        "tokens", "vocab",
    },
    "complete": {
        "checkpoint.reader", "errors", "methods", "older", "output", "plan", "prepare", "recipe", "report",
        "side_files",
    },
    "cli_options": {"errors", "memory", "methods", "recipe"},
    "api": {
        "card", "checkpoint.writer", "complete", "errors", "memory", "older", "output", "plan", "prepare",
        "recipe", "report", "run", "schedule", "side_files",
    },
    "checks": {"checkpoint.source", "errors", "plan"},
    "remerge_scaled": {
        "buffers", "checkpoint.reader", "checkpoint.source", "checks", "errors", "methods", "plan", "quantise",
        "report", "side_files", "work",
    },
    "remerge": {
        "_version", "api", "buffers", "checkpoint.folder", "checkpoint.source", "checks", "errors", "lora",
        "methods", "models", "plan", "prepare", "recipe", "remerge_scaled", "report", "run", "side_files", "work",
    },
    "verify": {
        "checkpoint.folder", "checkpoint.reader", "checkpoint.source", "checks", "errors", "older", "remerge",
        "report", "side_files",
    },
    "sweep": {"api", "errors", "lock", "output", "prepare", "recipe"},
    "diff": {
        "checkpoint.header", "checkpoint.reader", "errors", "lora", "matching", "memory", "methods", "report", "worker",
    },
    "plot": {"diff", "errors", "recipe", "sweep"},
    "show": {
        "api", "compare", "diff", "errors", "inputs", "plan", "prepare", "recipe", "recipes.stacks", "report",
        "show_plan", "sweep", "verify",
    },
    "cli": {
        "_version", "api", "cli_options", "compare", "complete", "diff", "errors", "models", "plot",
        "prepare", "recipe", "show", "sweep", "verify",
    },
    "models": {
        "api", "chat_template", "checkpoint.reader", "errors", "joined_vocab", "matching", "methods.many",
        "methods.steps", "naming", "output", "plan", "plan_models", "prepare", "recipe", "recipes.expand",
        "recipes.mergekit", "recipes.models_recipe", "renaming",
    },
    "plan_models": {
        "_version", "checkpoint.header", "checkpoint.reader", "checkpoint.source", "errors", "matching",
        "methods.passes", "methods.steps", "plan", "recipe", "recipes.expand", "recipes.models_recipe", "rows",
        "schedule",
    },
    "show_plan": {"errors", "matching", "plan", "recipe", "schedule"},
}  # fmt: skip
OUTSIDE = {
    "click": {"cli", "cli_options"},
    "tqdm": {"cli"},
    "yaml": {"card", "models", "recipes.yaml_text"},
    "huggingface_hub": {"card", "checkpoint.fetching", "checkpoint.ranges"},
    "numpy": {
        "methods.geometric", "methods.pair", "methods.passes", "methods.rowwise", "methods.sparse", "methods.steps",
        "methods.tiles", "checkpoint.fp8", "checkpoint.grid", "checkpoint.reader", "checkpoint.strided", "run",
        "buffers", "diff", "joined_rows", "low_rank", "quantise", "remerge_scaled", "rows", "vocab_rows",
        "work", "complete",
    },
    "ml_dtypes": {"methods.pair", "checkpoint.reader", "checkpoint.fp8", "quantise"},
    "safetensors": {"output", "verify"},
    "matplotlib": {"plot"},
    "torch": {"checkpoint.unpickle"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            found.add(node.module or "")
    return found


FILES = {
    path.relative_to(ROOT / "merge_tool").with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / "merge_tool").rglob("*.py")
}


def test_every_module_has_its_arrows() -> None:
    assert FILES.keys() == ARROWS.keys()


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_modules_import_only_what_their_arrows_allow(module: str) -> None:
    found = imports(FILES[module])
    ours = {name.removeprefix("merge_tool.") for name in found if name.startswith("merge_tool.")}
    assert ours <= ARROWS[module]
    for name in (name.split(".")[0] for name in found):
        assert name in sys.stdlib_module_names | {"merge_tool"} or module in OUTSIDE.get(name, set()), name


def test_a_merge_never_loads_torch_and_importing_us_loads_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys, merge_tool; assert 'numpy' not in sys.modules; "
        "merge_tool.merge(sys.argv[1], sys.argv[2], sys.argv[3]); "
        "assert not {'torch', 'transformers', 'train'} & sys.modules.keys(); import merge_tool.cli; "
        "assert not {'torch', 'transformers', 'train'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, pair), str(tmp_path / "out")], check=True)


def test_nothing_of_ours_imports_train() -> None:
    assert not any(name.split(".")[0] == "train" for path in FILES.values() for name in imports(path))
