#!/bin/bash
# A merge by torchrun, which sets RANK and WORLD_SIZE: 4 processes here; --nnodes and --rdzv-endpoint for more hosts.
#   bash torchrun.sh BASE FT OUT 0.4
set -euo pipefail
merge-tool plan "$1" "$2" "$3" --t "$4" --parts 8 -o plan.json
torchrun --nproc-per-node 4 --no-python merge-tool work plan.json --jobs 1 --quiet
merge-tool finish plan.json
