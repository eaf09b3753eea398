"""`proto-route export FOLDER --engine vllm`: the command that serves a router's variants.

Writes `serve.sh` beside the variants, which vLLM loads as they are. llama.cpp gets GGUF files, of the
adapters themselves where they are at hand, since it mixes them anew for each request. Loads no model.
"""

import json
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import torch

from merge.factors import Factors, gram
from merge.folders import SERVED_RANKS, AdapterError, open_adapter, served_rank, write_adapter
from router.constants import SCRIPT
from router.model.base import EMBEDDED_ID, embedded_folder, embedded_gguf
from router.routing.variants import limited
from router.serving.names import Served, read_adapters, read_served
from router.settings import Count, reader
from router.system.errors import InputError, printable
from router.system.files import SEAL, check_apart, is_sealed, remaking, replacing, sealed
from router.system.hub import fetch

GGUF = "gguf"  # a folder beside SCRIPT
CONVERTER = (
    "convert_lora_to_gguf.py"  # llama.cpp's own, which knows how each architecture's weights are laid out
)
HEAD = f"#!/bin/sh\n# Serves a router's adapters; flags are passed on; {SEAL}{'0' * 64}\n"


def vllm(served: Served) -> list[str]:
    """vLLM's server. One slot more than variants, since without it base rows were wrong on CPUs.

    The modules are named, since it keeps room for adapters at all others too, and computes there.
    """
    return [
        "vllm", "serve", served.base, *(["--revision", served.revision] if served.revision else []),
        "--dtype", served.dtype, "--enable-lora", "--max-loras", str(len(served.folders) + 1),
        "--max-cpu-loras", str(2 * (len(served.folders) + 1)),
        "--max-lora-rank", str(served_rank(served.rank)), "--lora-target-modules", *served.modules,
        *(["--trust-request-chat-template"] if served.templates else []),
        *(["--chat-template", str(served.template.resolve())] if served.template else []),
        "--lora-modules",  # in JSON, as its NAME=PATH cannot have every path
        *(json.dumps({"name": name, "path": str(path.resolve())}) for name, path in served.folders.items()),
    ]  # fmt: skip


def llamacpp(served: Served) -> list[str]:
    """llama.cpp's server. Each request says how much of which adapter it gets; without, it gets none.

    `--lora` with `--lora-init-without-apply` would give such a request all of them, at full scale.
    """
    scaled = [("--lora-scaled", f"{path.resolve()}:0") for path in served.folders.values()]
    return ["llama-server", "--model", served.base, *(word for pair in scaled for word in pair)]


ENGINES: dict[str, Callable[[Served], list[str]]] = {"vllm": vllm, "llamacpp": llamacpp}


def recompressed(path: Path, out: Path, max_rank: int, base: str, dtype: torch.dtype) -> tuple[int, float]:
    """Writes a variant at a lower rank; returns that rank and the share of its squared norm that is lost.

    The best approximation of each module's update of that rank (Eckart and Young 1936).
    """
    updates: dict[str, Factors] = {}
    lost = total = 0.0
    for module, update in open_adapter(path).read_all():
        updates[module] = limited(update, max_rank)
        whole, kept = (float(gram([one])) for one in (update, updates[module]))
        total, lost = total + whole, lost + max(0.0, whole - kept)
    return write_adapter(out, updates, base, None, dtype, max_rank), lost / total if total else 0.0


def converted(served: Served, out: Path, llama_cpp: Path | None) -> dict[str, Path]:
    """Converts adapters into a folder, which is replaced; the name of each file says which adapter it is.

    Returns:
        The files by the adapters' names, in the same order.

    Raises:
        InputError: the folder is somebody else's, there is no converter, or it fails.
    """
    script = (llama_cpp or Path()) / CONVERTER
    if llama_cpp is None or not script.is_file():
        got = f"no {CONVERTER} in {llama_cpp}" if llama_cpp else "none"
        raise InputError(f"--llama_cpp: expected a checkout of llama.cpp, whose converter is run, got {got}")
    if served.base == EMBEDDED_ID or Path(served.base).is_dir():
        base = embedded_folder() if served.base == EMBEDDED_ID else Path(served.base)
    else:
        spec = f"{served.base}@{served.revision}" if served.revision else served.base
        base, *_ = fetch(spec, ["*.json"], where=f"{spec}: no such folder with a configuration")
    outputs = {name: out / f"{quote(name, safe='')}.gguf" for name in served.folders}
    with remaking(out) as files:
        plain = files.parent / "plain"
        for name, path in served.folders.items():
            # The converter leaves out the scales of rsLoRA and of single modules: they go into the factors.
            write_adapter(plain, dict(open_adapter(path).read_all()), served.base, max_rank=served.rank)
            file = files / outputs[name].name
            command = [sys.executable, *map(str, (script, "--base", base, "--outfile", file, plain))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not file.is_file():
                reason = (done.stderr.strip() or "it wrote nothing").splitlines()[-1]
                raise InputError(f"{script}: cannot convert {name} ({path}): {reason}")
    return outputs


def export(args: Namespace) -> list[str]:
    """Writes `serve.sh`, and adapters as the engine needs them; returns what was done, in sentences.

    Raises:
        InputError: there are no variants in the folder, or nothing that llama.cpp's files can be made with;
            the engine does not take its path or the rank; or what would be replaced is somebody else's.
    """
    folder, engine, max_rank, script = args.folder, args.engine, args.max_rank, args.folder / SCRIPT
    if engine == "llamacpp" and {":", ","} & set(str(folder.resolve())):
        raise InputError(f"{folder.resolve()}: expected a path without : and , for llama.cpp; move it")
    if not is_sealed(script):
        raise InputError(f"{script}: expected none, or one of an earlier export as it was; move it away")
    served = read_served(folder, args.base_model)
    said = []
    if not served.folders:
        raise InputError(f"{folder}: expected variants to serve, but the base model answers all by itself")
    name, what = served.base, "variants"
    if engine == "llamacpp" and (adapters := read_adapters(folder)):
        rank = max(max(open_adapter(path).ranks.values()) for path in adapters.values())
        served, what = replace(served, folders=adapters, rank=rank), "adapters"
    if max_rank is not None and served.rank > max_rank:
        ranks = []
        dtype = getattr(torch, served.dtype)
        final = folder / f"{what}-rank-{max_rank}"
        check_apart(served.folders.items(), final)
        with remaking(final) as out:
            for variant, path in served.folders.items():
                rank, lost = recompressed(path, out / path.name, max_rank, served.base, dtype)
                said.append(f"{variant}: rank {rank}, {100 * lost:.2f} % of its squared norm lost")
                ranks.append(rank)
        folders = {variant: final / path.name for variant, path in served.folders.items()}
        served = replace(served, folders=folders, rank=max(ranks))
    if engine == "vllm" and served.rank > (most := SERVED_RANKS[-1]):
        raise InputError(
            f"{folder}: expected variants of rank {most} at most, as vLLM does, got {served.rank}; pass "
            f"--max_rank {most}"
        )
    if engine == "llamacpp":
        base = embedded_gguf() if args.gguf is None and served.base == EMBEDDED_ID else args.gguf
        if base is None or not base.is_file():
            raise InputError(f"--gguf: expected {served.base} as a GGUF file, got {base or 'none'}")
        files = converted(served, folder / GGUF, args.llama_cpp)
        served = replace(served, base=str(base.resolve()), folders=files)
    with replacing(script) as file:
        place = shlex.quote(str(script.resolve()))  # a copy would serve the variants there
        check = f'[ "$0" -ef {place} ] || {{ echo "$0: moved or copied; export again" >&2; exit 2; }}'
        file.write(sealed(f'{HEAD}{check}\nexec {shlex.join(ENGINES[engine](served))} "$@"\n'))
    script.chmod(0o755)
    count = len(served.folders)
    many = f"{count} {what if count != 1 else what.removesuffix('s')}"
    return [*said, f"{script}: {many} of {name}, rank {served.rank}, for {engine}"]


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route export`."""
    add = p.add_argument
    add("folder", type=Path, metavar="DIR", help="a saved router, or the output folder of a run")
    add("--engine", choices=ENGINES, default="vllm", help="the server (default: vllm)")
    add("--base_model", metavar="FOLDER|HUB_ID", help="the base model, if it is elsewhere now")
    add("--max_rank", type=reader(Count), metavar="INT", help="recompress adapters of a higher rank, from 1")
    add("--llama_cpp", type=Path, metavar="DIR", help="a checkout of llama.cpp, for its converter")
    add("--gguf", type=Path, metavar="FILE", help="llama.cpp's base model (default: the embedded one's)")


def work(args: Namespace) -> None:
    """Exports, and prints what was done."""
    try:
        lines = export(args)
    except (AdapterError, OverflowError) as error:
        raise InputError(str(error)) from error
    print(printable("\n".join(lines)))
