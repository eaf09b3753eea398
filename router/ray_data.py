"""`proto-route ray`: Ray Data answers query files block by block, on one machine or a cluster (extra `ray`).

A router is fitted to a sample and saved in the output folder, which all machines share. Each actor of a pool
loads it, routes the queries of a block, answers them, and leaves a Parquet file. A block that has its file is
not answered again. Ray's own checkpoints hold the ids of all rows in memory, so they are not used.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from router.constants import Device
from router.errors import InputError, reason, told_if_memory_runs_out
from router.files import is_folder, read_json, replacing, sha256_of, told_if_full
from router.journal import alone_in
from router.main import add_settings, settings_of, stop
from router.progress import progress
from router.settings import LARGEST, Settings
from router.submission import COLUMNS, Query, parse_query, read_queries, submitted

NEEDED = ("ray", "pyarrow")
SETTINGS = (
    "adapters", "base_model", "skip_bad", "n_variants", "variant_rank", "temperature", "false_alarm",
    "top_k", "seed", "device", "dtype", "max_gen_len", "max_seq_len", "scoring",
)  # fmt: skip
IDENTITY, ROUTER, ANSWERS = "ray.json", "router", "answers"  # in the output folder
PATIENCE = 10.0  # seconds for a cluster to accept a connection
LESS = "fewer --actors, --dtype bfloat16 (half as much for weights), a smaller --max_seq_len"
TRIES = 3  # of a block whose actor dies; without a limit Ray would try for ever
STORE = 128 << 20  # bytes that Ray keeps for what its processes exchange, which are numbers of rows


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(
        prog="proto-route ray",
        description="Answers many queries with Ray Data: proto_route, fitted to a sample of them.",
    )
    p.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PARQUET|CSV",
        help="the query files to answer",
    )
    p.add_argument(
        "--output", "--output_folder", type=Path, required=True, metavar="DIR",
        help="the folder for the router and the answers, which all machines share",
    )  # fmt: skip
    p.add_argument("--actors", type=int, default=2, help="processes that answer, from 1 (default: 2)")
    p.add_argument(
        "--sample", type=int, default=10_000, help="queries that decide the variants, from 1 (default: 10000)"
    )
    p.add_argument(
        "--block", type=int, default=1_000, help="queries that are kept together, from 1 (default: 1000)"
    )
    p.add_argument(
        "--address",
        default="local",
        metavar="local|auto|HOST:PORT",
        help="of a Ray cluster that runs (default: local, this machine alone)",
    )
    add_settings(p, SETTINGS)
    p.add_argument("--fresh", action="store_true", help="start anew where earlier answers are")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 2 for wrong input, 130 if it was stopped."""
    args = parser().parse_args(argv)
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, stop)
    try:
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise InputError(
                f"proto-route ray: expected the packages of the extra `ray`, {', '.join(missing)} is "
                "missing; install them with: pip install 'proto-route[ray]'"
            )
        for name in ("actors", "sample", "block"):
            if not 1 <= (value := getattr(args, name)) <= LARGEST:
                raise InputError(f"--{name}: expected a whole number from 1 to {LARGEST}, got {value!s:.40}")
        from router.run import check_outputs  # imports torch

        check_outputs(Settings((), args.output))
        with told_if_memory_runs_out(LESS), told_if_full(args.output), alone_in(args.output):
            told = _run(args, settings_of(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the command without --fresh" if args.fresh else "the same command"
        print(f"stopped; {again} goes on where it was", file=sys.stderr)
        return 130
    if not args.quiet:
        print(told)
    return 0


class Block(NamedTuple):
    """Some neighbouring queries of one file.

    Attributes:
        path: of the file.
        group: the number of its row group; 0 of a CSV file.
        start, stop: the rows of the group, from 0, without `stop`.
        part: the file that holds their answers.
    """

    path: str
    group: int
    start: int
    stop: int
    part: str

    @property
    def queries(self) -> list[Query]:
        """The queries, in order."""
        return read(self.path, self.group)[self.start : self.stop]


@lru_cache(maxsize=1)
def read(path: str, group: int) -> list[Query]:
    """The queries of a row group of a Parquet file, or all of a CSV file.

    In Parquet the choices are a list of texts, or one text as in CSV.

    Raises:
        InputError: a row is no query, or the file is damaged.
    """
    if _is_csv(path):
        return read_queries(Path(path))
    from pyarrow import ArrowException

    try:
        rows = _opened(path).read_row_group(group, list(COLUMNS)).to_pylist()
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise InputError(
            f"{path}, row group {group}: expected rows that can be read ({error}); write the file again"
        ) from error
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row group {group}, row {number}"
        if empty := [name for name in COLUMNS[:3] if row[name] is None]:
            raise InputError(f"{where}, column {empty[0]}: expected a value, got none")
        if other := [name for name in COLUMNS[:3] if not isinstance(row[name], (str, int))]:
            got = type(row[other[0]]).__name__
            raise InputError(f"{where}, column {other[0]}: expected a text or a whole number, got {got}")
        choices = row["answer_choices"]
        texts = {name: str(row[name]) for name in COLUMNS[:3]}
        found.append(parse_query({**texts, "answer_choices": "" if choices is None else str(choices)}, where))
    return found


def _is_csv(path: str) -> bool:
    return not path.casefold().endswith((".parquet", ".pq"))


def _opened(path: str) -> Any:
    """A Parquet file with the columns of queries."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (OSError, ArrowInvalid) as error:
        raise InputError(f"{path}: expected a Parquet file ({error})") from error
    if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
        raise InputError(
            f"{path}: expected the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing (found: "
            f"{', '.join(file.schema_arrow.names)[:300]})"
        )
    return file


def blocks(path: Path, folder: Path, size: int) -> Iterator[Block]:
    """Cuts a query file into blocks of at most so many queries, none of them in two row groups.

    Args:
        folder: for the files with the answers.
    """
    name, number = str(path), 0
    if _is_csv(name):
        groups = [len(read(name, 0))]
    else:
        about = _opened(name).metadata
        groups = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    for group, rows in enumerate(groups):
        for start in range(0, rows, size):
            part = folder / f"{number:06}.parquet"
            yield Block(name, group, start, min(start + size, rows), str(part))
            number += 1


def sample(of: Sequence[Block], size: int, seed: int) -> list[str]:
    """The texts of so many queries, in order, drawn without looking at them; all where there are no more."""
    total = sum(block.stop - block.start for block in of)
    numbers = iter(sorted(random.Random(seed).sample(range(total), min(size, total))))
    texts, number, first = [], next(numbers, None), 0
    for block in of:
        end = first + block.stop - block.start
        while number is not None and number < end:
            texts.append(block.queries[number - first].input)
            number = next(numbers, None)
        first = end
    return texts


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

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answers a block; tells how many queries it has, how many have no answer, and what is wrong."""
        block = Block(**row)
        part = Path(block.part)
        tries = part.with_name(f".{part.name}.tries")  # an actor that is killed leaves it
        try:
            with told_if_memory_runs_out(LESS), told_if_full(part):
                with tries.open("a") as file:
                    file.write(".")
                if tries.stat().st_size > TRIES:
                    raise InputError(_died(f"{TRIES} times at rows {block.start} to {block.stop - 1}"))
                failed = self._answer(block)
        except InputError as error:
            return {"rows": 0, "failed": 0, "error": str(error)}
        finally:
            tries.unlink(missing_ok=True)
        return {"rows": block.stop - block.start, "failed": failed, "error": ""}

    def _answer(self, block: Block) -> int:
        import pyarrow
        from pyarrow.parquet import write_table

        queries = block.queries
        answers, variants = self._router.answered(queries)
        columns = {
            "id": pyarrow.array([query.id for query in queries], pyarrow.string()),
            "prediction": pyarrow.array([submitted(answer.text) for answer in answers], pyarrow.string()),
            "variant": pyarrow.array(variants, pyarrow.int32()),
        }
        part = Path(block.part)
        new = part.with_name(f".{part.name}.{os.getpid()}")
        write_table(pyarrow.table(columns), new)
        new.replace(part)  # last, so that what has its name is whole
        return sum(answer.failed for answer in answers)


def _run(args: argparse.Namespace, settings: Settings) -> str:
    """Fits, answers what is not answered yet, and returns what to tell."""
    output = args.output.absolute()
    inputs = [path.absolute() for path in args.input]
    _check(inputs, output)
    _reach(args.address)
    folders = [output / ANSWERS / path.stem for path in inputs]
    every = [one for path, to in zip(inputs, folders, strict=True) for one in blocks(path, to, args.block)]
    if not every:
        raise InputError(f"--input {inputs[0]}: expected at least one query, found none")
    _begin(args, output, _identity(args, settings, inputs))
    if not (output / ROUTER / "router.json").is_file():
        shutil.rmtree(output / ROUTER, ignore_errors=True)  # of a run that was killed while it fitted
        _fit(settings, sample(every, args.sample, settings.seed), output / ROUTER)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*"):  # by an actor that was killed
            left.unlink()
    read.cache_clear()
    todo = [block for block in every if not Path(block.part).exists()]
    queries = sum(block.stop - block.start for block in every)
    failed = _answer(todo, args, settings, output / ROUTER, queries) if todo else 0
    lost = f"; {failed} of this run have no answer and say `unknown`" if failed else ""
    return f"{queries} queries, {len(todo)} of {len(every)} blocks in this run: {output / ANSWERS}{lost}"


def _check(inputs: Sequence[Path], output: Path) -> None:
    """Refuses files that are missing, or would be answered in one folder, and an output folder of others."""
    for path in inputs:
        if not path.is_file():
            raise InputError(f"--input {path}: expected a Parquet or CSV file, found none")
    stems = [path.stem for path in inputs]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"--input: two files called {twice[0]} would be answered in one folder; rename one")
    if not (output / IDENTITY).is_file() and any((output / name).exists() for name in (ROUTER, ANSWERS)):
        raise InputError(
            f"--output {output}: expected an empty folder, or what an earlier `proto-route ray` left; found "
            "another's; choose another folder"
        )


def _reach(address: str) -> None:
    """Refuses an address where nothing listens, since Ray would try for minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            f"--address {address}: expected local, auto, or HOST:PORT of a Ray cluster that runs ({error})"
        ) from error


def _identity(args: argparse.Namespace, settings: Settings, inputs: Sequence[Path]) -> dict[str, Any]:
    """What the answers depend on, as JSON values."""
    from router.library.adapters import load_library
    from router.record import versions
    from router.routing.store import content

    adapters = load_library(settings.adapters, bad=[] if settings.skip_bad else None)
    flags = {name: value for name, value in settings.plain().items() if name in SETTINGS}
    return flags | {
        "adapters": [[adapter.name, content(adapter)] for adapter in adapters],
        "input": {path.name: sha256_of(path) for path in inputs},
        "sample": args.sample, "block": args.block, "versions": versions(),
    }  # fmt: skip


def _begin(args: argparse.Namespace, output: Path, identity: dict[str, Any]) -> None:
    """Keeps what the answers depend on, or refuses to go on with other answers."""
    file = output / IDENTITY
    known = None
    if file.is_file() and not args.fresh:
        try:
            known = read_json(file, {})
        except ValueError as error:
            raise InputError(f"{file}: {error}; pass --fresh to start anew there") from error
    if known is None:
        for name in (ROUTER, ANSWERS):
            try:
                if (output / name).exists() or (output / name).is_symlink():
                    shutil.rmtree(output / name)
            except OSError as error:  # a link, or somebody else's
                raise InputError(
                    f"--output {output}: expected a folder `{name}` that can be removed, to start anew, but "
                    f"{error}; remove it, or choose another folder"
                ) from error
        with replacing(file) as new:
            json.dump(identity, new, indent=2)
    elif other := [key for key in {**known, **identity} if known.get(key) != identity.get(key)]:
        raise InputError(
            f"--output {output}: holds answers that differ in {', '.join(other)}; choose another folder, or "
            "pass --fresh to start anew there"
        )


def _fit(settings: Settings, texts: Sequence[str], folder: Path) -> None:
    """Decides the variants from some texts, and saves the router with them."""
    from router.api import Router

    how = {name: getattr(settings, name) for name in SETTINGS if name != "adapters"}
    router = Router.from_library(*settings.adapters, **how)
    router.fit(texts).save(folder)
    del router
    gc.collect()  # the actors need the room


def _answer(
    todo: Sequence[Block], args: argparse.Namespace, settings: Settings, router: Path, queries: int
) -> int:
    """Has the actors answer blocks; returns how many of their queries have no answer."""
    settled = {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # else it tells of actors that would restart
    }  # fmt: skip
    if args.address == "local":  # Ray listens on all network interfaces; nobody else has the token
        settled |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ |= settled  # before Ray is imported, which reads them
    import ray
    import ray.data

    from router.model.device import pick_device

    cards = int(pick_device(settings.device) == "cuda")  # for each actor
    actor: Any = Answering  # Ray's types know functions alone
    base = settings.base_model
    base = str(Path(base).absolute()) if base and is_folder(base) else base
    how: dict[str, Any] = {"address": args.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if args.address == "local":  # one processor more than actors, which Ray's own tasks need
        how |= {"num_cpus": args.actors + 1, "object_store_memory": STORE, "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it calls an error is raised as well
    try:
        with _hushed():
            ray.init(**how)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address {args.address}: expected a Ray cluster, but {error}") from error
    signal.signal(signal.SIGTERM, stop)  # Ray has put its own in place
    try:
        answered = ray.data.from_items(
            [block._asdict() for block in todo], override_num_blocks=len(todo)
        ).map(
            actor, fn_constructor_args=(router, base, settings.device), num_cpus=1,
            num_gpus=cards or None, compute=ray.data.ActorPoolStrategy(size=min(args.actors, len(todo))),
        )  # fmt: skip
        failed = 0
        waiting = sum(block.stop - block.start for block in todo)
        with progress(total=queries, initial=queries - waiting, desc="answer", unit="query") as bar:
            for found in answered.iter_rows():
                if found["error"]:
                    raise InputError(found["error"])
                failed += found["failed"]
                bar.update(found["rows"])
        return failed
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):  # a mistake in the code
            raise
        raise InputError(_died(f"({reason(error):.200})")) from error
    finally:
        ray.shutdown()


def _died(how: str) -> str:
    """What to say of actors that Ray has lost."""
    return (
        f"an actor died {how}, perhaps for want of memory; pass what needs less: {LESS}. What was answered "
        "is kept: the same command goes on there"
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """Takes what Ray's C++ says on standard error: the level that it was told to log at."""
    error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(error, 2)
        os.close(error)
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
