"""The contrastive stage in miniature: four ways to go on from a tiny model that adds, and often errs. run.py [FOLDER]

For every seed: the data and the base model of examples/mini (with fewer steps, so that it errs), then each arm, then
one judgement of all models on the test data. Every number of the table comes from results.json.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import click
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from story import parse, python, run, say

HERE = Path(__file__).resolve().parent
MINI = HERE.parent / "mini"
BASE_STEPS = 400
OPEN = {"temperature": 1.0, "top_p": 1.0, "ce_on": "right"}  # diverse answers, and all that are right are learned
ONE_EPOCH = "the stage as published: 1 epoch of its pairs in each cycle"
ARMS: dict[str, dict[str, Any]] = {  # changes of the contrast block
    ONE_EPOCH: {},
    "the same, with as many steps as the other arms": {},
    "verified answers, no ranking": {**OPEN, "rank_weight": 0},
    "verified answers, ranking at 0.3": {**OPEN, "rank_weight": 0.3},
}
CONTROL = "control: as many steps on the data's rationales"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/mini_contrast"))
@click.option("--seeds", type=click.IntRange(1), default=1)
@click.option("--quick", is_flag=True, help="A few steps on a few problems, to try it out.")
def main(folder: Path, seeds: int, quick: bool) -> None:
    """Run every arm for every seed; results go to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(seeds):
        results.append(run_seed(folder / f"seed-{seed}", seed, quick))
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    print("\n" + table(results))


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Scores of the base model and of each arm after each cycle; and what the cycles counted."""
    say(f"seed {seed}: make_data.py {folder}")
    run([sys.executable, MINI / "make_data.py", folder, "--seed", seed, *["--quick"] * quick])
    say(f"mixce-train base.yaml --max_steps {BASE_STEPS}")
    steps = 4 if quick else BASE_STEPS
    run(python("train"), MINI / "base.yaml", "--seed", seed, "--max_steps", steps, cwd=folder)
    stage = yaml.safe_load((HERE / "stage.yaml").read_text())
    if quick:
        # Nothing is solved after a few steps, so every other response counts as right: the machinery alone is tried.
        check = f'{sys.executable} -c "import sys; [print(n % 2) for n, _ in enumerate(sys.stdin)]"'
        stage["contrast"] |= {"cycles": 1, "samples": 2, "verify": {"compare": check}, "stop": "e", "temperature": 2.0}
        stage["contrast"]["questions"]["take"] = 8
        stage["max_steps"] = 2
    cycles = stage["contrast"]["cycles"]
    models, counts = {"base": ["base/final"]}, {}
    for number, (arm, changes) in enumerate(ARMS.items()):
        say(f"mixce-train: {arm}")
        changes = {k: v for k, v in changes.items() if not (quick and k == "temperature")}
        values = {**stage, "output": f"arm-{number}", "seed": seed, "contrast": {**stage["contrast"], **changes}}
        if arm == ONE_EPOCH:
            values |= {"epochs": 1, "max_steps": None}
        train(folder, f"arm-{number}", values)
        cells = [folder / f"arm-{number}" / f"cycle-{cycle}" for cycle in range(1, cycles + 1)]
        models[arm] = [str((cell / "model").relative_to(folder)) for cell in cells]
        counts[arm] = [json.loads((cell / "pairs/report.json").read_text()) for cell in cells]
    say(f"mixce-train: {CONTROL}")
    models[CONTROL] = train_control(folder, stage, seed, cycles)
    say("judge.py . test MODEL...")
    names = [name for found in models.values() for name in found]
    scores = iter(parse(run([sys.executable, MINI / "judge.py"], ".", "test", *names, cwd=folder)))
    return {
        "seed": seed,
        "test": {arm: [next(scores) for _ in found] for arm, found in models.items()},
        "counts": counts,
    }


def train_control(folder: Path, stage: dict[str, Any], seed: int, cycles: int) -> list[str]:
    """One ordinary training for each cycle, with its steps and learning rates, on the questions' own rationales."""
    questions = stage["contrast"]["questions"]
    template = {"prompt": questions["prompt"], "rationale": "{rationale}", "response": questions["answer"]}
    source = {key: questions[key] for key in ("path", "shuffle", "take")}
    values = {k: v for k, v in stage.items() if k != "contrast"}
    values |= {"sources": [{**source, "format": "tinycot", "templates": [template]}], "packing": False, "seed": seed}
    models = [stage["model"]]
    for cycle in range(1, cycles + 1):
        train(folder, f"control-{cycle}", {**values, "model": models[-1], "output": f"control-{cycle}"})
        models.append(f"control-{cycle}/final")
    return models[1:]


def train(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    run(python("train"), f"{name}.yaml", cwd=folder)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: sums solved after each cycle, and prose perplexity at the end."""
    cycles = len(results[0]["test"][CONTROL])
    heads = ["", *(f"sums solved, %: cycle {n}" for n in range(1, cycles + 1)), "prose perplexity"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (cycles + 1) + "|"]
    for arm in results[0]["test"]:
        scores = [result["test"][arm] for result in results]
        cells = [spread([s[n]["skill"] for s in scores]) for n in range(len(scores[0]))]
        cells = [""] * (cycles - len(cells)) + cells if arm != "base" else [f"{cells[0]} (start)"] + [""] * (cycles - 1)
        lines.append(f"| {' | '.join([arm, *cells, spread([s[-1]['prose_perplexity'] for s in scores])])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean and, of several, their standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
