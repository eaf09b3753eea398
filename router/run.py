"""One run: query files in, submissions, routing tables, record and report out."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from router.constants import ADDRESS, BASE_COLUMN
from router.deadline import Deadline
from router.errors import InputError, ServerError
from router.files import replacing, sha256_of
from router.journal import Journal, alone_in
from router.kit import Merges
from router.methods import load_method
from router.model.apply import picked
from router.model.device import batch_tokens, tokens_at_once
from router.per_token import PerToken
from router.pipeline import Routed
from router.record import record, versions
from router.result import Decision
from router.routing.store import content
from router.routing.variants import VARIANTS, remove_variants, variants_are_ours
from router.runs.report.page import write_report
from router.settings import Settings
from router.submission import Query, read_queries, write_submission, write_table


def run(
    name: str, settings: Settings, fresh: bool = False, time_limit: float | None = None
) -> dict[str, Any]:
    """Answers the query files with one method, writes all results, and returns the record in run.json.

    A run that was killed goes on where it stood.

    Args:
        fresh: forgets what an unfinished run in the output folder has answered.
        time_limit: minutes, in which the results are written even if answers have to be cut; None sets none.

    Raises:
        InputError: something a person can fix is wrong with the queries, adapters or base model, another run
            writes to the output folder, or an unfinished one with other settings is there.
    """
    deadline = None if time_limit is None else Deadline(time_limit)
    check_outputs(settings)
    _check_engine(name, settings, deadline)
    files = {path: read_queries(path) for path in settings.dataset_filepaths}
    with alone_in(settings.output_folder):
        return _run(name, settings, files, fresh, deadline)


def _run(
    name: str, settings: Settings, files: dict[Path, list[Query]], fresh: bool, deadline: Deadline | None
) -> dict[str, Any]:
    import torch

    torch.manual_seed(settings.seed)
    method = load_method(name)(name)
    method.settings = settings
    method.deadline = deadline
    method.merge()
    queries = [query for part in files.values() for query in part]
    identity = _identity(method, settings, queries) | {"time_limit": deadline and deadline.minutes}
    method.journal = journal = Journal(settings.output_folder, identity, fresh)
    try:
        result = method.answer(queries)
    except ServerError:
        raise
    except InputError:  # what it says to do would be another run
        journal.discard()
        raise
    finally:
        journal.close()
    late = deadline.unanswered if deadline else 0
    if not late and all(answer.failed for answer in result.answers):
        journal.discard()
        raise InputError(
            "no query could be answered: the model's output is not finite, or memory ran out (see "
            "the warnings above); try --dtype float32, or a smaller --max_seq_len"
        )
    final = settings.output_folder / "run.json"
    final.unlink(missing_ok=True)  # from here on the folder holds no finished run, until it holds this one
    start, written = 0, []
    for path, part in files.items():
        rows = slice(start, start + len(part))
        submission, routing, evidence = _outputs(settings, path)
        write_submission(submission, part, [answer.text for answer in result.answers[rows]])
        written.append(submission)
        for stale in (routing, evidence):  # a file of an earlier run would pass for this one's
            stale.unlink(missing_ok=True)
        if result.decision:
            _write_routing(routing, part, result.decision, rows)
            written.append(routing)
            if why := result.decision.routing.evidence:
                why.rows(rows).save(evidence)
                written.append(evidence)
        start = rows.stop
    if not result.decision:  # a starter-kit method makes no variants, and those of an earlier run are not its
        remove_variants(settings.output_folder)
    found = record(method.get_name(), settings, method.stages, result)
    if deadline:
        found["time_limit"] = {
            "minutes": deadline.minutes, "shortened": deadline.shortened, "unanswered": deadline.unanswered
        }  # fmt: skip
    found["files"] = {path.name: sha256_of(path) for path in written}
    with replacing(final) as file:
        json.dump(found, file, indent=2, ensure_ascii=False)
        file.write("\n")
    write_report(settings.output_folder)
    journal.discard()
    return found


def _identity(method: Merges, settings: Settings, queries: Sequence[Query]) -> dict[str, Any]:
    """What the answers depend on, as JSON values."""
    flags = settings.plain()
    for path in ("dataset_filepaths", "output_folder", "adapters", "base_model", "upstream"):
        del flags[path]  # what they stand for counts
    asked = hashlib.sha256(repr(queries).encode("utf-8", "surrogatepass")).hexdigest()
    found = {"method": method.get_name(), "queries": asked, "versions": versions(), **flags}
    if isinstance(method, Routed):
        model = method.base.model
        device, dtype = model.device, model.dtype
        found |= {"dtype": str(dtype), "device": device.type, "base model": method.base.sha256}
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


def _check_engine(name: str, settings: Settings, deadline: Deadline | None) -> None:
    """Refuses what a server cannot answer."""
    if settings.engine == "transformers":
        if settings.upstream is not None:
            raise InputError("--upstream: expected --engine openai with it, got --engine transformers")
        return
    if find_spec("httpx") is None:
        raise InputError("--engine openai: expected httpx, found none; pip install 'proto-route[serve]'")
    if not re.fullmatch(ADDRESS, settings.upstream or ""):
        raise InputError(
            f"--upstream: expected an address such as http://127.0.0.1:8000, got {settings.upstream!r}"
        )
    if deadline is not None:
        raise InputError("--time_limit: expected --engine transformers, since a server's pace is not ours")
    method = load_method(name)
    if not issubclass(method, Routed) or issubclass(method, PerToken):
        raise InputError(f"--engine openai: expected a method that makes variants, got {name}")


def _outputs(settings: Settings, path: Path) -> tuple[Path, Path, Path]:
    """Where the submission, the routing table and the evidence of a query file go."""
    folder = settings.output_folder
    return (
        folder / path.name,
        folder / f"{path.stem}.routing.csv",
        folder / f"{path.stem}.evidence.safetensors",
    )


def check_outputs(settings: Settings) -> None:
    """Refuses a run that would overwrite its queries, write one file twice, or could not write at all.

    Raises:
        InputError: it would, or the output folder is a file or cannot be written.
    """
    if settings.output_folder.exists() and not settings.output_folder.is_dir():
        raise InputError(f"--output_folder {settings.output_folder}: expected a folder, found a file")
    folder = settings.output_folder.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"--output_folder {settings.output_folder}: expected a folder to write to, but in {place}: "
            f"{error.strerror}"
        ) from error
    if not variants_are_ours(settings.output_folder):
        raise InputError(
            f"--output_folder {settings.output_folder}: expected no folder `{VARIANTS}` in it, or one of an "
            "earlier run, since it would be replaced; move it away or choose another folder"
        )
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


def _write_routing(path: Path, queries: list[Query], decision: Decision, part: slice) -> None:
    header = ["id", "variant", *(adapter.name for adapter in decision.adapters), BASE_COLUMN]
    labels, weights = decision.clusters.labels[part], decision.routing.weights[part]
    rows = (
        [query.id, label, *(f"{weight:.6g}" for weight in row)]
        for query, label, row in zip(queries, labels, weights, strict=True)
    )
    write_table(path, header, rows)
