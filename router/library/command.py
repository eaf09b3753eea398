"""Checks a library of adapters: which are sound, and which are alike. `proto-route library check`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.folders import WEIGHTS_FILE
from router.constants import LIBRARY
from router.library.adapters import Adapter, check_name, opened
from router.library.duplicates import OVERLAP, SAME, norms_and_cosines, overlaps
from router.library.sources import expand, find
from router.system.errors import InputError, printable

OUTLIER = 10.0  # a norm may be this many times larger or smaller than the median
HEADINGS = "adapter sound base rank scale modules kind parameters MB revision sha256".split()


@dataclass
class Report:
    """An adapter, None if it cannot be opened, and the reason why it is broken, None if it is sound."""

    name: str
    adapter: Adapter | None = None
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """The report as JSON values."""
        facts: dict[str, Any] = {"name": self.name, "sound": self.reason is None, "reason": self.reason}
        if self.adapter is None:
            return facts
        folder = self.adapter.folder
        return facts | {
            "path": str(folder.path),
            "base_model": folder.base_model,
            "ranks": sorted(set(folder.ranks.values())),
            "scales": sorted({folder.scale(module) for module in folder.shapes}),
            "modules": Counter(module.rpartition(".")[2] for module in sorted(folder.shapes)),
            "rslora": bool(folder.config.get("use_rslora")),
            "parameters": sum(rank * sum(folder.shapes[module]) for module, rank in folder.ranks.items()),
            "bytes": (folder.path / WEIGHTS_FILE).stat().st_size,
            "revision": self.adapter.revision,
            "sha256": self.adapter.sha256,
        }

    def traits(self) -> dict[str, Any]:
        """What a sound adapter must have in common with the others of its library."""
        if self.adapter is None or self.reason:
            return {}
        folder = self.adapter.folder
        base = {"its base model": folder.base_model.casefold()} if folder.base_model else {}
        return base | {f"the shape of {module}": shape for module, shape in folder.shapes.items()}


def check(specs: Sequence[str]) -> dict[str, Any]:
    """Checks every adapter, including broken ones, and compares the sound ones.

    Returns:
        What `check --json` prints: the facts of all adapters, then comparisons of the sound ones, with all
        modules taken as one vector. These are the norms of the updates, their cosines, the pairs of
        duplicates, whatever their sizes, the pairs of look-alikes with the overlap of what they read, and the
        outliers: norms far above or below the median, in medians.
    """
    reports = list(_reports(specs))
    _name_misfits(reports)
    sound = [report.adapter for report in reports if report.adapter and not report.reason]
    names, (norms, cosines), shared = [a.name for a in sound], norms_and_cosines(sound), overlaps(sound)
    same, alike = (
        np.argwhere(np.triu(of, 1)) for of in (cosines > SAME, (shared > OVERLAP) & (cosines <= SAME))
    )
    sizes = (norms / np.median(norms)).tolist() if sound else []
    return {
        "adapters": [report.facts() for report in reports],
        "compared": names,
        "norms": norms.tolist(),
        "cosines": cosines.tolist(),
        "near_duplicates": [[names[i], names[j], cosines[i, j]] for i, j in same],
        "look_alikes": [[names[i], names[j], shared[i, j], cosines[i, j]] for i, j in alike],
        "outliers": {
            name: size for name, size in zip(names, sizes, strict=True) if not 1 / OUTLIER <= size <= OUTLIER
        },
    }


def _reports(specs: Sequence[str]) -> Iterator[Report]:
    """Reports on each adapter after reading its every value, or on why there is none."""
    names = set[str]()
    for spec in expand(specs):
        try:
            sources = list(find(spec))
        except InputError as error:
            yield Report(Path(spec.partition("@")[0]).name, reason=str(error))
            continue
        for source in sources:
            report = Report(source.name)
            try:
                report.adapter = opened(source)
                report.adapter.check_values()
                check_name(source, names)
                names.add(source.name)
            except (InputError, OSError) as error:
                report.reason = str(error)
            yield report


def _name_misfits(reports: Sequence[Report]) -> None:
    """Gives a reason to adapters whose base model or shape of a module differs from what most adapters have.

    Of two values that are equally frequent the first counts.
    """
    votes: dict[str, Counter[Any]] = defaultdict(Counter)
    for report in reports:
        for trait, value in report.traits().items():
            votes[trait][value] += 1
    usual = {trait: values.most_common(1)[0] for trait, values in votes.items()}
    for report in reports:
        for trait, value in report.traits().items():
            most, count = usual[trait]
            if value != most and report.adapter and not report.reason:
                where = report.adapter.folder.path
                report.reason = f"{where}: {trait} is {value}, but {most} in {count} of the others"


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
            f"else (cosine {cosine:.2f}); one may be a copy that was made to do harm, so a run asks the first"
        )
    for name, size in findings["outliers"].items():
        lines.append(f"outlier: {name}: its update has {size:.3g} times the median norm")
    return lines


def _row(facts: Mapping[str, Any]) -> list[str]:
    """The facts of an adapter as cells below HEADINGS."""
    cells = [facts["name"], "yes" if facts["sound"] else "NO"]
    if "sha256" not in facts:
        return cells + [""] * (len(HEADINGS) - len(cells))
    return [
        *cells,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 if an adapter is broken."""
    p = argparse.ArgumentParser(prog="proto-route library", description=__doc__)
    commands = p.add_subparsers(required=True, metavar="check")
    checking = commands.add_parser("check", help="check and compare adapters; exit code 2 if one is broken")
    checking.add_argument("--json", action="store_true", help="print JSON instead of text")
    checking.add_argument(
        "specs",
        nargs="*",
        default=[str(LIBRARY)],
        metavar="NAME_OR_FOLDER_OR_HUB_ID",
        help=f"as for --adapters of router.main (default: {LIBRARY})",
    )
    args = p.parse_args(argv)
    try:
        findings = check(args.specs)
    except (InputError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    for line in [json.dumps(findings)] if args.json else as_text(findings):
        print(
            "".join(filter(str.isprintable, line))
        )  # names are a stranger's, who must not control the terminal
    return 0 if all(facts["sound"] for facts in findings["adapters"]) else 2


if __name__ == "__main__":
    sys.exit(main())
