"""The console command `proto-route`, also `python -m router`, with one subcommand per task."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from router import __version__
from router.system.errors import InputError, escape_letters, printable

# Each module adds its `flags` to a parser and does the `work`; it is imported only when it is called.
COMMANDS = {
    "run": ("router.main", "answer queries with a routed mixture of adapters"),
    "explain": ("router.runs.explain", "explain why one query of a finished run got its answer"),
    "compare": ("router.runs.compare", "show what changed between two finished runs"),
    "library": ("router.library.command", "check a library of adapters"),
    "check": ("router.serving.check", "say whether a run or a saved router can be served"),
    "export": ("router.serving.export", "write the command that serves a router's variants"),
    "serve": (
        "router.serving.command",
        "serve an OpenAI-compatible proxy: requests for `auto` go to the variant that fits",
    ),
    "ray": ("router.integrations.ray", "answer many queries with Ray Data, on one machine or a cluster"),
    "report": ("router.runs.report.page", "rebuild report.html of a finished run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; 2 for what a person can fix, once that is printed."""
    escape_letters()
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    p = argparse.ArgumentParser(
        prog="proto-route",
        description="Routes unlabelled queries over a library of LoRA adapters.",
        epilog=f"commands:\n{listed}\n\n`proto-route COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="store_true", help="print the version and exit")
    p.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="listed below")
    args = p.parse_args(argv[:1])
    if args.version:
        print(f"proto-route {__version__}")
        return 0
    if args.command is None:
        p.error(f"expected a command, one of {', '.join(COMMANDS)}")
    name, about = COMMANDS[args.command]
    module = import_module(name)
    try:
        if args.command == "run":  # also called as `python -m router.main`
            return int(module.main(argv[1:]))
        p = argparse.ArgumentParser(prog=f"proto-route {args.command}", description=about)
        module.flags(p)
        code = module.work(p.parse_args(argv[1:])) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
