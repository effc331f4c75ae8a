#!/bin/sh
# Merge the finetune back onto Memphis-CoT. t = 0.4 and bfloat16 are those of the published mergekit_config.yml:
# 60 % Memphis-CoT, 40 % finetune, for every tensor. The card's prose gives no t; for an even blend say --t 0.5.
#
# --files-from ft: Memphis-CoT carries an old config that transformers 5 refuses; the finetune's is converted.
# Stopped half-way? Run it again: it continues.
set -eu
slerp-merge euclaise/Memphis-CoT-3B runs/scribe-ft/final memphis-scribe --t 0.4 --dtype bfloat16 --files-from ft
# slerp-merge euclaise/Memphis-CoT-3B runs/scribe-ft/final memphis-scribe-0.5 --t 0.5 --dtype bfloat16 --files-from ft
