"""`proto-route export FOLDER --engine vllm`: the command that serves a router's variants.

Writes `serve.sh` beside the variants, which both engines load as they are. Loads no model.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from merge.factors import Factors, recompress
from merge.folders import AdapterError, open_adapter, served_rank, write_adapter
from router.errors import InputError
from router.files import replacing
from router.serving.names import Served, read_served

SCRIPT = "serve.sh"


def vllm(served: Served) -> list[str]:
    """vLLM's server. One slot more than variants, since without it base rows were wrong on CPUs."""
    return [
        "vllm", "serve", served.base, *(["--revision", served.revision] if served.revision else []),
        "--dtype", served.dtype, "--enable-lora", "--max-loras", str(len(served.folders) + 1),
        "--max-lora-rank", str(served_rank(served.rank)),
        "--lora-modules", *(f"{name}={path.resolve()}" for name, path in served.folders.items()),
    ]  # fmt: skip


def sglang(served: Served) -> list[str]:
    """SGLang's server."""
    return [
        "python", "-m", "sglang.launch_server", "--model-path", served.base,
        *(["--revision", served.revision] if served.revision else []),
        "--dtype", served.dtype, "--enable-lora", "--max-loras-per-batch", str(len(served.folders)),
        "--max-lora-rank", str(served.rank), "--lora-target-modules", *served.modules,
        "--lora-paths", *(f"{name}={path.resolve()}" for name, path in served.folders.items()),
    ]  # fmt: skip


ENGINES: dict[str, Callable[[Served], list[str]]] = {"vllm": vllm, "sglang": sglang}


def recompressed(path: Path, out: Path, rank: int, base: str, dtype: torch.dtype) -> float:
    """Writes a variant at a lower rank; returns the share of its squared norm that is lost.

    The best approximation of each module's update of that rank (Eckart and Young 1936).
    """
    updates: dict[str, Factors] = {}
    lost = total = 0.0
    for module, update in open_adapter(path).read_all():
        updates[module] = recompress(update, rank) if update.rank > rank else update
        whole, kept = (_energy(one) for one in (update, updates[module]))
        total, lost = total + whole, lost + max(0.0, whole - kept)
    write_adapter(out, updates, base, None, dtype)
    return lost / total if total else 0.0


def _energy(update: Factors) -> float:
    """The squared Frobenius norm of b a."""
    a, b = update.a.double(), update.b.double()
    return float(((a @ a.T) * (b.T @ b)).sum())


def export(folder: Path, engine: str, max_rank: int | None = None) -> list[str]:
    """Writes `serve.sh`, and variants of lower rank if asked for; returns what was done, in sentences.

    Raises:
        InputError: there are no variants in the folder.
    """
    served, said = read_served(folder), []
    if not served.folders:
        raise InputError(f"{folder}: expected variants to serve, but the base model answers all by itself")
    if max_rank is not None and served.rank > max_rank:
        folders = {}
        for name, path in served.folders.items():
            folders[name] = folder / f"variants-rank-{max_rank}" / path.name
            dtype = getattr(torch, served.dtype)
            lost = recompressed(path, folders[name], max_rank, served.base, dtype)
            said.append(f"{name}: rank {max_rank}, {100 * lost:.2f} % of its squared norm lost")
        rank = max(next(iter(open_adapter(path).ranks.values())) for path in folders.values())
        served = Served(served.base, served.revision, served.dtype, folders, rank, served.modules)
    with replacing(folder / SCRIPT) as file:
        file.write("#!/bin/sh\n# The base model and the variants of a router; flags are passed on.\n")
        file.write(f'exec {shlex.join(ENGINES[engine](served))} "$@"\n')
    (folder / SCRIPT).chmod(0o755)
    return [
        *said,
        f"{folder / SCRIPT}: {len(served.folders)} variants of {served.base}, rank {served.rank}, "
        f"for {engine}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for input that a person can fix."""
    p = argparse.ArgumentParser(
        prog="proto-route export", description="Writes the command that serves a router's variants."
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="a saved router, or the output folder of a run")
    p.add_argument("--engine", choices=ENGINES, default="vllm", help="the server (default: vllm)")
    p.add_argument("--max_rank", type=int, metavar="INT", help="recompress variants of a higher rank")
    args = p.parse_args(argv)
    if args.max_rank is not None and args.max_rank < 1:
        p.error(f"--max_rank: expected a whole number from 1, got {args.max_rank}")
    try:
        print("\n".join(export(args.folder, args.engine, args.max_rank)))
    except (InputError, AdapterError, OverflowError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
