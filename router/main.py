"""The command: flags to settings to a run, nothing else. `python -m router.main -m proto_route`."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.errors import InputError
from router.methods import method_names

if TYPE_CHECKING:
    from router.settings import Settings


DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCORINGS = ("full", "kit")
NO_SETTINGS = (
    "merging_method", "list_methods", "quiet", "json", "plan", "time_limit", "memory_limit",
)  # fmt: skip


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
                f"expected a whole number from {least}{f' or {word}' if word else ''}, got {text!r}"
            )
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


def _one_of(accepted: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in accepted:
            return text
        close = difflib.get_close_matches(text, accepted, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(accepted)}, got {text!r}{hint}")

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line; defaults that are None stand for those of `router.settings.Settings`."""
    p = argparse.ArgumentParser(
        prog="python -m router.main",
        description="Answers unlabelled queries with a routed mixture of LoRA adapters.",
    )
    p.add_argument(
        "-m",
        "--merging_method",
        type=_one_of(method_names()),
        metavar="NAME",
        help=f"one of {', '.join(method_names())}",
    )
    p.add_argument("--list_methods", action="store_true", help="print the methods' names and exit")
    p.add_argument(
        "--dataset_filepaths",
        nargs="+",
        type=Path,
        metavar="CSV",
        help="query files (default: data/test.csv)",
    )
    p.add_argument("--output_folder", type=Path, metavar="DIR", help="where results go (default: output)")
    p.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME_OR_FOLDER_OR_HUB_ID",
        help="adapters, or a folder of adapter folders, or the word competition (default: data/library)",
    )
    p.add_argument(
        "--base_model",
        metavar="embedded|FOLDER|HUB_ID[@REVISION]",
        help="default: the model that the adapters name; embedded if that is SmolLM2-135M-Instruct",
    )
    p.add_argument(
        "--n_variants",
        type=_integer(1, "auto"),
        metavar="INT|auto",
        help="merged variants, from 1; auto takes as few as the weights allow, at most 32 (default: auto)",
    )
    p.add_argument(
        "--variant_rank",
        type=_integer(1, "exact"),
        metavar="INT|exact",
        help="recompress variants to at most this rank (default: exact, no recompression)",
    )
    p.add_argument(
        "--temperature",
        type=_above_zero,
        metavar="FLOAT",
        help="of the gate's softmax, in standard deviations of generic text, above 0 (default: 0.2)",
    )
    p.add_argument("--top_k", type=_integer(1), metavar="INT", help="adapters per query, from 1 (default: 3)")
    p.add_argument(
        "--seed", type=_integer(0), metavar="INT", help="of the clustering and of dare_ties (default: 0)"
    )
    p.add_argument(
        "--batch_size",
        type=_integer(1, "auto"),
        metavar="INT|auto",
        help="queries a batch, from 1; auto fills batches by tokens (default: auto)",
    )
    p.add_argument(
        "--device",
        type=_one_of(DEVICES),
        metavar="|".join(DEVICES),
        help="default: auto, a GPU where there is one",
    )
    p.add_argument(
        "--dtype",
        type=_one_of(DTYPES),
        metavar="|".join(DTYPES),
        help="default: auto, bfloat16 where the device multiplies it natively, else float32",
    )
    p.add_argument("--max_gen_len", type=_integer(1), metavar="INT", help="new tokens, from 1 (default: 64)")
    p.add_argument(
        "--max_seq_len",
        type=_integer(1, "none"),
        metavar="INT|none",
        help="tokens kept of a prompt, from its start (default: none, all of them)",
    )
    p.add_argument(
        "--scoring",
        type=_one_of(SCORINGS),
        metavar="|".join(SCORINGS),
        help="multiple choice by the log-probability of all of a choice's tokens (full, the default) "
        "or of all but its first, as the starter kit does (kit)",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="tell what the run would take and stop: adapters, seconds and memory by stage, downloads; "
        "exit code 1 if that is over a limit",
    )
    p.add_argument(
        "--time_limit", type=_above_zero, metavar="MINUTES", help="for --plan, above 0 (default: none)"
    )
    p.add_argument(
        "--memory_limit", type=_above_zero, metavar="GIB", help="for --plan, above 0 (default: none)"
    )
    told = p.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="print nothing but errors")
    told.add_argument("--json", action="store_true", help="print the record of the run, as in run.json")
    return p  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a plan over a limit, 2 for what one can mend."""
    p = parser()
    args = p.parse_args(argv, argparse.Namespace())
    if args.list_methods:
        print("\n".join(method_names()))
        return 0
    if args.merging_method is None:
        p.error(f"expected -m NAME, one of {', '.join(method_names())}")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(args).items()
        if value is not None and key not in NO_SETTINGS
    }
    if not args.plan and (args.time_limit or args.memory_limit):
        p.error(
            "--time_limit and --memory_limit: expected --plan with them, which compares; a run has no limits"
        )
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    from router.run import record, run, summary  # imports torch
    from router.settings import Settings

    try:
        if args.plan:
            return _plan(args, Settings(**given))
        with _logging("WARNING" if args.quiet else "INFO"):
            method = run(args.merging_method, Settings(**given))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(record(method), ensure_ascii=False))
    elif not args.quiet:
        print(summary(method), flush=True)
    return 0


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """What the package logs goes to standard error as it stands; other packages' logs are left alone."""
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
    """Prints the plan and keeps it beside where the results will go; 1 if it is over a limit."""
    from router.plan import fits, keep, lines, plan
    from router.run import check_outputs

    check_outputs(settings)
    found, limits = plan(args.merging_method, settings), vars(args)
    keep(found, settings.output_folder)
    if not args.quiet:
        print(json.dumps(found) if args.json else "\n".join(lines(found, limits)))
    return 0 if fits(found, limits) else 1


if __name__ == "__main__":
    sys.exit(main())
