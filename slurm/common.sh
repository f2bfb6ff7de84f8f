# shellcheck shell=bash
# What the templates share: on a login node check and submit; in a job check, train, and go back into the queue or not.

# main RECIPE [ARGUMENT ...]: a --config among the arguments comes later than the recipe, and so replaces it.
main() {
  source slurm/site.sh
  local recipe
  recipe=$(recipe_of "$1")
  shift
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run --config "$recipe" "$@"
  else
    check 1 --config "$recipe" "$@" >/dev/null
    sbatch "${sbatch_options[@]}" "$0" "$@"
  fi
}

# recipe_of NAME: its file in configs/ here, which may be edited; else its name, for the one that sslcells brings.
recipe_of() {
  if [[ -f configs/$1.yaml ]]; then
    echo "configs/$1.yaml"
  else
    echo "$1"
  fi
}

# sweep RECIPE FILE [ARGUMENT ...]: as main, once for each line of FILE that is neither empty nor a comment. In a job
# array a task takes the line of its number, counted from 0.
sweep() {
  source slurm/site.sh
  local recipe file=${2:-} lines arguments i configuration name wrong=0
  local -A line_of=()
  recipe=$(recipe_of "$1")
  [[ -f $file ]] || fail "a sweep needs its file first: bash slurm/sweep.sh configs/sweep_temperature.txt" 2
  shift 2
  mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$file" || true)
  ((${#lines[@]})) || fail "$file holds no line with a run" 2

  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    i=${SLURM_ARRAY_TASK_ID:-} # none in a job that is no array
    [[ -n $i && -n ${lines[i]:-} ]] ||
      fail "task ${i:-without a number}, but $file holds ${#lines[@]} run(s): sbatch --array=0-$((${#lines[@]} - 1))" 2
    sweep_arguments "$i" "$@"
    run "${arguments[@]}"
  fi
  for i in "${!lines[@]}"; do
    sweep_arguments "$i" "$@"
    if ! configuration=$(check 1 "${arguments[@]}"); then
      wrong=1
      echo "slurm: that was run $i of $file: ${lines[i]}" >&2
      continue
    fi
    name=$(value name "$configuration")
    if [[ -n ${line_of[$name]:-} ]]; then
      wrong=1
      echo "slurm: two runs of $file are called $name: ${line_of[$name]} and $i" >&2
    fi
    line_of[$name]=$i
  done
  ((wrong == 0)) || exit 2
  sbatch "${sbatch_options[@]}" --array="0-$((${#lines[@]} - 1))${SWEEP_AT_ONCE:+%$SWEEP_AT_ONCE}" "$0" "$file" "$@"
}

# sweep_arguments NUMBER [ARGUMENT ...]: of a sweep's run, the default name, the common arguments, those of its line,
# quoted as in a shell; what comes later counts. Options first: a command line takes its section.key=value in one piece.
sweep_arguments() {
  local stem=${file##*/} parsed words=() word options=(--config "$recipe") value=''
  parsed=$(xargs -r printf '%s\n' <<<"${lines[$1]}") || fail "run $1 of $file cannot be read: ${lines[$1]}" 2
  mapfile -t words <<<"$parsed"
  arguments=("name=${stem%.*}-$1")
  for word in "${@:2}" "${words[@]}"; do
    if [[ -n $value || $word == -* ]]; then
      options+=("$word")
    else
      arguments+=("$word")
    fi
    [[ $word == --config ]] && value=next || value=''
  done
  arguments=("${options[@]}" "${arguments[@]}")
}

# check RANKS ARGUMENT ...: print the whole configuration, or say what is wrong with it and exit with 2.
check() {
  WORLD_SIZE=$1 python -m sslcells.train --check "${@:2}" || exit
}

# value KEY CONFIGURATION: one that stands at the left margin; YAML quotes what looks like a number.
value() {
  sed -n "s/^$1: //p" <<<"$2" | tr -d "'"
}

# run ARGUMENT ...: on the batch node, from the first check to the training's exit status or back into the queue.
run() {
  # SLURM_JOB_ID of an array's last task is the array's: scontrol requeue would start all its tasks once more.
  job=$SLURM_JOB_ID asked='' step='' status=0
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  trap "ask USR1" USR1
  trap "ask TERM" TERM
  local nodes devices per_node ranks configuration each_node launch newest exported
  survey
  configuration=$(check "$ranks" "$@") || exit
  folder=$(value out "$configuration")/$(value name "$configuration")
  arrange
  rm -f "$folder/stopped.txt" # of an earlier job
  newest=$(newest) exported=$(exported)
  if [[ -z $asked ]]; then
    "${each_node[@]}" launch "${launch[@]}" -m sslcells.train "$@" &
    step=$!
    await "$step" || status=$?
  fi

  if [[ $asked == TERM ]]; then # whoever sent it requeues the job where that is wanted
    echo "job $job: SIGTERM, ended"
    exit 143
  elif [[ -f $folder/stopped.txt ]]; then
    echo "job $job: not back into the queue, as this would come again: $(<"$folder/stopped.txt")" >&2
    exit $((status > 0 ? status : 1))
  elif ((status == 0)) && [[ $(exported) != "$exported" ]]; then
    exit 0
  elif [[ $asked == USR1 ]]; then
    again "SIGUSR1"
  elif ((status == 0)); then # the signal came to the ranks alone
    again "the ranks were asked to stop"
  else
    again "the training was cut off, with status $status"
  fi
}

# evaluate RUN [ARGUMENT ...]: measure a finished run, on a login node by way of the queue. What is cut off is lost.
evaluate() {
  source slurm/site.sh
  local nodes devices per_node ranks each_node launch
  folder=${1:-}
  [[ -f $folder/config.yaml && -f $folder/encoder.json ]] ||
    fail "${folder:-no folder} is not the folder of a finished run: bash slurm/evaluate.sh runs/my_cells" 2
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    sbatch "${sbatch_options[@]}" "$0" "$@"
    return
  fi
  job=$SLURM_JOB_ID
  survey
  arrange
  "${each_node[@]}" launch "${launch[@]}" -m sslcells.evaluate "$@"
}

# survey: the job's nodes, GPUs of each and ranks, into the caller's variables.
survey() {
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  devices=$(gpus)
  per_node=$((devices > 0 ? devices : ${SSLCELLS_CPU_RANKS:-1}))
  ranks=$((${#nodes[@]} * per_node))
  echo "job $job: nodes ${nodes[*]}; ranks $ranks; SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}"
}

# arrange: how to start ranks on the nodes, into the caller's variables, after a look at each of them.
arrange() {
  local node port cpus
  for node in "${nodes[@]}"; do
    getent hosts "$node" >/dev/null || fail "the name of node $node does not resolve on $(hostname)"
  done
  mkdir -p "$folder" || fail "the run's folder $folder cannot be made"
  port=$(free_port) || fail "no free port for the rendezvous on ${nodes[0]}"

  # Without --cpus-per-task the step's one task would be bound to one core, and all its data loaders with it.
  cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > per_node ? cpus / per_node : 1))}
  if ((devices == 0)); then
    echo "no GPU in this job: on CPUs with gloo, $per_node rank(s) a node"
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
  # --export: a job submitted with --export=NONE would otherwise lose its modules and its virtual environment here.
  # --kill-on-bad-exit: where a rank died, those of other nodes may wait for it in a collective until the next day.
  each_node=(
    srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus"
    --kill-on-bad-exit=1 --export=ALL bash -c 'source slurm/common.sh && "$@"' bash
  )
  # A step of its own: what is wrong with a node is no death in training, and would come again.
  "${each_node[@]}" inspect "$devices" "$folder" || exit
}

# ask SIGNAL: SLURM wants the nodes back. The ranks get SIGUSR1 in any case: at SIGTERM srun would have them killed.
ask() {
  [[ $asked == TERM ]] || asked=$1
  echo "job $job: SIG$1${step:+, handed to the ranks}"
  [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}

# await PROCESS: its exit status, or 124 where it still runs 90 seconds after `ask`.
await() {
  local left=90
  while kill -0 "$1" 2>/dev/null; do
    if [[ -z ${asked:-} ]]; then
      wait "$1" || true # until its end, or a trap was run
      continue
    fi
    ((left-- > 0)) || return 124
    ((left % 10)) || kill -USR1 "$1" 2>/dev/null || true # ranks that were still starting did not hear the first
    deaf sleep 1
  done
  wait "$1"
}

# again REASON: back into the queue, from where SLURM starts the job with the same arguments; but not for ever.
again() {
  local try starts=$((${SLURM_RESTART_COUNT:-0} + 1))
  if ((starts > 2)) && [[ $(newest) == "$newest" ]]; then
    fail "$1; not back into the queue: start $starts of this job made no new checkpoint, and the next would not either.
  Look above for what ended it. Too little time: a smaller checkpoint.every_steps, a longer --time. Killed for its memory:
  a smaller train.micro_batch, fewer train.workers, more --mem. Then submit it again: it goes on from where it is."
  fi
  echo "job $job: $1, back into the queue"
  trap "" USR1 TERM # the requeue ends this script with SIGTERM
  for try in 1 2 3; do
    ((try == 1)) || sleep 5
    ! scontrol requeue "$job" || exit 0
  done
  fail "SLURM does not take job $job back; submit it again with the same arguments, and it goes on"
}

# newest: the newest whole checkpoint of the run.
newest() {
  find "$folder/checkpoints" -maxdepth 1 -name "step_*" 2>/dev/null | sort | tail -n 1
}

# exported: a word that changes when the run's encoder is written, which is the last that a training does.
exported() {
  stat --format=%i-%y "$folder/encoder.safetensors" 2>/dev/null || true
}

# inspect GPUS FOLDER: on each node, whether a rank can work there.
inspect() {
  local devices probe
  devices=$(gpus)
  ((devices == $1)) || fail "GPUs on $SLURMD_NODENAME: $devices, on the batch node: $1; all nodes need as many"
  [[ -d $2 ]] || fail "$SLURMD_NODENAME does not see the run's folder $2: is it on a shared disk?"
  probe=$(mktemp "$2/.probe-XXXXXX") || fail "the run's folder $2 is not writable from $SLURMD_NODENAME"
  rm "$probe"
}

# launch ARGUMENT ...: the one task on each node, accelerate launch for the ranks there. With proctrack/cgroup SLURM
# signals this task and no process below it, so it stays and hands signals to the ranks. The launcher ignores SIGUSR1,
# and its ranks inherit that until they set a handler of their own; SIGTERM too, where it has but one rank.
launch() {
  local launcher='' term=0 status=0
  trap 'deaf pkill -USR1 -P "$launcher" || true' USR1
  trap 'deaf pkill -TERM -P "$launcher" || true; term=1' TERM
  (trap "" USR1 TERM && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
  launcher=$!
  await "$launcher" || status=$?
  # Ranks of other nodes take some seconds to find out who died, and to say so, before srun has them killed.
  ((status == 0 || term)) || deaf sleep 10
  return "$status"
}

# deaf COMMAND ...: with proctrack/linuxproc SLURM signals every process there is, and this one must not end by it.
deaf() {
  (trap "" USR1 TERM && exec "$@")
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

# fail MESSAGE [STATUS]
fail() {
  echo "slurm: $1" >&2
  exit "${2:-1}"
}
