"""One run from query files to submissions, with the record of what was done."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from router.constants import BASE_COLUMN
from router.errors import InputError
from router.evidence import CLOSE
from router.merges import Merges, Routed
from router.methods import load_method
from router.plan import kept
from router.report import REPORT, write_report
from router.settings import Settings
from router.submission import Query, read_queries, replacing, write_submission, write_table

SHOWN = 12  # variants in the summary
PACKAGES = ("torch", "transformers", "peft", "safetensors", "scikit-learn", "faiss-cpu", "numpy")


def run(name: str, settings: Settings) -> Merges:
    """Answers the query files with one method and writes all results.

    Raises:
        InputError: something a person can mend is wrong with the queries, adapters or base model.
    """
    check_outputs(settings)
    files = {path: read_queries(path) for path in settings.dataset_filepaths}
    queries = [query for part in files.values() for query in part]
    import torch

    torch.manual_seed(settings.seed)
    method = load_method(name)(name)
    method.settings = settings
    method.merge()
    answers = [answer.text for answer in method.answer(queries)]
    start = 0
    for path, part in files.items():
        end = start + len(part)
        submission, routing, evidence = _outputs(settings, path)
        write_submission(submission, part, answers[start:end])
        if isinstance(method, Routed):
            _write_routing(routing, part, method, slice(start, end))
            if method.evidence:
                method.evidence.rows(slice(start, end)).save(evidence)
            else:
                evidence.unlink(missing_ok=True)
        else:
            routing.unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
            evidence.unlink(missing_ok=True)
        start = end
    with replacing(settings.output_folder / "run.json") as file:
        json.dump(record(method), file, indent=2, ensure_ascii=False)
        file.write("\n")
    write_report(settings.output_folder)
    return method


def _outputs(settings: Settings, path: Path) -> tuple[Path, Path, Path]:
    """Where the submission, the routing table and the evidence of a query file go."""
    folder = settings.output_folder
    return (
        folder / path.name,
        folder / f"{path.stem}.routing.csv",
        folder / f"{path.stem}.evidence.safetensors",
    )


def check_outputs(settings: Settings) -> None:
    """Refuses a run that would write over its queries, or one file twice.

    Raises:
        InputError: it would.
    """
    if settings.output_folder.exists() and not settings.output_folder.is_dir():
        raise InputError(f"--output_folder {settings.output_folder}: expected a folder, found a file")
    queries = {path.resolve() for path in settings.dataset_filepaths}
    written: set[Path] = set()
    for path in settings.dataset_filepaths:
        for output in _outputs(settings, path):
            if output.resolve() in queries:
                raise InputError(
                    f"--output_folder {settings.output_folder}: the results would replace the queries in "
                    f"{output}; choose another folder"
                )
            if output in written:
                raise InputError(
                    f"--dataset_filepaths: {path} and another file would both be answered in {output}; "
                    "rename one"
                )
            written.add(output)


def _write_routing(path: Path, queries: list[Query], method: Routed, part: slice) -> None:
    header = ["id", "variant", *(adapter.name for adapter in method.adapters), BASE_COLUMN]
    rows = (
        [query.id, label, *(f"{weight:.6g}" for weight in row)]
        for query, label, row in zip(queries, method.clusters.labels[part], method.weights[part], strict=True)
    )
    write_table(path, header, rows)


def record(method: Merges) -> dict[str, Any]:
    """What run.json holds: everything needed to repeat the run, and what it cost."""
    flags = method.settings.plain()
    found: dict[str, Any] = {
        "method": method.get_name(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "flags": flags,
        "seconds": {stage: round(value, 3) for stage, value in method.stages.seconds.items()},
        "peak_mib": method.stages.peak_mib,
    }
    if planned := kept(method.settings.output_folder, method.get_name(), flags):
        found["plan"] = {key: planned[key] for key in ("seconds", "total_seconds", "peak_mib", "n_variants")}
    if isinstance(method, Routed):
        counts = np.bincount(method.clusters.labels, minlength=len(method.variants))
        found |= {
            "base": {
                "name": method.base.name,
                "revision": method.base.revision,
                "sha256": method.base.sha256,
                "dtype": str(method.base.model.dtype).removeprefix("torch."),
                "device": str(method.base.model.device),
            },
            "adapters": {
                adapter.name: {"revision": adapter.revision, "sha256": adapter.sha256}
                for adapter in method.adapters
            },
            "n_variants": len(method.variants),
            **(
                {
                    "guesses": int(method.evidence.guesses.sum()),
                    "tried": round(float(method.evidence.tried.mean()), 3),
                }
                if method.evidence
                else {}
            ),
            "variants": [
                {
                    "folder": f"variants/{folder}" if (folder := method.folder(n)) else None,
                    "queries": int(count),
                    "weights": {**variant.weights, BASE_COLUMN: variant.base},
                }
                for n, (variant, count) in enumerate(zip(method.variants, counts, strict=True))
            ],
        }
    return found


def summary(method: Merges) -> str:
    """What was found, what was decided, how sure that is, and where to look."""
    lines = []
    if isinstance(method, Routed):
        adapters, queries, variants = (
            _count(len(found), what)
            for found, what in (
                (method.adapters, "adapter"), (method.weights, "query"), (method.variants, "variant"),
            )
        )  # fmt: skip
        lines.append(f"{method.name}: {adapters} of {method.base.name}, {queries}, {variants}")
        counts = np.bincount(method.clusters.labels, minlength=len(method.variants))
        order = np.argsort(-counts, kind="stable")
        lines.append("variant  queries  heaviest")
        for n in order[:SHOWN]:
            variant = method.variants[n]
            shares = sorted(
                [*variant.weights.items(), (BASE_COLUMN, variant.base)], key=lambda share: -share[1]
            )
            heaviest = ", ".join(f"{name} {weight:.2f}" for name, weight in shares[:3] if weight > 0)
            lines.append(f"{n:7}  {counts[n]:7}  {heaviest}")
        if len(order) > SHOWN:
            rest = _count(int(counts[order[SHOWN:]].sum()), "query")
            lines.append(f"and {_count(len(order) - SHOWN, 'variant')} with {rest}")
        if method.evidence:
            unsure = int(method.evidence.guesses.sum())
            lines.append(
                f"{_count(unsure, 'guess')}, queries whose two best candidates are within {CLOSE} standard "
                "deviations"
                if unsure
                else f"no guess: every query's best candidate is {CLOSE} standard deviations ahead or more"
            )
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in method.stages.seconds.items())
    lines.append(f"{sum(method.stages.seconds.values()):.0f} seconds: {stages}")
    folder = method.settings.output_folder
    files = ", ".join(path.name for path in method.settings.dataset_filepaths)
    lines.append(f"answers in {folder}: {files}; to look at: {folder / REPORT}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    plural = {"query": "queries", "guess": "guesses"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"
