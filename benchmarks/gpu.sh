#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of at most 25 minutes: the GPU tests, doctor, the losses beside the
# peers and FlexAttention, large batches, decoding of JPEG, and a training run with its evaluation. From the checkout, in
# its environment:
#
#   bash benchmarks/gpu.sh [FOLDER]                  prints; sections for RESULTS.md and a log go to FOLDER
#   PARTS="tests losses" bash benchmarks/gpu.sh      only some of: tests doctor losses augment large decode train evaluate
#   PBC28=pbc28.npz bash benchmarks/gpu.sh           trains on these images instead of synthetic ones
set -uo pipefail

cd "$(dirname "$0")/.." || exit
out=${1:-gpu-results}
mkdir -p "$out"
status=0

part() { # NAME SECONDS COMMAND ...
  [[ " ${PARTS:-tests doctor losses augment large decode train evaluate} " == *" $1 "* ]] || return 0
  echo "== $1"
  timeout --signal=INT --kill-after=30 "$2" "${@:3}" 2>&1 | tee -a "$out/$1.log" || status=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || exit
part tests 300 python -m pytest -q -m gpu
part doctor 120 python -m sslcells.doctor --out "$out"
part losses 400 python benchmarks/losses.py --device cuda --repeats 5 --out "$out/RESULTS.md" --plot "$out/losses_gpu.png"
part augment 120 python benchmarks/augment.py --device cuda --out "$out/RESULTS.md"
part large 240 python benchmarks/large_batch.py train.precision=bf16 --device cuda --batches 256 1024 4096 --micro-batches none 256 --out "$out/RESULTS.md"
part decode 240 python benchmarks/throughput.py --drawn 4096 360 --size 64 --workers 12 --only files device --steps 30 --out "$out/RESULTS.md"
if [[ -n ${PBC28:-} ]]; then
  images=(--config configs/simclr_pbc28.yaml "data.path=$PBC28" model.backbone=resnet18 model.stem=small)
else
  images=(data.train=20000 data.size=64 augment.size=64 model.backbone=resnet18 model.stem=small)
fi
part train 480 accelerate launch --config_file launch/gpu1.yaml -m sslcells.train "${images[@]}" \
  name=gpu out="$out/runs" train.precision=bf16 train.global_batch=1024 train.workers=12 train.total_epochs=60 log.tracker=none
part evaluate 60 python -m sslcells.evaluate "$out/runs/gpu" evaluate.bootstrap=200
exit "$status"
