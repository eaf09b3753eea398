#!/usr/bin/env bash
# Linters, types and tests in the demo's .venv. --all adds the slow tests, which need the real model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test,notebook,bench

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/vulture
.venv/bin/python -m pytest "$@"
