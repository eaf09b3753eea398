"""Measures what is missing and prints the tables: `python -m scripts.bench.scale`.

Every cell runs in a process of its own. What it found is kept in a file under output/benchmark/scale, so a
benchmark that was stopped goes on where it stood. Delete a file or a folder there to measure it anew.
"""

from __future__ import annotations

import argparse
import sys

from scripts.bench import runner
from scripts.bench.scale import measures, tables
from scripts.bench.scale.tables import FOLDER


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only cells that begin with these words")
    parser.add_argument("--cell", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        runner.keep(FOLDER, tuple(args.cell), measures.run(args.cell))
        return
    cells = [cell for cell in tables.cells() if not args.only or cell[0] in args.only]
    failed = runner.fill("scripts.bench.scale", FOLDER, [cell for cell in cells if not tables.skipped(cell)])
    tables.write()
    if failed:
        sys.exit("these did not finish: " + ", ".join(map(" ".join, failed)))


if __name__ == "__main__":
    main()
