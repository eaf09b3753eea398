"""The command line: flags -> settings -> run, nothing else. `python -m router.main -m proto_route`."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router.errors import InputError, told_if_memory_runs_out
from router.methods import method_names
from router.processes import leads, several
from router.settings import LARGEST, SMALLEST, WORDS, Settings

LEAST = 3 << 29  # bytes of address space


def _integer(least: int, word: str | None = None) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if text == word:
            return None
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least}{f' or {word}' if word else ''}, got {text!r:.40}"
            )
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f"expected a number of at most {LARGEST}, got {text!r:.40}")
        return value

    return parse


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def _one_of(accepted: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in accepted:
            return text
        close = difflib.get_close_matches(text, accepted, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(accepted)}, got {text!r}{hint}")

    return parse


def _none_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else parse(text)


def _default(name: str, none: str) -> str:
    """A setting's default as the help text shows it; `none` is the wording for None."""
    value = Settings.__dataclass_fields__[name].default
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return none if value is None else str(value)


def add_settings(p: argparse.ArgumentParser, wanted: Collection[str]) -> None:
    """Adds the flags of these settings. One that is not given is None; its default is in `Settings`."""

    def setting(name: str, what: str, none: str = "none", **how: Any) -> None:
        if name in wanted:
            p.add_argument(f"--{name}", help=f"{what} (default: {_default(name, none)})", **how)

    def word(name: str, what: str) -> None:
        setting(name, what, type=_one_of(WORDS[name]), metavar="|".join(WORDS[name]))

    setting("dataset_filepaths", "the query files to answer", nargs="+", type=Path, metavar="CSV")
    setting("output_folder", "the folder for the results", type=Path, metavar="DIR")
    setting(
        "adapters",
        "adapters, folders of adapter folders, or the word competition",
        nargs="+",
        metavar="NAME_OR_FOLDER_OR_HUB_ID",
    )
    setting(
        "base_model",
        "the base model",
        "the one that the adapters name; embedded if that is SmolLM2-135M-Instruct",
        metavar="embedded|FOLDER|HUB_ID[@REVISION]",
    )
    setting(
        "skip_bad",
        "go on without adapters that are missing, broken, of an unsupported kind or of another base model, "
        "and list them; else the first one ends the run",
        action="store_true",
    )
    setting(
        "n_variants",
        "number of merged variants, from 1; auto makes as few as the weights allow",
        "auto",
        type=_integer(SMALLEST["n_variants"], "auto"),
        metavar="INT|auto",
    )
    setting(
        "variant_rank",
        "recompress variants to at most this rank, from 1; exact does not recompress",
        "exact",
        type=_integer(SMALLEST["variant_rank"], "exact"),
        metavar="INT|exact",
    )
    setting(
        "temperature",
        "temperature of the gate's softmax, in standard deviations of generic text, above 0",
        type=_above_zero,
        metavar="FLOAT",
    )
    setting(
        "false_alarm",
        "share of generic text, which no adapter fits, that may be sent to one, between 0 and 1",
        type=_share,
        metavar="FLOAT",
    )
    setting(
        "ahead",
        "tokens that the base model writes after each prompt, for the gate to see what is asked for, from 0; "
        "0 is faster and finds fewer adapters",
        type=_integer(SMALLEST["ahead"]),
        metavar="INT",
    )
    setting(
        "top_k",
        "maximum number of adapters per query, from 1",
        type=_integer(SMALLEST["top_k"]),
        metavar="INT",
    )
    setting(
        "seed",
        f"seed of the clustering and of dare_ties, from 0 to {LARGEST}",
        type=_integer(SMALLEST["seed"]),
        metavar="INT",
    )
    setting(
        "batch_size",
        "queries per batch, from 1; auto fills batches by tokens",
        "auto",
        type=_integer(SMALLEST["batch_size"], "auto"),
        metavar="INT|auto",
    )
    word("device", "auto uses a GPU if there is one")
    maps = ("none", *WORDS["device_map"])
    setting(
        "device_map",
        "how accelerate spreads a base model that is too large for one device: over all devices, the memory "
        "and the disk; none does not",
        type=_none_or(_one_of(maps)),
        metavar="|".join(maps),
    )
    word(
        "dtype",
        "auto uses bfloat16 if the device multiplies it natively, else float16 on a GPU and float32 on a CPU",
    )
    word(
        "apply",
        "add a variant to the weights, of which a copy is kept (merged), or compute it beside them; "
        "auto adds it in float32 where the memory has room for the copy, since other dtypes round the sum",
    )
    word(
        "engine",
        "what answers in this process, which routes in both cases: transformers or vLLM",
    )
    setting(
        "max_gen_len",
        "maximum number of new tokens per answer, from 1",
        type=_integer(SMALLEST["max_gen_len"]),
        metavar="INT",
    )
    setting(
        "max_seq_len",
        "maximum number of tokens per prompt, from 1; longer prompts keep their start, none keeps all",
        type=_integer(SMALLEST["max_seq_len"], "none"),
        metavar="INT|none",
    )
    word(
        "scoring",
        "score a choice by the log-probability of all of its tokens (full) "
        "or of all but its first, as the starter kit does (kit)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that were given as flags, and the defaults of the others."""
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(args).items()
        if value is not None and key in Settings.__dataclass_fields__
    }
    return Settings(**given)


def parser() -> argparse.ArgumentParser:
    """The flags. One that is not given is None; its default is in `Settings`."""
    module = Path(sys.argv[0]).name == "main.py"  # as `python -m` says it
    p = argparse.ArgumentParser(
        prog="python -m router.main" if module else "proto-route run",
        description="Answers unlabelled queries with a routed mixture of LoRA adapters.",
    )
    p.add_argument(
        "-m",
        "--merging_method",
        type=_one_of(method_names()),
        metavar="NAME",
        help=f"one of {', '.join(method_names())}",
    )
    p.add_argument("--list_methods", action="store_true", help="print the names of all methods and exit")
    add_settings(p, Settings.__dataclass_fields__)
    p.add_argument(
        "--fresh",
        action="store_true",
        help="start anew where an unfinished run left its answers; else the same command goes on there",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="instead of running, print what the run would take: adapters, seconds and memory by stage, "
        "downloads; exit with code 1 if that exceeds a limit",
    )
    p.add_argument(
        "--time_limit",
        type=_above_zero,
        metavar="MINUTES",
        help="answers get shorter, and the last ones are left out, so that the results are written by then; "
        "checked by --plan; above 0 (default: none)",
    )
    p.add_argument(
        "--memory_limit", type=_above_zero, metavar="GIB", help="checked by --plan, above 0 (default: none)"
    )
    output = p.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print nothing but errors")
    output.add_argument("--json", action="store_true", help="print the record of the run, as in run.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0, 1 for a plan over a limit, 2 for wrong input, 130 if it was stopped.
    """
    began = time.monotonic()  # imports take seconds
    p = parser()
    args = p.parse_args(argv)
    if args.list_methods:
        print("\n".join(method_names()))
        return 0
    if args.merging_method is None:
        p.error(f"expected -m NAME, one of {', '.join(method_names())}")
    if not args.plan and args.memory_limit:
        p.error("--memory_limit: expected --plan with it, which compares; a run has no such limit")
    if args.plan and several():
        p.error("--plan: expected one process, whose pace it measures; leave torchrun out")
    quiet = args.quiet or not leads()
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, stop)
    try:
        _check_address_space()
        with told_if_memory_runs_out():
            if args.plan:
                return _plan(args, settings_of(args))
            from router.record import summary  # imports torch
            from router.run import run

            with _logging("WARNING" if quiet else "INFO"):
                record = run(args.merging_method, settings_of(args), args.fresh, args.time_limit, began)
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
    if record is None:
        return 0
    if args.json:
        print(record.text())
    elif not args.quiet:
        print(summary(record), flush=True)
    return 0


def _check_address_space() -> None:
    """Refuses a limit below which the libraries are not loaded: OpenBLAS then tries for ever.

    Raises:
        InputError: there is one.
    """
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
    log, handler = logging.getLogger("router"), logging.StreamHandler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _plan(args: argparse.Namespace, settings: Settings) -> int:
    """Prints the plan and keeps it in the output folder; returns 1 if it exceeds a limit, else 0."""
    from router.plan.estimate import keep, plan
    from router.plan.text import fits, lines
    from router.run import check_engine, check_outputs

    check_outputs(settings)
    check_engine(args.merging_method, settings, args.time_limit)
    found, limits = plan(args.merging_method, settings), vars(args)
    keep(found, settings.output_folder)
    if not args.quiet:
        print(json.dumps(found) if args.json else "\n".join(lines(found, limits)))
    return 0 if fits(found, limits) else 1


if __name__ == "__main__":
    code = main()
    if several():  # torch's threads have aborted processes that ended in the usual way before the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
