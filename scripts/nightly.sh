#!/usr/bin/env bash
# The slow proofs, and the type checker.
set -euo pipefail
source "$(dirname "$0")/venv.sh" dev
.venv/bin/pyright
.venv/bin/python -m pytest -m slow "$@"
