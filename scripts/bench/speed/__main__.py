"""Measures what is missing and writes the tables: `python -m scripts.bench.speed`.

Every measurement runs in a process of its own; those that are compared take turns. What it found is kept in
a file under output/benchmark/speed, so a benchmark that was stopped goes on where it stood. Delete a file or
a folder there to measure it anew. `--shape mistral-7b` does the same for layers with Mistral's dimensions.
"""

from __future__ import annotations

import argparse
import sys

from scripts.bench import runner
from scripts.bench.speed import measures, tables
from scripts.bench.speed.tables import ALL, EIGHTH, FOLDER, SHAPE, SIZES

WHOLE = (f"routed 22 {ALL}", f"static {ALL}", f"kit {EIGHTH}", "demo all")
PARTS = (
    *(f"decode {way}" for way in ("merged", "beside", "arrow", "spectr", "lag")),
    *(f"merge {way} embedded 16" for way in ("ours", "peft")),
    *(f"library_prototypes {size}" for size in ("22", "256")),
    "gate 3200 256", "floor", "roofline",
)  # fmt: skip
ONCE = (
    "probing 100", f"same {EIGHTH}", f"matmul_share {EIGHTH}", "merge ours large 16", "merge peft large 16",
    *(f"truncation {tokens}" for tokens in (128, 256, 512, 0)),
)  # fmt: skip
GROWTH = tuple(f"routed {size} {EIGHTH}" for size in SIZES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of what is compared (default: 5)")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="only measurements that begin with these words"
    )
    parser.add_argument("--shape", choices=["mistral-7b"], help="measure this shape instead")
    parser.add_argument("--cell", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        *words, _ = args.cell  # last is the number of the repetition
        runner.keep(FOLDER, tuple(args.cell), measures.run(words))
        return
    if args.shape:
        wanted = _turns(SHAPE, args.repetitions)
    else:
        compared = (job for jobs in (WHOLE, PARTS, GROWTH) for job in _turns(jobs, args.repetitions))
        wanted = [*_turns(ONCE, 1), *compared]
    if args.only:
        wanted = [cell for cell in wanted if cell[0] in args.only]
    failed = runner.fill("scripts.bench.speed", FOLDER, wanted)
    tables.write(*(["mistral"] if args.shape else []))
    if failed:
        sys.exit("these did not finish: " + ", ".join(map(" ".join, failed)))


def _turns(jobs: tuple[str, ...], repetitions: int) -> list[runner.Cell]:
    """Each job so many times, in turns."""
    return [(*job.split(), str(n)) for n in range(repetitions) for job in jobs]


if __name__ == "__main__":
    main()
