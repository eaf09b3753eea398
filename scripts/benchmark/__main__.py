"""Runs what is missing of the benchmark, then makes its tables: `python -m scripts.benchmark --all`.

Every method runs in every setting in a process of its own, so that its peak memory is its own.
Answers are kept under output/benchmark/cells, one file per setting, method, seed and part; a run that was
stopped goes on where it stood. Delete a folder there to have it answered anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from scripts.benchmark import cells, tables
from scripts.benchmark.settings import SETTINGS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--all", action="store_true", help="all settings and methods; about 4 hours on two cores"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[], help="only these settings")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time, which share the cores (default 1)"
    )
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "METHOD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        setting, method, seed = args.one
        cells.answer(setting, method, int(seed))
        return
    wanted = list(SETTINGS) if args.all else args.settings
    todo = [
        (name, method, str(seed))
        for name in wanted
        for method in SETTINGS[name].methods
        if not args.methods or method in args.methods
        for seed in SETTINGS[name].seeds(method)
    ]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}

    def run(job: tuple[str, str, str]) -> int:
        if not cells.missing(job[0], job[1], int(job[2])):
            return 0
        print(*job, flush=True)
        command = [sys.executable, "-m", "scripts.benchmark", "--one", *job]
        return subprocess.run(command, env=environment, check=False).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [job for job, code in zip(todo, pool.map(run, todo), strict=True) if code]
    tables.write()
    if failed:
        sys.exit("these did not finish: " + ", ".join("/".join(job) for job in failed))


if __name__ == "__main__":
    main()
