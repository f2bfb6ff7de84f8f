#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of under nine minutes, what nobody has seen yet first. From the
# checkout, in its environment; nothing is fetched:
#
#   bash benchmarks/gpu.sh [FOLDER]                  FOLDER (gpu-results) gets RESULTS.md, log.txt, parts.txt, losses.png
#   PARTS="tests steps" bash benchmarks/gpu.sh       only some of the parts below
#   LIMIT=300 bash benchmarks/gpu.sh                 seconds in all; what does not fit is left for another call
#   PBC28=pbc28.npz bash benchmarks/gpu.sh           trains on these images instead of synthetic ones
#
# A part has a time limit of its own and stops no other. parts.txt says how each went; one that is done there is not run
# again, so a second call with the same FOLDER does what is left. The exit status is 0 when all parts are done.
set -uo pipefail

cd "$(dirname "$0")/.." || exit
all=(tests kernels steps augment determinism micro_batch decode train doctor)
read -ra parts <<<"${PARTS:-${all[*]}}"
limit=${LIMIT:-530}
out=${1:-gpu-results}
left=()
for name in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "PARTS: there is no part $name, but ${all[*]}" >&2 && exit 2; }
done
mkdir -p "$out" || exit
scratch=$(mktemp -d) || exit
trap 'rm -rf "$scratch"' EXIT

part() { # NAME SECONDS COMMAND ...
  [[ " ${parts[*]} " == *" $1 "* ]] || return 0
  grep -qs "^$1: done" "$out/parts.txt" && echo "== $1 is done" && return 0
  local began=$SECONDS how
  local most=$(($2 < limit - began ? $2 : limit - began))
  if ((most < 10)); then
    how="not begun, no time is left"
  else
    echo "== $1, $most s at most"
    timeout --signal=INT --kill-after=5 "$most" "${@:3}" >"$scratch/log" 2>&1
    how=$?
    tail -n 60 "$scratch/log"
    { echo "== $1" && cat "$scratch/log"; } >>"$out/log.txt"
    case $how in
      0) how="done" ;;
      124 | 137) how="stopped after $most s" ;;
      *) how="failed with status $how" ;;
    esac
  fi
  [[ $how == "done" ]] || left+=("$1")
  echo "$1: $how, $((SECONDS - began)) s" | tee -a "$out/parts.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || exit
mapfile -t tested < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
part tests 80 python -m pytest -m 'gpu and not slow' --numprocesses 6 --dist load "${tested[@]}"
part kernels 110 python benchmarks/losses.py --device cuda --sizes 16384 131072 1048576 --only sslcells plain Flex \
  --repeats 1 --budget 90 --out "$out/RESULTS.md" --plot "$out/losses.png"
part steps 100 python benchmarks/end_to_end.py --networks resnet50 vit_small_patch16_224 --sizes 224 --images 1024 \
  --px 256 --batch 256 --workers 12 --warm 2 --steps 6 --only pack bare --seconds 40 --out "$out/RESULTS.md"
part augment 25 python benchmarks/augment.py --device cuda --pixels 256 224 --views 2 --out "$out/RESULTS.md"
# shellcheck disable=SC2016 # the inner shell's variables
part determinism 40 bash -ec '
  for name in one two; do
    python -m sslcells.train "$@" "name=$name"
  done
  cmp "${2#out=}"/{one,two}/encoder.safetensors
  echo "two runs gave the same encoder, to the last bit"' _ \
  train.deterministic=true "out=$scratch" data.train=512 data.test=64 model.backbone=resnet18 model.stem=small \
  train.precision=bf16 train.total_steps=8 train.workers=2 log.tracker=none evaluate.pictures=false
part micro_batch 50 python benchmarks/large_batch.py train.precision=bf16 --device cuda --batches 256 4096 \
  --micro-batches none 256 --out "$out/RESULTS.md"
part decode 45 python benchmarks/throughput.py --drawn 1024 360 --size 64 --workers 12 --only files device --steps 0 \
  --out "$out/RESULTS.md"
if [[ -n ${PBC28:-} ]]; then
  images=(--config configs/simclr_pbc28.yaml "data.path=$PBC28")
else
  images=(data.train=4096 data.size=64 augment.size=64)
fi
# shellcheck disable=SC2016
part train 50 bash -ec '
  accelerate launch --config_file launch/gpu1.yaml -m sslcells.train "${@:2}" "out=$1" name=gpu
  python -m sslcells.evaluate "$1/gpu" evaluate.bootstrap=200' _ \
  "$scratch" "${images[@]}" model.backbone=resnet18 model.stem=small train.precision=bf16 train.global_batch=512 \
  train.workers=12 train.total_steps=60 log.tracker=none
part doctor 30 python -m sslcells.doctor --out "$scratch"

((${#left[@]} == 0)) && exit
echo "left for another call: ${left[*]}"
exit 1
