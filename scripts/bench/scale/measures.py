"""The measurements. Each runs in a process of its own; seconds are of this process's own processor time.

A cell's first word names its function, the others are its arguments. Wall time would count what else the
machine does; nothing here waits for anything but the processor and, when files are read, the disk.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from merge.factors import Factors
from merge.folders import write_adapter
from router.constants import BASE_COLUMN
from router.files import sha256_of
from router.library.adapters import Adapter, load_library
from router.library.duplicates import representatives
from router.model.answer import encode
from router.model.base import EMBEDDED, Base, linear_shapes, load_base
from router.model.passes import truncated
from router.plan import plan
from router.routing.calibration import Calibration
from router.routing.clusters import BLOCK, cluster, mixes
from router.routing.evidence import Evidence
from router.routing.fitted import Fitted
from router.routing.gate import PrototypeGate
from router.routing.probe import Probed
from router.routing.prototypes import prototypes
from router.routing.shortlist import LARGE
from router.runs.report.page import write_report
from router.settings import Settings
from router.stages import peak_mib
from router.submission import read_queries, write_table
from scripts.bench import libraries
from scripts.bench.libraries import empty_cache
from scripts.bench.scale.resampled import Library

SEED = 6
RANK = 4
COPIES = 20  # every so many adapters, one is another in twice its size
QUERIES = Path("data/test.csv")
ASKED = 64  # queries of it, where the model reads them
LISTED = 1_000  # queries for which shortlists are judged
Found = dict[str, Any]


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time of one call, and what it returned."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def one_layer(base: Base, size: int) -> list[Adapter]:
    """Seeded random adapters of the last layer's seven modules; every COPIESth is the one before, doubled."""
    folder = libraries.FOLDER / "one_layer"
    shapes = {m: shape for m, shape in linear_shapes(base.model).items() if ".layers.29." in m}
    for n in range(size):
        copied = n % COPIES == COPIES - 1
        if not (folder / f"{n:05}").exists():
            generator = torch.Generator().manual_seed(SEED + n - copied)
            updates = {
                m: Factors(
                    torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, RANK, generator=generator) * 0.01 * (1 + copied),
                )
                for m, (d_out, d_in) in shapes.items()
            }
            write_adapter(folder / f"{n:05}", updates, base.name, None, torch.bfloat16)
    return load_library([str(folder / f"{n:05}") for n in range(size)])


def written(size: str) -> Found:
    """Writes the adapters that `library` reads."""
    return {"seconds": spent(lambda: one_layer(load_base(EMBEDDED), int(size)))[0]}


def library(size: str) -> Found:
    """All that routing does with a library whose adapters change one layer of the base model."""
    base, count = load_base(EMBEDDED), int(size)
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        seconds[name], found = spent(work)
        peaks[name] = peak_mib()
        return found

    adapters = step("open", lambda: one_layer(base, count))
    rows = truncated(encode(base.tokenizer, [query.input for query in read_queries(QUERIES)[:ASKED]]))
    with empty_cache():
        step("prototypes", lambda: prototypes(adapters, dtype=base.model.dtype))
        protos = step("prototypes, kept", lambda: prototypes(adapters, dtype=base.model.dtype))
        calibration = Calibration(base)
        means = calibration.means(list(protos))
        reference = step("calibrate", lambda: calibration.responses(adapters, protos, means))
    who, _ = step("duplicates", lambda: representatives(adapters, reference[..., 0]))
    kept = np.unique(who)
    gate = step("fit", lambda: PrototypeGate().fit(reference[:, kept], confidence=calibration.confidence()))
    names = [adapter.name for adapter in adapters]
    fitted = Fitted(names, protos, means, gate, who.tolist(), [], [], reference.mean(0))
    probed = step("probe", lambda: fitted.probe(base.model, rows, base.tokenizer.pad_token_id, None))
    step("gate", lambda: fitted.decide(probed))
    planted = np.arange(count) % COPIES == COPIES - 1
    right = np.where(planted, np.arange(count) - 1, np.arange(count))  # the lower of two medians
    return {
        "seconds": seconds, "peaks": peaks, "tokens": sum(map(len, rows)), "peak_mib": peak_mib(),
        "prototypes_mib": sum(p.directions.nbytes for p in protos.values()) / 2**20,
        "duplicates": float((who == right).mean()), "planted": int(planted.sum()), "queries": ASKED,
    }  # fmt: skip


def planned(size: str) -> Found:
    """What --plan says of a run with that library, of ASKED queries."""
    folder = libraries.FOLDER / "one_layer"
    with tempfile.TemporaryDirectory() as work:
        queries = Path(work) / "queries.csv"
        rows = read_queries(QUERIES)[:ASKED]
        table = [[query.id, query.input, query.eval_type, ""] for query in rows]
        write_table(queries, ["id", "input", "eval_type", "answer_choices"], table)
        specs = tuple(str(folder / f"{n:05}") for n in range(int(size)))
        found = plan("proto_route", Settings((queries,), Path(work) / "output", specs, EMBEDDED))
    return {"peak_mib": max(found["peak_mib"][stage] for stage in ("load", "route"))}


def gate(size: str) -> Found:
    """The gate on resampled responses: its fit, a query, and whether the best adapter is on the shortlist."""
    drawn, count = Library(int(size)), int(size)
    reference = drawn.reference()
    before = peak_mib()
    means, names = reference.mean(0), [f"{n}" for n in range(count)]
    fit, estimator = spent(partial(PrototypeGate().fit, reference))
    del reference
    modules = {f"m{n}": torch.empty(0) for n in range(means.shape[1])}
    protos: Any = modules
    fitted = Fitted(names, protos, modules, estimator, list(range(count)), [], [], means)
    some = max(1, min(LISTED, fitted.at_once))
    times, hits, same, seen = [], 0, 0, 0
    for seed in range(-(-LISTED // some)):
        responses = drawn.queries(some, seed)
        confidence = np.zeros(some, np.float32)
        probed = Probed(responses, confidence)
        seconds, (weights, evidence) = spent(partial(fitted.decide, probed))
        times.append(seconds / some)
        with patch("router.routing.shortlist.SHORT", count):
            every = estimator.decision_function(responses)
        best = every.argmax(1)
        hits += int(np.isfinite(evidence.scores[np.arange(some), best]).sum())
        whole = estimator.weights(estimator.candidate_scores(every, confidence))
        same += int((weights.argmax(1) == whole.argmax(1)).sum())
        seen += some
    return {
        "fit": fit, "ms": 1000 * float(np.median(times)), "recall": hits / seen, "same": same / seen,
        "queries": seen, "before_mib": before, "peak_mib": peak_mib(),
    }  # fmt: skip


def factor(size: str) -> Found:
    """How often a gate in which all adapters tell the common factor has the same top candidate."""
    drawn = Library(int(size))
    reference, responses = drawn.reference(), drawn.queries(500, 0)
    tops = []
    for large in (LARGE, int(size)):
        with patch("router.routing.shortlist.LARGE", large):
            estimator = PrototypeGate().fit(reference)
            tops.append(estimator.predict(responses))
    return {"same": float((tops[0] == tops[1]).mean()), "queries": len(responses)}


def _weights(size: int, count: int) -> Any:
    """Weights like the gate's: a third go to the base model, a tenth are shared, few adapters are popular."""
    rng = np.random.default_rng(SEED)
    popular = 1 / np.arange(1, size + 1)
    best = rng.choice(size, count, p=popular / popular.sum())
    best[rng.random(count) < 1 / 3] = size
    out = np.zeros((count, size + 1))
    rows = np.arange(count)
    out[rows, best] = rng.uniform(0.5, 1, count)
    shared = rng.random(count) < 0.1
    out[rows[shared], best[shared]] = 0.45
    out[rows, (best + 1) % size] += np.where(shared, 0.45, 0.3 * (1 - out[rows, best]))
    out[:, -1] += 1 - out.sum(1)
    return out


def clusters(size: str, count: str) -> Found:
    """Groups of queries with weights as the gate gives them."""
    weights = _weights(int(size), int(count))
    before = peak_mib()
    seconds, found = spent(lambda: cluster(weights, None, 0))
    lost = []
    for start in range(0, len(weights), BLOCK):
        part = slice(start, start + BLOCK)
        apart = np.abs(mixes(weights[part]) - found.weights[found.labels[part]]).sum(1) / 2
        lost += [apart]
    loss = np.concatenate(lost)
    return {
        "seconds": seconds, "before_mib": before, "peak_mib": peak_mib(), "variants": len(found.weights),
        "loss": float(loss.mean()), "worst": float(loss.max()),
    }  # fmt: skip


def report(size: str, count: str) -> Found:
    """The report of a run whose files are made up, from the CSV files to the page."""
    adapters, n = int(size), int(count)
    weights = _weights(adapters, n)
    made = cluster(weights, None, 0)
    names, rng = [f"adapter-{k}" for k in range(adapters)], np.random.default_rng(SEED)
    scores = (8 * weights + rng.normal(size=weights.shape)).astype(np.float32)
    votes = rng.normal(size=(n, 210)).astype(np.float32)
    responses = np.full_like(scores[:, :-1], 0.1)
    modules = [f"model.layers.{k // 7}.m{k % 7}" for k in range(210)]
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        out.mkdir()
        source, answers = Path(work) / "queries.csv", out / "queries.csv"
        texts = (
            f"Question {k}: how many apples are left of {k % 97} if {k % 13} are eaten?" for k in range(n)
        )
        write_table(
            source,
            ["id", "input", "eval_type", "answer_choices"],
            ([str(k), text, "generation", ""] for k, text in enumerate(texts)),
        )
        write_table(answers, ["id", "prediction"], ([str(k), f"{k % 84} apples"] for k in range(n)))
        write_table(
            out / "queries.routing.csv",
            ["id", "variant", *names, BASE_COLUMN],
            (
                [str(k), label, *(f"{value:.6g}" for value in row)]
                for k, (label, row) in enumerate(zip(made.labels, weights, strict=True))
            ),
        )
        Evidence(names, modules, responses, scores[:, :-1], scores[:, -1], votes).save(
            out / "queries.evidence.safetensors"
        )
        record = {
            "method": "proto_route", "versions": {}, "seconds": {"probe": 1.0}, "peak_mib": {"probe": 1},
            "flags": {"dataset_filepaths": [str(source)], "output_folder": str(out), "temperature": 0.7,
                      "false_alarm": 0.2},
            "base": {"name": "base", "dtype": "float32", "sha256": "0" * 64},
            "adapters": {name: {"revision": None, "sha256": "0" * 64} for name in names},
            "variants": [
                {"folder": None, "queries": 1, "weights": dict(zip([*names, BASE_COLUMN], row, strict=True))}
                for row in made.weights.tolist()
            ],
            "files": {file.name: sha256_of(file) for file in (answers,)},
        }  # fmt: skip
        (out / "run.json").write_text(json.dumps(record), "utf-8")
        del weights, scores, votes, responses
        before = peak_mib()
        seconds, page = spent(lambda: write_report(out))
        megabytes = page.stat().st_size / 1e6
    return {"seconds": seconds, "before_mib": before, "peak_mib": peak_mib(), "megabytes": megabytes}


MEASURES: dict[str, Callable[..., Found]] = {
    f.__name__: f for f in (written, library, planned, gate, factor, clusters, report)
}


def run(words: Sequence[str]) -> Found:
    """One measurement by its name and arguments."""
    return MEASURES[words[0]](*words[1:])
