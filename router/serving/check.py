"""`proto-route check`: opens a saved router or a finished run as a server would, and says what is wrong."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from router.serving.names import read_served


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route check`."""
    p.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a saved router, or the output folder of a run"
    )
    p.add_argument("--base_model", metavar="FOLDER|HUB_ID", help="the base model, if it is elsewhere now")


def work(args: Namespace) -> None:
    """Prints what a server would have.

    Raises:
        InputError: it could not serve the folder: something is missing, damaged, exchanged or of another base
            model.
    """
    served = read_served(args.folder, args.base_model)
    from router.api import Router  # imports torch

    router = Router.load(args.folder, args.base_model)
    router.choose(["1 + 1 ="])
    count = len(router.candidates) - 1
    names = ", ".join(served.folders) or "none, since the base model answers all"
    print(f"{args.folder}: {count} adapters of {served.base}, whose weights are as they were")
    print(f"variants with weights: {names}; highest rank {served.rank}")
