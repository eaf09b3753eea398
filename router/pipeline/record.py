"""The record of a run, which run.json holds, and the summary that is printed of it."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import FiniteFloat

from router.constants import BASE_COLUMN, FORMAT, LIBRARY, Apply, Dtype, Engine
from router.pipeline.evidence import LOW_MARGIN
from router.queries.submission import submission_name
from router.system.files import read_record, typed
from router.system.version import own_version

if TYPE_CHECKING:
    from router.library.adapters import Adapter
    from router.pipeline.context import Context
    from router.pipeline.result import Decision

RECORD, REPORT = "run.json", "report.html"
RESUMED = "it went on where an earlier process had stopped; times are of the last process alone"
SHOWN = 12  # variants in the summary
PACKAGES = ("torch", "transformers", "peft", "safetensors", "scikit-learn", "faiss-cpu", "numpy")


@dataclass(frozen=True)
class BaseRecord:
    """The base model, as `Base` has it; `tokens_at_once` and `apply` decide how its sums round."""

    name: str
    sha256: str
    dtype: Dtype
    revision: str | None = None
    device: str | None = None
    tokens_at_once: int | None = None
    apply: str | None = None
    configuration: str = ""


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter of the library: the hash of its weights, and one of all that it brings."""

    sha256: str
    revision: str | None = None
    content: str = ""

    def is_of(self, adapter: Adapter) -> bool:
        """Whether an adapter is as it was."""
        from router.library.store import content  # imports torch

        return (self.sha256, self.content) == (adapter.sha256, content(adapter))


@dataclass(frozen=True)
class VariantRecord:
    """A variant: how many queries it answered, its mix, and, if it has weights, their folder and hash."""

    queries: int
    weights: dict[str, FiniteFloat]
    folder: str | None = None
    sha256: str = ""


@dataclass(frozen=True)
class TimeLimit:
    """The effect of --time_limit: how many queries have no answer."""

    minutes: FiniteFloat
    unanswered: int

    def __str__(self) -> str:
        return f"to end within {self.minutes:g} minutes, queries without an answer: {self.unanswered}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of run.json: all that is needed to repeat the run, and its cost.

    Raises:
        ValueError: something is missing.
    """

    method: str
    versions: dict[str, str]
    flags: dict[str, Any]  # as `Settings.plain` has them
    directory: str = ""  # in which the run was started, so of which its relative paths are
    seconds: dict[str, FiniteFloat] = field(default_factory=dict)  # this and the next two as in `Stages`
    peak_mib: dict[str, FiniteFloat] = field(default_factory=dict)
    peak_gpu_mib: dict[str, FiniteFloat] = field(default_factory=dict)
    base: BaseRecord | None = None  # as adapters and variants, of a method that routes
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    n_variants: int | None = None
    low_margin: int | None = None  # counts queries; as the next three, of a method that keeps evidence
    lookalikes: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    variants: list[VariantRecord] = field(default_factory=list)
    queries: dict[str, str] = field(default_factory=dict)  # a sha256 of each file's queries, by its name
    left_out: list[str] = field(default_factory=list)  # with --skip_bad, why an adapter is not in the library
    processes: int | None = None
    time_limit: TimeLimit | None = None
    # A sha256 of each result, by its name; of the template of chats where it is not the base model's own.
    files: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, str] = field(default_factory=dict)  # the same of earlier runs' on other query files
    resumed: bool | None = None  # True of a run that was stopped; its seconds are the last process's
    format: int = 0  # FORMAT of the version that wrote it

    def __post_init__(self) -> None:
        names = self.flags.get("dataset_filepaths")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("expected the names of query files in flags.dataset_filepaths")
        if len({path.stem for path in self.paths}) < len(names):
            raise ValueError("expected query files of different names in flags.dataset_filepaths")
        if self.variants and not (self.base and self.adapters):
            raise ValueError("expected the base model and the adapters of its variants")
        if not all(variant.weights for variant in self.variants):
            raise ValueError("a variant has no weights")

    @staticmethod
    def read(path: Path) -> Record:
        """Reads run.json.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no record.
        """
        values = read_record(dict[str, Any], path)
        return typed(Record, {key: value for key, value in values.items() if value is not None})

    @property
    def paths(self) -> list[Path]:
        """The query files, as the run was given them."""
        return list(map(Path, self.flags["dataset_filepaths"]))

    def located(self, path: str) -> str:
        """A path of the flags as any directory finds it; a word or a hub id as it is."""
        for place in (Path(self.directory, path), Path(self.directory, LIBRARY, path)):
            with suppress(OSError):  # a directory that others may not read, or a name that is too long
                if self.directory and place.exists():
                    return str(place)
        return path

    def plain(self) -> dict[str, Any]:
        """The record as JSON values; what such a run does not have is left out."""
        always = ("seconds", "peak_mib")
        return {key: value for key, value in asdict(self).items() if value or value == 0 or key in always}

    def text(self) -> str:
        """The record in JSON, as the file has it."""
        return json.dumps(self.plain(), indent=2, ensure_ascii=False) + "\n"


def record(
    name: str, context: Context, decision: Decision | None, queries: dict[str, str], left_out: list[str]
) -> Record:  # fmt: skip
    """The record of a run, but for the hashes of its results.

    Args:
        name: the method.
        decision: how queries were routed; None of a method that does not route.
    """
    stages, settings, count = context.stages, context.settings, context.processes.count
    deadline = context.deadline
    return Record(
        method=name,
        versions=versions(settings.engine),
        flags=settings.plain(),
        directory=str(Path.cwd()),
        seconds={stage: round(value, 3) for stage, value in stages.seconds.items()},
        peak_mib=dict(stages.peak_mib),
        peak_gpu_mib=dict(stages.peak_gpu_mib),
        format=FORMAT,
        queries=queries,
        left_out=left_out,
        processes=count if count > 1 else None,
        resumed=(context.journal is not None and context.journal.resumed) or None,
        time_limit=TimeLimit(deadline.minutes, len(deadline.unanswered)) if deadline else None,
        **(_decided(decision, settings.apply) if decision else {}),
    )


def versions(engine: Engine = "transformers") -> dict[str, str]:
    """The versions of this package, of Python, and of the packages that compute."""
    packages = {"proto-route": own_version(), "python": platform.python_version()}
    packages |= {package: version(package) for package in PACKAGES}
    if engine == "vllm":  # its build for processors is distributed under another name
        packages |= {name: version(name) for name in packages_distributions().get("vllm", ())}
    return packages


def _decided(decision: Decision, apply: Apply) -> dict[str, Any]:
    """The fields of a method that routes."""
    from router.library.store import content
    from router.model.apply import picked
    from router.model.device import tokens_at_once

    base, evidence = decision.base, decision.routing.evidence
    device, dtype = base.model.device, base.model.dtype
    counts = np.bincount(decision.clusters.labels, minlength=len(decision.variants)).tolist()
    rows = zip(decision.variants, decision.folders, counts, strict=True)
    fields: dict[str, Any] = {
        "base": BaseRecord(
            base.name,
            base.sha256,
            cast(Dtype, str(dtype).removeprefix("torch.")),
            base.revision,
            str(device),
            tokens_at_once(device, dtype),
            picked(base.model, device, apply),
            base.configuration,
        ),
        "adapters": {
            adapter.name: AdapterRecord(adapter.sha256, adapter.revision, content(adapter))
            for adapter in decision.adapters
        },
        "n_variants": len(decision.variants),
        "variants": [
            VariantRecord(
                count,
                {**variant.weights, BASE_COLUMN: variant.base},
                folder and f"variants/{folder}",
                variant.sha256,
            )
            for variant, folder, count in rows
        ],
    }
    if evidence:
        fields["low_margin"] = int(evidence.low_margin.sum())
        fields |= {name: getattr(evidence, name) for name in ("lookalikes", "silent", "homes")}
    return fields


def summary(run: Record) -> str:
    """A record as text for a person: what was decided, how clearly, what it cost, and where to look."""
    lines = []
    if run.base:
        queries = sum(variant.queries for variant in run.variants)
        counts = _count(len(run.adapters), "adapter"), _count(queries, "query")
        made = _count(len(run.variants), "variant")
        lines.append(f"{run.method}: {counts[0]} of {run.base.name}, {counts[1]}, {made}")
        order = sorted(enumerate(run.variants), key=lambda one: -one[1].queries)
        lines.append("variant  queries  top candidates")
        for n, variant in order[:SHOWN]:
            shares = sorted(variant.weights.items(), key=lambda share: -share[1])
            top = ", ".join(f"{name} {weight:.2f}" for name, weight in shares[:3] if weight > 0)
            lines.append(f"{n:7}  {variant.queries:7}  {top}")
        if rest := order[SHOWN:]:
            left = _count(sum(variant.queries for _, variant in rest), "query")
            lines.append(f"and {_count(len(rest), 'variant')} with {left}")
    if run.low_margin is not None:
        lines.append(
            f"{_count(run.low_margin, 'query')} with a low margin: the two best candidates are "
            f"less than {LOW_MARGIN} apart"
        )
    lines += [
        f"warning: {name} reads what {other} reads and writes something else; {other}, listed first or a "
        "duplicate of the first, answers for both. One may be a copy that was made to do harm"
        for name, other in run.lookalikes.items()
    ]
    lines += [
        f"warning: {name} reads directions that text hardly has, as an adapter does that is made to "
        "attract all queries; it gets no weight"
        for name in run.silent
    ]
    lines += [
        f"trained in {form}, and less likely to be chosen elsewhere: "
        + ", ".join(name for name, home in run.homes.items() if home == form)
        for form in dict.fromkeys(run.homes.values())
    ]
    if run.left_out:
        lines.append(f"{_count(len(run.left_out), 'adapter')} left out:")
        lines += [f"  {reason}" for reason in run.left_out]
    if run.time_limit:
        lines.append(str(run.time_limit))
    if run.resumed:
        lines.append(RESUMED)
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in run.seconds.items())
    lines.append(f"{sum(run.seconds.values()):.0f} seconds: {stages}")
    folder = run.flags["output_folder"]
    files = ", ".join(map(submission_name, run.paths))
    lines.append(f"answers in {folder}: {files}; report: {folder}/{REPORT}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    plural = {"query": "queries"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"
