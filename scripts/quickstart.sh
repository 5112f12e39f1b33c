#!/usr/bin/env bash
# The main job on the shipped small MoE and text: calibrate, prune, 4-bit, DoRA, evaluate, export, report.
# Ends with a table; everything is below runs/quickstart. 4 to 6 minutes on two cores after installation.
# Arguments go to the training runs, for example: bash scripts/quickstart.sh --trainer.accelerator gpu
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
run=runs/quickstart
trainer_options=("$@")
rm -rf "$run"
mkdir -p "$run/logs"
moe() { OMP_NUM_THREADS=1 .venv/bin/python -m lightning_moe "$@"; }
recover() { # NAME PRUNE_RATIO [OPTIONS]: cut, pack, recover, export and evaluate; the output goes to a log
  local name=$1 ratio=$2
  shift 2
  moe fit --config configs/quickstart.yaml --pruning.prune_ratio "$ratio" --pruning.save_plan "$run/plans/$name.json" \
    --export.folder "$run/$name" --report.name "$name" "$@" "${trainer_options[@]}" >"$run/logs/$name.log" 2>&1 || { cat "$run/logs/$name.log"; return 1; }
}

echo "[1/4] calibrate: one forward pass over five domains"
moe calibrate --config configs/quickstart_calibrate.yaml
echo "[2/4] recover at 50 %, and the control: the unpruned NF4 model given the same training (logs: $run/logs)"
recover recovered_50_nf4 0.5 &
recovered_50=$!
recover control 0
wait "$recovered_50"
echo "[3/4] one-shot methods side by side; a shorter recovery at 25 % on the other core"
recover recovered_25_nf4 0.25 --trainer.max_steps 100 &
recovered_25=$!
moe compare --config configs/quickstart_compare.yaml
wait "$recovered_25"
echo "[4/4] report"
moe report --folder "$run" --statistics "$run/statistics.safetensors"
