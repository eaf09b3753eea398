"""One run: read -> route -> group -> write -> answer -> commit. Query files in, an output folder out."""

import inspect
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from router.constants import BASE_COLUMN, FORMAT, LIBRARY, SCRIPT, TEMPLATE
from router.kit import StarterKitMethod
from router.library.store import content
from router.methods import check_flags, load_method
from router.model.apply import picked
from router.model.device import batch_tokens, tokens_at_once
from router.pipeline.context import Context, Deadline
from router.pipeline.journal import FOLDER, LOCK, Journal, alone_in
from router.pipeline.processes import connected
from router.pipeline.reading import check_frame
from router.pipeline.record import RECORD, REPORT, Record, record, versions
from router.pipeline.result import Decision, Result
from router.pipeline.saved import ABOUT
from router.pipeline.steps import Loaded, Method, answer, group, load, route, write
from router.queries.submission import (
    Query,
    digest_of,
    read_queries,
    submission_name,
    write_submission,
    write_table,
)  # fmt: skip
from router.routing.variants import VARIANTS
from router.runs.report.page import write_report
from router.settings import Settings
from router.system.errors import InputError, reason, whole
from router.system.files import (
    check_apart,
    explain_full_disk,
    for_others,
    is_folder,
    is_ours,
    is_sealed,
    is_still,
    mark,
    read_record,
    remove_ours,
    replacing,
    sha256_of,
    work_folder,
)

log = logging.getLogger(__name__)

WORK = ".results."  # how the name of the folder begins in which a run writes
# While results are replaced, the hashes that each may have, by name: a run may be killed meanwhile.
COMMIT = ".commit.json"
HERE = Path(__file__).parent
CODE = [
    HERE.parent / "merge",
    *(HERE / top for top in ("library", "model", "pipeline", "queries", "routing")),
]
Files = dict[Path, list[Query]]  # the queries of each query file


def run(
    name: str,
    settings: Settings,
    fresh: bool = False,
    time_limit: float | None = None,
    began: float | None = None,
) -> Record | None:
    """Answers the query files with one method, writes all results, and returns the record in run.json.

    A run that was killed goes on where it stood. torchrun may start it in several processes, which share the
    batches; only the first one writes, and the others return None.

    Args:
        fresh: forgets what an unfinished run in the output folder has answered.
        time_limit: minutes, in which the results are written even if queries are left out; None sets none.
        began: when the time began, by `time.monotonic`; None is now.

    Raises:
        InputError: something a person can fix is wrong with the queries, adapters or base model, the output
            folder holds what no run wrote, another run writes there, an unfinished one with other settings is
            there, flags do not go together, or there was no time for any answer.
    """
    deadline = None if time_limit is None else Deadline(time_limit, began=began)
    with connected(settings.device) as processes:
        context = Context(settings, processes=processes, deadline=deadline)
        alone = nullcontext() if processes.rank else alone_in(settings.output_folder, "--output_folder")
        with explain_full_disk(settings.output_folder), alone:
            with processes.first():
                check_outputs(settings)
                files = {path: read_queries(path) for path in settings.dataset_filepaths}
            return _run(name, files, context, fresh)


def _run(name: str, files: Files, context: Context, fresh: bool = False) -> Record | None:
    import torch

    settings = context.settings
    processes = context.processes
    made = load_method(name)
    torch.manual_seed(settings.seed)
    queries = [query for part in files.values() for query in part]
    if not issubclass(made, Method) and any(query.messages for query in queries):
        raise InputError(f"-m {name}: expected prompts, since a starter-kit method takes no conversations")
    with processes.first():
        check_flags(name, made, settings, context.deadline is not None, processes)
        check_frame(queries, settings.frame)
        source = _loaded(made, context) if issubclass(made, Method) else StarterKitMethod(made, name, context)
    identity = {"method": name, "queries": digest_of(queries)} | _identity(made, source, settings)
    with ExitStack() as ending:
        with processes.first():
            journal = Journal(settings.output_folder, identity, fresh, processes.rank)
            ending.callback(journal.close)  # also where another process is refused
        context = replace(context, journal=journal)
        with _work(context) as work:
            if isinstance(source, StarterKitMethod):
                with context.stages("predict"):
                    result = Result(source.answer(queries, context))
            else:
                method = cast(type[Method], made)(name, source.base, source.adapters, context)
                rows, routing = route(method, queries)
                clusters, variants = group(method, routing)
                decision = write(method, routing, clusters, variants, work / VARIANTS)
                if method.template.source and not processes.rank:
                    (work / TEMPLATE).write_text(method.template.source, "utf-8", newline="")
                result = answer(method, queries, rows, decision, work / VARIANTS)
            if processes.rank:
                return None
            if all(answer.failed for answer in result.answers):
                raise _no_answer(journal, context.deadline)
            digests = {path.name: digest_of(part) for path, part in files.items()}
            left_out = source.left_out if isinstance(source, Loaded) else []
            final = record(name, context, result.decision, queries=digests, left_out=left_out)
            final = _commit(files, result, final, settings, work)
    write_report(settings.output_folder)
    if context.deadline and context.deadline.unanswered:
        journal.finish()
    else:
        journal.discard()
    return final


def _loaded(made: type[Method], context: Context) -> Loaded:
    """Loads what a method needs."""
    made.check()
    loaded = load(context)
    inputs = [("--adapters", adapter.folder.path) for adapter in loaded.adapters]
    check_apart(
        [*inputs, ("--base_model", Path(loaded.base.name))], context.settings.output_folder / VARIANTS
    )
    return loaded


@contextmanager
def _work(context: Context) -> Iterator[Path]:
    """A folder in the output folder for all that the run writes, so that a full disk leaves what is there."""
    processes = context.processes
    work = processes.decided(lambda: work_folder(context.settings.output_folder, WORK))
    try:
        if not processes.rank:
            (work / VARIANTS).mkdir()
        yield work
    finally:
        if not processes.rank:
            remove_ours(work)


def _identity(made: type[Any], source: Loaded | StarterKitMethod, settings: Settings) -> dict[str, Any]:
    """All that the answers depend on beside the queries, as JSON values."""
    import torch

    paths = ("dataset_filepaths", "output_folder", "adapters", "base_model")  # what they stand for counts
    identity = {flag: value for flag, value in settings.plain().items() if flag not in paths}
    files = [Path(inspect.getfile(made)), *(file for top in CODE for file in sorted(top.rglob("*")))]
    code = sha256_of(*(file for file in files if file.suffix in (".py", ".json") and file.is_file()))
    identity |= {"versions": versions(settings.engine), "format": FORMAT, "code": code}
    if isinstance(source, StarterKitMethod):
        kit = source.kit
        models = [settings.base_model, kit.base_model_name, kit.base_model_revision_id]
        names = (settings.base_model, kit.base_model_name, *(name for name, *_ in kit.list_models))
        places = [path for name in names if name for path in (Path(name), LIBRARY / name) if is_folder(path)]
        check_apart([(f"-m {kit.name}:", place) for place in places], settings.output_folder / VARIANTS)
        files = sorted(file for place in places for file in place.iterdir())
        return identity | {"base model": models, "models": kit.list_models, "files": _each(files)}
    model = source.base.model
    device, dtype = model.device, model.dtype
    if device.type == "cpu" and dtype.itemsize < 4:  # each number of threads rounds otherwise
        identity["threads"] = torch.get_num_threads()
    room = () if settings.batch_size else batch_tokens(model, device, dtype)
    return identity | {
        "template": _each([settings.chat_template] if settings.chat_template else []),
        "what the method reads": _each(made.reads(source.adapters, settings)),
        "dtype": str(dtype), "device": device.type, "base model": source.base.sha256,
        "configuration": source.base.configuration,
        # Other batches round otherwise, which decides between answers that are nearly as likely.
        "apply": picked(model, device, settings.apply),
        "tokens at once": [tokens_at_once(device, dtype), *room],
        # In order, as the columns of the routing are.
        "adapters": [[adapter.name, content(adapter)] for adapter in source.adapters],
    }  # fmt: skip


def _each(files: Sequence[Path]) -> list[str | None]:
    """The hash of each file, None where there is none: which adapter has one counts, too."""
    try:
        return [sha256_of(file) if file.is_file() else None for file in files]
    except OSError as error:
        raise InputError(f"{error.filename}: expected a file that can be read ({error.strerror})") from error


def _no_answer(journal: Journal, deadline: Deadline | None) -> InputError:
    """Why a run without any answer is refused. Drops the journal if other flags may help: it fixes them."""
    if deadline and deadline.unanswered:
        return InputError(
            f"--time_limit {deadline.minutes:g}: expected time for an answer, but loading and routing took "
            "it all; the routing is kept: the same command goes on there, also with a longer limit"
        )
    journal.close()  # Windows removes no open file
    journal.discard()
    return InputError(
        "no query could be answered: the model's output is not finite, or memory ran out (see the warnings "
        "above); try --dtype float32, or a smaller --max_seq_len"
    )


def _commit(files: Files, result: Result, final: Record, settings: Settings, work: Path) -> Record:
    """Writes all results, then moves them to the output folder, the record last; returns it whole."""
    folder = settings.output_folder
    start = 0
    for path, part in files.items():
        rows = slice(start, start + len(part))
        submission, routing, evidence = (work / name for name in _outputs(path))
        write_submission(submission, part, [answer.text for answer in result.answers[rows]])
        if result.decision:
            _write_routing(routing, part, result.decision, rows)
            if why := result.decision.routing.evidence:
                why.rows(rows).save(evidence)
        start = rows.stop
    names = _results(settings)
    left = _left(folder)
    written = sorted(name for name in names if (work / name).exists())
    earlier = {
        name: sha256 for name, sha256 in left.items() if name not in names and is_still(folder / name, sha256)
    }
    final = replace(final, files={name: sha256_of(work / name) for name in written}, earlier=earlier)
    with replacing(work / RECORD) as file:
        file.write(final.text())
    check_outputs(settings)  # what was put there meanwhile stays, too
    names_left = sorted({*left, *final.files})
    either = {name: [of[name] for of in (left, final.files) if name in of] for name in names_left}
    with replacing(folder / COMMIT) as file:
        json.dump(either, file)
    # From here on the folder holds no finished run, until it holds this one. Variants and report of an
    # earlier run go; its answers to other query files stay, and later runs know them.
    for name in (RECORD, REPORT, *([SCRIPT] if is_sealed(folder / SCRIPT) else [])):
        (folder / name).unlink(missing_ok=True)
    if result.decision:
        _place_variants(work / VARIANTS, folder / VARIANTS)
    else:  # a starter-kit method makes none, and those of an earlier run are not its
        remove_ours(folder / VARIANTS)
    for name in names:
        if name in final.files:
            (work / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    (work / RECORD).replace(folder / RECORD)
    (folder / COMMIT).unlink()
    return final


def _place_variants(work: Path, final: Path) -> None:
    """Moves variants into the output folder; where it cannot is a warning, since answers are worth more."""
    try:
        mark(work, finished=True)
        for_others(work)
        remove_ours(final)
        work.rename(final)
    except OSError as error:
        log.warning("%s: the variants could not be kept: %s", final, error)


def _write_routing(path: Path, queries: list[Query], decision: Decision, part: slice) -> None:
    header = ["id", "variant", *(adapter.name for adapter in decision.adapters), BASE_COLUMN]
    labels, weights = decision.clusters.labels[part], decision.routing.weights[part]
    rows = (
        [query.id, label, *(f"{weight:.6g}" for weight in row)]
        for query, label, row in zip(queries, labels, weights, strict=True)
    )
    write_table(path, header, rows)


def _results(settings: Settings) -> list[str]:
    """The names of all results of a run but its record, its report and its variants."""
    return [*(name for path in settings.dataset_filepaths for name in _outputs(path)), TEMPLATE]


def _outputs(path: Path) -> tuple[str, str, str]:
    """The names of the submission, the routing table and the evidence of a query file."""
    return submission_name(path), f"{path.stem}.routing.csv", f"{path.stem}.evidence.safetensors"


def check_outputs(settings: Settings) -> set[str]:
    """Refuses to replace what no run wrote; returns the hashes of the results that runs did.

    Raises:
        InputError: the output folder holds something that no run wrote where a result will be, a result would
            have the name of another or of its queries, or a name is no UTF-8, so that the record could not be
            written.
    """
    _check_names(settings)
    folder = settings.output_folder
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"--output_folder {folder}: expected a folder to write to, but {place} is none")
    try:
        known = {*_left(folder).values(), *chain.from_iterable(_committed(folder).values())}
        foreign = list(_foreign(settings, known))
    except (OSError, ValueError) as error:
        known, foreign = set(), [f"a result, {RECORD} or {COMMIT} that cannot be read ({reason(error)})"]
    if foreign:
        raise InputError(
            f"--output_folder {folder}: expected nothing where a run writes but what a run left there, whole "
            f"and unchanged, got {', '.join(foreign)}; move it away or choose another folder"
        )
    return known


def _left(folder: Path) -> dict[str, str]:
    """The hashes of results that the last run and those before it left in a folder, by name."""
    if (folder / RECORD).exists():
        record = Record.read(folder / RECORD)
        return record.earlier | record.files
    hashes = _committed(folder)
    return {name: one for name in hashes for one in hashes[name] if is_still(folder / name, one)}


def _committed(folder: Path) -> dict[str, list[str]]:
    """The hashes that results may have, by name, where a run was killed as it replaced them."""
    return read_record(dict[str, list[str]], folder / COMMIT) if (folder / COMMIT).exists() else {}


def _foreign(settings: Settings, known: set[str]) -> Iterator[str]:
    """The names of what a run would replace though no run wrote it."""
    folder = settings.output_folder
    yield from (name for name in (VARIANTS, FOLDER) if not is_ours(folder / name))
    if settings.dataset_filepaths and (folder / ABOUT).exists():  # its variants would be replaced
        yield ABOUT
    if not is_sealed(folder / REPORT):
        yield REPORT
    for output in (folder / name for name in _results(settings)):
        there = output.is_symlink() or output.exists()
        if there and not (output.is_file() and sha256_of(output) in known):
            yield output.name


def _check_names(settings: Settings) -> None:
    """Refuses names not in UTF-8, and results of one name, or of that of queries or of what a run needs."""
    for flag, value in settings.plain().items():
        for text in value if isinstance(value, list) else [value]:
            if not whole(str(text)):  # bytes that were no UTF-8
                raise InputError(f"--{flag} {text}: expected a name in UTF-8, got another; rename it")
    queries = {os.path.realpath(path) for path in settings.dataset_filepaths}  # takes links in a circle, too
    taken = {RECORD, REPORT, VARIANTS, TEMPLATE, FOLDER, LOCK, COMMIT}
    for path in settings.dataset_filepaths:
        for name in _outputs(path):
            output = settings.output_folder / name
            if name.casefold() in taken or os.path.realpath(output) in queries:
                raise InputError(
                    f"--dataset_filepaths: {path} would be answered in {output}, which is a query file, or "
                    "which a run or another file needs; rename it or choose another --output_folder"
                )
            taken.add(name.casefold())  # which macOS and Windows take for the same
