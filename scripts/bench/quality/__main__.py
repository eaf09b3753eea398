"""Runs what is missing of the benchmark, then makes its tables: `python -m scripts.bench.quality --all`.

Every method runs in every setting in a process of its own. Its answers are kept in a file under
output/benchmark/quality, by library, setting, method and seed, so a benchmark that was stopped goes on
where it stood. Delete a file or a folder there to run that part again.
"""

from __future__ import annotations

import argparse
import sys

from scripts.bench import runner
from scripts.bench.development import COMMITTED, libraries
from scripts.bench.quality import cells, tables
from scripts.bench.quality.settings import SETTINGS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all settings and methods; a day on two cores")
    here = [library.name for library in libraries()]
    parser.add_argument("--libraries", nargs="+", choices=here, default=here, help="only these libraries")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[], help="only these settings")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument(
        "--graded", action="store_true", help="the graded metric alone: no answer is written, so it is quick"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time, which share the cores (default 1)"
    )
    parser.add_argument(
        "--cell", nargs=4, metavar=("LIBRARY", "SETTING", "METHOD", "SEED"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.cell:
        library, setting, method, seed = args.cell
        runner.keep(cells.FOLDER, tuple(args.cell), cells.answer(library, setting, method, seed))
        return
    wanted = [
        (library, name, method, str(seed))
        for library in args.libraries
        for name in (SETTINGS if args.all else args.settings)
        if SETTINGS[name].everywhere or library == COMMITTED
        for method in SETTINGS[name].methods
        if not args.methods or method in args.methods
        for seed in ((cells.GRADED,) if args.graded else SETTINGS[name].seeds(method))
    ]
    failed = runner.fill("scripts.bench.quality", cells.FOLDER, wanted, args.jobs)
    tables.write()
    if failed:
        sys.exit("these did not finish: " + ", ".join(map("/".join, failed)))


if __name__ == "__main__":
    main()
