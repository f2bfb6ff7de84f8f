#!/usr/bin/env bash
# Fine-tuning of a trained encoder with labels on the nodes of a SLURM job. From the checkout, or the folder
# that `sslcells init` wrote, on a login node, either
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
  echo "slurm/finetune.sh: no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
  exit 2
fi
source slurm/common.sh
main finetune_bloodcells "$@"
