"""The scribe in miniature: a tiny StableLM that adds, its MixCE finetune on prose, and the merges. demo.py [FOLDER]"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
from story import Story, run_story
from story_report import write_report

STORY = Story(
    here=Path(__file__).resolve().parent,
    title="A merge that remembers",
    stages=("base", "cot", "finetune"),
    skill="skill",
    skill_label="sums solved, %",
    prose="prose_perplexity",
    prose_label="prose perplexity",
    kept=lambda scores, cot, ft: scores["skill"] / max(cot["skill"], 1e-9),
    least_kept=0.9,
    validation_note="200 validation problems; the figures are of 300 others (standard error up to 3 points)",
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs/mini")
@click.option("--seeds", type=click.IntRange(1), default=1)
@click.option("--quick", is_flag=True, help="A few steps on a few problems, to try the demo out.")
def main(folder: Path, seeds: int, quick: bool) -> None:
    results = run_story(STORY, folder, seeds, quick=quick)
    print("\n" + write_report(STORY, folder, results))


if __name__ == "__main__":
    main()
