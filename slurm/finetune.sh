#!/usr/bin/env bash
# Fine-tuning of a trained encoder with labels on the nodes of a SLURM job. From the checkout, on a login node, either
#
#   bash slurm/finetune.sh [--config FILE] model.encoder=runs/NAME [section.key=value ...]
#   sbatch --gpus-per-node=1 slurm/finetune.sh [--config FILE] model.encoder=runs/NAME [section.key=value ...]
#
# The first checks the configuration before it queues anything, and takes sbatch's options from slurm/site.sh.
# docs/cluster.md says what each line is for. Options given to sbatch overrule these:
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file, from a spool folder
if [[ ! -f slurm/common.sh ]]; then
  echo "slurm/finetune.sh: $PWD is not the checkout of sslcells: change to it, then submit" >&2
  exit 2
fi
source slurm/common.sh
main configs/finetune_bloodcells.yaml "$@"
