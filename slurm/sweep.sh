#!/usr/bin/env bash
# A sweep: one run for each line of FILE, as a job array. SWEEP_AT_ONCE limits how many run at the same time.
#   SWEEP_AT_ONCE=4 bash slurm/sweep.sh configs/sweep_temperature.txt [--config RECIPE] [section.key=value ...]
#   sbatch --array=0-3 --gpus-per-node=8 slurm/sweep.sh FILE [--config RECIPE] [section.key=value ...]
# docs/cluster.md explains every option; those given to sbatch override these:
#SBATCH --job-name=sweep --nodes=1 --ntasks-per-node=1 --open-mode=append --output=%x-%A_%a.log
#SBATCH --requeue --signal=B:USR1@120
cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file in a spool folder
[[ -f slurm/common.sh ]] || echo "no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
source slurm/common.sh || exit 2
sweep simclr_bloodcells "$@"
