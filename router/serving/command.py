"""`proto-route serve --router FOLDER --upstream URL`: the front, until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from router.constants import ADDRESS, Dtype
from router.errors import InputError
from router.keys import key_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine alone
NEEDED = ("starlette", "httpx", "uvicorn", "prometheus_client")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(
        prog="proto-route serve",
        description="An OpenAI-compatible front: requests for the model `auto` go to the variant that fits.",
    )
    p.add_argument(
        "--router", type=Path, required=True, metavar="DIR", help="a saved router, or a finished run"
    )
    p.add_argument("--upstream", required=True, metavar="URL", help="the server that serves the variants")
    p.add_argument("--base_model", metavar="embedded|FOLDER|HUB_ID", help="in place of the router's own")
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="of the base model's copy"
    )
    p.add_argument(
        "--dtype", choices=get_args(Dtype), help="of the base model's copy (default: as the router was made)"
    )
    p.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    p.add_argument("--port", type=int, default=8080, help="default: 8080")
    p.add_argument("--reroute", action="store_true", help="route each message of a conversation anew")
    p.add_argument(
        "--max_body", type=int, default=4 << 20, metavar="BYTES", help="of a request (default: 4 MiB)"
    )
    p.add_argument(
        "--queue", type=int, default=1024, help="requests that may wait to be routed (default: 1024)"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="without a byte from upstream, and to drain at the end (default: 600)",
    )
    p.add_argument("--log_prompts", action="store_true", help="write prompts to the log")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Serves; returns the exit code: 0, or 2 for input that a person can fix.

    The environment variable PROTO_ROUTE_API_KEY holds the key that clients have to bring, if there is one,
    and PROTO_ROUTE_UPSTREAM_KEY the one that the upstream asks for.
    """
    args = parser().parse_args(argv)
    try:
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise InputError(
                f"proto-route serve: expected the packages of the extra `serve`, {', '.join(missing)} is "
                "missing; install them with: pip install 'proto-route[serve]'"
            )
        _check(args)
        if not re.fullmatch(ADDRESS, args.upstream):
            raise InputError(
                f"--upstream: expected an address such as http://127.0.0.1:8000, got {args.upstream!r}"
            )
        _serve(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers out of their range."""
    for name, what, fine in (
        ("port", "from 0 to 65535", 0 <= args.port < 1 << 16),
        ("queue", "from 1", args.queue >= 1),
        ("max_body", "from 1", args.max_body >= 1),
        ("timeout", "above 0", args.timeout > 0),
    ):
        if not fine:
            raise InputError(f"--{name}: expected a number {what}, got {getattr(args, name)}")


def _listening(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; they wait until it is served.

    Raises:
        InputError: the port is taken, or there is no such address.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"--port {port}: expected a free port of --host {host}, but {error.strerror}; choose another, or "
            "stop what listens there"
        ) from error


def _serve(args: argparse.Namespace) -> None:
    keys = {name: key_of(name) for name in ("PROTO_ROUTE_API_KEY", "PROTO_ROUTE_UPSTREAM_KEY")}
    with _listening(args.host, args.port) as listener:  # first, since loading takes long
        _serve_at(listener, args, keys)


def _serve_at(listener: socket.socket, args: argparse.Namespace, keys: dict[str, str | None]) -> None:
    import uvicorn

    from router.api import Router
    from router.serving.front import Front

    def load() -> Router:
        found = Router.load(args.router, args.base_model, args.device, args.dtype)
        if not found.variants:
            raise InputError(f"--router {args.router}: expected a router with variants, found none")
        return found

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request of ours
    front = Front(
        load(), args.upstream, load=load, api_key=keys["PROTO_ROUTE_API_KEY"],
        reroute=args.reroute, max_body=args.max_body, queue=args.queue, timeout=args.timeout,
        log_prompts=args.log_prompts, upstream_key=keys["PROTO_ROUTE_UPSTREAM_KEY"],
        hosts=LOOPBACK if args.host in LOOPBACK else None,
    )  # fmt: skip

    async def run() -> None:
        loop, renewals = asyncio.get_running_loop(), set()

        async def renewed() -> None:
            try:
                await front.renew()
            except InputError as error:
                logging.getLogger("router").error("the router was not reloaded: %s", error)

        def renew() -> None:
            task = loop.create_task(renewed())
            renewals.add(task)  # a task that nobody holds may vanish
            task.add_done_callback(renewals.discard)

        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, renew)
        config = uvicorn.Config(
            front.app, args.host, args.port, log_level="warning", timeout_graceful_shutdown=args.timeout
        )
        port = listener.getsockname()[1]  # --port 0 is any
        count = len(front.router.variants)
        print(f"http://{args.host}:{port}: {count} variant{'s' * (count != 1)}", flush=True)
        await uvicorn.Server(config).serve([listener])  # drains on SIGTERM and Ctrl-C

    with suppress(KeyboardInterrupt):  # uvicorn has drained, and raises it once more
        asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
