#!/usr/bin/env bash
# Evaluate a finished run on the nodes of a SLURM job.
#   bash slurm/evaluate.sh runs/NAME [section.key=value ...]
#   sbatch --gpus-per-node=1 slurm/evaluate.sh runs/NAME [section.key=value ...]
# docs/cluster.md explains every option; those given to sbatch override these:
#SBATCH --job-name=evaluate --nodes=1 --ntasks-per-node=1 --open-mode=append --output=%x-%j.log
cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file in a spool folder
[[ -f slurm/common.sh ]] || echo "no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
source slurm/common.sh || exit 2
evaluate "$@"
