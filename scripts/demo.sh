#!/usr/bin/env bash
# The main job on this machine's CPU or GPU, from nothing but Python and a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

time .venv/bin/python -m router.main -m proto_route "$@"
