# shellcheck shell=bash
# What the templates share: on a login node check and submit, in a job check and train.

# main RECIPE [ARGUMENT ...]: a --config among the arguments comes later than the recipe, and so replaces it.
main() {
  source slurm/site.sh
  local recipe=$1
  shift
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run --config "$recipe" "$@"
  else
    check 1 --config "$recipe" "$@" >/dev/null
    sbatch "${sbatch_options[@]}" "$0" "$@"
  fi
}

# check RANKS ARGUMENT ...: print the whole configuration, or say what is wrong with it and exit with 2.
check() {
  WORLD_SIZE=$1 python -m sslcells.train --check "${@:2}" || exit
}

# run ARGUMENT ...: on the batch node, from the first check to the training's exit status.
run() {
  trap requeue USR1
  local nodes node devices per_node ranks configuration folder port cpus launch status=0
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  devices=$(gpus)
  per_node=$((devices > 0 ? devices : ${SSLCELLS_CPU_RANKS:-1}))
  ranks=$((${#nodes[@]} * per_node))
  echo "job $SLURM_JOB_ID: nodes ${nodes[*]}; ranks $ranks; SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}"

  configuration=$(check "$ranks" "$@") || exit
  folder=$(sed -n "s/^out: //p" <<<"$configuration")/$(sed -n "s/^name: //p" <<<"$configuration")
  folder=${folder//\'/} # YAML quotes what looks like a number
  for node in "${nodes[@]}"; do
    getent hosts "$node" >/dev/null || fail "the name of node $node does not resolve on $(hostname)"
  done
  mkdir -p "$folder" || fail "the run's folder $folder cannot be made"
  port=$(free_port) || fail "no free port for the rendezvous on ${nodes[0]}"

  # Without --cpus-per-task the step's one task would be bound to one core, and all its data loaders with it.
  cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > per_node ? cpus / per_node : 1))}
  if ((devices == 0)); then
    echo "no GPU in this job: training on CPUs with gloo, $per_node rank(s) a node"
    export ACCELERATE_USE_CPU=true
  fi
  if ((ranks == 1)); then
    launch=(--config_file launch/gpu1.yaml)
  else
    launch=(
      --config_file launch/nodes.yaml # and so not whatever ~/.cache/huggingface/accelerate holds
      --multi_gpu                     # also for ranks on CPUs: MULTI_CPU would need mpirun
      --num_machines "${#nodes[@]}"
      --num_processes "$ranks"
      --main_process_ip "${nodes[0]}"
      --main_process_port "$port"
      --rdzv_backend static
    )
  fi
  # One task a node; it starts the ranks of its node. --export: a job submitted with --export=NONE would otherwise lose
  # its modules and its virtual environment here. In the background, because bash runs traps only between commands.
  srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 --export=ALL \
    bash -c 'source slurm/common.sh && on_node "$@"' bash "$devices" "$folder" \
    "${launch[@]}" -m sslcells.train "$@" &
  step=$!
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do # the trap ended the wait, not the training
    status=0
    wait "$step" || status=$?
  done
  exit "$status"
}

# on_node GPUS FOLDER ARGUMENT ...: the one task on each node; it becomes accelerate launch for the ranks there. The
# rendezvous waits for all nodes, so that no training begins where one of them fails here.
on_node() {
  local expected=$1 folder=$2 devices probe
  shift 2
  devices=$(gpus)
  ((devices == expected)) ||
    fail "GPUs on $SLURMD_NODENAME: $devices, on the batch node: $expected; all nodes need as many"
  [[ -d $folder ]] || fail "$SLURMD_NODENAME does not see the run's folder $folder: is it on a shared disk?"
  probe=$(mktemp "$folder/.probe-XXXXXX") || fail "the run's folder $folder is not writable from $SLURMD_NODENAME"
  rm "$probe"
  trap "" USR1 # stays so in the launcher, which has no use for the signal; training may set a handler of its own
  exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"
}

# requeue: the time limit is near, or the job is being preempted; it goes back into the queue, and then resumes.
requeue() {
  trap "" USR1
  echo "job $SLURM_JOB_ID: SIGUSR1, back into the queue"
  if [[ ${SSLCELLS_FORWARD_SIGNAL:-0} == 1 && -n ${step:-} ]]; then
    kill -USR1 "$step"
    timeout 90 tail --pid="$step" -f /dev/null || true # the training's time to write a checkpoint and end
  fi
  scontrol requeue "$SLURM_JOB_ID"
}

# gpus: how many the job has on this node; fewer than SLURM says where the driver lost one.
gpus() {
  local seen
  seen=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU" || true)
  if [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || ((0 < seen && seen < SLURM_GPUS_ON_NODE)); then
    echo "$seen"
  else
    echo "$SLURM_GPUS_ON_NODE"
  fi
}

# free_port: one of this node's that nobody listens on, from the job's id so that jobs seldom meet; below 32768, where
# outgoing connections take theirs.
free_port() {
  python - "$SLURM_JOB_ID" <<'PY'
import socket, sys

for port in (20000 + (int(sys.argv[1]) + i) % 12000 for i in range(100)):
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            continue
    print(port)
    sys.exit()
sys.exit(1)
PY
}

fail() {
  echo "slurm: $*" >&2
  exit 1
}
