"""The command line of a run: flags -> settings -> run. `python -m router.main -m proto_route`."""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, get_args, get_origin

from router.methods import method_names
from router.pipeline.processes import leads, several
from router.settings import Positive, Settings, kinds, reader
from router.system.errors import InputError, escape_letters, explain_out_of_memory

LEAST = 3 << 29  # bytes of address space
ALIASES = {"false_positive_rate": ("--false_alarm",)}  # the name in 0.1, when it meant something else


def _add_setting(p: argparse.ArgumentParser, setting: Field[Any]) -> None:
    """Adds the flag of a setting."""
    kind = kinds()[setting.name]
    about = setting.metadata
    default: Any = setting.default
    many = get_origin(kind) is tuple
    none = about["none"]
    words = [word for part in (kind, *get_args(kind)) for word in get_args(part) if isinstance(word, str)]
    how: dict[str, Any] = {
        "default": None if many else default,
        "type": reader(get_args(kind)[0] if many else kind, none),
        "metavar": about["metavar"] or "|".join([none, *words] if none else words),
        "nargs": "+" if many else None,
        "action": "extend" if many else "store",  # given twice, both count
    }
    if kind is bool:
        how = {"action": "store_true"}
    shown = none if default is None else " ".join(map(str, default)) if many else default
    names = (f"--{setting.name}", *ALIASES.get(setting.name, ()))
    p.add_argument(*names, help=f"{about['help']} (default: {shown})", **how)


def _settings(args: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {name: value for name in kinds() if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return Settings(**given)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    module = Path(sys.argv[0]).name == "main.py"  # as `python -m` says it
    p = argparse.ArgumentParser(
        prog="python -m router.main" if module else "proto-route run",
        description="Answers unlabelled queries with a routed mixture of LoRA adapters.",
    )
    methods = method_names()
    shown = f"one of {', '.join(methods)}"
    p.add_argument("-m", "--merging_method", choices=methods, metavar="NAME", help=shown)
    for setting in fields(Settings):
        _add_setting(p, setting)
    p.add_argument(
        "--fresh",
        action="store_true",
        help="start anew where an unfinished run left its answers; else the same command goes on there",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="instead of running, print what the run would take: seconds, memory, downloads; exit with code "
        "1 if that exceeds a limit",
    )
    p.add_argument(
        "--time_limit",
        type=reader(Positive),
        metavar="MINUTES",
        help="what is not answered by then says `unknown`, to write the results about in time; checked "
        "by --plan (default: none)",
    )
    p.add_argument(
        "--memory_limit", type=reader(Positive), metavar="GIB", help="checked by --plan (default: none)"
    )
    output = p.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    output.add_argument("--json", action="store_true", help="print the record of the run, as in run.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0, 1 for a plan over a limit, 2 for wrong input, 130 if it was stopped.
    """
    began = time.monotonic()  # imports take seconds
    args = argparse.Namespace(fresh=False)
    escape_letters()
    signal.signal(signal.SIGTERM, stop)
    try:
        with explain_out_of_memory():
            (p := parser()).parse_args(argv, args)
            _check_together(p, args)
            if args.quiet or not leads():
                os.environ["TQDM_DISABLE"] = "1"
            _check_address_space()
            settings = _settings(args)
            return _plan(args, settings) if args.plan else _run(args, settings, began)
    except InputError as error:
        where = "" if leads() else f"process {os.environ['RANK']}: "
        print(f"error: {where}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:  # temporary folders are gone by now
        again = "the command without --fresh" if args.fresh else "the same command"
        why = str(stopped) or (
            "another process of the run ended, or torchrun was stopped" if several() else ""
        )
        if leads():
            print(f"stopped{f', since {why}' if why else ''}; {again} goes on where it was", file=sys.stderr)
        return 130


def _check_together(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where flags do not go together."""
    if args.merging_method is None:
        p.error(f"expected -m NAME, one of {', '.join(method_names())}")
    if not args.plan and args.memory_limit:
        p.error("--memory_limit: expected --plan with it, which compares; a run has no such limit")
    if args.plan and several():
        p.error("--plan: expected one process, whose pace it measures; leave torchrun out")


def _run(args: argparse.Namespace, settings: Settings, began: float) -> int:
    """Answers the queries and prints a summary of the run; of several processes the first one prints."""
    from router.pipeline.record import summary  # imports torch
    from router.run import run

    quiet = args.quiet or not leads()
    with _logging("WARNING" if quiet else "INFO"):
        record = run(args.merging_method, settings, args.fresh, args.time_limit, began)
    if record and (args.json or not quiet):
        print(json.dumps(record.plain()) if args.json else summary(record), flush=True)
    return 0


def _check_address_space() -> None:
    """Refuses a limit below which the libraries are not loaded: OpenBLAS then tries for ever."""
    if sys.platform == "win32":
        return
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < LEAST:
        raise InputError(
            f"ulimit -v: expected {LEAST >> 10} KiB or more, which loading torch and the like takes, got "
            f"{allowed >> 10}; allow more"
        )


def stop(*_: object) -> None:
    """Ends a run on SIGTERM as on Ctrl-C, so that it takes its temporary folders with it."""
    raise KeyboardInterrupt


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """Sends the package's own log messages to standard error, unadorned, while the block runs."""
    log = logging.getLogger("router")
    handler = logging.StreamHandler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _plan(args: argparse.Namespace, settings: Settings) -> int:
    """Prints what the run would take; returns 1 if that exceeds a limit, else 0."""
    from router.methods import check_flags, load_method
    from router.plan import plan
    from router.run import check_outputs

    check_outputs(settings)
    name = args.merging_method
    check_flags(name, load_method(name), settings, args.time_limit is not None)
    planned = plan(name, settings)
    over = planned.over(args.time_limit, args.memory_limit)
    if args.json:
        print(json.dumps(asdict(planned)))
    elif not args.quiet:
        print("\n".join([planned.text(), *over]))
    return 1 if over else 0


if __name__ == "__main__":
    code = main()
    if several():  # torch's threads have aborted processes that ended in the usual way before the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
