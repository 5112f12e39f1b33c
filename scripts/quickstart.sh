#!/usr/bin/env bash
# The main job on the shipped small MoE and text: calibrate, prune, 4-bit, DoRA, evaluate, export, report.
# Ends with a table; everything is below runs/quickstart. About 6 minutes on two cores after installation.
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
run=runs/quickstart
rm -rf "$run"
mkdir -p "$run/logs"
moe() { OMP_NUM_THREADS=1 .venv/bin/python -m lightning_moe "$@"; }
recover() { # NAME PRUNE_RATIO: cut, pack, recover, export and evaluate; logs go to a file
  moe fit --config configs/quickstart.yaml --pruning.prune_ratio "$2" --pruning.save_plan "$run/plans/$1.json" \
    --export.folder "$run/$1" --report.name "$1" >"$run/logs/$1.log" 2>&1 || { cat "$run/logs/$1.log"; return 1; }
}

echo "[1/4] calibrate: one forward pass over five domains"
moe calibrate --config configs/quickstart_calibrate.yaml
echo "[2/4] recover at 50 % on one core (log: $run/logs/recovered_50_nf4.log); one-shot comparison on the other"
recover recovered_50_nf4 0.5 &
recovered_50=$!
moe compare --config configs/quickstart_compare.yaml
wait "$recovered_50"
echo "[3/4] recover at 25 %, and the control: the unpruned NF4 model given the same training"
recover recovered_25_nf4 0.25 &
recovered_25=$!
recover control 0
wait "$recovered_25"
echo "[4/4] report"
moe report --folder "$run" --statistics "$run/statistics.safetensors"
