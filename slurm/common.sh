# shellcheck shell=bash
# All that the templates do. On a login node: check and submit. In a job: check, train, and requeue where that helps.
# A template holds only what must be in the submitted file itself: the #SBATCH line, which sbatch reads nowhere else.

module=sslcells.train array= # what runs, and the tasks of a job array; tune has its own

# train RECIPE [ARGUMENT ...]: a --config among the arguments comes after the recipe and so replaces it.
train() {
  begin
  local recipe
  recipe=$(recipe_of "$1")
  shift
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run --config "$recipe" "$@"
  else
    check 1 --config "$recipe" "$@" >/dev/null
    sbatch "${sbatch_options[@]}" ${array:+--array="$array"} "$0" "$@"
  fi
}

# begin: stop at the first error; the cluster's own options and environment.
begin() {
  set -euo pipefail
  source slurm/site.sh
}

# recipe_of NAME: the file configs/NAME.yaml where there is one, as it may be edited; otherwise the name, for the recipe
# that sslcells ships.
recipe_of() {
  if [[ -f configs/$1.yaml ]]; then
    echo "configs/$1.yaml"
  else
    echo "$1"
  fi
}

# sweep RECIPE FILE [ARGUMENT ...]: like train, for each line of FILE that is neither empty nor a comment. In a job
# array, task N runs line N, counted from 0.
sweep() {
  begin
  local recipe file=${2:-} lines arguments i configuration name wrong=0
  local -A line_of=()
  recipe=$(recipe_of "$1")
  [[ -f $file ]] || fail "a sweep needs its file first: bash slurm/sweep.sh configs/sweep_temperature.txt" 2
  shift 2
  mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$file" || true)
  ((${#lines[@]})) || fail "$file holds no line with a run" 2

  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    i=${SLURM_ARRAY_TASK_ID:-} # empty in a job that is not an array
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

# tune RECIPE [ARGUMENT ...]: a search with Optuna. TUNE_AT_ONCE tasks of a job array share its study in out/name: each
# takes the next trial, and resumes those of tasks that are gone.
tune() {
  local module=sslcells.tune array=0-$((${TUNE_AT_ONCE:-1} - 1))
  train "$@"
}

# sweep_arguments NUMBER [ARGUMENT ...]: the arguments of one run, in order of rising priority: the default name, the
# common arguments, the words of its line (quoted as in a shell). Options come first: a command line takes all its
# section.key=value in one piece.
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

# check RANKS ARGUMENT ...: print the whole configuration, or print what is wrong with it and exit with 2.
check() {
  WORLD_SIZE=$1 python -m "$module" --check "${@:2}" || exit
}

# value KEY CONFIGURATION: the value of a top-level key. YAML quotes a string that looks like a number.
value() {
  sed -n "s/^$1: //p" <<<"$2" | tr -d "'"
}

# run ARGUMENT ...: on the batch node, everything from the first check to the exit status or the requeue.
run() {
  # In an array's last task SLURM_JOB_ID is the array's number: scontrol requeue would start all its tasks again.
  job=$SLURM_JOB_ID asked='' step='' status=0
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  trap "ask USR1" USR1
  trap "ask TERM" TERM
  local nodes devices per_node ranks configuration each_node launch newest exported
  survey
  configuration=$(check "$ranks" "$@") || exit
  folder=$(value out "$configuration")/$(value name "$configuration")
  arrange
  rm -f "$folder/stopped.txt" # from an earlier job
  newest=$(newest) exported=$(exported)
  if [[ -z $asked ]]; then
    "${each_node[@]}" launch "${launch[@]}" -m "$module" "$@" &
    step=$!
    await "$step" || status=$?
  fi

  if [[ $asked == TERM ]]; then # the sender of SIGTERM decides whether the job is requeued
    echo "job $job: SIGTERM, ended"
    exit 143
  elif [[ -f $folder/stopped.txt ]]; then
    echo "job $job: not requeued, as this would happen again: $(<"$folder/stopped.txt")" >&2
    exit $((status > 0 ? status : 1))
  elif ((status == 0)) && [[ $(exported) != "$exported" ]]; then
    exit 0
  elif [[ $asked == USR1 ]]; then
    again "SIGUSR1"
  elif ((status == 0)); then # only the ranks got the signal
    again "the ranks were asked to stop"
  else
    again "the training was cut off, with status $status"
  fi
}

# evaluate RUN [ARGUMENT ...]: submit the evaluation of a finished run; in the job, evaluate it. It is not requeued.
evaluate() {
  begin
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

# survey: set the caller's nodes, devices (GPUs a node), per_node (ranks a node) and ranks.
survey() {
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  devices=$(gpus)
  per_node=$((devices > 0 ? devices : ${SSLCELLS_CPU_RANKS:-1}))
  ranks=$((${#nodes[@]} * per_node))
  echo "job $job: nodes ${nodes[*]}; ranks $ranks; SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}"
}

# arrange: set the caller's each_node and launch, the commands that start ranks on the nodes, and inspect each node.
arrange() {
  local node port cpus
  for node in "${nodes[@]}"; do
    getent hosts "$node" >/dev/null || fail "the name of node $node does not resolve on $(hostname)"
  done
  mkdir -p "$folder" || fail "the run's folder $folder cannot be created"
  port=$(free_port) || fail "no free port for the rendezvous on ${nodes[0]}"

  # Without --cpus-per-task, the one task of the step and all its data loaders would share one core.
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
      --config_file launch/nodes.yaml # otherwise accelerate reads ~/.cache/huggingface/accelerate
      --multi_gpu                     # for ranks on CPUs too: MULTI_CPU would need mpirun
      --num_machines "${#nodes[@]}"
      --num_processes "$ranks"
      --main_process_ip "${nodes[0]}"
      --main_process_port "$port"
      --rdzv_backend static
    )
  fi
  # --export: a job submitted with --export=NONE would otherwise lose its modules and its virtual environment here.
  # --kill-on-bad-exit: when a rank dies, ranks on other nodes could wait for it in a collective for hours.
  each_node=(
    srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus"
    --kill-on-bad-exit=1 --export=ALL bash -c 'source slurm/common.sh && "$@"' bash
  )
  # A separate step: a broken node is not a training that died, and a requeue would not help.
  "${each_node[@]}" inspect "$devices" "$folder" || exit
}

# ask SIGNAL: SLURM wants the nodes back. The ranks always get SIGUSR1: on SIGTERM, srun would kill them.
ask() {
  [[ $asked == TERM ]] || asked=$1
  echo "job $job: SIG$1${step:+, handed to the ranks}"
  [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}

# await PROCESS: wait for it and return its exit status, or 124 if it still runs 90 seconds after `ask`.
await() {
  local left=90
  while kill -0 "$1" 2>/dev/null; do
    if [[ -z ${asked:-} ]]; then
      wait "$1" || true # returns when the process ends or a trap has run
      continue
    fi
    ((left-- > 0)) || return 124
    ((left % 10)) || kill -USR1 "$1" 2>/dev/null || true # ranks that were still starting missed the first one
    deaf sleep 1
  done
  wait "$1"
}

# again REASON: requeue the job, so that SLURM starts it with the same arguments; give up when it makes no progress.
again() {
  local try starts=$((${SLURM_RESTART_COUNT:-0} + 1))
  if ((starts > 2)) && [[ $(newest) == "$newest" ]]; then
    fail "$1; not requeued: start $starts of this job wrote no new checkpoint, and the next would not either.
  Look above for what ended it. Too little time: a smaller checkpoint.every_steps, a longer --time. Out of memory:
  a smaller train.micro_batch, fewer train.workers, more --mem. Then submit it again: it resumes where it was."
  fi
  echo "job $job: $1, requeued"
  trap "" USR1 TERM # the requeue ends this script with SIGTERM
  for try in 1 2 3; do
    ((try == 1)) || sleep 5
    ! scontrol requeue "$job" || exit 0
  done
  fail "SLURM refuses to requeue job $job; submit it again with the same arguments, and it resumes"
}

# newest: the newest complete checkpoint of the run, or of the last trial of a search.
newest() {
  find "$folder"/{,trial_*/}checkpoints -maxdepth 1 -name "step_*" 2>/dev/null | sort | tail -n 1
}

# exported: a word that changes when the run's encoder, or a search's table, is written: the last thing that either does.
exported() {
  stat --format=%i-%y "$folder"/{encoder.safetensors,trials.csv} 2>/dev/null || true
}

# inspect GPUS FOLDER: on each node, fail if a rank cannot work there.
inspect() {
  local devices probe
  devices=$(gpus)
  ((devices == $1)) || fail "GPUs on $SLURMD_NODENAME: $devices, on the batch node: $1; all nodes need as many"
  [[ -d $2 ]] || fail "$SLURMD_NODENAME does not see the run's folder $2: is it on a shared disk?"
  probe=$(mktemp "$2/.probe-XXXXXX") || fail "the run's folder $2 is not writable from $SLURMD_NODENAME"
  rm "$probe"
}

# launch ARGUMENT ...: the one task on each node; runs accelerate launch for the node's ranks. With proctrack/cgroup
# SLURM signals this task but none of its child processes, so it waits and passes signals on to the ranks. The launcher
# ignores SIGUSR1 (and SIGTERM, if it has only one rank), and so do its ranks until they install their own handlers.
launch() {
  local launcher='' term=0 status=0
  trap 'deaf pkill -USR1 -P "$launcher" || true' USR1
  trap 'deaf pkill -TERM -P "$launcher" || true; term=1' TERM
  (trap "" USR1 TERM && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
  launcher=$!
  await "$launcher" || status=$?
  # Ranks on other nodes need some seconds to find out who died and to report it, before srun kills them.
  ((status == 0 || term)) || deaf sleep 10
  return "$status"
}

# deaf COMMAND ...: run it with both signals ignored. With proctrack/linuxproc SLURM signals all processes of a job.
deaf() {
  (trap "" USR1 TERM && exec "$@")
}

# gpus: the number of GPUs on this node; fewer than SLURM says if the driver lost one.
gpus() {
  local seen
  seen=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU" || true)
  if [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || ((0 < seen && seen < SLURM_GPUS_ON_NODE)); then
    echo "$seen"
  else
    echo "$SLURM_GPUS_ON_NODE"
  fi
}

# free_port: a free port of this node. The search starts at a number made from the job's id, so that jobs rarely collide,
# and stays below 32768, where ports of outgoing connections begin.
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
