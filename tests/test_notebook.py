"""examples/merge.ipynb: every cell runs, against a Hub on this machine with tiny models under the notebook's ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hub_replica import TOKEN, serve

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/merge.ipynb"
IDS = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
REPO = "me/merged"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook with its outputs, and the Hub's folder. Only REPO is set to something else."""
    home = tmp_path_factory.mktemp("notebook")
    subprocess.run([sys.executable, ROOT / "examples/make_tiny_pair.py", home / "tiny"], check=True)
    for name, repo in zip(("base", "ft"), IDS, strict=True):
        (home / "hub/models" / repo).parent.mkdir(parents=True, exist_ok=True)
        (home / "tiny" / name).rename(home / "hub/models" / repo)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert "\nREPO = None" in parameters.source
    parameters.source += f"\nREPO = {REPO!r}"
    (home / "here").mkdir()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with serve(home / "hub") as hub:
        environment = {**os.environ, **hub.environment(home / "cache", HF_TOKEN=TOKEN, PYTHONPATH=path)}
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(home / "here")}})
        client.execute(env=environment)
    return notebook, home / "hub/models"


def printed(notebook: nbformat.NotebookNode, part: str) -> str:
    """What the cell with this text printed, and its value."""
    cell = next(cell for cell in notebook.cells if part in cell.source and cell.cell_type == "code")
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "".join(texts)


def test_it_is_short_and_published_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 15
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore")  # of the kernel's own
def test_it_looks_merges_checks_and_compares(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    notebook, _ = executed
    assert printed(notebook, "inspect(model)").count("39 tensors, 222,016 parameters") == 2
    assert "to download 0.00 GB" in printed(notebook, "plan_recipe")
    assert printed(notebook, "report = merge").splitlines()[-3].startswith("merged: slerp at t = 0.5, 39 tensors")
    assert printed(notebook, "verify(OUT").endswith("elements merged again: verified")
    answers = printed(notebook, "answers([")
    assert [line[:-1] for line in answers.splitlines() if line.endswith(":")] == [*IDS, "merged"]
    assert "not tried" not in answers
    assert "transformers cannot" not in answers


def test_it_pushes_the_whole_output(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    notebook, models = executed
    assert f"{REPO}/commit/" in printed(notebook, "upload_folder")
    names = {path.name for path in (models / REPO).iterdir()}
    assert {"README.md", "SHA256SUMS", "config.json", "merge_report.json", "model.safetensors"} <= names
    card = (models / REPO / "README.md").read_text()
    assert all(f"- {repo}\n" in card for repo in IDS)
