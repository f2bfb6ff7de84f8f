#!/usr/bin/env bash
# What a finished run has learned, measured on the nodes of a SLURM job. From the checkout, or the folder
# that `sslcells init` wrote, on a login node, either
#
#   bash slurm/evaluate.sh runs/NAME [section.key=value ...]
#   sbatch --gpus-per-node=1 slurm/evaluate.sh runs/NAME [section.key=value ...]
#
# The first looks at the folder before it queues anything, and takes sbatch's options from slurm/site.sh.
# Options given to sbatch overrule these:
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file, from a spool folder
if [[ ! -f slurm/common.sh ]]; then
  echo "slurm/evaluate.sh: no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
  exit 2
fi
source slurm/common.sh
evaluate "$@"
