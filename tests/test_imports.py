"""The law of the house: a folder imports only what stands below it; and the merger never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [  # from the top; those in one set stand side by side
    {"__init__", "__main__"}, {"cli"}, {"python_words"}, {"pages"}, {"verification", "sweeps"}, {"api"}, {"hosts"},
    {"output", "compare"}, {"run"}, {"plan"}, {"vocabulary"}, {"models"}, {"checkpoint", "recipe"}, {"methods"},
    {"arrays"}, {"apart", "files"}, {"streams", "progress"}, {"errors", "_version"},
]  # fmt: skip
OUTSIDE = {  # who alone may import a package that is not Python's own
    "click": {"cli"}, "tqdm": {"progress"}, "matplotlib": {"cli.plot"}, "torch": {"checkpoint.unpickle", "compare"},
    "huggingface_hub": {"checkpoint", "output.card", "output.pushing", "output.repository", "output.hub_session"},
    "safetensors": {"output", "verification"},
    "yaml": {"recipe", "models.cards"}, "transformers": {"compare"}, "numpy": set(), "ml_dtypes": {"arrays"},
    "ray": {"hosts"}, "distributed": {"hosts"}, "optuna": {"sweeps.study"}, "sqlalchemy": {"sweeps.study"},
    "cmaes": {"sweeps.study"}, "obstore": {"checkpoint", "output"},
}  # fmt: skip
FILES = {
    path.relative_to(ROOT / "merge_tool").with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / "merge_tool").rglob("*.py")
}
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the order"
            found.add(node.module or "")
    return found


def test_few_files_stand_outside_the_folders() -> None:
    assert len({module for module in FILES if "." not in module} - {"__init__", "__main__", "_version"}) <= 8


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_folder_imports_only_what_stands_below_it(module: str) -> None:
    room = module.split(".")[0]
    for name in imports(FILES[module]):
        package, _, rest = name.partition(".")
        if package == "merge_tool":
            other = rest.split(".")[0] or "__init__"
            assert other == room or FLOOR[room] < FLOOR[other], name
        elif package not in sys.stdlib_module_names:
            assert not OUTSIDE[package] or OUTSIDE[package] & {module, room}, name


def test_a_merge_never_loads_torch_and_importing_us_loads_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys, merge_tool, merge_tool.cli; assert 'numpy' not in sys.modules; "
        "merge_tool.merge(sys.argv[1], sys.argv[2], sys.argv[3]); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'train'} & sys.modules.keys() - {'huggingface_hub'}"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, pair), str(tmp_path / "out")], check=True)
