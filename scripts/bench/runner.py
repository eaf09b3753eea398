"""Runs what is missing of a benchmark, cell by cell.

A cell is a few words, such as `held_in average 0`. Its process measures one thing and leaves one JSON file,
FOLDER/held_in/average/0.json; where that file is, the cell is done. So a benchmark that was stopped goes on
where it stood, a file that is deleted is made anew, and peak memory is the cell's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from router.system.files import replacing

Cell = tuple[str, ...]


def file_of(folder: Path, cell: Cell) -> Path:
    """The file that a cell leaves."""
    *folders, name = cell
    return folder.joinpath(*folders, f"{name}.json")


def fill(module: str, folder: Path, cells: Sequence[Cell], jobs: int = 1) -> list[Cell]:
    """Runs `python -m MODULE --cell WORDS...` for each cell whose file is missing, in order.

    Args:
        jobs: processes at a time; several share the cores.

    Returns:
        The cells that failed.
    """
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def run(cell: Cell) -> int:
        if file_of(folder, cell).exists():
            return 0
        print(*cell, flush=True)
        command = [sys.executable, "-m", module, "--cell", *cell]
        return subprocess.run(command, env=environment, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return [cell for cell, code in zip(cells, pool.map(run, cells), strict=True) if code]


def keep(folder: Path, cell: Cell, found: Any) -> None:
    """Writes what a cell's process found."""
    with replacing(file_of(folder, cell)) as file:
        json.dump(found, file)


def kept(folder: Path) -> Iterator[tuple[Cell, Any]]:
    """All cells that are done, with what they found, in order of name."""
    for file in sorted(folder.rglob("*.json")):
        yield file.relative_to(folder).with_suffix("").parts, json.loads(file.read_text("utf-8"))


def run(*words: str, cache: str | None = None) -> dict[str, Any]:
    """One run of `router.main` in a process of its own.

    Args:
        words: of the command line, but for `--output_folder`.
        cache: a folder for what runs keep for each other; None takes the user's.

    Returns:
        Seconds from start to end (`seconds`), seconds by stage (`stages`), peak memory (`peak_mib`), and the
        number of variants.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "router.main", *words, "--quiet", "--output_folder", folder]
        start = time.perf_counter()
        kept_in = {"PROTO_ROUTE_CACHE": cache} if cache else {}
        subprocess.run(command, check=True, env=os.environ | kept_in)
        seconds = time.perf_counter() - start
        record = json.loads((Path(folder) / "run.json").read_text("utf-8"))
    return {
        "seconds": seconds, "stages": record["seconds"], "peak_mib": max(record["peak_mib"].values()),
        "variants": len(record.get("variants") or []),
    }  # fmt: skip
