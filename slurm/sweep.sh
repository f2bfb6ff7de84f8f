#!/usr/bin/env bash
# A sweep: one run for each line of a file, as a job array. From the checkout, or the folder
# that `sslcells init` wrote, on a login node, either
#
#   SWEEP_AT_ONCE=4 bash slurm/sweep.sh configs/sweep_temperature.txt [--config FILE] [section.key=value ...]
#   sbatch --array=0-3 --gpus-per-node=8 slurm/sweep.sh FILE [--config FILE] [section.key=value ...]
#
# The first checks every line before it queues anything, counts them, and takes sbatch's options from slurm/site.sh;
# SWEEP_AT_ONCE is how many may run at the same time, by default all. The arguments are common to all runs.
# docs/cluster.md says what each line is for. Options given to sbatch overrule these:
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file, from a spool folder
if [[ ! -f slurm/common.sh ]]; then
  echo "slurm/sweep.sh: no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
  exit 2
fi
source slurm/common.sh
sweep simclr_bloodcells "$@"
