#!/usr/bin/env bash
# Train with the hardest triplets of the global batch on the nodes of a SLURM job.
#   bash slurm/triplet.sh [--config RECIPE] [section.key=value ...]
#   sbatch --nodes=2 --gpus-per-node=8 slurm/triplet.sh [--config RECIPE] [section.key=value ...]
# docs/cluster.md explains every option; those given to sbatch override these:
#SBATCH --job-name=triplet --nodes=1 --ntasks-per-node=1 --open-mode=append --output=%x-%j.log
#SBATCH --requeue --signal=B:USR1@120
cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file in a spool folder
[[ -f slurm/common.sh ]] || echo "no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
source slurm/common.sh || exit 2
train triplet_bloodcells "$@"
