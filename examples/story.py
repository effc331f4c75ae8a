"""One story in two sizes: a model learns a skill, its finetune forgets it, merges get it back.

For every seed: data, the trainings, a sweep that chooses t on validation data, merges by SLERP and linearly, one
judgement of all on the test data. A story may have one more arm: the finetune with replay, and its merge. What a size
has of its own (data, configs, judge, the rule for t) is a `Story`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TS = [round(0.1 * k, 1) for k in range(1, 10)]
Scores = dict[str, float]
REPLAY, REPLAY_MERGED = "replay/final", "replay-merged"


@dataclass(frozen=True)
class Story:
    """`stages` are configs in `here`; `cot` and `ft` the two models they leave in the seed's folder.

    The judge prints `skill` first, then `prose`, then `more` if there is one, for each model; `kept(scores, cot, ft)`
    is how much of the skill a model still has (1: the CoT model's). t is the largest that keeps `least_kept` on the
    validation data.
    """

    here: Path
    title: str
    stages: Sequence[str]
    skill: str
    skill_label: str
    prose: str
    prose_label: str
    kept: Callable[[Scores, Scores, Scores], float]
    least_kept: float
    validation_note: str
    batch: int = 11  # models that the sweep has on disk at once
    keep_merges: bool = True
    cot: str = "cot/final"
    ft: str = "ft/final"
    more: str | None = None  # a score that is reported beside the skill, and chooses nothing
    more_label: str = ""
    replay: str | None = None  # another finetune, its config in `here`: with some of the old data mixed in


def run_story(story: Story, folder: Path, seeds: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """The results of every seed; also in results.json. `quick`: a few steps on a few problems, to try it out."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(seeds):
        results.append(run_seed(story, folder / f"seed-{seed}", seed, quick))
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    return results


def run_seed(story: Story, folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    say(f"seed {seed}: make_data.py {folder}")
    run([sys.executable, story.here / "make_data.py", folder, "--seed", seed, *["--quick"] * quick])
    shorter = ["--max_steps", 2] if quick else []
    for stage in story.stages:
        say(f"mixce-train {stage}.yaml")
        run(python("train"), story.here / f"{stage}.yaml", "--seed", seed, *shorter, cwd=folder)
    pair = [story.cot, story.ft]
    say(f"merge-tool sweep {story.cot} {story.ft} sweep --t 0:1:0.1 --eval 'judge.py . validation'")
    judge = shlex.join([sys.executable, str(story.here / "judge.py"), "."])
    sweep = [
        "sweep",
        *pair,
        "sweep",
        "--t",
        "0:1:0.1",
        "--batch",
        story.batch,
        "--eval",
        f"{judge} validation",
        "--json",
    ]
    points = json.loads(run(python("merge_tool"), *sweep, cwd=folder))["points"]
    validation = {point["t"]: point["scores"] for point in points}
    for method in ("slerp", "linear"):
        say(f"slerp-merge {story.cot} {story.ft} {method} --t 0.1:0.9:0.1 --method {method}")
        run(python("merge_tool"), "merge", *pair, method, "--t", "0.1:0.9:0.1", "--method", method, cwd=folder)
    chosen_t = choose(story, validation)
    models = [*pair, *(f"{method}/t-{t}" for method in ("slerp", "linear") for t in TS)]
    if story.replay:
        say(f"mixce-train {story.replay}.yaml, merged at t = {chosen_t}")
        run(python("train"), story.here / f"{story.replay}.yaml", "--seed", seed, *shorter, cwd=folder)
        merge = [story.cot, REPLAY, REPLAY_MERGED, "--t", chosen_t]
        run(python("merge_tool"), "merge", *merge, cwd=folder)
        models += [REPLAY, REPLAY_MERGED]
    say("judge.py . test MODEL...")
    scores = run([sys.executable, story.here / "judge.py"], ".", "test", *models, cwd=folder)
    if not story.keep_merges:
        for method in ("slerp", "linear"):
            shutil.rmtree(folder / method)
    say(f"merge-tool diff {story.cot} {story.ft} --plot angles.png")
    diff = run(python("merge_tool"), "diff", *pair, "--json", "--plot", "angles.png", cwd=folder)
    return {
        "seed": seed,
        "chosen_t": chosen_t,
        "validation": validation,
        "test": dict(zip(models, parse(scores, 3 if story.more else 2), strict=True)),
        "angles": sorted(t["angle_degrees"] for t in json.loads(diff)["tensors"] if t["angle_degrees"] is not None),
    }


def choose(story: Story, validation: dict[float, Scores]) -> float:
    """The largest t below 1 that keeps enough of the skill; 0, the CoT model itself, if none does."""
    cot, ft = validation[0], validation[1]
    enough = (t for t in TS if story.kept(validation[t], cot, ft) >= story.least_kept)
    return max(enough, default=0.0)


def parse(printed: str, count: int = 2) -> list[Scores]:
    """The judge's lines, `count` for a model."""
    values = [(name, float(value)) for name, value in map(str.split, printed.splitlines())]
    return [dict(values[k : k + count]) for k in range(0, len(values), count)]


def python(module: str) -> list[Any]:
    return [sys.executable, "-m", module]


def run(command: list[Any], *words: Any, cwd: Path | None = None) -> str:
    """Run to the end, or stop the demo; what it writes on stderr is shown, what it prints is returned."""
    whole = [str(word) for word in (*command, *words)]
    # Threads that wait must sleep: where other work shares the cores, spinning made everything three times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(whole, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(whole)} failed:\n{done.stdout}")
    return done.stdout


def say(text: str) -> None:
    print(f"== {text}", flush=True)
