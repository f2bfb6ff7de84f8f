#!/usr/bin/env bash
# Fine-tune a trained encoder with labels on the nodes of a SLURM job.
#   bash slurm/finetune.sh [--config RECIPE] model.encoder=runs/NAME [section.key=value ...]
#   sbatch --gpus-per-node=1 slurm/finetune.sh [--config RECIPE] model.encoder=runs/NAME [section.key=value ...]
# docs/cluster.md explains every option; those given to sbatch override these:
#SBATCH --job-name=finetune --nodes=1 --ntasks-per-node=1 --open-mode=append --output=%x-%j.log
#SBATCH --requeue --signal=B:USR1@120
cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file in a spool folder
[[ -f slurm/common.sh ]] || echo "no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
source slurm/common.sh || exit 2
train finetune_bloodcells "$@"
