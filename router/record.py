"""The record of a run: what run.json holds, and the summary that is printed of it."""

from __future__ import annotations

import platform
from importlib.metadata import packages_distributions, version
from typing import Any

import numpy as np

from router.constants import BASE_COLUMN, Apply, Engine
from router.deadline import told
from router.model.apply import picked
from router.model.device import tokens_at_once
from router.result import Decision, Result
from router.routing.evidence import LOW_MARGIN
from router.runs.report.page import REPORT
from router.settings import Settings
from router.stages import Stages
from router.version import own_version

SHOWN = 12  # variants in the summary
PACKAGES = ("torch", "transformers", "peft", "safetensors", "scikit-learn", "faiss-cpu", "numpy")


def record(name: str, settings: Settings, stages: Stages, result: Result) -> dict[str, Any]:
    """What run.json holds: everything needed to repeat the run, and what it cost.

    Args:
        name: the method.
    """
    found: dict[str, Any] = {
        "method": name,
        "versions": versions(settings.engine),
        "flags": settings.plain(),
        "seconds": {stage: round(value, 3) for stage, value in stages.seconds.items()},
        "peak_mib": stages.peak_mib,
    }
    if stages.peak_gpu_mib:
        found["peak_gpu_mib"] = stages.peak_gpu_mib
    return found | (_decided(result.decision, settings.apply) if result.decision else {})


def versions(engine: Engine = "transformers") -> dict[str, str]:
    """The versions of this package, of Python, and of the packages that compute."""
    own = {"proto-route": own_version(), "python": platform.python_version()}
    own |= {package: version(package) for package in PACKAGES}
    if engine == "vllm":  # its build for processors is distributed under another name
        own |= {name: version(name) for name in packages_distributions().get("vllm", ())}
    return own


def _decided(decision: Decision, apply: Apply) -> dict[str, Any]:
    base, evidence = decision.base, decision.routing.evidence
    device, dtype = base.model.device, base.model.dtype
    counts = np.bincount(decision.clusters.labels, minlength=len(decision.variants))
    rows = zip(decision.variants, decision.folders, counts, strict=True)
    return {
        "base": {
            "name": base.name,
            "revision": base.revision,
            "sha256": base.sha256,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "tokens_at_once": tokens_at_once(device, dtype),
            "apply": picked(base.model, device, dtype, apply),
        },
        "adapters": {
            adapter.name: {"revision": adapter.revision, "sha256": adapter.sha256}
            for adapter in decision.adapters
        },
        "n_variants": len(decision.variants),
        **(
            {
                "low_margin": int(evidence.low_margin.sum()),
                "lookalikes": evidence.lookalikes,
                "silent": evidence.silent,
            }
            if evidence
            else {}
        ),
        "variants": [
            {
                "folder": f"variants/{folder}" if folder else None,
                "queries": int(count),
                "weights": {**variant.weights, BASE_COLUMN: variant.base},
            }
            for variant, folder, count in rows
        ],
    }


def summary(found: dict[str, Any]) -> str:
    """A record as text for a person: what was decided, how clearly, what it cost, and where to look."""
    lines, flags = [], found["flags"]
    if "variants" in found:
        variants = found["variants"]
        queries = sum(variant["queries"] for variant in variants)
        counts = _count(len(found["adapters"]), "adapter"), _count(queries, "query")
        made = _count(len(variants), "variant")
        lines.append(f"{found['method']}: {counts[0]} of {found['base']['name']}, {counts[1]}, {made}")
        order = sorted(range(len(variants)), key=lambda n: -variants[n]["queries"])
        lines.append("variant  queries  top candidates")
        for n in order[:SHOWN]:
            shares = sorted(variants[n]["weights"].items(), key=lambda share: -share[1])
            top = ", ".join(f"{name} {weight:.2f}" for name, weight in shares[:3] if weight > 0)
            lines.append(f"{n:7}  {variants[n]['queries']:7}  {top}")
        if len(order) > SHOWN:
            rest = _count(sum(variants[n]["queries"] for n in order[SHOWN:]), "query")
            lines.append(f"and {_count(len(order) - SHOWN, 'variant')} with {rest}")
    if "low_margin" in found:
        lines.append(
            f"{_count(found['low_margin'], 'query')} with a low margin: the two best candidates are "
            f"less than {LOW_MARGIN} apart"
        )
    for name, other in found.get("lookalikes", {}).items():
        lines.append(
            f"warning: {name} reads what {other} reads and writes something else; {other}, listed first or a "
            "duplicate of the first, answers for both. One may be a copy that was made to do harm"
        )
    for name in found.get("silent", []):
        lines.append(
            f"warning: {name} reads directions that text hardly has, as an adapter does that is made to "
            "attract all queries; it gets no weight"
        )
    if left_out := found.get("left_out"):
        lines += [f"{_count(len(left_out), 'adapter')} left out:", *(f"  {reason}" for reason in left_out)]
    if cut := found.get("time_limit"):
        lines.append(told(cut))
    seconds = found["seconds"]
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    lines.append(f"{sum(seconds.values()):.0f} seconds: {stages}")
    folder = flags["output_folder"]
    files = ", ".join(path.rpartition("/")[2] for path in flags["dataset_filepaths"])
    lines.append(f"answers in {folder}: {files}; report: {folder}/{REPORT}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    plural = {"query": "queries"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"
