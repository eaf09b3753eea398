"""A whole run of `router.main` at the competition's size: `python -m scripts.bench.full_shape`.

Mistral-7B-v0.1's exact configuration with random weights, a tokenizer as large as its own, and 27 random
adapters of rank 16 on all linear layers, since the cards of the competition's adapters were not at hand. All
is made on disk, 17 GB, and deleted afterwards. A random model hardly ever ends an answer, so each takes all
its tokens.

On a CPU a layer or two of it can be run: `--layers 1 --every 40`. What all layers would take there is
extrapolated by `python -m scripts.bench.speed --shape mistral-7b`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from router.files import read_json
from router.submission import COLUMNS, write_table
from scripts.bench import runner
from scripts.bench.markdown import header, insert, row

FOLDER = Path("output/benchmark/full_shape")
PAGE = Path("docs/speed.md")
SECONDS, BYTES = 3600, 48e9  # the competition's limits
ROOM = 1.2  # times what the weights need, for variants and what is kept of prototypes


def make(folder: Path, layers: int, adapters: int, **config: Any) -> None:
    """Writes the base model, its tokenizer, and the adapters.

    Args:
        config: what differs from Mistral-7B-v0.1.

    Raises:
        OSError: the disk has no room for them.
    """
    from router.model.base import linear_shapes
    from scripts.bench.libraries import uniform
    from scripts.bench.speed import shape

    model = shape.build(layers, **config)
    updates = adapters * shape.RANK * sum(d_out + d_in for d_out, d_in in linear_shapes(model).values())
    needed, free = ROOM * 2 * (model.num_parameters() + updates), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: expected {needed / 1e9:.0f} GB for a model, found {free / 1e9:.0f}")
    model.save_pretrained(folder / "base", max_shard_size="5GB")
    write_tokenizer(folder / "base", model.config.vocab_size)
    uniform(model, str(folder / "base"), shape.RANK, adapters, folder / "library")


def write_tokenizer(folder: Path, size: int) -> None:
    """Writes the embedded base model's tokenizer, cut to its first tokens, since Mistral's is not at hand.

    Tokens are numbered in the order in which they were merged, so the rest is a tokenizer of that size.
    """
    from transformers import PreTrainedTokenizerFast

    from router.model.base import embedded_folder

    found = json.loads((embedded_folder() / "tokenizer.json").read_text("utf-8"))
    model = found["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(found), "utf-8")
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    ).save_pretrained(folder)  # fmt: skip


def measure(folder: Path, every: int) -> dict[str, Any]:
    """Runs proto_route on what `make` wrote; seconds by stage and of all, and the peak of memory.

    Args:
        every: every so many of the competition's queries.
    """
    import torch

    from router.main import main as run
    from router.stages import peak_mib
    from scripts.bench.libraries import empty_cache
    from scripts.bench.speed.measures import queries

    asked = queries(every)
    rows = [
        (query.id, query.input, query.eval_type, list(query.choices) if query.choices else "")
        for query in asked
    ]
    write_table(folder / "queries.csv", COLUMNS, rows)
    words = ["-m", "proto_route", "--quiet"]
    for flag, name in (
        ("dataset_filepaths", "queries.csv"), ("adapters", "library"), ("base_model", "base"),
        ("output_folder", "out"),
    ):  # fmt: skip
        words += [f"--{flag}", str(folder / name)]
    start = time.perf_counter()
    with empty_cache():
        if code := run(words):
            sys.exit(code)
    seconds = time.perf_counter() - start
    record = read_json(folder / "out" / "run.json", {"seconds": {"*": float}, "base": {"dtype": str}})
    card = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if card else f"CPU, threads: {torch.get_num_threads()}",
        "dtype": record["base"]["dtype"], "queries": len(asked), "seconds": seconds,
        "stages": record["seconds"], "variants": len(record["variants"]),
        "peak": torch.cuda.max_memory_reserved() if card else peak_mib() << 20,
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each run."""
    stages = list(found[0]["stages"])
    lines = header(["device", "layers", "queries", *stages, "all, s", "peak, GB", ""], texts=1)
    for one in found:
        whole = one["layers"] == 32 and one["every"] == 1
        fits = one["seconds"] <= SECONDS and one["peak"] <= BYTES
        verdict = "" if not whole else "met" if fits else "missed"
        seconds = [f"{one['stages'].get(stage, 0):.1f}" for stage in stages]
        lines.append(
            row(f"{one['device']}, {one['dtype']}", one["layers"], one["queries"], *seconds,
                f"{one['seconds']:.0f}", f"{one['peak'] / 1e9:.1f}", verdict)
        )  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None, **config: Any) -> None:
    """Command line.

    Args:
        config: what differs from Mistral-7B-v0.1.
    """
    from scripts.bench.speed.shape import ADAPTERS, LAYERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of the base model (default: {LAYERS})")
    parser.add_argument("--every", type=int, default=1, help="every so many of the queries (default: 1)")
    parser.add_argument("--adapters", type=int, default=ADAPTERS, help=f"default: {ADAPTERS}")
    args = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as work:
        # In a process of its own, whose memory does not count.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
            maker.submit(make, Path(work), args.layers, args.adapters, **config).result()
        found = measure(Path(work), args.every) | {"layers": args.layers, "every": args.every}
    runner.keep(FOLDER, (str(args.layers), str(args.every)), found)
    insert(PAGE, "full", table([one for _, one in runner.kept(FOLDER)]))


if __name__ == "__main__":
    main()
