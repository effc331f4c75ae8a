"""The scribe with a real model: SmolLM2-135M learns word problems, forgets some over prose, merges. demo.py [FOLDER]"""

import sys
from math import log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from story import Scores, Story
from story_report import demo_command


def kept(scores: Scores, cot: Scores, ft: Scores) -> float:
    """1 at the CoT model's log perplexity of answers, 0 at the finetune's."""
    here, best, worst = (log(s["answer_perplexity"]) for s in (scores, cot, ft))
    return (worst - here) / (worst - best) if worst > best else 1.0


STORY = Story(
    here=Path(__file__).resolve().parent,
    title="A merge that remembers: SmolLM2-135M",
    stages=("cot", "finetune"),
    skill="answer_perplexity",
    skill_label="answer perplexity, trained templates",
    prose="prose_perplexity",
    prose_label="prose perplexity",
    kept=kept,
    least_kept=0.75,
    validation_note="40 validation problems of the trained templates (the skill: log perplexity of the worked "
    "answers, 100 % the CoT model's, 0 % the finetune's); the figures are of 40 other problems of these templates, and "
    "of 40 of templates that no model saw",
    more="new_template_perplexity",
    more_label="answer perplexity, new templates",
    batch=3,
    keep_merges=False,
)


main = demo_command(STORY, Path("runs/smollm2"))

if __name__ == "__main__":
    main()
