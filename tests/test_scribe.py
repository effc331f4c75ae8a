"""The rehearsal: examples/scribe as it stands, run by the real clients against a replica of the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import load_folder
from hub_replica import Replica, serve
from tests.scribe_hub import DATA_SETS, MEMPHIS, make_hub
from tests.test_train_docs import load_script
from tests.train_fixtures import REPO, environment, read_metrics
from train.config import load_config

SCRIBE = REPO / "examples" / "scribe"
RECORDED = next((REPO / "tests" / "lm_eval_results").glob("results_*.json"))
SMALL = (
    *("--sequence_length", "256", "--global_batch_examples", "4", "--max_steps", "3"),
    *("--eval_batches", "1", "--sample_tokens", "4", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with serve(make_hub(tmp_path_factory.mktemp("hub"))) as replica:
        yield replica


def programs() -> str:
    """PATH with the programs of this environment first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(hub: Replica, folder: Path, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder` as a newcomer would run it there, with a cache of its own and our programs on the path."""
    more = {"PATH": programs(), "PYTHONPATH": str(REPO), **more}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder, env={**environment(), **hub.environment(folder / "home"), **more},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_recipe_says_what_is_known() -> None:
    """The card's counts and filters, Memphis-CoT's settings; every key has a word about where it comes from."""
    config = load_config(SCRIBE / "train.yaml")
    assert {s.title: s.take for s in config.sources} == {
        "TinyCoT": None, "reddit-instruct": 10_000, "WritingPrompts_curated": 15_000, "mathqa_programs": 4_000,
        "booksum-short": 3_000, "mathoverflow-accepted": 10_000, "coedit-reworded-deduped": 1_000,
    }  # fmt: skip
    where = {s.title: s.where for s in config.sources if s.where}
    ((test,),) = where.values()
    assert (list(where), test.op, test.value, test.cast) == (["mathoverflow-accepted"], ">", 10, "float")
    published = (config.mixing_ratio, config.neftune_alpha, config.epochs, config.global_batch_examples)
    assert published == (0.5, 10, 2, 128)
    settings = (SCRIBE / "train.yaml").read_text().split("# ---- watching")[0].splitlines()
    for line in settings:
        assert not re.match(r"\w", line) or line.startswith("output:") or re.search(r"KNOWN|ASSUMED|# ours", line), line
    assert "sablo/oasst2_curated" not in {s.path for s in config.sources}
    assert {s["path"] for s in yaml.safe_load(with_oasst2_text())["sources"]} == DATA_SETS.keys()


def with_oasst2_text() -> str:
    head, tail = (SCRIBE / "train.yaml").read_text().split("# - path: sablo", 1)
    return head + re.sub(r"^# ?", "", "# - path: sablo" + tail, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def trained(hub: Replica, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which train.yaml (with oasst2) and merge.sh have run."""
    folder = tmp_path_factory.mktemp("scribe")
    (folder / "train.yaml").write_text(with_oasst2_text())
    done = run(hub, folder, sys.executable, "-m", "train", "train.yaml", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "old stablelm_epoch config" in done.stdout + done.stderr
    done = run(hub, folder, "sh", SCRIBE / "merge.sh")
    assert done.returncode == 0, done.stderr
    return folder


def test_all_eight_data_sets_are_trained_on(trained: Path) -> None:
    """Each gives examples; string scores are filtered, booksum goes both ways, over-long stories are dropped."""
    reports = {r["title"]: r for r in json.loads((trained / "runs/scribe-ft/data.json").read_text())}
    assert len(reports) == len(DATA_SETS)
    assert all(r["examples"] > 0 and r["held_out_examples"] > 0 for r in reports.values())
    assert reports["mathoverflow-accepted"]["rows_kept"] == sum(n % 160 - 4 > 10 for n in range(150))
    assert reports["booksum-short"]["examples"] == 2 * (80 - 50)
    assert reports["WritingPrompts_curated"]["dropped_long"] == 13
    assert [line["step"] for line in read_metrics(trained / "runs/scribe-ft")] == [1, 2, 3]


def test_the_merge_lies_between_and_loses_nothing(trained: Path, hub: Replica) -> None:
    """356 tensors in bfloat16, 60 % Memphis-CoT and 40 % finetune by SLERP; transformers loads and runs it."""
    base = load_folder(hub.root / "models" / MEMPHIS)
    ft, merged = load_folder(trained / "runs/scribe-ft/final"), load_folder(trained / "memphis-scribe")
    assert len(base) == 356
    assert base.keys() == ft.keys() == merged.keys()
    for name, value in merged.items():
        x, y = base[name].astype(np.float64).ravel(), ft[name].astype(np.float64).ravel()
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        angle = np.arccos(np.clip(x @ y / norms, -1, 1)) if norms else 0.0
        weights = (np.sin(0.6 * angle), np.sin(0.4 * angle)) / np.sin(angle) if angle > 1e-6 else (0.6, 0.4)
        expected = weights[0] * x + weights[1] * y
        assert value.dtype == "bfloat16"
        np.testing.assert_allclose(value.astype(np.float64).ravel(), expected, rtol=2**-8, atol=1e-7)
    config = json.loads((trained / "memphis-scribe/config.json").read_text())
    assert (config["model_type"], config["layer_norm_eps"]) == ("stablelm", 1e-5)
    model = AutoModelForCausalLM.from_pretrained(trained / "memphis-scribe")
    ids = AutoTokenizer.from_pretrained(trained / "memphis-scribe")("### User:\nred cat", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
    assert f"- {MEMPHIS}\n" in (trained / "memphis-scribe/README.md").read_text()


@pytest.mark.slow
def test_the_whole_recipe_is_evaluated_and_compared(trained: Path, hub: Replica) -> None:
    """evaluate.sh as it stands, with local tasks under the card's names, scores all four models; compare.py prints
    them. A second run finds everything done. At t = 0 the old base comes out bit by bit."""
    if shutil.which("lm_eval", path=programs()) is None:
        pytest.skip("needs lm-evaluation-harness: make test-slow installs it")
    load_script(REPO / "tests/lm_eval_tasks/make_tasks.py").make(trained / "local")
    shutil.move(trained / "local/data", trained / "data")
    flags = "--include_path local/tasks --device cpu --batch_size 4 --limit 4"
    for _ in range(2):
        done = run(hub, trained, "sh", SCRIBE / "evaluate.sh", FLAGS=flags, HF_DATASETS_OFFLINE="1")
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("has results already") == 4
    done = run(hub, trained, sys.executable, SCRIBE / "compare.py", "runs/eval")
    assert done.returncode == 0, done.stderr
    assert "No results yet" not in done.stdout
    scores = done.stdout.split("\n\n")[0].splitlines()[2:]
    assert [row.count("+/-") for row in scores] == [4, 4, 4, 4]
    old, new = (load_folder(folder) for folder in (hub.root / "models" / MEMPHIS, trained / "runs/memphis-cot"))
    assert all(np.array_equal(new[name].view(np.uint16), value.view(np.uint16)) for name, value in old.items())


def test_what_the_trainer_cannot_have_is_one_line(hub: Replica, tmp_path: Path) -> None:
    """Models and data sets that are missing, gated, offline or lack the revision: what, why, what to do.

    One process for all: each import of torch and transformers costs seconds.
    """
    hub.gated = {"euclaise/TinyCoT", "stabilityai/stablelm-3b-4e1t"}
    hub.tags["euclaise/mathqa_programs"] = {"v1"}
    try:
        done = run(hub, tmp_path, sys.executable, "-c", REFUSALS)
    finally:
        hub.gated = set()
    assert done.returncode == 0, done.stderr
    *lines, tagged = done.stdout.splitlines()
    assert tagged == "130 rows of a tagged revision"
    expected = [
        ("no/thing", "no such model"), (MEMPHIS, "no revision 'v9'"), ("stabilityai/stablelm-3b-4e1t", "gated"),
        ("no/data", "no such data set"), ("euclaise/mathqa_programs", "no revision 'v9'"),
        ("euclaise/TinyCoT", "gated"),
    ]  # fmt: skip
    assert len(lines) == len(expected), lines
    for line, (name, reason) in zip(lines, expected, strict=True):
        assert name in line, line
        assert reason in line, line
    assert hub.url in lines[2]


REFUSALS = """
import datasets, transformers
from train.config import build_config
from train.errors import TrainError
from train.model import load_model_config
from train.sources import open_rows

def source(path, revision=None):
    text = {"path": path, "revision": revision, "templates": [{"prompt": "{a}", "response": "{b}"}]}
    return build_config({"model": "m", "output": "o", "sources": [text]}).sources[0]

models = [("no/thing", None), ("euclaise/Memphis-CoT-3B", "v9"), ("stabilityai/stablelm-3b-4e1t", None)]
sources = [("no/data", None), ("euclaise/mathqa_programs", "v9"), ("euclaise/TinyCoT", None)]
open_model = lambda name, revision: load_model_config(name, revision, print)
open_data = lambda name, revision: open_rows(source(name, revision))
for call, asked in [(open_model, models), (open_data, sources)]:
    for name, revision in asked:
        try:
            call(name, revision)
        except TrainError as e:
            print(e)
print(open_data("euclaise/mathqa_programs", "v1").count, "rows of a tagged revision")
"""


def test_a_model_offline_and_not_cached_is_one_line(hub: Replica, tmp_path: Path) -> None:
    done = run(hub, tmp_path, sys.executable, "-m", "train", SCRIBE / "train.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE prevents" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- compare.py ------------------------------------------------------------------------------------------


def results(folder: Path, *names: str) -> Path:
    for name in names:
        target = folder / "eval" / name / "model" / RECORDED.name
        target.parent.mkdir(parents=True)
        target.write_bytes(RECORDED.read_bytes())
    return folder / "eval"


def compare(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIBE / "compare.py", folder], capture_output=True, text=True, check=False)


def test_the_means_are_the_harnesss_own(tmp_path: Path) -> None:
    """By size, AGIEval and BBH and their errors are what the harness computed; the macro mean weighs tasks alike."""
    found = load_script(SCRIBE / "compare.py").load_scores(RECORDED)
    recorded = json.loads(RECORDED.read_text())
    agieval, bbh = recorded["groups"]["agieval_nous"], recorded["groups"]["bbh_cot_fewshot"]
    assert found["agieval-sized"].value == pytest.approx(100 * agieval["acc_norm,none"])
    assert found["agieval-sized"].error == pytest.approx(100 * agieval["acc_norm_stderr,none"], rel=0.02)
    assert found["bbh"].value == pytest.approx(100 * bbh["exact_match,get-answer"])
    parts = [recorded["results"][name]["acc_norm,none"] for name in recorded["group_subtasks"]["agieval_nous"]]
    assert found["agieval-macro"].value == pytest.approx(100 * sum(parts) / 3)
    assert found["agieval-macro"].value != pytest.approx(found["agieval-sized"].value, abs=0.1)
    gsm8k = recorded["results"]["gsm8k"]
    assert found["gsm8k"] == pytest.approx(
        (100 * gsm8k["exact_match,strict-match"], 100 * gsm8k["exact_match_stderr,strict-match"])
    )


def test_ours_stands_beside_the_cards(tmp_path: Path) -> None:
    done = compare(results(tmp_path, "memphis-cot", "memphis-scribe"))
    assert done.returncode == 0, done.stderr
    (gsm8k,) = [line for line in done.stdout.splitlines() if line.startswith("GSM8K")]
    assert re.sub(r"\s+", " ", gsm8k).endswith("37.50 +/- 10.09 13.80 37.50 +/- 10.09 12.28")
    assert "No results yet: stablelm" in done.stdout
    assert "3-shot" in done.stdout


def test_what_are_no_results_is_said(tmp_path: Path) -> None:
    done = compare(tmp_path)
    assert done.returncode == 1
    assert "Run evaluate.sh first" in done.stderr
    folder = results(tmp_path, "memphis-cot")
    next(folder.rglob("*.json")).write_text('{"results": []}')
    done = compare(folder)
    assert done.returncode == 1
    assert "is not a results file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_recorded_results_name_no_machine() -> None:
    text = RECORDED.read_text()
    assert "pretty_env_info" not in text
    assert not re.search(r'"/(?:home|tmp|root|usr|opt)/', text)
