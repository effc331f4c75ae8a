"""Local tasks for lm-evaluation-harness under the names and with the metrics of the card's three: no network needed.

python tests/lm_eval_tasks/make_tasks.py FOLDER   writes the YAML files and their data; run lm_eval in FOLDER with
--include_path tasks. The questions are the harness's kinds (generate and match a pattern; pick the likeliest answer),
the numbers of subtasks and rows are small and unequal, so that the two means of AGIEval differ.

tests/lm_eval_results holds what lm-eval 0.4.13 wrote of such a folder and a tiny StableLM (save_model of
tests/train_fixtures.py, in `model`), but for `pretty_env_info`, which describes the machine and was taken out:
lm_eval run --model hf --model_args pretrained=model,dtype=float32 --tasks gsm8k,agieval_nous,bbh_cot_fewshot
--include_path tasks --device cpu --batch_size 4 --output_path out, with HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

AGIEVAL = {"agieval_aqua_rat": 12, "agieval_logiqa_en": 30, "agieval_sat_math": 20}
BBH = {"bbh_cot_fewshot_navigate": 8, "bbh_cot_fewshot_word_sorting": 16}


def make(folder: Path) -> None:
    tasks, data = folder / "tasks", folder / "data"
    tasks.mkdir(parents=True)
    data.mkdir()
    numbers = random.Random(0)
    for name, rows in {"gsm8k": 24, **AGIEVAL, **BBH}.items():
        content = _choices(numbers, rows) if name in AGIEVAL else _questions(numbers, rows)
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        (tasks / f"{name}.yaml").write_text(json.dumps(_task(name), indent=1))  # JSON is YAML
    for group, names, metric in (("agieval_nous", AGIEVAL, "acc_norm"), ("bbh_cot_fewshot", BBH, "exact_match")):
        mean: dict[str, Any] = {"metric": metric, "aggregation": "mean", "weight_by_size": True}
        if group == "bbh_cot_fewshot":
            mean["filter_list"] = "get-answer"
        content = {"group": group, "task": list(names), "aggregate_metric_list": [mean], "metadata": {"version": 0.0}}
        (tasks / f"{group}.yaml").write_text(json.dumps(content, indent=1))


def _choices(numbers: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {
            "query": f"Q: {n}?\nA:",
            "choices": ["(A) one", "(B) two three", "(C) a long one"],
            "gold": numbers.randrange(3),
        }
        for n in range(count)
    ]


def _questions(numbers: random.Random, count: int) -> list[dict[str, Any]]:
    """Half of the answers are empty: what a model without words gets right."""
    return [{"question": f"{n} and {n}?", "answer": numbers.choice(["[invalid]", str(2 * n)])} for n in range(count)]


def _task(name: str) -> dict[str, Any]:
    common = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"data/{name}.jsonl"}},
        "test_split": "test", "metadata": {"version": 1.0},
    }  # fmt: skip
    if name in AGIEVAL:
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
        return {
            **common, "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}", "metric_list": metrics,
        }  # fmt: skip
    filters = {"get-answer": r"(?<=the answer is )(.*)(?=.)"}
    if name == "gsm8k":
        filters = {"strict-match": r"#### (\-?[0-9\.\,]+)", "flexible-extract": r"(-?[0-9]+)"}
    filter_list = [
        {"name": k, "filter": [{"function": "regex", "regex_pattern": v}, {"function": "take_first"}]}
        for k, v in filters.items()
    ]
    return {
        **common, "output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}", "filter_list": filter_list,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 8},
    }  # fmt: skip


if __name__ == "__main__":
    make(Path(sys.argv[1]))
