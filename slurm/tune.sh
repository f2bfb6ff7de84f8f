#!/usr/bin/env bash
# A search for good settings with Optuna, as a job array. TUNE_AT_ONCE says how many tasks share its trials (1).
#   TUNE_AT_ONCE=4 bash slurm/tune.sh name=NAME [section.key=value ...] --trials 40 --search KEY=RANGE ...
#   sbatch --array=0-3 --gpus-per-node=8 slurm/tune.sh name=NAME [section.key=value ...] --search KEY=RANGE ...
# docs/cluster.md explains every option; those given to sbatch override these:
#SBATCH --job-name=tune --nodes=1 --ntasks-per-node=1 --open-mode=append --output=%x-%A_%a.log
#SBATCH --requeue --signal=B:USR1@120
cd "${SLURM_SUBMIT_DIR:-.}" # a job runs a copy of this file in a spool folder
[[ -f slurm/common.sh ]] || echo "no slurm/common.sh in $PWD: change to the checkout, or to what sslcells init wrote" >&2
source slurm/common.sh || exit 2
tune simclr_bloodcells "$@"
