#!/usr/bin/env bash
# Linters, types and tests in the demo's .venv. --all adds the slow tests, which need the real model.
. "$(dirname "${BASH_SOURCE[0]}")/install.sh" test,notebook,bench

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
