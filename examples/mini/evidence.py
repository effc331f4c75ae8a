"""Does any of this beat one number? Ways to merge the demo's models, chosen on validation data, tested once, compared.

evidence.py [FOLDER] [--seeds 3] [--jobs 2]. In FOLDER/seed-N the data and models of the demo are made, if they are not
there; FOLDER/seed-N/evidence has a folder for each arm. What is finished is skipped, so a stopped run goes on. Needs
the extras [train,plot,search].
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from math import exp
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from evidence_arms import (
    ARMS,
    AVERAGES,
    FINETUNE,
    MOST_CANDIDATES,
    PARENT,
    REPLAY,
    WEIGHTS,
    WINDOWS,
    Arm,
    Candidate,
    Scores,
    checkpoints,
    choose,
    slerp,
    value,
)
from evidence_report import results_of, write_report
from judge import rows, solved, text_losses
from make_data import SPLITS, unique_problems, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import merge_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from story import python, run, say

HERE = Path(__file__).resolve().parent
TEST_PROBLEMS = 400  # the demo's 300, and 100 more
CURVE = tuple(k / 20 for k in range(6, 15))  # t whose merges are tested to compare by: nothing is chosen by them
ENDS = "evidence/ends.json"  # the parent's and the finetune's scores on validation data
QUICK_TRIALS = 12
Judge = Callable[[Path | Mapping[str, Any]], dict[str, Any]]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/evidence"))
@click.option("--seeds", type=click.IntRange(1), default=3)
@click.option("--jobs", type=click.IntRange(1), default=2, help="Processes; each has its share of the processors.")
@click.option("--quick", is_flag=True, help="A few steps on a few problems, to try it out.")
def main(folder: Path, seeds: int, jobs: int, quick: bool) -> None:
    """Compare ways to merge over several seeds; results go to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))  # of the trainings, too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see story.py
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        run_all(pool, [(folder / f"seed-{seed}", seed) for seed in range(seeds)], quick)
    results = results_of([folder / f"seed-{seed}" for seed in range(seeds)])
    (folder / "evidence.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + write_report(results, folder / "evidence.svg"))


def run_all(pool: ProcessPoolExecutor, places: list[tuple[Path, int]], quick: bool) -> None:
    """The models of every seed; then the choice of every arm; then the test of what was chosen."""
    folders = [folder for folder, _ in places]
    arms = sorted(ARMS, key=lambda arm: arm.candidates is not None)  # the search takes longest, so it begins
    finish(pool.submit(make_models, folder, seed, quick) for folder, seed in places)
    finish(pool.submit(run_arm, folder, arm.name, quick) for arm in arms for folder in folders)
    tests = [pool.submit(score_arm, folder, arm.name) for arm in ARMS for folder in folders]
    finish([*tests, *(pool.submit(score_curve, folder) for folder in folders)])


def finish(tasks: Iterable[Future[None]]) -> None:
    for task in as_completed([*tasks]):
        task.result()


# -------------------------------------------------------------------------------------------- models


def make_models(folder: Path, seed: int, quick: bool) -> None:
    """The demo's data and models of one seed, the averages of the finetune's checkpoints, and more test problems."""
    if not (folder / "init/config.json").exists():
        say(f"seed {seed}: make_data.py {folder}")
        run([sys.executable, HERE / "make_data.py", folder, "--seed", seed, *["--quick"] * quick])
    write_test_problems(folder, seed, quick)
    for stage, model in (("base", "base/final"), ("cot", PARENT), ("finetune", FINETUNE), ("replay", REPLAY)):
        if not (folder / model).is_dir():
            say(f"seed {seed}: mixce-train {stage}.yaml")
            shorter = ["--max_steps", 10, "--save_every", 1] if quick else []
            run(python("train"), HERE / f"{stage}.yaml", "--seed", seed, *shorter, cwd=folder)
    merge_tool.average(checkpoints(folder), folder / AVERAGES, window=WINDOWS, weights=WEIGHTS, progress="none")
    if not (folder / ENDS).exists():
        judge = make_judge(folder, "validation")
        write_json(folder / ENDS, [scores_of(judge(folder / end)) for end in (PARENT, FINETUNE)])


def write_test_problems(folder: Path, seed: int, quick: bool) -> None:
    """`evidence/skill_test.jsonl`: the demo's test problems, and the next ones of the same random numbers."""
    path = folder / "evidence/skill_test.jsonl"
    path.parent.mkdir(exist_ok=True)
    if quick:
        shutil.copyfile(folder / "skill_test.jsonl", path)
        return
    start = SPLITS["train"] + SPLITS["validation"]
    write_rows(path, list(unique_problems(random.Random(seed), start + TEST_PROBLEMS))[start:])


# --------------------------------------------------------------------------------------------- judge


def make_judge(folder: Path, split: str) -> Judge:
    """A function that scores a model: a folder, or tensors by name. The data of `split` alone are read."""
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    problems = rows(folder / ("evidence/skill_test.jsonl" if split == "test" else "skill_validation.jsonl"))
    texts = [row["text"] for row in rows(folder / f"prose_{split}.jsonl")]
    texts = texts[::2] if split == "validation" else texts  # enough to tell merges apart, and half the time
    tokenizer = AutoTokenizer.from_pretrained(folder / PARENT)
    model = AutoModelForCausalLM.from_pretrained(folder / PARENT, dtype=torch.float32).eval()

    @torch.inference_mode()
    def judge(found: Path | Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(found, Path):
            found = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32).state_dict()
        model.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in found.items()})
        right, losses = solved(model, tokenizer, problems), text_losses(model, tokenizer, texts)
        return {
            "skill": 100 * sum(right) / len(right),
            "prose_perplexity": exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses)),
            "solved": [int(one) for one in right],
            "text_losses": [loss / count for loss, count in losses],
        }

    return judge


def scores_of(judged: Mapping[str, Any]) -> dict[str, float]:
    return {name: judged[name] for name in ("skill", "prose_perplexity")}


# ---------------------------------------------------------------------------------------------- arms


def run_arm(folder: Path, name: str, quick: bool = False) -> None:
    """Score every candidate of an arm on the validation data, and write the choice: `evidence/NAME/chosen.json`."""
    place = folder / "evidence" / name
    if (place / "chosen.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    arm = next(one for one in ARMS if one.name == name)
    say(f"{folder}: {arm.title}")
    judge = make_judge(folder, "validation")
    parent, finetune = json.loads((folder / ENDS).read_text())
    if arm.candidates is None:
        chosen = search(folder, place, judge, parent, finetune, QUICK_TRIALS if quick else MOST_CANDIDATES)
    else:
        chosen = choose_one(folder, arm, place, judge, parent, finetune)
    write_json(place / "chosen.json", chosen)


class Scored:
    """Scores by a label, in a file of one line each that only grows: what a stopped run has judged is not judged
    again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        lines = text.splitlines()[: text.count("\n")]  # the last line may be a part
        self._have = {line["label"]: line["scores"] for line in map(json.loads, lines)}
        path.write_text("".join(line + "\n" for line in lines))

    def get(self, label: str, judge: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
        if label not in self._have:
            self._have[label] = scores_of(judge())
            with self._path.open("a") as file:
                file.write(json.dumps({"label": label, "scores": self._have[label]}) + "\n")
        return self._have[label]


def choose_one(folder: Path, arm: Arm, place: Path, judge: Judge, parent: Scores, finetune: Scores) -> dict[str, Any]:
    """The candidate that the rule takes, from their scores on validation data."""
    assert arm.candidates is not None
    candidates, scored = arm.candidates(folder), Scored(place / "scores.jsonl")

    def validated() -> dict[str, dict[str, float]]:
        return {
            one.label: scored.get(one.label, lambda one=one: judge(made(one, place / "candidate")))
            for one in candidates
        }

    label = choose(validated().items(), parent, finetune)
    if finer := next(one.finer for one in candidates if one.label == label):
        candidates += finer()
        label = choose(validated().items(), parent, finetune)
    shutil.rmtree(place / "candidate", ignore_errors=True)
    return {"label": label, "candidates": len(candidates), "validation": validated()[label]}


def made(candidate: Candidate, out: Path) -> Path:
    """The folder of the model; a recipe's is merged into `out`."""
    if candidate.model is not None:
        return candidate.model
    assert candidate.recipe is not None
    merge_tool.merge_models(candidate.recipe, out, overwrite=True, progress="none", on_warning=lambda text: None)
    return out


def search(folder: Path, place: Path, judge: Judge, parent: Scores, finetune: Scores, trials: int) -> dict[str, Any]:
    """`merge-tool search` over its default space, by the number that the other arms choose by."""

    def judged(tensors: Mapping[str, Any]) -> dict[str, float]:
        scores = scores_of(judge(tensors))
        return {"value": value(scores, parent, finetune), **scores}

    models = [folder / PARENT, folder / FINETUNE]
    found = merge_tool.search(models, place / "study", judge=judged, maximize=["value"], trials=trials, progress="none")
    assert found.chosen is not None
    point = found.point(found.chosen)
    assert point.scores is not None
    label = in_words(point.values) if point.t is None else f"t = {point.t:.3g} everywhere"
    return {"label": label, "candidates": len(found.tried), "validation": scores_of(point.scores)}


def in_words(values: Mapping[str, float]) -> str:
    """The t of each group, from the first band of layers to the last: `attention 0.1 0.5 0.2 0.9; mlp ...`."""
    groups: dict[str, list[str]] = {}
    for name, t in values.items():  # t.attention.1
        groups.setdefault(name.split(".")[1], []).append(f"{t:.2f}")
    return "; ".join(" ".join([group, *ts]) for group, ts in groups.items())


# ---------------------------------------------------------------------------------------------- test


def score_arm(folder: Path, name: str) -> None:
    """Score what an arm chose on the test data, once: `evidence/NAME/test.json`."""
    place = folder / "evidence" / name
    if not (place / "test.json").exists():
        say(f"{folder}: {name}, on test data")
        candidate = chosen_candidate(folder, next(one for one in ARMS if one.name == name))
        write_json(place / "test.json", make_judge(folder, "test")(made(candidate, place / "chosen")))


def score_curve(folder: Path) -> None:
    """The merges with one t on the test data, for comparisons: `evidence/curve.json`."""
    path, out = folder / "evidence/curve.json", folder / "evidence/curve"
    if not path.exists():
        say(f"{folder}: one t, on test data")
        judge = make_judge(folder, "test")
        merges = {f"t = {t}": Candidate("", slerp(folder, FINETUNE, t)) for t in CURVE}
        write_json(path, {label: scores_of(judge(made(one, out))) for label, one in merges.items()})
        shutil.rmtree(out)


def chosen_candidate(folder: Path, arm: Arm) -> Candidate:
    place = folder / "evidence" / arm.name
    if arm.candidates is None:
        return Candidate("", recipe=place / "study/chosen.yaml")
    label = json.loads((place / "chosen.json").read_text())["label"]
    first = arm.candidates(folder)
    more = [finer for one in first if one.finer for finer in one.finer()]
    return next(one for one in (*first, *more) if one.label == label)


def write_json(path: Path, found: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)


if __name__ == "__main__":
    main()
