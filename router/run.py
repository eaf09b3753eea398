"""One run: query files in, submissions, routing tables, record and report out."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from router.constants import BASE_COLUMN
from router.deadline import Deadline
from router.errors import InputError, ServerError, out_of_memory
from router.files import (
    MARKER,
    is_ours,
    read_json,
    remove_ours,
    replacing,
    sha256_of,
    told_if_full,
    work_folder,
)  # fmt: skip
from router.journal import FOLDER, LOCK, Journal, alone_in
from router.kit import Merges
from router.methods import load_method
from router.model.apply import picked
from router.model.device import batch_tokens, tokens_at_once
from router.per_token import PerToken
from router.pipeline import Routed
from router.plan.estimate import PLAN
from router.processes import Processes, connected
from router.record import record, versions
from router.result import Decision, Result
from router.routing.store import content
from router.routing.variants import VARIANTS
from router.runs.report.page import MADE_BY, REPORT, write_report
from router.settings import Settings
from router.submission import Query, digest_of, read_queries, write_submission, write_table

RECORD = "run.json"
RESULTS = ".results."  # how the name of the folder begins in which results are written


def run(
    name: str,
    settings: Settings,
    fresh: bool = False,
    time_limit: float | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Answers the query files with one method, writes all results, and returns the record in run.json.

    A run that was killed goes on where it stood. torchrun may start it in several processes, which share the
    batches; only the first one writes, and the others return an empty record.

    Args:
        fresh: forgets what an unfinished run in the output folder has answered.
        time_limit: minutes, in which the results are written even if answers have to be cut; None sets none.
        began: when the time began, by `time.monotonic`; None is now.

    Raises:
        InputError: something a person can fix is wrong with the queries, adapters or base model, another run
            writes to the output folder, an unfinished one with other settings is there, or there are several
            processes where there cannot be.
    """
    deadline = None if time_limit is None else Deadline(time_limit, began=began)
    with connected(settings.device) as processes:
        with processes.first():
            check_outputs(settings)
            check_engine(name, settings, time_limit)
            files = {path: read_queries(path) for path in settings.dataset_filepaths}
        with (
            told_if_full(settings.output_folder),
            nullcontext() if processes.rank else alone_in(settings.output_folder),
        ):
            return _run(name, settings, files, fresh, deadline, processes)


def _run(
    name: str,
    settings: Settings,
    files: dict[Path, list[Query]],
    fresh: bool,
    deadline: Deadline | None,
    processes: Processes,
) -> dict[str, Any]:
    import torch

    torch.manual_seed(settings.seed)
    method = load_method(name)(name)
    method.settings = settings
    method.deadline = deadline
    method.processes = processes
    with processes.first():
        _check_places(method, settings, processes)
        method.merge()
        if isinstance(method, Routed):
            check_inputs(method)
    queries = [query for part in files.values() for query in part]
    identity = _identity(method, settings, queries) | {"time_limit": deadline and deadline.minutes}
    with processes.first():
        method.journal = journal = Journal(settings.output_folder, identity, fresh, processes.rank)
    try:
        with method.answering(queries) as result:
            if deadline:
                told = processes.gathered((deadline.shortened, deadline.unanswered))
                deadline.shortened, deadline.unanswered = (sum(each) for each in zip(*told, strict=True))
            if processes.rank:
                return {}
            _check_answered(result, deadline)
            found = record(method.get_name(), settings, method.stages, result)
            found["queries"] = {path.name: digest_of(part) for path, part in files.items()}
            if isinstance(method, Routed) and method.left_out:
                found["left_out"] = list(method.left_out)
            if processes.count > 1:
                found["processes"] = processes.count
            if deadline:
                found["time_limit"] = {
                    "minutes": deadline.minutes,
                    "shortened": deadline.shortened,
                    "to_base": len(deadline.to_base),
                    "unanswered": deadline.unanswered,
                }
            work = _write(settings, files, result, found)
            # From here on the folder holds no finished run, until it holds this one.
            for name in (RECORD, REPORT):
                (settings.output_folder / name).unlink(missing_ok=True)
    except InputError as error:
        if not (
            isinstance(error, ServerError) or out_of_memory(error)
        ):  # what it says to do would be another run
            journal.discard()
        raise
    finally:
        journal.close()
    _settle(settings, work)
    if not result.decision:  # a starter-kit method makes no variants, and those of an earlier run are not its
        remove_ours(settings.output_folder / VARIANTS)
    write_report(settings.output_folder)
    journal.discard()
    return found


def _check_answered(result: Result, deadline: Deadline | None) -> None:
    """Refuses a run without a single answer."""
    late = deadline.unanswered if deadline else 0
    if not late and all(answer.failed for answer in result.answers):
        raise InputError(
            "no query could be answered: the model's output is not finite, or memory ran out (see the warnings "
            "above); try --dtype float32, or a smaller --max_seq_len"
        )


def _write(settings: Settings, files: dict[Path, list[Query]], result: Result, found: dict[str, Any]) -> Path:
    """Writes all results into a new folder, so that a full disk leaves earlier ones whole; returns it."""
    work = work_folder(settings.output_folder, RESULTS)
    try:
        start = 0
        for path, part in files.items():
            rows = slice(start, start + len(part))
            submission, routing, evidence = (work / output.name for output in _outputs(settings, path))
            write_submission(submission, part, [answer.text for answer in result.answers[rows]])
            if result.decision:
                _write_routing(routing, part, result.decision, rows)
                if why := result.decision.routing.evidence:
                    why.rows(rows).save(evidence)
            start = rows.stop
        written = sorted(path for path in work.iterdir() if path.name != MARKER)
        found["files"] = {path.name: sha256_of(path) for path in written}
        with replacing(work / RECORD) as file:
            json.dump(found, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except BaseException:
        remove_ours(work)
        raise
    return work


def _settle(settings: Settings, work: Path) -> None:
    """Moves results to the output folder, the record last, and removes that of an earlier run."""
    outputs = [output for path in settings.dataset_filepaths for output in _outputs(settings, path)]
    for output in (*outputs, settings.output_folder / RECORD):
        if (work / output.name).exists():
            (work / output.name).replace(output)
        else:  # a file of an earlier run would pass for this one's
            output.unlink(missing_ok=True)
    remove_ours(work)


def _check_places(method: Merges, settings: Settings, processes: Processes) -> None:
    """Refuses several processes, or a model that is spread over devices, where that cannot be."""
    if settings.device_map and processes.count > 1:
        raise InputError("--device_map: expected one process, which takes all devices; leave torchrun out")
    if settings.engine != "transformers" and processes.count > 1:
        raise InputError(f"--engine {settings.engine}: expected one process; leave torchrun out")
    if isinstance(method, Routed):
        return
    if settings.device_map:
        raise InputError(f"-m {method.get_name()}: expected no --device_map; a starter-kit method takes none")
    if processes.count > 1:
        raise InputError(f"-m {method.get_name()}: expected one process; a starter-kit method runs in one")


def _identity(method: Merges, settings: Settings, queries: Sequence[Query]) -> dict[str, Any]:
    """What the answers depend on, as JSON values."""
    import torch

    flags = settings.plain()
    for path in ("dataset_filepaths", "output_folder", "adapters", "base_model"):
        del flags[path]  # what they stand for counts
    asked, made_by = digest_of(queries), versions(settings.engine)
    found = {"method": method.get_name(), "queries": asked, "versions": made_by, **flags}
    if isinstance(method, Routed):
        model = method.base.model
        device, dtype = model.device, model.dtype
        found |= {"dtype": str(dtype), "device": device.type, "base model": method.base.sha256}
        found["configuration"] = method.base.configuration
        if device.type == "cpu" and dtype.itemsize < 4:  # each number of threads rounds otherwise
            found["threads"] = torch.get_num_threads()
        # Other batches round otherwise, which decides between answers that are nearly as likely.
        found |= {
            "apply": picked(model, device, dtype, settings.apply),
            "tokens at once": [tokens_at_once(device, dtype), *batch_tokens(model, device, dtype)],
        }
        # In order, as the columns of the routing are.
        found["adapters"] = [[adapter.name, content(adapter)] for adapter in method.adapters]
    else:
        found["base model"] = [settings.base_model, method.base_model_name, method.base_model_revision_id]
        found |= {"models": method.list_models, "code": sha256_of(Path(inspect.getfile(type(method))))}
    return found


def check_engine(name: str, settings: Settings, time_limit: float | None) -> None:
    """Refuses what another engine than transformers cannot answer.

    Raises:
        InputError: it is asked for.
    """
    engine = settings.engine
    if engine == "transformers":
        return
    if engine == "vllm" and find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: expected the package vllm, found none; pip install 'proto-route[vllm]'"
        )
    if engine == "vllm" and settings.device_map:
        raise InputError("--device_map: expected --engine transformers, since vLLM places the model itself")
    if time_limit is not None:
        raise InputError(f"--time_limit: expected --engine transformers, since {engine}'s pace is not ours")
    method = load_method(name)
    if not issubclass(method, Routed) or issubclass(method, PerToken):
        raise InputError(f"--engine {engine}: expected a method that makes variants, got {name}")


def _outputs(settings: Settings, path: Path) -> tuple[Path, Path, Path]:
    """Where the submission, the routing table and the evidence of a query file go."""
    folder = settings.output_folder
    return (
        folder / path.name,
        folder / f"{path.stem}.routing.csv",
        folder / f"{path.stem}.evidence.safetensors",
    )


def check_outputs(settings: Settings) -> None:
    """Refuses a run that would overwrite its queries or what is not a run's, or could not write all it has.

    Raises:
        InputError: it would, the output folder is a file or cannot be written, a result would have the name
            of another or of a folder, or a name is no UTF-8, so that the record could not be written.
    """
    for flag, value in settings.plain().items():
        for name in value if isinstance(value, list) else [value]:
            try:
                str(name).encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"--{flag} {name}: expected a name in UTF-8, got another; rename it"
                ) from error
    folder = place = settings.output_folder.absolute()
    try:
        if folder.is_symlink() and not folder.exists():
            raise InputError(f"--output_folder {settings.output_folder}: expected a folder, got a dead link")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output_folder {settings.output_folder}: expected a folder, found a file")
        place = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"--output_folder {settings.output_folder}: expected a folder to write to, but in {place}: "
            f"{error.strerror}"
        ) from error
    for name in (VARIANTS, FOLDER):
        if not is_ours(folder / name):
            raise InputError(
                f"--output_folder {settings.output_folder}: expected no folder `{name}` in it, or one of an "
                "earlier run, since it would be replaced; move it away or choose another folder"
            )
    if not _of_a_run(folder):
        raise InputError(
            f"--output_folder {settings.output_folder}: expected no `{RECORD}` or `{REPORT}` in it, or those "
            "of an earlier run, since they would be replaced; move them away or choose another folder"
        )
    queries = {path.resolve() for path in settings.dataset_filepaths}
    kept = {settings.output_folder / name for name in (RECORD, REPORT, PLAN, VARIANTS, FOLDER, LOCK)}
    written: set[Path] = set()
    for path in settings.dataset_filepaths:
        for output in _outputs(settings, path):
            if output.resolve() in queries:
                raise InputError(
                    f"--output_folder {settings.output_folder}: the results would replace the queries in "
                    f"{output}; choose another folder"
                )
            if output in kept:
                raise InputError(
                    f"--dataset_filepaths: {path} would be answered in {output}, which a run needs for "
                    "something else; rename it"
                )
            if output.is_dir():
                raise InputError(
                    f"--output_folder {settings.output_folder}: expected a file or nothing at {output}, got "
                    "a folder; move it away or choose another output folder"
                )
            if output in written:
                raise InputError(
                    f"--dataset_filepaths: {path} and another file would both be answered in {output}; "
                    "rename one"
                )
            written.add(output)


def _of_a_run(folder: Path) -> bool:
    """Whether the record and the report in a folder are those of a run, or are not there."""
    record, report = folder / RECORD, folder / REPORT
    try:
        if record.exists():
            read_json(record, {"method": str, "versions": {"*": str}, "flags": dict})
        elif report.exists():
            with report.open("rb") as file:
                return MADE_BY.encode() in file.read(4096)
    except (OSError, ValueError):
        return False
    return True


def check_inputs(method: Routed) -> None:
    """Refuses a run whose adapters or base model are variants that it would replace.

    Raises:
        InputError: they are.
    """
    own = (method.settings.output_folder / VARIANTS).resolve()
    inputs = [("--adapters", adapter.folder.path) for adapter in method.adapters]
    for flag, path in (*inputs, ("--base_model", Path(method.base.name))):
        if path.resolve().is_relative_to(own):
            raise InputError(
                f"{flag} {path}: expected a folder that the run does not replace, got one in {own}; choose "
                "another --output_folder"
            )


def _write_routing(path: Path, queries: list[Query], decision: Decision, part: slice) -> None:
    header = ["id", "variant", *(adapter.name for adapter in decision.adapters), BASE_COLUMN]
    labels, weights = decision.clusters.labels[part], decision.routing.weights[part]
    rows = (
        [query.id, label, *(f"{weight:.6g}" for weight in row)]
        for query, label, row in zip(queries, labels, weights, strict=True)
    )
    write_table(path, header, rows)
