#!/bin/bash
#SBATCH --job-name=merge
#SBATCH --array=0-15
#SBATCH --cpus-per-task=4
#SBATCH --mem=2G
#SBATCH --time=02:00:00
# A merge as a job array on a shared file system:
#   merge-tool plan BASE FT OUT --t 0.4 --parts 64 -o plan.json
#   job=$(sbatch --parsable slurm.sh plan.json)
#   sbatch --dependency=afterok:$job --wrap "merge-tool finish plan.json"
# Each task takes its share by SLURM_ARRAY_TASK_ID, then what dead tasks have left.
set -euo pipefail
merge-tool work "${1:-plan.json}" --steal --memory 1GB --jobs "${SLURM_CPUS_PER_TASK:-1}" --quiet
