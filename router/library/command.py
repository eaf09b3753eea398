"""Checks a library of adapters: which are sound, and which are alike. `proto-route library check`."""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from merge.folders import WEIGHTS_FILE
from router.constants import LIBRARY
from router.library.adapters import Adapter, Examined, examined, misfit, model_of
from router.library.duplicates import OVERLAP, SAME, norms_and_cosines, overlaps

OUTLIER = 10.0  # a norm may be this many times larger or smaller than the median
HEADINGS = "adapter sound base rank scale modules kind parameters MB revision sha256".split()


def check(specs: Sequence[str]) -> dict[str, Any]:
    """Checks every adapter, including broken ones, and compares the sound ones.

    Returns:
        What `check --json` prints: the facts of all adapters, then comparisons of the sound ones, with all
        modules taken as one vector. These are the norms of the updates, their cosines, the pairs of
        duplicates, whatever their sizes, the pairs of look-alikes with the overlap of what they read, and the
        outliers: norms far above or below the median, in medians.
    """
    every = _misfits_refused(list(examined(specs)))
    sound = [one.adapter for one in every if one.adapter and not one.error]
    names = [a.name for a in sound]
    norms, cosines = norms_and_cosines(sound)
    shared = overlaps(sound)
    same, alike = (
        np.argwhere(np.triu(pairs, 1)) for pairs in (cosines > SAME, (shared > OVERLAP) & (cosines <= SAME))
    )
    sizes = (norms / np.median(norms)).tolist() if sound else []
    return {
        "adapters": [
            {"name": one.name, "sound": not one.error, "reason": str(one.error) if one.error else None}
            | (_facts(one.adapter) if one.adapter else {})
            for one in every
        ],
        "compared": names,
        "norms": norms.tolist(),
        "cosines": cosines.tolist(),
        "near_duplicates": [[names[i], names[j], cosines[i, j]] for i, j in same],
        "look_alikes": [[names[i], names[j], shared[i, j], cosines[i, j]] for i, j in alike],
        "outliers": {
            name: size for name, size in zip(names, sizes, strict=True) if not 1 / OUTLIER <= size <= OUTLIER
        },
    }


def _facts(adapter: Adapter) -> dict[str, Any]:
    folder = adapter.folder
    return {
        "path": str(folder.path),
        "base_model": folder.base_model,
        "ranks": sorted(set(folder.ranks.values())),
        "scales": sorted(set(folder.scales.values())),
        "modules": Counter(module.rpartition(".")[2] for module in sorted(folder.shapes)),
        "rslora": bool(folder.config.get("use_rslora")),
        "parameters": sum(rank * sum(folder.shapes[module]) for module, rank in folder.ranks.items()),
        "bytes": (folder.path / WEIGHTS_FILE).stat().st_size,
        "revision": adapter.revision,
        "sha256": adapter.sha256,
    }


def _misfits_refused(every: Sequence[Examined]) -> list[Examined]:
    """Refuses sound adapters whose base model or shape of a module differs from what most of them have.

    Of two values that are equally frequent the first counts.
    """
    bases, shapes = list[str](), defaultdict[str, Counter[tuple[int, int]]](Counter)
    for _, adapter, error in every:
        if adapter and not error:
            bases += filter(None, [adapter.folder.base_model])
            for module, shape in adapter.folder.shapes.items():
                shapes[module][shape] += 1
    most = dict(Counter(map(model_of, bases)).most_common(1))
    base = next((name for name in bases if model_of(name) in most), "the others' base model")
    usual = {module: votes.most_common(1)[0][0] for module, votes in shapes.items()}
    return [
        one._replace(error=misfit(one.adapter, base, False, usual)) if one.adapter and not one.error else one
        for one in every
    ]


def as_text(findings: Mapping[str, Any]) -> list[str]:
    """The findings as lines: the adapters, what is wrong with them, how alike they are."""
    adapters = findings["adapters"]
    rows = [HEADINGS, *map(_row, adapters)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    broken = [facts for facts in adapters if not facts["sound"]]
    lines += ["", f"{len(adapters)} adapters, {len(broken)} of them broken"]
    lines += [f"broken: {facts['name']}: {facts['reason']}" for facts in broken]
    for one, other, cosine in findings["near_duplicates"]:
        lines.append(f"duplicates: {one} and {other}: cosine {cosine:.4f}")
    for one, other, overlap, cosine in findings["look_alikes"]:
        lines.append(
            f"look-alikes: {one} and {other}: they read the same (overlap {overlap:.2f}) and write something "
            f"else (cosine {cosine:.2f}); one may be a copy that was made to do harm: a run that finds their "
            "responses alike asks the first"
        )
    for name, size in findings["outliers"].items():
        lines.append(f"outlier: {name}: its update has {size:.3g} times the median norm")
    return lines


def _row(facts: Mapping[str, Any]) -> list[str]:
    """The facts of an adapter as cells below HEADINGS."""
    cells = [facts["name"], "yes" if facts["sound"] else "NO"]
    if "sha256" in facts:
        cells += [
            facts["base_model"],
            " ".join(map(str, facts["ranks"])),
            " ".join(f"{scale:.4g}" for scale in facts["scales"]),
            " ".join(facts["modules"]),
            "rsLoRA" if facts["rslora"] else "LoRA",
            f"{facts['parameters']:,}",
            f"{facts['bytes'] / 1e6:.1f}",
            (facts["revision"] or "")[:12],
            facts["sha256"][:12],
        ]
    return cells + [""] * (len(HEADINGS) - len(cells))


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route library`."""
    commands = p.add_subparsers(required=True, metavar="check")
    checking = commands.add_parser("check", help="check and compare adapters; exit code 2 if one is broken")
    checking.add_argument("--json", action="store_true", help="print JSON instead of text")
    specs = f"as for --adapters of router.main (default: {LIBRARY})"
    checking.add_argument(
        "specs", nargs="*", default=[str(LIBRARY)], metavar="NAME_OR_FOLDER_OR_HUB_ID", help=specs
    )


def work(args: Namespace) -> int:
    """Prints what `check` finds; returns 2 if an adapter is broken, else 0."""
    findings = check(args.specs)
    for line in [json.dumps(findings)] if args.json else as_text(findings):
        # Names are a stranger's, who must not control the terminal.
        print("".join(filter(str.isprintable, line)))
    return 0 if all(facts["sound"] for facts in findings["adapters"]) else 2
