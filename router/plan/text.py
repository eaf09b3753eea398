"""A plan in words, and whether it fits its limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def lines(found: dict[str, Any], limits: Mapping[str, float | None]) -> list[str]:
    """The plan as text for a person; the last lines say whether it fits its limits."""
    count, total = len(found["adapters"]), found["total_seconds"]
    rows = [f"{found['method']}: {count} adapters of {found['base']}, {found['queries']} queries, "
            f"{found['prompt_tokens']} prompt tokens, on {found['device']} in {found['dtype']}"]  # fmt: skip
    rows += [
        f"  {name}: rank {a['rank']}, {a['modules']} modules, {a['mib']} MiB"
        for name, a in found["adapters"].items()
    ]
    rows += [f"to download: {what}" for kind in found["download"].values() for what in kind]
    rows += [f"{stage:>12} {seconds:8.1f} s" for stage, seconds in found["seconds"].items()]
    spread = f", {total[0]:.0f} to {total[2]:.0f} with fewer or more variants" if len(total) == 3 else ""
    where = "as in an earlier run" if found["known_from_an_earlier_run"] else "an assumed number"
    rows.append(
        f"about {sum(found['seconds'].values()):.0f} seconds with {found['n_variants']} variants, "
        f"{where}{spread}"
    )
    if "calibrate" in found["seconds"]:
        rows.append("calibration is kept on disk: a library seen before does not need it again")
    peak = max(found["peak_mib"].values())
    whose = ", the GPU's counted as the machine's" if found["device"] == "cuda" else ""
    rows.append(f"about {peak:.0f} MiB of memory at the peak{whose}, {found['disk_mib']} MiB of disk")
    for flag, limit, value, unit in _needs(found, limits):
        verdict = "fits" if value <= limit else "does not fit"
        if math.isinf(value):
            rows.append(f"--{flag} {limit:g} {unit}: unknown until the adapters are here")
        else:
            rows.append(f"--{flag} {limit:g} {unit}: {verdict}, about {value:.1f}")
    return rows


def _needs(
    found: dict[str, Any], limits: Mapping[str, float | None]
) -> Iterator[tuple[str, float, float, str]]:
    """Each limit that is set, as (flag, limit, what is needed, unit); infinite while adapters are missing."""
    missing = math.inf if found["download"]["adapters"] else 0.0
    needed = {
        "time_limit": (sum(found["seconds"].values()) / 60, "minutes"),
        "memory_limit": (max(found["peak_mib"].values()) / 1024, "GiB"),
    }
    for flag, (value, unit) in needed.items():
        if (limit := limits[flag]) is not None:
            yield flag, limit, value + missing, unit


def fits(found: dict[str, Any], limits: Mapping[str, float | None]) -> bool:
    """Whether time (minutes) and memory (GiB) are known to stay below their limits; None is no limit."""
    return all(value <= limit for _, limit, value, _ in _needs(found, limits))
