# shellcheck shell=bash
# What differs between clusters: edit this file once. It is read on the login node and again in the job, before anything
# starts. Put no passwords or tokens here: `wandb login` keeps its own in ~/.netrc.

# sbatch options that all your jobs need. `bash slurm/<template>.sh` adds them; `sbatch slurm/<template>.sh` does not
# read this file, so give it the options yourself.
# shellcheck disable=SC2034 # read in common.sh
sbatch_options=(
  --nodes="${NODES:-1}" # NODES=4 bash slurm/simclr.sh
  # --account=my-lab
  # --partition=gpu
  # --gpus-per-node=8 # older clusters: --gres=gpu:8
  # --cpus-per-task=64 # all CPUs that belong to a node's GPUs: the data loaders run on them
  # --mem=0 # all memory of the nodes
  # --time=24:00:00
)

# How a shell on your cluster finds python and accelerate.
# module load cuda
# source .venv/bin/activate

# The network between the nodes, if NCCL or gloo do not find the right one (`ip -br address`).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
