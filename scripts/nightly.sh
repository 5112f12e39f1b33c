#!/usr/bin/env bash
# The type checker, the slow proofs, and streaming through a checkpoint larger than its memory limit: 10 GB with layers
# of Qwen3-30B-A3B, 16 GB of disk at most beside it, in $PROOF_FOLDER (runs if not set), about 15 minutes on one core.
set -euo pipefail
source "$(dirname "$0")/venv.sh" dev
.venv/bin/pyright
.venv/bin/python -m pytest -m slow "$@"
mkdir -p "${PROOF_FOLDER:=runs}"
proof=$(mktemp -d "$PROOF_FOLDER/streaming.XXXXXX")
trap 'rm -rf "$proof"' EXIT
OMP_NUM_THREADS=1 .venv/bin/python scripts/prove_streaming.py --work "$proof" --json "$PROOF_FOLDER/streaming.json"
