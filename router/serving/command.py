"""`proto-route serve --router FOLDER --upstream URL`: the proxy, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import Field

from router.constants import ADDRESS, Dtype
from router.settings import Count, Positive, reader
from router.system.errors import InputError

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    from router.serving.proxy import Proxy

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine alone
KEPT = 75  # seconds of an idle connection: longer than clients keep theirs, or one is cut as it is used
NEEDED = ("starlette", "httpx", "uvicorn", "prometheus_client")
FILE_SIZE, FILES = 64 << 20, 9  # bytes of a file of decisions, and how many older ones are kept


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route serve`."""
    add = p.add_argument
    count = reader(Count)
    add("--router", type=Path, required=True, metavar="DIR", help="a saved router, or a finished run")
    add("--upstream", required=True, metavar="URL", help="the server that serves the variants")
    add("--base_model", metavar="embedded|FOLDER|HUB_ID", help="in place of the router's own")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="of the base model's copy")
    add("--dtype", choices=get_args(Dtype), help="of the base model's copy (default: the router's)")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    add("--port", type=reader(Annotated[int, Field(ge=0, le=65535)]), default=8080, help="default: 8080")
    add("--max_body", type=count, default=4 << 20, metavar="BYTES", help="of a request (default: 4 MiB)")
    add("--queue", type=count, default=1024, help="requests that may wait to be routed (default: 1024)")
    add(
        "--timeout", type=reader(Positive), default=600.0, metavar="SECONDS",
        help="without a byte from upstream, for a request to arrive, to drain at the end (default: 600)",
    )  # fmt: skip
    add("--decisions", type=Path, metavar="FILE", help="write each decision as a line of JSON")
    add("--log_prompts", action="store_true", help="write prompts to the log, and to --decisions")


def key_of(name: str) -> str | None:
    """The key in an environment variable, without blanks around it; it never stands in a message or a log.

    Raises:
        InputError: a header cannot hold it.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name}: expected a key of printable ASCII characters, got others")
    return key or None


def _listening(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; they wait until it is served."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"--port {port}: expected a free port of --host {host}, but {error.strerror}; choose another, or "
            "stop what listens there"
        ) from error


def decisions_to(file: Path) -> RotatingFileHandler:
    """A file that starts anew at a size, and keeps some older ones.

    Raises:
        InputError: it cannot be written.
    """
    try:
        file.open("a").close()
    except OSError as error:
        raise InputError(f"--decisions {file}: expected a file to write to, but {error.strerror}") from error
    return RotatingFileHandler(file, maxBytes=FILE_SIZE, backupCount=FILES, encoding="utf-8", delay=True)


def work(args: Namespace) -> None:
    """Serves until it is stopped.

    The environment variable PROTO_ROUTE_API_KEY holds the key that clients have to bring, if there is one,
    and PROTO_ROUTE_UPSTREAM_KEY the one that the upstream asks for.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"proto-route serve: expected the packages of the extra `serve`, {', '.join(missing)} is "
            "missing; install them with: pip install 'proto-route[serve]'"
        )
    if not re.fullmatch(ADDRESS, args.upstream):
        raise InputError(
            f"--upstream: expected an address such as http://127.0.0.1:8000, got {args.upstream!r}"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request of the proxy
    with _listening(args.host, args.port) as listener:  # first, since loading takes long
        proxy = _proxy(args)
        count = len(proxy.router.variants)
        port = listener.getsockname()[1]  # --port 0 is any
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{port}: {count} variant{'s' * (count != 1)}", flush=True)
        # uvicorn drains and raises the signal once more; Python's own end aborts while a frame is calibrated.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asyncio.run(_served(proxy, listener, args.timeout))


def _proxy(args: Namespace) -> Proxy:
    from router.api import Router
    from router.serving.names import read_served
    from router.serving.proxy import Proxy
    from router.serving.tracing import tracer

    def load() -> Router:
        read_served(args.router, args.base_model)  # refuses one whose variants are gone
        return Router.load(args.router, args.base_model, args.device, args.dtype)

    api_key = key_of("PROTO_ROUTE_API_KEY")
    here = args.host in LOOPBACK
    if api_key is None and not here:
        log.warning(
            "--host %s: whoever reaches this machine can use the proxy; set PROTO_ROUTE_API_KEY", args.host
        )
    decisions = decisions_to(args.decisions) if args.decisions else None
    return Proxy(
        load(), args.upstream, load=load, api_key=api_key, upstream_key=key_of("PROTO_ROUTE_UPSTREAM_KEY"),
        max_body=args.max_body, queue=args.queue, timeout=args.timeout,
        log_prompts=args.log_prompts, decisions=decisions, tracer=tracer(),
        hosts=LOOPBACK if here else None,
    )  # fmt: skip


async def _served(proxy: Proxy, listener: socket.socket, timeout: float) -> None:
    import uvicorn

    loop = asyncio.get_running_loop()
    renewals = set()

    async def renewed() -> None:
        try:
            await proxy.renew()
        except InputError as error:
            log.error("the router was not reloaded: %s", error)

    def renew() -> None:
        task = loop.create_task(renewed())
        renewals.add(task)  # a task that nobody holds may vanish
        task.add_done_callback(renewals.discard)

    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, renew)
    config = uvicorn.Config(
        proxy.app, log_level="warning", http=impatient(timeout), timeout_keep_alive=KEPT,
        timeout_graceful_shutdown=timeout,  # type: ignore[arg-type]
    )  # fmt: skip
    await uvicorn.Server(config).serve([listener])  # drains on SIGTERM and Ctrl-C


def impatient(timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which by itself waits for ever for the rest of a request's headers.

    What is no HTTP gets an error object, as all other refusals do.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from router.serving.request import refusal

    class Impatient(H11Protocol):
        def send_400_response(self, msg: str) -> None:
            answer = refusal(400, msg)
            head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            text = f"HTTP/1.1 400 Bad Request\r\n{head}connection: close\r\n\r\n"
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(text.encode() + bytes(answer.body))
            self.transport.close()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(timeout, self.look, None)

        def look(self, last: RequestResponseCycle | None) -> None:
            """Closes the connection if no request has come since the last look."""
            busy = self.cycle is not None and not self.cycle.response_complete
            if not busy and self.cycle is last:
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(timeout, self.look, self.cycle)

    return Impatient
