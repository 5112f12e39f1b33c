# Sourced by the other scripts: makes .venv at the top of the repository if it is missing, and installs into it.
# Usage: source scripts/venv.sh EXTRAS     (for example: test)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
stamp=".venv/.installed-$1"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/constraints.txt -nt "$stamp" ]; then
  # torch first: a looser range would fetch a CUDA build of several gigabytes.
  .venv/bin/python -m pip install --quiet "torch==2.13.0" -c scripts/constraints.txt
  .venv/bin/python -m pip install --quiet --editable ".[$1]" -c scripts/constraints.txt
  touch "$stamp"
fi
