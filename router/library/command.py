"""Checks, lists and extends a library of adapters: `proto-route library check`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.constants import LIBRARY
from router.errors import InputError, printable
from router.library.adapters import Adapter, card, check_name, opened
from router.library.duplicates import OVERLAP, SAME, norms_and_cosines, overlaps
from router.library.sources import CARD_FILE, Source, expand, find, from_hub

OUTLIER = 10.0  # a norm may be this many times larger or smaller than the median
DRAWN = 40  # the heat map is drawn for at most this many adapters
SIGNS, LEVELS = "-.:+#@", (-0.02, 0.02, 0.1, 0.5, SAME)  # of the heat map, and the cosines that separate them
HEADINGS = "adapter sound base rank scale modules kind parameters MB revision sha256".split()


@dataclass(frozen=True)
class Report:
    """What is known of one adapter.

    Attributes:
        name: as in the routing table.
        source: where it is, None if it was not found.
        adapter: None if it cannot be opened.
        reason: why it is broken, None if it is sound.
    """

    name: str
    source: Source | None = None
    adapter: Adapter | None = None
    reason: str | None = None

    @property
    def path(self) -> Path | None:
        """Its folder, None if there is none."""
        return self.source.path if self.source else None

    def facts(self) -> dict[str, Any]:
        """The report as JSON values; for an adapter that cannot be opened, only the reason."""
        known = {"name": self.name, "sound": self.reason is None, "reason": self.reason}
        if self.adapter is None:
            return known
        folder = self.adapter.folder
        return known | {
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
    reports = misfits([read_whole(report) for report in found(specs)])
    sound = [report.adapter for report in reports if report.adapter and not report.reason]
    names, (norms, cosines) = [adapter.name for adapter in sound], norms_and_cosines(sound)
    sizes, shared = (norms / np.median(norms)).tolist() if sound else [], overlaps(sound)
    return {
        "adapters": [report.facts() for report in reports],
        "compared": names,
        "norms": norms.tolist(),
        "cosines": cosines.tolist(),
        "near_duplicates": [
            [names[i], names[j], cosines[i, j]] for i, j in np.argwhere(np.triu(cosines > SAME, 1))
        ],
        "look_alikes": [
            [names[i], names[j], shared[i, j], cosines[i, j]]
            for i, j in np.argwhere(np.triu((shared > OVERLAP) & (cosines <= SAME), 1))
        ],
        "outliers": {
            name: size for name, size in zip(names, sizes, strict=True) if not 1 / OUTLIER <= size <= OUTLIER
        },
    }


def found(specs: Sequence[str]) -> Iterator[Report]:
    """Reports on each adapter, which is not opened yet, or on why there is none."""
    for spec in expand(specs):
        try:
            for source in find(spec):
                yield Report(source.name, source)
        except InputError as error:
            yield Report(Path(spec.partition("@")[0]).name, reason=str(error))


def read_whole(report: Report) -> Report:
    """The same report after reading every value of the adapter."""
    if report.source is None:
        return report
    try:
        report = replace(report, adapter=(adapter := opened(report.source)))
        adapter.check_values()
    except (InputError, OSError) as error:
        return replace(report, reason=str(error))
    return report


def misfits(reports: Sequence[Report]) -> list[Report]:
    """The same reports; an adapter that cannot be in one library with the others is broken.

    Its name may be taken, or its base model or the shape of a module may differ from what most adapters
    have. If two values are equally frequent, the first counts.
    """
    votes: dict[str, Counter[Any]] = defaultdict(Counter)
    for report in reports:
        for trait, value in report.traits().items():
            votes[trait][value] += 1
    usual = {trait: values.most_common(1)[0] for trait, values in votes.items()}
    taken, out = set[str](), []
    for report in reports:
        reason = report.reason or _misnamed(report, taken)
        odd = [(trait, value) for trait, value in report.traits().items() if value != usual[trait][0]]
        if not reason and odd:
            (trait, value), (most, count) = odd[0], usual[odd[0][0]]
            reason = f"{report.path}: {trait} is {value}, but {most} in {count} of the others"
        if not reason:
            taken.add(report.name)
        out.append(replace(report, reason=reason))
    return out


def _misnamed(report: Report, taken: Container[str]) -> str | None:
    """Why a run would refuse the adapter's name; None if it would not."""
    try:
        if report.source:
            check_name(report.source, taken)
    except InputError as error:
        return str(error)
    return None


def add(spec: str, library: Path) -> Report:
    """Fetches an adapter from the hub, checks it, and copies it into a library, whole or not at all.

    Raises:
        InputError: no revision is given, there is no such adapter, it is broken or does not fit the
            library, or the library has one of that name.
    """
    repo, _, revision = spec.partition("@")
    if not revision:
        raise InputError(
            f"add {spec}: expected HUB_ID@REVISION, since nobody could fetch the same again without; "
            f"take a commit from https://huggingface.co/{repo}/commits/main"
        )
    name = Path(repo).name
    final = library / name
    if final.exists():
        raise InputError(f"add {spec}: {final} exists already; remove it, or choose another folder with --to")
    source = from_hub(spec)
    present = found([str(library)]) if library.is_dir() else []
    report = misfits([read_whole(one) for one in (*present, Report(name, source))])[-1]
    if report.reason:
        raise InputError(f"add {spec}: not added: {report.reason}")
    library.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=library) as work:
        copy = Path(work, name)
        copy.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
            if (source.path / file).is_file():
                shutil.copyfile(source.path / file, copy / file)
        copy.rename(final)
    return replace(report, source=source._replace(path=final))


def description(report: Report) -> str:
    """The first line of prose in an adapter's model card, or why there is none."""
    if report.path is None:
        return str(report.reason)
    return next((line for line in card(report.path).splitlines() if re.match(r"\w", line)), "(no model card)")


def as_text(findings: Mapping[str, Any]) -> list[str]:
    """The findings as lines: the adapters, what is wrong with them, how alike they are."""
    adapters, names = findings["adapters"], findings["compared"]
    lines = columns([HEADINGS, *map(row, adapters)])
    lines += ["", f"{len(adapters)} adapters, {len(adapters) - len(names)} of them broken"]
    lines += [f"broken: {facts['name']}: {facts['reason']}" for facts in adapters if not facts["sound"]]
    for one, other, cosine in findings["near_duplicates"]:
        lines.append(f"duplicates: {one} and {other}: cosine {cosine:.4f}")
    for one, other, overlap, cosine in findings["look_alikes"]:
        lines.append(
            f"look-alikes: {one} and {other}: they read the same (overlap {overlap:.2f}) and write something "
            f"else (cosine {cosine:.2f}); one may be a copy that was made to do harm, so a run asks the first"
        )
    for name, size in findings["outliers"].items():
        lines.append(f"outlier: {name}: its update has {size:.3g} times the median norm")
    return lines + (heat_map(names, findings["cosines"]) if 1 < len(names) <= DRAWN else [])


def row(facts: Mapping[str, Any]) -> list[str]:
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


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the columns aligned."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def heat_map(names: Sequence[str], cosines: Sequence[Sequence[float]]) -> list[str]:
    """The cosines below the diagonal as signs."""
    legend = ", ".join(f"{sign} from {level:g}" for sign, level in zip(SIGNS[1:], LEVELS, strict=True))
    lines = ["", f"cosines of updates: {legend}, {SIGNS[0]} below"]
    for n, name in enumerate(names):
        signs = [SIGNS[level] for level in np.digitize(cosines[n][:n], LEVELS)]
        lines.append(" ".join([*signs, "\\", name]))
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="proto-route library", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="check|list|add")
    checking = commands.add_parser("check", help="check and compare adapters; exit code 2 if one is broken")
    checking.add_argument("--json", action="store_true", help="print JSON instead of text")
    listing = commands.add_parser("list", help="list their names, each with a line of its model card")
    for command in (checking, listing):
        command.add_argument(
            "specs",
            nargs="*",
            default=[str(LIBRARY)],
            metavar="NAME_OR_FOLDER_OR_HUB_ID",
            help=f"as for --adapters of router.main (default: {LIBRARY})",
        )
    adding = commands.add_parser("add", help="fetch one from the hub, check it, copy it into a library")
    adding.add_argument("spec", metavar="HUB_ID@REVISION")
    adding.add_argument("--to", type=Path, default=LIBRARY, metavar="DIR", help=f"default: {LIBRARY}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for what a person can fix."""
    args, code = parser().parse_args(argv), 0
    try:
        if args.command == "add":
            report = add(args.spec, args.to)
            lines = [f"added {report.path}, commit {report.source.revision if report.source else None}"]
        elif args.command == "list":
            reports = list(found(args.specs))
            lines = columns([(report.name, description(report)) for report in reports])
            code = 2 if any(report.reason for report in reports) else 0
        else:
            findings = check(args.specs)
            lines = [json.dumps(findings)] if args.json else as_text(findings)
            code = 0 if all(facts["sound"] for facts in findings["adapters"]) else 2
    except (InputError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    for line in lines:  # names and cards may come from a stranger, who must not control the terminal
        print("".join(letter for letter in line if letter.isprintable()))
    return code


if __name__ == "__main__":
    sys.exit(main())
