"""One method in one setting: answers that are not on disk yet are made, one part after the other."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from router.adapters import load_library
from router.base import EMBEDDED, Base, load_base
from router.clusters import Array
from router.constants import BASE_COLUMN
from router.merges import Routed
from router.methods import load_method
from router.settings import Settings
from router.submission import Query, read_queries, replacing
from scripts.benchmark.per_query import PerQuery
from scripts.benchmark.settings import SETTINGS, Part

CELLS = Path("output/benchmark/cells")
COLUMNS = ("task", "id", "skill", "adapter", "right", "routed", "variant")


class Single(Routed):
    """The one adapter of a library of one, for every query."""

    def route(self, queries: Sequence[Query]) -> Array:
        """All weight on the adapter."""
        return np.tile([1.0, 0.0], (len(queries), 1))


def method_named(name: str) -> type[Any]:
    """A method of the package, or one of the benchmark's own."""
    return {"single": Single, "per_query": PerQuery}.get(name) or load_method(name)


def folder_of(setting: str, method: str, seed: int) -> Path:
    """Where the answers of one method in one setting are kept, a CSV file and a record a part."""
    return CELLS / setting / method / str(seed)


def missing(setting: str, method: str, seed: int) -> list[Part]:
    """The parts that are not answered yet."""
    folder = folder_of(setting, method, seed)
    return [part for part in SETTINGS[setting].parts() if not (folder / f"{part.name}.csv").exists()]


def answer(setting: str, method: str, seed: int) -> None:
    """Answers all missing parts of one method in one setting."""
    parts = missing(setting, method, seed)
    if not parts:
        return
    base, adapters = load_base(EMBEDDED), load_library(["data/library"])
    for part in parts:
        library = part.library(adapters)
        work = folder_of(setting, method, seed) / f".{part.name}"
        work.mkdir(parents=True, exist_ok=True)
        try:
            _answer(part, method_named(method)(method), base, library, seed, work)
        finally:
            shutil.rmtree(work)


def _answer(part: Part, method: Any, base: Base, library: list[Any], seed: int, work: Path) -> None:
    file = work / "queries.csv"
    rows = part.rows.assign(label=part.rows["id"], id=range(len(part.rows)))
    rows.to_csv(file, index=False, quoting=csv.QUOTE_ALL)
    # No longer text than the longest target can be right, so nothing is lost by stopping there.
    longest = max(map(len, base.tokenizer(list(rows["target"]))["input_ids"])) + 1
    method.settings = Settings(
        dataset_filepaths=(file,), output_folder=work, seed=seed, max_gen_len=longest
    )  # fmt: skip
    torch.manual_seed(seed)
    start = time.perf_counter()
    method.attach(base, library)
    answers = method.answer(read_queries(file))
    seconds = time.perf_counter() - start
    names = [*(adapter.name for adapter in library), BASE_COLUMN]
    heaviest = [names[n] for n in method.weights.argmax(1)]
    record = {
        "seconds": round(seconds, 2),
        "stages": {stage: round(value, 2) for stage, value in method.stages.seconds.items()},
        "peak_mib": max(method.stages.peak_mib.values()),
        "threads": torch.get_num_threads(),
        "adapters": len(library),
        "variants": len(method.variants),
    }
    done = work.parent / f"{part.name}.csv"
    with replacing(done.with_suffix(".json")) as out:
        json.dump(record, out)
    with replacing(done) as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        columns = zip(rows.itertuples(), answers, heaviest, method.clusters.labels, strict=True)
        for row, found, routed, variant in columns:
            right = int(found.text.strip() == row.target)
            table.writerow([row.task, row.label, row.skill, row.adapter, right, routed, variant])
