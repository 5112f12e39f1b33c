#!/usr/bin/env bash
# Makes .venv if it is missing, installs, and runs lint and tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
.venv/bin/ruff check lightning_moe callbacks tests scripts
.venv/bin/ruff format --check lightning_moe callbacks tests scripts
.venv/bin/python -m pytest -m "not slow and not gpu" "$@"
