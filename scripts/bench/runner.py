"""Runs what is missing of a benchmark, cell by cell.

A cell is a few words, such as `routed 22`, `0`. Its process measures one thing and leaves one JSON file,
FOLDER/routed 22/0.json; where that file is, the cell is done. So a benchmark that was stopped goes on
where it stood, a file that is deleted is made anew, and peak memory is the cell's own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.benchmark import timer

from router.queries.submission import COLUMNS, Query, write_table
from router.system.files import replacing

Cell = tuple[str, ...]
Found = dict[str, Any]
T = TypeVar("T")


def fill(name: str, cells: Iterable[tuple[Cell, Callable[[], Found]]]) -> str | None:
    """Measures each cell whose file is missing, in order.

    Returns:
        What to exit with: the cells that failed, or None.
    """
    failed = []
    for cell, measure in cells:
        if not (file := folder(name).joinpath(*cell[:-1], f"{cell[-1]}.json")).exists():
            print(*cell, flush=True)
            process = get_context("spawn").Process(target=_measure, args=(measure, file))
            process.start()
            process.join()
            failed += ["/".join(cell)] if process.exitcode else []
    return f"these did not finish: {', '.join(failed)}" if failed else None


def _measure(measure: Callable[[], Found], file: Path) -> None:
    with replacing(file) as out:
        json.dump(measure(), out)


def folder(name: str) -> Path:
    """Where a benchmark keeps its cells."""
    return Path("output/benchmark") / name


def kept(name: str) -> Iterator[tuple[Cell, Found]]:
    """All cells that are done, with what they found, in order of name."""
    for file in sorted(folder(name).rglob("*.json")):
        yield file.relative_to(folder(name)).with_suffix("").parts, json.loads(file.read_text("utf-8"))


def timed(work: Callable[[], T], clock: Callable[[], float] = timer) -> tuple[float, T]:
    """Seconds of one call without warming up, and what it returned.

    Args:
        clock: by default that of torch.utils.benchmark, which waits for what runs on an accelerator.
    """
    start = clock()
    found = work()
    return clock() - start, found


def write_prompts(file: Path, queries: Iterable[Query]) -> None:
    """Writes queries that are no conversations as CSV."""
    write_table(file, COLUMNS, ((q.id, q.input, q.eval_type, list(q.choices) or "") for q in queries))


def run(queries: Sequence[Query], *words: str, cache: str | None = None) -> Found:
    """One run of `router.main` in a process of its own.

    Args:
        words: of the command line, but for the queries and `--output_folder`.
        cache: a folder for what runs keep for each other; None takes the user's.

    Returns:
        Seconds from start to end (`seconds`), seconds by stage (`stages`), peak memory (`peak_mib`), and the
        numbers of variants and queries.
    """
    with tempfile.TemporaryDirectory() as work:
        file, out = Path(work) / "queries.csv", Path(work) / "out"
        write_prompts(file, queries)
        command = [sys.executable, "-m", "router.main", *words, "--quiet", "--output_folder", str(out)]
        command += ["--dataset_filepaths", str(file)]
        start = time.perf_counter()
        environment = os.environ | ({"PROTO_ROUTE_CACHE": cache} if cache else {})
        subprocess.run(command, check=True, env=environment)
        seconds = time.perf_counter() - start
        record = json.loads((out / "run.json").read_text("utf-8"))
    return {
        "seconds": seconds, "stages": record["seconds"], "peak_mib": max(record["peak_mib"].values()),
        "variants": len(record.get("variants") or []), "queries": len(queries),
    }  # fmt: skip
