#!/bin/sh
# Score StableLM, Memphis-CoT, the finetune and the merge by lm-evaluation-harness on the card's three tasks.
# pip install '.[train,eval]'. Results go to runs/eval/NAME; then: python examples/scribe/compare.py runs/eval
#
# TASKS and FLAGS may be set to something else (FLAGS='--limit 20 --device cpu' for a trial).
set -eu
TASKS=${TASKS:-gsm8k,agieval_nous,bbh_cot_fewshot}
FLAGS=${FLAGS:---batch_size auto}

# Older repositories carry a config that transformers 5 refuses. At t = 0 a merge is its base, value by value; with
# the finetune's config beside it, it loads. (Nothing is done where it is there already.)
slerp-merge stabilityai/stablelm-3b-4e1t runs/scribe-ft/final runs/stablelm --t 0 --files-from ft --quiet
slerp-merge euclaise/Memphis-CoT-3B runs/scribe-ft/final runs/memphis-cot --t 0 --files-from ft --quiet

score() { # NAME FOLDER; skipped when it has results
    if ls "runs/eval/$1"/*/results_*.json > /dev/null 2>&1; then
        echo "runs/eval/$1: has results already"
        return
    fi
    echo "== $1"
    # shellcheck disable=SC2086  # FLAGS are words
    lm_eval run --model hf --model_args "pretrained=$2,dtype=bfloat16" --tasks "$TASKS" \
        --output_path "runs/eval/$1" $FLAGS
}
score stablelm runs/stablelm
score memphis-cot runs/memphis-cot
score scribe-ft runs/scribe-ft/final
score memphis-scribe memphis-scribe
