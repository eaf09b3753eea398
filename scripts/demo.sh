#!/usr/bin/env bash
# The main job on this machine's CPU or GPU, from nothing but Python and a package index.
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

time .venv/bin/python -m router.main -m proto_route "$@"
