"""`proto-route check`: opens a saved router or a finished run as a server would, and says what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from router.serving.names import read_served
from router.system.errors import InputError, exit_code


def check(folder: Path, base_model: str | None = None) -> list[str]:
    """What a server would have, in lines for a person.

    Raises:
        InputError: it could not serve the folder: something is missing, damaged, exchanged or of another base
            model.
    """
    served = read_served(folder)
    from router.api import Router  # imports torch

    router = Router.load(folder, base_model)
    if not router.variants:
        raise InputError(f"{folder}: expected variants to serve, found none; run again, or call Router.fit")
    router.choose(["1 + 1 ="])
    names = ", ".join(served.folders) or "none, since the base model answers all"
    return [
        f"{folder}: {len(router.candidates) - 1} adapters of {served.base}, whose weights are as they were",
        f"variants with weights: {names}; highest rank {served.rank}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 with what is wrong."""
    p = argparse.ArgumentParser(
        prog="proto-route check",
        description="Opens a router or a run as `proto-route serve` would, and says what is wrong.",
    )
    add = p.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a saved router, or the output folder of a run")
    add("--base_model", metavar="FOLDER|HUB_ID", help="the base model, if it is elsewhere now")
    args = p.parse_args(argv)
    return exit_code(lambda: print("\n".join(check(args.folder, args.base_model))))
