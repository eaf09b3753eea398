#!/usr/bin/env bash
# Linters, types and tests in the demo's .venv. --all adds the slow tests, which need the real model; and alone also
# 10,000 damaged files a reader, and the tests with the oldest and the newest versions (some GiB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test,notebook,bench,ray

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes share the tests, so each computes with one thread.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
if [ "$*" = --all ]; then
  OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/test_fuzz.py --cases 10000
  bash scripts/versions.sh
fi
