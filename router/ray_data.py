"""`proto-route ray`: Ray Data answers query files block by block, on one machine or a cluster (extra `ray`).

A router is fitted to a sample and saved in the output folder, which all machines share. Each actor of a pool
loads it, routes and answers the queries of a block, and leaves a Parquet file. A block that has its file is
not answered again.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from router.constants import Device
from router.main import add_settings, settings_of, stop
from router.pipeline.journal import alone_in
from router.queries.submission import COLUMNS, Query, parse_query, read_queries, submitted
from router.settings import LARGEST, Settings
from router.system.errors import InputError, reason, told_if_memory_runs_out
from router.system.files import is_folder, read_json, replacing, sha256_of, told_if_full
from router.system.progress import progress

NEEDED = ("ray", "pyarrow")
SETTINGS = (
    "adapters", "base_model", "skip_bad", "n_variants", "variant_rank", "temperature", "false_alarm", "top_k",
    "seed", "device", "dtype", "max_gen_len", "max_seq_len", "scoring",
    "chat_template", "frame",
)  # fmt: skip
IDENTITY, ROUTER, ANSWERS = "ray.json", "router", "answers"  # in the output folder
LESS = "fewer --actors, --dtype bfloat16 (half as much for weights), a smaller --max_seq_len"
TRIES = 3  # of a block whose actor dies; without a limit Ray would try for ever


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(
        prog="proto-route ray",
        description="Answers many queries with Ray Data: proto_route, fitted to a sample of them.",
    )

    add = p.add_argument
    add(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PARQUET|CSV",
        help="the query files to answer",
    )
    shared = "the folder for the router and the answers, which all machines share"
    add("--output", "--output_folder", type=Path, required=True, metavar="DIR", help=shared)
    add("--actors", type=int, default=2, help="processes that answer, from 1 (default: 2)")
    add(
        "--sample", type=int, default=10_000, help="queries that decide the variants, from 1 (default: 10000)"
    )
    add("--block", type=int, default=1_000, help="queries that are kept together, from 1 (default: 1000)")
    where = "of a Ray cluster that runs (default: local, this machine alone)"
    add("--address", default="local", metavar="local|auto|HOST:PORT", help=where)
    add_settings(p, SETTINGS)
    add("--fresh", action="store_true", help="start anew where earlier answers are")
    add("--quiet", action="store_true", help="print no progress and no summary")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 2 for wrong input, 130 if it was stopped."""
    args = parser().parse_args(argv)
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, stop)
    try:
        _check(args)
        with told_if_memory_runs_out(LESS), told_if_full(args.output), alone_in(args.output):
            said = _run(args, settings_of(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the command without --fresh" if args.fresh else "the same command"
        print(f"stopped; {again} goes on where it was", file=sys.stderr)
        return 130
    if not args.quiet:
        print(said)
    return 0


def read(path: Path) -> Iterator[Query]:
    """The queries of a Parquet or CSV file, in order; in Parquet choices are a list, or a text as in CSV.

    Raises:
        InputError: a row is no query, or the file is damaged.
    """
    if path.suffix.casefold() not in (".parquet", ".pq"):
        yield from read_queries(path)
        return
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise InputError(f"{path}: expected the columns {', '.join(COLUMNS)}; {missing[0]} is missing")
        batches = file.iter_batches(columns=list(COLUMNS))
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield _query(row, f"{path}, row {number}")
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise InputError(f"{path}: expected a Parquet file ({reason(error)}); write it again") from error


def _query(row: dict[str, Any], where: str) -> Query:
    for name in COLUMNS[:3]:
        if not isinstance(row[name], (str, int)):
            raise InputError(
                f"{where}, column {name}: expected a text or a whole number, got {row[name]!r:.40}"
            )
    texts = {name: str(row[name]) for name in COLUMNS[:3]}
    choices = row["answer_choices"]
    return parse_query({**texts, "answer_choices": "" if choices is None else str(choices)}, where)


def sample(queries: Iterable[Query], size: int, seed: int) -> list[Any]:
    """The prompts of so many queries, in order, drawn blindly; all where there are no more."""
    numbers, texts = count(), (query.conversation or query.input for query in queries)
    drawn = heapq.nsmallest(size, zip(iter(random.Random(seed).random, None), numbers, texts))  # noqa: B905
    return [text for _, _, text in sorted(drawn, key=lambda one: one[1])]


def blocks(path: Path, output: Path, size: int) -> Iterator[tuple[Path, list[Query]]]:
    """The queries of a file, so many at a time, each with the file for their answers."""
    queries = read(path)
    for number in count():
        if not (block := list(islice(queries, size))):
            return
        yield output / ANSWERS / path.stem / f"{number:06}.parquet", block


def table(part: Path, queries: Sequence[Query]) -> Any:
    """A block as an actor gets it, a pyarrow table with the columns `part` and those of a query."""
    from pyarrow import Table, list_, schema, string

    columns = {
        "part": string(),
        "id": string(),
        "input": string(),
        "eval_type": string(),
        "messages": string(),
    }
    rows = [{"part": str(part), **asdict(query)} for query in queries]
    return Table.from_pylist(rows, schema({**columns, "choices": list_(string())}))


class Answering:
    """An actor of Ray's, which answers blocks with a saved router.

    Args:
        router: the folder of the saved router.
        base_model, device: as `Router.load` takes them.
    """

    def __init__(self, router: Path, base_model: str | None, device: Device) -> None:
        self._how = (router, base_model, device)

    @cached_property
    def _router(self) -> Any:  # not in __init__, where Ray would try an error of a person's again
        from router.api import Router

        return Router.load(*self._how)

    def __call__(self, block: Any) -> dict[str, list[Any]]:
        """Answers a block, as `table` makes it.

        Returns:
            `rows` and `failed`, how many queries it has and how many of them have no answer, and `error`.
        """
        rows = block.to_pylist()
        part = Path(rows[0]["part"])
        queries = [
            Query(row["id"], row["input"], row["eval_type"], tuple(row["choices"]), row["messages"])
            for row in rows
        ]
        tries = part.with_name(f".{part.name}.tries")  # an actor that is killed leaves it
        try:
            with told_if_memory_runs_out(LESS), told_if_full(part):
                with tries.open("a") as file:
                    file.write(".")
                if tries.stat().st_size > TRIES:
                    raise _died(f"{TRIES} times at {part}")
                return {"rows": [len(rows)], "failed": [self._answer(queries, part)], "error": [""]}
        except InputError as error:
            return {"rows": [0], "failed": [0], "error": [str(error)]}
        finally:
            tries.unlink(missing_ok=True)

    def _answer(self, queries: list[Query], part: Path) -> int:
        import pyarrow
        from pyarrow.parquet import write_table

        answers, variants = self._router.answered(queries)
        columns = {
            "id": pyarrow.array([query.id for query in queries], pyarrow.string()),
            "prediction": pyarrow.array([submitted(answer.text) for answer in answers], pyarrow.string()),
            "variant": pyarrow.array(variants, pyarrow.int32()),
        }
        new = part.with_name(f".{part.name}.{os.getpid()}")
        write_table(pyarrow.table(columns), new)
        new.replace(part)  # last, so that what has its name is whole
        return sum(answer.failed for answer in answers)


def _died(how: str) -> InputError:
    return InputError(
        f"an actor died {how}, perhaps for want of memory; pass what needs less: {LESS}. What was answered "
        "is kept: the same command goes on there"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuses missing packages, files and clusters, and flags out of range."""
    from router.run import check_outputs  # imports torch

    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"proto-route ray: expected the packages of the extra `ray`, {', '.join(missing)} is "
            "missing; install them with: pip install 'proto-route[ray]'"
        )
    for name in ("actors", "sample", "block"):
        if not 1 <= (value := getattr(args, name)) <= LARGEST:
            raise InputError(f"--{name}: expected a whole number from 1 to {LARGEST}, got {value!s:.40}")
    for path in args.input:
        if not path.is_file():
            raise InputError(f"--input {path}: expected a Parquet or CSV file, found none")
    stems = [path.stem for path in args.input]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"--input: two files called {twice[0]} would be answered in one folder; rename one")
    check_outputs(Settings((), args.output))
    if args.address not in ("local", "auto"):
        host, _, port = args.address.rpartition(":")
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(
                f"--address {args.address}: expected a Ray cluster that runs there ({error})"
            ) from error


def _run(args: argparse.Namespace, settings: Settings) -> str:
    """Fits, answers what is not answered yet, and returns what to say."""
    output = args.output.absolute()
    _begin(args, output, _identity(args, settings))
    if not (output / ROUTER / "router.json").is_file():
        texts = sample(chain.from_iterable(map(read, args.input)), args.sample, settings.seed)
        if not texts:
            raise InputError(f"--input {args.input[0]}: expected at least one query, found none")
        _fit(settings, texts, output / ROUTER)
    for path in args.input:
        folder = output / ANSWERS / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*"):  # by an actor that was killed
            left.unlink()
    every = (block for path in args.input for block in blocks(path, output, args.block))
    todo = (block for block in every if not block[0].exists())
    first = next(todo, None)
    if first is None:
        return f"all is answered: {output / ANSWERS}"
    queries, failed = _answer(chain([first], todo), args, settings, output / ROUTER)
    lost = f"; {failed} of them have no answer and say `unknown`" if failed else ""
    return f"{queries} queries in this run: {output / ANSWERS}{lost}"


def _identity(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What the answers depend on, as JSON values."""
    from router.library.adapters import load_library
    from router.library.store import content
    from router.pipeline.record import versions

    adapters = load_library(settings.adapters, bad=[] if settings.skip_bad else None)
    flags = {name: value for name, value in settings.plain().items() if name in SETTINGS}
    return flags | {
        "adapters": [[adapter.name, content(adapter)] for adapter in adapters],
        "input": {path.name: sha256_of(path) for path in args.input},
        "sample": args.sample, "block": args.block, "versions": versions(),
    }  # fmt: skip


def _begin(args: argparse.Namespace, output: Path, identity: dict[str, Any]) -> None:
    """Keeps what the answers depend on; refuses to go on with other answers, or in somebody else's folder."""
    file, folders = output / IDENTITY, (output / ROUTER, output / ANSWERS)
    ours = file.is_file() and not any(folder.is_symlink() for folder in folders)
    if not ours and any(os.path.lexists(folder) for folder in folders):
        raise InputError(
            f"--output {output}: expected no `{ROUTER}` and `{ANSWERS}` in it, or what an earlier "
            "`proto-route ray` left; choose another folder"
        )
    if (output / ROUTER / "router.json").is_file() and not args.fresh:  # else nothing is answered
        try:
            known = read_json(file, {})
        except ValueError as error:
            raise InputError(f"{file}: {error}; pass --fresh to start anew there") from error
        if other := [key for key in {**known, **identity} if known.get(key) != identity.get(key)]:
            raise InputError(
                f"--output {output}: holds answers that differ in {', '.join(other)}; choose another folder, "
                "or pass --fresh to start anew there"
            )
        return
    for folder in filter(Path.exists, folders):
        shutil.rmtree(folder)
    with replacing(file) as new:
        json.dump(identity, new, indent=2)


def _fit(settings: Settings, texts: Sequence[str], folder: Path) -> None:
    """Decides the variants from some texts, and saves the router with them."""
    from router.api import Router

    how = {name: getattr(settings, name) for name in SETTINGS if name != "adapters"}
    Router.from_library(*settings.adapters, **how).fit(texts).save(folder)
    gc.collect()  # the actors need the room


def _answer(
    todo: Iterable[tuple[Path, list[Query]]], args: argparse.Namespace, settings: Settings, router: Path
) -> tuple[int, int]:
    """Has the actors answer blocks; returns how many queries these have, and how many have no answer."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"  # else it warns of actors that might restart
    how: dict[str, Any] = {"address": args.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if args.address == "local":  # Ray listens on all network interfaces; nobody else has the token
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        how |= {"num_cpus": args.actors + 1, "include_dashboard": False}  # one for Ray's own tasks
    import ray  # reads the environment
    import ray.data

    from router.model.device import pick_device

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it calls an error is raised as well
    base = settings.base_model
    base = str(Path(base).absolute()) if base and is_folder(base) else base
    actor: Any = Answering  # Ray's types know functions alone
    try:
        ray.init(**how)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address {args.address}: expected a Ray cluster, but {error}") from error
    signal.signal(signal.SIGTERM, stop)  # Ray has put its own in place
    try:
        # Ray keeps them in its store, and on the disk what has no room there.
        counts, refs = zip(*((len(block), ray.put(table(part, block))) for part, block in todo), strict=True)
        answered = ray.data.from_arrow_refs(list(refs)).map_batches(
            actor, fn_constructor_args=(router, base, settings.device),
            batch_size=None, batch_format="pyarrow",  # whole blocks
            num_cpus=1, num_gpus=int(pick_device(settings.device) == "cuda") or None,
            compute=ray.data.ActorPoolStrategy(size=min(args.actors, len(refs))),
        )  # fmt: skip
        failed = 0
        with progress(total=sum(counts), desc="answer", unit="query") as bar:
            for found in answered.iter_rows():
                if found["error"]:
                    raise InputError(found["error"])
                failed += found["failed"]
                bar.update(found["rows"])
        return sum(counts), failed
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):  # a mistake in the code
            raise
        raise _died(f"({reason(error):.200})") from error
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
