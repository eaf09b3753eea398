"""`proto-route check`: opens a saved router or a finished run as a server would, and says what is wrong."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from router.serving.names import read_served


def check(folder: Path, base_model: str | None = None) -> list[str]:
    """What a server would have, in lines for a person.

    Raises:
        InputError: it could not serve the folder: something is missing, damaged, exchanged or of another base
            model.
    """
    served = read_served(folder)
    from router.api import Router  # imports torch

    router = Router.load(folder, base_model)
    router.choose(["1 + 1 ="])
    names = ", ".join(served.folders) or "none, since the base model answers all"
    return [
        f"{folder}: {len(router.candidates) - 1} adapters of {served.base}, whose weights are as they were",
        f"variants with weights: {names}; highest rank {served.rank}",
    ]


def flags(p: ArgumentParser) -> None:
    """Those of `proto-route check`."""
    p.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a saved router, or the output folder of a run"
    )
    p.add_argument("--base_model", metavar="FOLDER|HUB_ID", help="the base model, if it is elsewhere now")


def work(args: Namespace) -> None:
    """Prints what a server would have."""
    print("\n".join(check(args.folder, args.base_model)))
