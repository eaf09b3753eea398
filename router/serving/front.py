"""A thin OpenAI-compatible front: routes requests for the model `auto`, and passes all others on untouched.

It names a variant; the server behind it (vLLM, SGLang, LoRAX) has that variant as a LoRA adapter of this
name. llama.cpp's server takes scales instead of a name, so it is sent each request's own mix of adapters. A
conversation is routed by its first user message, as plain text, so it stays with its variant: the server's
prefix cache depends on it.
"""

from __future__ import annotations

import asyncio
import gzip
import hmac
import json
import logging
import re
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib import resources
from io import BytesIO
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router.api import Choice, Router
from router.constants import BASE_COLUMN
from router.errors import InputError
from router.files import is_folder
from router.routing.variants import served
from router.serving.names import AUTO
from router.serving.prober import Full, Prober
from router.serving.text import NoText, text_of

log = logging.getLogger(__name__)
REMEMBERED = 10_000  # conversations
GONE = 499  # the status of a request whose client has left, which nobody sees
HUB_ID = r"[\w.-]+/[\w.-]+"
RECENT = 100  # decisions on the page
# Headers of one connection, whichever way they go; and those that httpx says anew, since it makes the request
# and takes the compression off the response.
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_OF_REQUEST = _HOP | {"host", "accept-encoding"}
_OF_RESPONSE = _HOP | {"content-encoding", "set-cookie"}  # cookies, of which there may be several, go apart


class Refused(Exception):
    """A request that is not passed on.

    Args:
        status: of HTTP.
        message: what was expected and what came.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Decided(NamedTuple):
    """A choice, and what answers it in the router that made it, which may have been replaced since."""

    choice: Choice
    variant: str | None  # None for the plain base model


class Upstream(NamedTuple):
    """What the upstream serves."""

    names: set[str] | None  # at /v1/models; None where it has no such list, as LoRAX
    base: str | None  # what it calls the base model; None where it lists none
    loras: dict[str, int] | None  # llama.cpp's adapters and their ids; None where a name chooses one


async def _left(request: Request) -> None:
    """Ends when the client of a request, whose body has been read, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Front:
    """The front of one upstream.

    Args:
        router: decides; its variants are served by the upstream as `variant-N`.
        upstream: its address.
        load: makes a new router when a reload is asked for; None refuses it.
        api_key: that clients have to bring; None asks for none.
        upstream_key: that the upstream asks for; None passes on what the client sent.
        reroute: whether a conversation is routed by its last message instead of its first.
        max_body: bytes of a request.
        queue: requests that may wait for their decision.
        timeout: seconds without a byte from the upstream.
        log_prompts: whether texts may stand in the log.
        hosts: names that it answers to where it asks for no key; None answers to any.
        transport: in place of the network, for tests.
    """

    def __init__(
        self,
        router: Router,
        upstream: str,
        *,
        load: Callable[[], Router] | None = None,
        api_key: str | None = None,
        upstream_key: str | None = None,
        reroute: bool = False,
        max_body: int = 4 << 20,
        queue: int = 1024,
        timeout: float = 600.0,
        log_prompts: bool = False,
        hosts: Collection[str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.router, self.load, self.api_key, self.reroute = router, load, api_key, reroute
        self.max_body, self.log_prompts, self.hosts = max_body, log_prompts, hosts
        self.ours = {} if upstream_key is None else {"authorization": f"Bearer {upstream_key}"}
        self.renewing = asyncio.Lock()
        self.asking: dict[str, asyncio.Future[Upstream]] = {}  # what the upstream serves, by the key
        nobody = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # a client's cookies are its own
        self.client = httpx.AsyncClient(
            base_url=upstream, timeout=httpx.Timeout(timeout, connect=10.0), transport=transport,
            limits=httpx.Limits(max_connections=None), cookies=nobody,
        )  # fmt: skip
        self.prober = Prober(self._choose, queue)
        self.kept: OrderedDict[bytes, Decided] = OrderedDict()  # by the sha256 of the conversation's text
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.upstream: Upstream | None = None  # once it was asked
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "router_requests", "Routed requests by variant.", ["variant"], registry=self.registry
        )
        self.seconds = Histogram(
            "router_seconds", "Seconds by stage.", ["stage"], registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        waiting = Gauge("router_queue", "Requests that wait for their decision.", registry=self.registry)
        waiting.set_function(lambda: self.prober.waiting)
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/recent", self.decisions),
                Route("/v1/models", self.models),
                Route("/v1/route", self.route, methods=["POST"]),
                Route("/admin/reload", self.reload, methods=["POST"]),
                Route("/v1/{path:path}", self.forward, methods=["GET", "POST", "DELETE"]),
            ],
            lifespan=self._lifespan,
            exception_handlers={Refused: self._refusal},
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.client, self.prober:
            yield

    @staticmethod
    def _refusal(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body = {"error": {"message": str(error), "type": kind, "code": error.status}}
        return JSONResponse(body, error.status, dict(error.headers or {}))

    def _admit(self, request: Request) -> None:
        """Refuses who brings no key, or where none is asked for, a page of another site in a browser here."""
        if self.api_key is None:
            host, origin = request.headers.get("host", ""), request.headers.get("origin")
            foreign = origin is not None and urlsplit(origin).netloc != host
            if foreign or request.headers.get("sec-fetch-site") == "cross-site":
                raise Refused(403, "origin: expected no page of another site; set PROTO_ROUTE_API_KEY")
            if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
                raise Refused(
                    403, f"host: expected {' or '.join(sorted(self.hosts))}, since no key is asked for"
                )
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Refused(401, "authorization: expected the API key of this server as a bearer token")

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is too long."""
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self._measure(size)
                parts.append(part)
        except ClientDisconnect as error:
            raise Refused(GONE, "the client has left") from error
        return b"".join(parts)

    def _measure(self, size: int) -> None:
        if size > self.max_body:
            raise Refused(413, f"expected a body of at most {self.max_body} bytes, got a longer one")

    def _parsed(self, request: Request, body: bytes) -> dict[str, Any]:
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding == "gzip":
            body = self._unzipped(body)
        elif encoding != "identity":
            raise Refused(415, f"content-encoding: expected gzip or none, got {encoding}")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"expected JSON, got something else ({error})") from error
        if not isinstance(found, dict):
            raise Refused(400, f"expected a JSON object, got a {type(found).__name__}")
        return found

    def _unzipped(self, body: bytes) -> bytes:
        """A body without its compression, refused as soon as it is too long."""
        try:
            with gzip.open(BytesIO(body)) as file:
                found = file.read(self.max_body + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(400, f"expected a body in gzip, got something else ({error})") from error
        self._measure(len(found))
        return found

    @staticmethod
    def _text(body: Mapping[str, Any], chat: bool, message: int = 0) -> str:
        try:
            return text_of(body, chat, message)
        except NoText as error:
            raise Refused(400, str(error)) from error

    def _choose(self, texts: Sequence[str]) -> list[Decided]:
        router = self.router
        found = []
        for choice in router.choose(texts):
            assert choice.variant is not None  # a router without variants is refused at the start
            has_folder = bool(router.variants[choice.variant].weights)
            found.append(Decided(choice, served(choice.variant) if has_folder else None))
        return found

    async def _decided(self, text: str) -> Decided:
        start = time.perf_counter()
        try:
            found: Decided = await self.prober(text)
        except Full as error:
            raise Refused(429, "too many requests wait; try again", {"retry-after": "1"}) from error
        self.seconds.labels("probe").observe(time.perf_counter() - start)
        return found

    def _key(self, request: Request) -> dict[str, str]:
        """The key that the upstream is to get: ours, or the client's where that is not for us."""
        theirs = request.headers.get("authorization")
        return self.ours or ({"authorization": theirs} if theirs and self.api_key is None else {})

    async def _name(self, decided: Decided, key: Mapping[str, str]) -> str:
        """What the upstream calls what answers."""
        if decided.variant:
            return decided.variant
        base = (await self._known_upstream(key)).base
        if base is None:
            raise Refused(502, "the upstream lists no base model at /v1/models")
        return base

    async def _known_upstream(self, key: Mapping[str, str]) -> Upstream:
        """What the upstream serves, as it was when it was first asked: once for all that wait with a key."""
        if self.upstream is None:
            who = key.get("authorization", "")
            if who not in self.asking:
                self.asking[who] = asyncio.ensure_future(self._ask_upstream(key))
                self.asking[who].add_done_callback(lambda task: self._asked_for(who, task))
            self.upstream = await asyncio.shield(self.asking[who])  # others may wait when this client leaves
        return self.upstream

    def _asked_for(self, who: str, task: asyncio.Future[Upstream]) -> None:
        del self.asking[who]
        if not task.cancelled():
            task.exception()  # so that it is not told of as lost, if all that waited have left

    async def _ask_upstream(self, key: Mapping[str, str]) -> Upstream:
        listed = (await self._upstream_models(key))["data"]
        if not listed:
            return Upstream(None, "", None)  # LoRAX loads what a request names, and "" is the base model
        ours = {served(n) for n in range(len(self.router.variants))}
        # An adapter has a parent; the base model has none.
        bases = [one for one in listed if one["id"] not in ours and not one.get("parent")]
        theirs, own = (str(bases[0].get("root") or bases[0]["id"]) if bases else ""), self.router.base_model
        on_hub = all(re.fullmatch(HUB_ID, one) for one in (theirs, own)) and not is_folder(own)
        if on_hub and theirs.casefold() != own.casefold():
            raise Refused(502, f"the upstream serves {theirs}, the router is of {own}; see --base_model")
        loras = None
        if bases and bases[0].get("owned_by") == "llamacpp":
            found = await self._asked("/lora-adapters", key)
            try:
                loras = {unquote(PurePath(one["path"]).stem): int(one["id"]) for one in found or []}
            except (KeyError, TypeError, ValueError) as error:
                raise Refused(502, "the upstream does not list its adapters as llama.cpp does") from error
        return Upstream({one["id"] for one in listed}, bases[0]["id"] if bases else None, loras)

    async def _upstream_models(self, key: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = await self._asked("/v1/models", key) or {"object": "list", "data": []}
        try:
            if not all(isinstance(one["id"], str) for one in found["data"]):
                raise ValueError("a model without a name")
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(502, "the upstream does not list its models as OpenAI does") from error
        return found

    async def _asked(self, path: str, key: Mapping[str, str]) -> Any:
        """What the upstream answers to a GET, as JSON values; None where it has no such path."""
        try:
            response = await self.client.get(path, headers=key)
            if response.status_code == 404:
                return None
            response.raise_for_status()
            return response.json()
        except httpx.TransportError as error:
            raise self._gone(error) from error
        except httpx.HTTPStatusError as error:  # its text has the upstream's address
            status = error.response.status_code
            raise Refused(502, f"the upstream answered {status} at {path}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise Refused(502, f"the upstream does not answer as expected at {path}") from error

    def _gone(self, error: httpx.HTTPError) -> Refused:
        """The upstream is not there; it may come back with other adapters."""
        self.upstream = None
        if isinstance(error, httpx.TimeoutException):
            return Refused(504, f"the upstream did not answer in time ({type(error).__name__})")
        return Refused(502, f"the upstream cannot be reached ({type(error).__name__})")

    @staticmethod
    def _scales(decided: Decided, loras: Mapping[str, int]) -> list[dict[str, Any]]:
        """The scale of each of llama.cpp's adapters: the request's own mix, or else its variant.

        All are named, since a request that names none may meet the cache of another's adapters.
        """
        mix = decided.choice.mix
        if not mix.keys() <= loras.keys():
            mix = {decided.variant: 1.0} if decided.variant else {}
        if missing := sorted(mix.keys() - loras.keys()):
            raise Refused(502, f"the upstream has no adapter {', '.join(missing)}; export the router again")
        return [{"id": number, "scale": mix.get(name, 0.0)} for name, number in loras.items()]

    @staticmethod
    def _shown(choice: Choice, name: str) -> dict[str, Any]:
        """A decision for a person or a program."""
        return {
            "model": name, "weights": {key: round(w, 4) for key, w in choice.weights.items()},
            "margin": round(choice.margin, 3), "low_margin": choice.low_margin, "fits": choice.fits,
        }  # fmt: skip

    async def route(self, request: Request) -> Response:
        """POST /v1/route: the decision alone."""
        self._admit(request)
        body = self._parsed(request, await self._body(request))
        decided = await self._decided(self._text(body, "messages" in body, -1 if self.reroute else 0))
        return JSONResponse(self._shown(decided.choice, await self._name(decided, self._key(request))))

    async def forward(self, request: Request) -> Response:
        """Everything else under /v1: passed on; with the model `auto`, under a variant's name."""
        self._admit(request)
        steps = re.split("/|%2f", request.scope["raw_path"].decode("latin-1").lower())
        if {".", "..", "%2e", "%2e%2e", ".%2e", "%2e."} & set(steps):
            raise Refused(404, "expected a path without steps upwards")
        raw = await self._body(request)
        answering = asyncio.ensure_future(self._answered(request, raw))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise Refused(GONE, "the client has left")
            return answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()  # the upstream hears of it

    async def _answered(self, request: Request, raw: bytes) -> Response:
        decision = None
        if request.url.path in ("/v1/completions", "/v1/chat/completions") and request.method == "POST":
            body = self._parsed(request, raw)
            if body.get("model") == AUTO:
                decision, how = await self._decision(request.url.path, body, self._key(request))
                raw = json.dumps(body | how).encode()
        return await self._passed_on(request, raw, decision)

    async def _decision(
        self, path: str, body: dict[str, Any], secret: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The decision for a person, and the fields of the request that tell the upstream."""
        chats = path.endswith("/chat/completions")
        text, router = self._text(body, chats, -1 if self.reroute else 0), self.router
        chat = chats and not self.reroute
        key = sha256(text.encode("utf-8", "surrogatepass")).digest()  # a prompt may be long
        decided = self.kept.get(key) if chat else None
        if decided is None:
            decided = await self._decided(text)
        if chat and self.router is router:  # else it was decided by one that has been replaced
            self.kept[key] = decided
            self.kept.move_to_end(key)
            while len(self.kept) > REMEMBERED:
                self.kept.popitem(last=False)
        name, choice = await self._name(decided, secret), decided.choice
        how: dict[str, Any] = {"model": name}
        if (loras := (await self._known_upstream(secret)).loras) is not None:
            how["lora"] = self._scales(decided, loras)
        name = name or BASE_COLUMN
        self.requests.labels(name).inc()
        found = self._shown(choice, name)
        self.recent.appendleft(found | {"at": time.time()})
        log.info("%s margin %.2f%s", name, choice.margin, f" {text!r}" if self.log_prompts else "")
        return found, how

    async def _passed_on(self, request: Request, raw: bytes, decision: dict[str, Any] | None) -> Response:
        # The client's key is for us, if we ask for one, and the upstream may ask for another.
        left = _OF_REQUEST | ({"authorization"} if self.api_key or self.ours else set())
        if decision is not None:
            left |= {"content-encoding"}  # its body is written anew
        headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in left]
        headers += [(key.encode(), value.encode()) for key, value in self.ours.items()]
        url = request.scope["raw_path"].decode("latin-1")
        url += f"?{request.url.query}" if request.url.query else ""
        start = time.perf_counter()
        try:
            outgoing = self.client.build_request(request.method, url, content=raw, headers=headers)
        except httpx.InvalidURL as error:
            raise Refused(414, f"expected a shorter path, or another one ({error})") from error
        try:
            answer = await self.client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        response = await self._response(answer, decision, start)
        for value in answer.headers.get_list("set-cookie"):
            if value.isascii():
                response.headers.append("set-cookie", value)
        return response

    async def _response(
        self, answer: httpx.Response, decision: dict[str, Any] | None, start: float
    ) -> Response:
        """What the upstream answered, with the decision, if there is one."""
        back = {
            key: value
            for key, value in answer.headers.items()
            if key not in _OF_RESPONSE and value.isascii()  # a response's headers are
        }
        if decision is None:
            return self._streamed(answer, back, start)
        back |= {
            "x-router-model": quote(decision["model"], safe="/:@ "),
            "x-router-weights": json.dumps(decision["weights"]),
            "x-router-margin": str(decision["margin"]), "x-router-fits": str(decision["fits"]).lower(),
        }  # fmt: skip
        if "event-stream" in answer.headers.get("content-type", "") or answer.status_code >= 400:
            return self._streamed(answer, back, start)
        whole = await self._whole(answer)
        self.seconds.labels("upstream").observe(time.perf_counter() - start)
        try:
            found = json.loads(whole)
            whole = json.dumps(found | {"router": decision}).encode()
        except (ValueError, TypeError):
            pass  # not JSON, so it goes back as it came
        return Response(whole, answer.status_code, back)

    async def _whole(self, answer: httpx.Response) -> bytes:
        try:
            return await answer.aread()
        except httpx.TimeoutException as error:
            raise self._gone(error) from error
        except httpx.HTTPError as error:
            self.upstream = None  # it may come back with other adapters
            raise Refused(502, f"the upstream broke off ({type(error).__name__})") from error
        finally:
            await answer.aclose()

    def _streamed(self, answer: httpx.Response, headers: dict[str, str], start: float) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_bytes():
                    yield chunk
            except httpx.HTTPError:
                self.upstream = None
                raise
            finally:  # also when the client has gone: the upstream hears of it
                await asyncio.shield(answer.aclose())
                self.seconds.labels("upstream").observe(time.perf_counter() - start)

        # The task closes it where the body was never asked for.
        return StreamingResponse(
            chunks(), answer.status_code, headers, background=BackgroundTask(answer.aclose)
        )  # fmt: skip

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the upstream's, and `auto`."""
        self._admit(request)
        found = await self._upstream_models(self._key(request))
        mine = {"id": AUTO, "object": "model", "created": 0, "owned_by": "proto-route"}
        return JSONResponse(found | {"data": [mine, *found["data"]]})

    async def health(self, _: Request) -> Response:
        """GET /health: this process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: the upstream is there and serves every variant."""
        found = self.upstream = await self._ask_upstream(self._key(request))
        ours = {served(n) for n, variant in enumerate(self.router.variants) if variant.weights}
        there = found.names if found.loras is None else found.loras.keys()
        missing = ours - there if there is not None else set()
        if missing and found.loras is not None:  # it mixes the adapters themselves
            missing = set(self.router.candidates[:-1]) - found.loras.keys()
        if missing:
            raise Refused(503, f"the upstream does not serve {', '.join(sorted(missing))}")
        return JSONResponse({"status": "ready", "variants": len(ours)})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def decisions(self, request: Request) -> Response:
        """GET /recent: the last decisions, newest first; no prompts."""
        self._admit(request)
        return JSONResponse(list(self.recent))

    async def page(self, _: Request) -> Response:
        """GET /: a small page that shows the last decisions."""
        text = resources.files("router.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(
            text, headers={"content-security-policy": "default-src 'self' 'unsafe-inline'; img-src data:"}
        )

    async def reload(self, request: Request) -> Response:
        """POST /admin/reload: loads the router anew; requests go on with the old one meanwhile."""
        self._admit(request)
        if self.load is None:
            raise Refused(409, "this server was started without a folder to reload")
        if self.renewing.locked():
            raise Refused(409, "not reloaded: it is being loaded already")
        old = self.router.variants
        try:
            await self.renew()
        except InputError as error:
            raise Refused(409, f"not reloaded: {error}") from error
        new = self.router.variants
        other = [
            served(n) for n, variant in enumerate(new) if variant.weights and variant not in old[n : n + 1]
        ]
        return JSONResponse({"status": "reloaded", "variants": len(new), "changed": other})

    async def renew(self) -> None:
        """Puts a newly loaded router in place of the old one."""
        assert self.load is not None
        async with self.renewing:  # one at a time, since each loads a model
            self.router = await asyncio.to_thread(self.load)
            self.upstream = None
            self.kept.clear()
