#!/usr/bin/env bash
# Makes .venv if it is missing, installs, and runs lint, the yardstick and tests. Arguments go to pytest: `bash scripts/test.sh -m property`.
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
.venv/bin/ruff check lightning_moe callbacks tests scripts
.venv/bin/ruff format --check lightning_moe callbacks tests scripts
.venv/bin/python scripts/yardstick.py
# One process a core, each with one thread: half the time of one process with threads in every kernel.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile "$@"
