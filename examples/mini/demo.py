"""The whole story on one machine: a model that reasons, a finetune that forgets, merges that get it back.

For every seed: data, a base model, a CoT model, its MixCE finetune, a sweep that chooses t on validation problems,
merges by SLERP and linearly, one judgement of all on the test problems. Then a table, a picture, a report.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from report import write_report

HERE = Path(__file__).parent
STAGES = ("base", "cot", "finetune")
TS = "0.1:0.9:0.1"
KEPT = 0.9  # the rule for t: the largest that keeps so much of the CoT model's skill, on the validation problems


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs/mini")
@click.option("--seeds", type=click.IntRange(1), default=1)
@click.option("--max-steps", type=click.IntRange(1), help="Shorten every training, to try the demo out.")
def main(folder: Path, seeds: int, max_steps: int | None) -> None:
    results = [run_seed(folder / f"seed-{seed}", seed, max_steps) for seed in range(seeds)]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print("\n" + write_report(folder, results, folder / "seed-0/angles.png"))


def run_seed(folder: Path, seed: int, max_steps: int | None) -> dict[str, Any]:
    say(f"seed {seed}: problems, prose, a tokenizer and an untrained model of 1.0 million parameters")
    run([sys.executable, HERE / "make_data.py", folder, "--seed", seed])
    shorter = ["--max_steps", max_steps] if max_steps else []
    for stage in STAGES:
        say(f"mixce-train {stage}.yaml")
        run(python("train"), HERE / f"{stage}.yaml", "--seed", seed, *shorter, cwd=folder)
    pair = ["cot/final", "ft/final"]
    say("merge-tool sweep cot/final ft/final sweep --t 0:1:0.1 --eval 'judge.py . validation'")
    judge = shlex.join([sys.executable, str(HERE / "judge.py"), "."])
    sweep = ["sweep", *pair, "sweep", "--t", "0:1:0.1", "--batch", 11, "--eval", f"{judge} validation", "--json"]
    points = json.loads(run(python("merge_tool"), *sweep, cwd=folder))["points"]
    validation = {point["t"]: point["scores"] for point in points}
    for method in ("slerp", "linear"):
        say(f"slerp-merge cot/final ft/final {method} --t {TS} --method {method}")
        print(run(python("merge_tool"), "merge", *pair, method, "--t", TS, "--method", method, cwd=folder), end="")
    say("judge.py . test MODEL...")
    models = [*pair, *(f"{m}/{path.name}" for m in ("slerp", "linear") for path in sorted((folder / m).glob("t-*")))]
    scores = run([sys.executable, HERE / "judge.py"], ".", "test", *models, cwd=folder)
    say("merge-tool diff cot/final ft/final --plot angles.png")
    angles = run(python("merge_tool"), "diff", *pair, "--json", "--plot", "angles.png", cwd=folder)
    return {
        "seed": seed,
        "chosen_t": choose(validation),
        "validation": validation,
        "test": dict(zip(models, parse(scores), strict=True)),
        "angles": sorted(t["angle_degrees"] for t in json.loads(angles)["tensors"] if t["angle_degrees"] is not None),
    }


def choose(validation: dict[float, dict[str, float]]) -> float:
    """The largest t below 1 whose skill is at least KEPT of the CoT model's."""
    enough = KEPT * validation[0]["skill"]
    return max(t for t, scores in validation.items() if t < 1 and scores["skill"] >= enough)


def parse(printed: str) -> list[dict[str, float]]:
    """The judge's lines, two for a model."""
    pairs = [line.split() for line in printed.splitlines()]
    values = [(name, float(value)) for name, value in pairs]
    return [dict(values[k : k + 2]) for k in range(0, len(values), 2)]


def python(module: str) -> list[Any]:
    return [sys.executable, "-m", module]


def run(command: list[Any], *words: Any, cwd: Path | None = None) -> str:
    """Run to the end, or stop the demo; what it writes on stderr is shown, what it prints is returned."""
    done = subprocess.run(
        [*map(str, command), *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, [*command, *words]))} failed:\n{done.stdout}")
    return done.stdout


def say(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    main()
