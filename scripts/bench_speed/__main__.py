"""Measures what is missing and writes the tables: `python -m scripts.bench_speed`.

Every measurement runs in a process of its own, those that are compared in turns, and is kept in
output/benchmark/speed.json, so that a run that was stopped goes on where it stood. Delete that file to
measure anew. `--shape mistral-7b` does the same for layers with Mistral's dimensions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench_speed import measures, shape, tables
from scripts.bench_speed.tables import COUNTS, RANKS, SHAPE, SIZES

RESULTS = Path("output/benchmark/speed.json")
EVERY = "8"  # of the queries, where not all are asked
WHOLE = ("routed 22 1", "static 1", f"kit {EVERY}")
PARTS = (
    *(f"decode {way}" for way in ("ours", "merged", "arrow", "spectr", "lag")),
    *(f"merge {way} embedded 16" for way in ("ours", "peft")),
    *(f"library_prototypes {size}" for size in ("22", "256")),
    "gate 3200 256", "floor", "roofline",
)  # fmt: skip
ONCE = (
    *(f"merge ours embedded {rank}" for rank in RANKS if rank != "16"),
    "merge ours large 16", "merge peft large 16", f"matmul_share {EVERY}",
    *(f"step {count} {rows}" for rows in (1, 11, 32) for count in (0, 1, 3, 8) if count <= rows),
    *(f"look {tokens}" for tokens in (128, 256, 512, 0)),
    *(f"gate {count} {size}" for size in SIZES for count in COUNTS),
    *(f"probing {count}" for count in COUNTS),
    *(f"rank {rank}" for rank in RANKS),
)  # fmt: skip
GROWTH = tuple(f"routed {size} {EVERY}" for size in SIZES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of what is compared (default: 5)")
    parser.add_argument("--shape", choices=["mistral-7b"], help="measure this shape instead")
    parser.add_argument(
        "--plans", nargs="+", type=Path, metavar="RUN",
        help="write the table of plan and actual from these output folders instead",
    )  # fmt: skip
    parser.add_argument("--one", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, *words = args.one
        found = shape.measure(*words) if name == "shape" else measures.run(args.one)
        print(json.dumps(found))
        return
    if args.plans:
        tables.write_plans(args.plans)
        return
    if args.shape:
        _measure(SHAPE, args.repetitions)
    else:
        _measure(ONCE, 1)
        _measure(PARTS, args.repetitions)
        _measure(WHOLE, args.repetitions)
        _measure(GROWTH, args.repetitions)
    tables.write(_known())


def _known() -> dict[str, list[dict[str, Any]]]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def _measure(jobs: tuple[str, ...], repetitions: int) -> None:
    """Fills up each job's results to so many, in turns."""
    for repetition in range(repetitions):
        for job in jobs:
            known = _known()
            if len(known.get(job, [])) > repetition:
                continue
            print(job, flush=True)
            command = [sys.executable, "-m", "scripts.bench_speed", "--one", *job.split()]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            known.setdefault(job, []).append(json.loads(done.stdout.splitlines()[-1]))
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
