"""The scribe in miniature: a tiny StableLM that adds, its MixCE finetune on prose, and the merges. demo.py [FOLDER]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from story import Story
from story_report import demo_command

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
    replay="replay",
    validation_note="200 validation problems; the figures are of 300 others (standard error up to 3 points)",
)


main = demo_command(STORY, Path("runs/mini"))

if __name__ == "__main__":
    main()
