"""`proto-route ray`: Ray Data answers query files block by block, on one machine or a cluster (extra `ray`).

Each actor of a pool loads a saved router, or a finished run, and leaves a Parquet file for each block. The
name of the folder is made of what the answers depend on, so a block that has its file is not answered again.
"""

import hashlib
import json
import logging
import os
import secrets
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from router.constants import Dtype
from router.main import stop
from router.model.device import pick_device
from router.pipeline.journal import alone_in
from router.pipeline.record import versions
from router.queries.submission import UNREAD, Query, check_id, id_of, query_of, read_queries, submitted
from router.settings import Count, Settings, reader
from router.system.errors import InputError, explain_out_of_memory, reason
from router.system.files import explain_full_disk, is_folder, sha256_of
from router.system.progress import progress

# Of Parquet, as the keys of JSON lines.
COLUMNS = ["id", "input", "messages", "eval_type", "answer_choices", *UNREAD]
LESS = "fewer --actors, --dtype bfloat16 (half as much for weights)"
TRIES = 3  # of a block whose actor dies; without a limit Ray would try for ever


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route ray`."""
    add = p.add_argument
    add("--router", type=Path, required=True, metavar="DIR", help="a saved router, or a finished run")
    files, shared = "the query files to answer", "the folder for the answers, which all machines share"
    add(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PARQUET|CSV|JSONL",
        help=files,
    )
    add("--output", "--output_folder", type=Path, required=True, metavar="DIR", help=shared)
    add("--base_model", metavar="embedded|FOLDER|HUB_ID", help="in place of the router's own")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="of each actor (default: auto)")
    add("--dtype", choices=get_args(Dtype), help="of the base model (default: the router's)")
    count = reader(Count)
    add("--actors", type=count, default=2, help="processes that answer, from 1 (default: 2)")
    add("--block", type=count, default=1000, help="queries of a file of answers, from 1 (default: 1000)")
    where = "this machine alone, or the Ray cluster that it belongs to (default: local)"
    add("--address", default="local", choices=("local", "auto"), help=where)


def work(args: Namespace) -> int:
    """Answers what is not answered yet; returns 130 if it was stopped, else 0."""
    from router.run import check_outputs  # imports torch

    signal.signal(signal.SIGTERM, stop)
    for package in ("ray", "pyarrow"):
        if find_spec(package) is None:
            raise InputError(f"expected the package {package}; pip install 'proto-route[ray]'")
    try:
        with explain_out_of_memory(LESS), explain_full_disk(args.output), alone_in(args.output, "--output"):
            check_outputs(Settings((), args.output))
            every: dict[Path, list[Query]] = {}  # by the file for their answers
            for path in args.input:
                queries = read(path)
                folder = args.output.absolute() / _name(path, args)
                folder.mkdir(exist_ok=True)
                print(f"{path}: {len(queries)} queries, answers in {folder}", file=sys.stderr)
                for n, start in enumerate(range(0, len(queries), args.block)):
                    every[folder / f"{n:06}.parquet"] = queries[start : start + args.block]
            if todo := {part: block for part, block in every.items() if not part.exists()}:
                _answer(todo, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def read(path: Path) -> list[Query]:
    """The queries of a file in order; a row of Parquet is what an object of JSON lines is.

    Raises:
        InputError: there is none, one of them is no query, or the file is damaged.
    """
    if path.suffix.casefold() != ".parquet":
        return read_queries(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = ParquetFile(path).read(columns=COLUMNS).to_pylist()
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise InputError(f"--input {path}: expected a Parquet file ({reason(error)})") from error
    if not rows:
        raise InputError(f"--input {path}: expected at least one query, found none")
    queries = []
    numbers = dict[str, int]()
    for n, row in enumerate(rows, 1):
        try:
            name = id_of(row, n)
        except ValueError as error:
            raise InputError(f"--input {path}, row {n}: {error}") from error
        check_id(name, n, numbers, path, "row")
        queries.append(query_of(row | {"id": name}, f"{path}, row {n}"))
    return queries


def _name(path: Path, args: Namespace) -> str:
    """The folder of a file's answers: its name, and a hash of all that the answers depend on."""
    known = [file for name in ("router.json", "run.json") if (file := args.router / name).is_file()]
    if not known:
        raise InputError(f"--router {args.router}: expected a saved router or a finished run, found neither")
    hashes = [sha256_of(path), sha256_of(known[0])]
    flags = [str(args.base_model), pick_device(args.device), str(args.dtype), str(args.block)]
    flags.append(json.dumps(versions()))
    return f"{path.stem}-{hashlib.sha256(' '.join(hashes + flags).encode()).hexdigest()[:12]}"


def packed(part: Path, queries: Sequence[Query]) -> dict[str, str]:
    """A block as an actor gets it: the file for its answers, and its queries as JSON."""
    return {"part": str(part), "queries": json.dumps([asdict(query) for query in queries])}


class Answering:
    """An actor of Ray's, which answers blocks with a router. It takes what `Router.load` takes."""

    def __init__(self, *how: Any) -> None:
        self._how = how

    @cached_property
    def _router(self) -> Any:  # not in __init__, where Ray would try an error of a person's again
        from router.api import Router

        return Router.load(*self._how)

    def __call__(self, block: Mapping[str, str]) -> dict[str, Any]:
        """Answers a block, as `packed` makes it; `failed` counts queries without an answer."""
        part, rows = Path(block["part"]), json.loads(block["queries"])
        queries = [Query(**row | {"choices": tuple(row["choices"])}) for row in rows]
        tries = _tries(part)
        try:
            with explain_out_of_memory(LESS), explain_full_disk(part):
                with tries.open("a") as file:
                    file.write(".")
                if tries.stat().st_size > TRIES:
                    raise _died()
                return {"failed": self._answer(queries, part), "error": ""}
        except InputError as error:
            return {"failed": 0, "error": str(error)}
        finally:
            tries.unlink(missing_ok=True)

    def _answer(self, queries: list[Query], part: Path) -> int:
        from pyarrow import table
        from pyarrow.parquet import write_table

        answers, variants = self._router.answered(queries)
        ids, texts = [query.id for query in queries], [submitted(answer.text) for answer in answers]
        new = part.with_name(f".{part.name}")
        write_table(table({"id": ids, "prediction": texts, "variant": variants}), new)
        new.replace(part)  # last, so that what has its name is whole
        return sum(answer.failed for answer in answers)


def _tries(part: Path) -> Path:
    """The file that has a mark for each try at a block; an actor that is killed leaves it."""
    return part.with_name(f".{part.name}.tries")


def _died() -> InputError:
    return InputError(
        f"an actor died {TRIES} times, perhaps for want of memory; pass what needs less: {LESS}. What was "
        "answered is kept: the same command goes on there"
    )


def _answer(todo: Mapping[Path, Sequence[Query]], args: Namespace) -> None:
    """Has actors answer blocks, each for its file."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"  # else it warns of actors that might restart
    actors = min(args.actors, len(todo))
    for part in todo:
        _tries(part).unlink(missing_ok=True)  # of an earlier run
    how: dict[str, Any] = {"address": args.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if args.address == "local":  # Ray listens on all network interfaces; nobody else has the token
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        how |= {"num_cpus": actors + 1, "include_dashboard": False}  # one for Ray's own tasks
    import ray  # reads the environment
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it calls an error is raised as well
    base = args.base_model
    base = str(Path(base).absolute()) if base and is_folder(base) else base
    actor: Any = Answering  # Ray's types know functions alone
    try:
        ray.init(**how)
        signal.signal(signal.SIGTERM, stop)  # Ray has put its own in place
        items = [packed(*block) for block in todo.items()]
        answered = ray.data.from_items(items, override_num_blocks=len(items)).map(
            actor, fn_constructor_args=(args.router.absolute(), base, args.device, args.dtype),
            num_cpus=1, num_gpus=int(pick_device(args.device) == "cuda") or None,
            compute=ray.data.ActorPoolStrategy(size=actors),
        )  # fmt: skip
        failed = 0
        for done in progress(answered.iter_rows(), total=len(todo), desc="answer", unit="block"):
            if done["error"]:
                raise InputError(done["error"])
            failed += done["failed"]
    except ConnectionError as error:
        raise InputError(f"--address {args.address}: expected a Ray cluster ({reason(error)})") from error
    except ray.exceptions.RayActorError as error:
        raise _died() from error
    finally:
        ray.shutdown()
    if failed:
        print(f"{failed} queries have no answer and say `unknown`", file=sys.stderr)
