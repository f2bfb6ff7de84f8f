# shellcheck shell=bash
# What differs from cluster to cluster: edit this file once. It is read on the login node and again in the job, before
# anything is started. No passwords or tokens: `wandb login` keeps its own in ~/.netrc.

# Options of sbatch that every job of yours needs; `bash slurm/<template>.sh` adds them. `sbatch slurm/<template>.sh`
# does not read this file: give it the options yourself.
# shellcheck disable=SC2034 # read in common.sh
sbatch_options=(
  --nodes="${NODES:-1}" # NODES=4 bash slurm/simclr.sh
  # --account=my-lab
  # --partition=gpu
  # --gpus-per-node=8 # older clusters: --gres=gpu:8
  # --cpus-per-task=64 # all that belong to a node's GPUs: its data loaders run on them
  # --mem=0 # the whole memory of the nodes
  # --time=24:00:00
)

# How a shell on your cluster gets at python and accelerate.
# module load cuda
# source .venv/bin/activate

# The network between the nodes, where NCCL or gloo do not find the right one by themselves (`ip -br address`).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
