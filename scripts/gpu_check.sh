#!/usr/bin/env bash
# What only a GPU can show, at most 10 minutes on one: the tests marked `gpu`, the quickstart on the GPU, serving speed,
# and a calibration and cut that move one layer at a time to the GPU, killed and resumed.
# Install the CUDA build of torch 2.13.0 that your driver supports into .venv first.
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
.venv/bin/python - <<'PYTHON'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"scripts/gpu_check.sh needs a GPU that torch {torch.__version__} can use, and none is visible.")
print(f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
PYTHON
.venv/bin/python -m pytest -m gpu -rs --log-cli-level=WARNING tests/test_gpu.py "$@"
bash scripts/quickstart.sh --trainer.accelerator gpu
.venv/bin/python scripts/bench_serve.py --quick
proof=$(mktemp -d)
trap 'rm -rf "$proof"' EXIT
.venv/bin/python scripts/prove_streaming.py --quick --work "$proof" --limit 16GB
