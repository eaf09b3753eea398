"""A thin OpenAI-compatible proxy: routes requests for the model `auto`, and passes all others on untouched.

It names a variant, which the server behind it has as a LoRA adapter of this name. llama.cpp's server takes
scales instead of a name, so it is sent each request's own mix of adapters. A conversation stays with its
variant until a message clearly asks for another: the server's prefix cache depends on it.
"""

import asyncio
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import uuid4

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from router.api import Choice, Prompt, Router
from router.constants import CANARY
from router.model.template import Template
from router.pipeline.served import served_names
from router.queries.conversation import checked
from router.serving.decision import CHATS, ROUTED, described, headers_of, not_routed
from router.serving.names import AUTO
from router.serving.prober import Prober
from router.serving.request import GONE, admit, as_error, as_json, body_of, left, object_of
from router.serving.text import prompt_of
from router.serving.tracing import traced
from router.serving.upstream import Serves, Upstream, end_to_end, variants_of
from router.system.errors import InputError, printable

log = logging.getLogger(__name__)
RECENT = 100  # decisions on the page
READY = 30.0  # seconds that the canaries' result holds
# In a body that is no JSON: a form, or what another reader takes for JSON.
FOR_AUTO = re.compile(rb'name="?model"?\s+auto\s|"model"\s*:\s*"auto"')
MODEL = {"id": AUTO, "object": "model", "created": 0, "owned_by": "proto-route"}
PAGE_POLICY = "default-src 'self' 'unsafe-inline'; img-src data:"


class Decided(NamedTuple):
    """A choice, and what answers it in the router that made it, which may have been replaced since."""

    choice: Choice
    variant: str | None  # None for the plain base model
    template: Template | None = None  # that the variant's adapters were trained in, if it is another


class Routed(NamedTuple):
    """A decision as it is shown to the client, and the fields and headers that tell the upstream."""

    shown: dict[str, Any]
    fields: dict[str, Any]
    headers: dict[str, str]


class Proxy:
    """The proxy of one server. What is not listed here is a flag of `proto-route serve`.

    Args:
        router: decides; its variants are served by the upstream under their `served_names`.
        upstream: the server's address.
        load: makes a new router when a reload is asked for; None refuses it.
        api_key: that clients have to bring; None asks for none.
        upstream_key: that the upstream asks for; None passes on what the client sent.
        decisions: takes one line of JSON a routed request.
        tracer: takes a span of each; see router/serving/tracing.py.
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
        max_body: int = 4 << 20,
        queue: int = 1024,
        timeout: float = 600.0,
        log_prompts: bool = False,
        decisions: logging.Handler | None = None,
        tracer: Any = None,
        hosts: Collection[str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.router, self.load, self.api_key, self.upstream_key = router, load, api_key, upstream_key
        self.max_body, self.timeout, self.hosts = max_body, timeout, hosts
        self.log_prompts, self.decisions, self.tracer = log_prompts, decisions, tracer
        self.renewing, self.trying = asyncio.Lock(), asyncio.Lock()
        theirs = api_key is None and upstream_key is None
        self.upstream = Upstream(upstream, timeout, transport, theirs)
        self.prober = Prober(self._choose, queue)
        self.tried: tuple[Any, float, str] = None, 0.0, ""  # what canaries were sent to, when, what was wrong
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "router_requests", "Routed requests by variant.", ["variant"], registry=registry
        )
        self.frames = Counter("router_frames", "Routed requests by frame.", ["frame"], registry=registry)
        self.unserved = Counter(
            "router_unserved", "Requests by the adapter that no variant has.", ["adapter"], registry=registry
        )
        self.calibrating = threading.Thread()  # of the last frame
        self.seconds = Histogram(
            "router_seconds", "Seconds by stage.", ["stage"], registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        waiting = Gauge("router_queue", "Requests that wait for their decision.", registry=registry)
        waiting.set_function(lambda: self.prober.waiting)
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/recent", self.last_decisions),
                Route("/v1/models", self.models),
                Route(f"/v1/models/{AUTO}", self.model),
                Route("/v1/route", self.route, methods=["POST"]),
                Route("/admin/reload", self.reload, methods=["POST"]),
                Route("/v1/{path:path}", self.forward, methods=["GET", "POST", "DELETE"]),
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: as_error, InputError: as_error, Exception: as_error},
        )
        self.app.router.redirect_slashes = False  # it would make an address of the header `host`

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.upstream.client:
            yield
        if sending := getattr(self.tracer, "span_processor", None):  # none where OTEL_SDK_DISABLED is set
            sending.force_flush()  # now, since a signal ends the process

    def _key(self, request: Request) -> str:
        """The header for the upstream: with its own key, or the client's where that is not for this proxy."""
        if self.upstream_key is not None:
            return f"Bearer {self.upstream_key}"
        return request.headers.get("authorization", "") if self.api_key is None else ""

    def _choose(self, prompts: Sequence[Prompt]) -> list[Decided]:
        router = self.router
        decided = []
        names = served_names(router.variants)
        for choice in router.choose(prompts):
            assert choice.variant is not None  # a router without variants is refused at the start
            decided.append(Decided(choice, names[choice.variant], router.templates.get(choice.variant)))
        return decided

    async def _decided(self, prompt: Prompt) -> Decided:
        start = time.perf_counter()
        try:
            decided: Decided = await self.prober(prompt)
        except asyncio.QueueFull as error:
            raise HTTPException(429, "too many requests wait; try again", {"retry-after": "1"}) from error
        self.seconds.labels("probe").observe(time.perf_counter() - start)
        return decided

    async def _shown(self, decided: Decided, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A decision as clients see it, and the fields of a request that have the upstream follow it."""
        serves = await self.upstream.known(key, self.router)
        if (name := decided.variant or serves.base) is None:
            raise HTTPException(502, "the upstream lists no base model at /v1/models")
        shown, fields = described(decided.choice, name), dict[str, Any](model=name)
        if serves.loras is not None:
            fields["lora"] = self._scales(decided, serves)
            shown["fits"] = any(one["scale"] for one in fields["lora"])  # each adapter, whatever is a variant
        return shown, fields

    @staticmethod
    def _scales(decided: Decided, serves: Serves) -> list[dict[str, Any]]:
        """The scales of llama.cpp's adapters: the request's own mix, or else its variant."""
        there = (serves.loras or {}).keys()
        mix = decided.choice.mix
        if not mix.keys() <= there:
            mix = {decided.variant: 1.0} if decided.variant else {}
        if missing := sorted(mix.keys() - there):
            raise HTTPException(502, f"the upstream lacks {', '.join(missing)}; export the router again")
        return serves.scales(mix)

    async def route(self, request: Request) -> Response:
        """POST /v1/route: the decision alone."""
        admit(request, self.api_key, self.hosts)
        body = object_of(request, await body_of(request, self.max_body, self.timeout))
        decided = await self._decided(prompt_of(body))
        try:
            shown, _ = await self._shown(decided, self._key(request))
        except HTTPException:
            if decided.variant is None:
                raise
            shown = described(decided.choice, decided.variant)  # which needs no server
        return as_json(shown)

    async def forward(self, request: Request) -> Response:
        """All else under /v1: passed on; with the model `auto` under a variant's name, or refused."""
        admit(request, self.api_key, self.hosts)
        if {".", ".."} & set(unquote(request.scope["raw_path"].decode("latin-1")).split("/")):
            raise HTTPException(404, "expected a path without steps upwards")
        raw = await body_of(request, self.max_body, self.timeout)
        answering = asyncio.ensure_future(self._answered(request, raw))
        leaving = asyncio.ensure_future(left(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise HTTPException(GONE, "the client has left")
            return answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()  # the upstream hears of it

    async def _answered(self, request: Request, raw: bytes) -> Response:
        path = request.scope["path"]
        body = {}
        routes = request.method == "POST" and path in ROUTED
        try:
            body = object_of(request, raw)
        except HTTPException as error:
            if routes or error.status_code != 400:
                raise
            body = {"model": AUTO} if FOR_AUTO.search(raw) else {}
        if body.get("model") != AUTO:
            return await self._passed_on(request, raw)
        if not routes:
            raise not_routed(path)
        routed = await self._decision(request, body)
        try:
            raw = json.dumps(body | routed.fields).encode()
        except RecursionError as error:
            raise HTTPException(400, "expected JSON that is nested less deeply") from error
        return await self._passed_on(request, raw, routed)

    async def _decision(self, request: Request, body: dict[str, Any]) -> Routed:
        prompt = prompt_of(body)
        began = time.time_ns()
        decided = await self._decided(prompt)
        shown, fields = await self._shown(decided, self._key(request))
        mixes, template = "lora" in fields, decided.template
        if template and not mixes and request.scope["path"] == CHATS and _takes(template, body):
            with suppress(InputError):  # what is no chat, the server refuses
                if await asyncio.to_thread(template.tried, checked(body["messages"], ends=False)) is not None:
                    fields["chat_template"] = template.source  # vLLM's word; serve.sh has it trust this one
        self.requests.labels(shown["model"]).inc()
        self.frames.labels(decided.choice.frame).inc()
        self._calibrate()
        number = request.headers.get("x-request-id", "")[:128] or uuid4().hex
        shown["request_id"] = number
        if decided.choice.mix and not (mixes or decided.choice.fits):
            self.unserved.labels(next(iter(decided.choice.weights))).inc()
        self._write_down(shown, prompt)
        headers = traced(self.tracer, request.headers, shown, began) if self.tracer else {}
        return Routed(shown, fields, headers | {"x-request-id": number})

    def _calibrate(self) -> None:
        """Has a system message of many requests become a frame, beside the requests, one at a time."""
        router = self.router
        if self.calibrating.is_alive() or (frame := router.wanted) is None:
            return

        def work() -> None:
            try:
                router.calibrate(frame)
                log.info("frame %s is calibrated", frame.name)
            except Exception:
                log.exception("frame %s was not calibrated", frame.name)

        self.calibrating = threading.Thread(target=work, daemon=True)  # the end does not wait for it
        self.calibrating.start()

    def _write_down(self, shown: dict[str, Any], prompt: Prompt) -> None:
        """A decision goes to the page, to the log and to the file of decisions."""
        now = round(time.time(), 3)
        self.recent.appendleft(shown | {"at": now})
        spelt = f" {prompt!r}" if self.log_prompts else ""
        log.info("%s margin %.2f%s", printable(shown["model"]), shown["margin"], spelt)
        if self.decisions is not None:
            line = {"time": now, "request_id": shown["request_id"], "variant": shown["model"]}
            line |= {key: shown[key] for key in ("weights", "margin", "fits")}
            line |= {"prompt": prompt} if self.log_prompts else {}
            self.decisions.handle(logging.makeLogRecord({"msg": json.dumps(line)}))

    async def _passed_on(self, request: Request, raw: bytes, routed: Routed | None = None) -> Response:
        """The upstream's answer to a request, with the decision on it."""
        start = time.perf_counter()
        answer = await self._sent(request, raw, routed.headers if routed else {})
        streams = "event-stream" in answer.headers.get("content-type", "") or answer.status_code >= 400
        if routed is None or streams:
            response = self._streamed(answer, start)
        else:
            response = await self._whole(answer, routed.shown, start)
        headers = headers_of(routed.shown) if routed else {}
        response.headers.update(headers)
        less = {b"content-encoding", b"date", b"server", *map(str.encode, headers)}  # uvicorn writes its own
        for key, value in end_to_end(answer.headers.raw, less):
            response.headers.append(key.decode("latin-1"), value.decode("latin-1"))
        if "location" in answer.headers:  # a redirect of the upstream's own does not lead past the proxy
            theirs = rf"^https?://{re.escape(self.upstream.client.base_url.netloc.decode())}/+"
            response.headers["location"] = re.sub(theirs, "/", answer.headers["location"])
        return response

    async def _sent(self, request: Request, raw: bytes, ours: Mapping[str, str]) -> httpx.Response:
        """Passes a request on, with some headers of our own in place of the client's."""
        if self.upstream_key:
            ours = {**ours, "authorization": self._key(request)}
        less = {b"host", b"accept-encoding", *map(str.encode, ours)}  # httpx says the first two anew
        if self.api_key:  # the client's key is for this proxy
            less |= {b"authorization", b"x-api-key"}
        query = request.scope["query_string"]
        target = request.scope["raw_path"] + (b"?" + query if query else b"")
        headers = end_to_end(request.headers.raw, less)
        headers += [(key.encode(), value.encode("latin-1")) for key, value in ours.items()]
        return await self.upstream.send(request.method, target.decode("latin-1"), headers, raw)

    async def _whole(self, answer: httpx.Response, shown: dict[str, Any], start: float) -> Response:
        """An answer with the decision as one more field; as it came where it is no object of JSON."""
        try:
            whole = await answer.aread()
        except httpx.HTTPError as error:
            raise self.upstream.away(error, "broke off") from error
        finally:
            await answer.aclose()
        self.seconds.labels("upstream").observe(time.perf_counter() - start)
        with suppress(ValueError, TypeError, RecursionError):
            whole = json.dumps(json.loads(whole) | {"router": shown}).encode()
        return Response(whole, answer.status_code)

    def _streamed(self, answer: httpx.Response, start: float) -> Response:
        """An answer that passes chunk by chunk."""

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_bytes():
                    yield chunk
            except httpx.HTTPError as error:
                self.upstream.away(error)
                raise
            finally:  # also when the client has gone: the upstream hears of it
                await asyncio.shield(answer.aclose())
                self.seconds.labels("upstream").observe(time.perf_counter() - start)

        # The task closes it where the body was never asked for.
        return StreamingResponse(chunks(), answer.status_code, background=BackgroundTask(answer.aclose))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the upstream's, and `auto`."""
        admit(request, self.api_key, self.hosts)
        listed = await self.upstream.models(self._key(request))
        try:
            return as_json(listed | {"data": [MODEL, *listed["data"]]})
        except RecursionError as error:
            raise HTTPException(502, "expected the upstream's models as OpenAI lists them") from error

    async def model(self, request: Request) -> Response:
        """GET /v1/models/auto."""
        admit(request, self.api_key, self.hosts)
        return as_json(MODEL)

    async def health(self, _: Request) -> Response:
        """GET /health: this process lives."""
        return as_json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: the router decides, the upstream is there, and every variant answers a canary there."""
        self._admit_if_open(request)
        key = self._key(request)
        router = self.router
        self.upstream.asked.clear()
        serves = await self.upstream.known(key, router)
        asked, missing = serves.needed(router)
        if missing:
            raise HTTPException(503, f"the upstream does not serve {', '.join(sorted(missing))}")
        async with self.trying:
            if self.tried[0] != (router, serves, key) or time.monotonic() > self.tried[1] + READY:
                wrong = await self._wrong(asked, serves, key, router)
                self.tried = (router, serves, key), time.monotonic(), wrong
        if self.tried[2]:
            raise HTTPException(503, self.tried[2])
        return as_json({"status": "ready", "variants": len(variants_of(router))})

    async def _wrong(self, names: Collection[str], serves: Serves, key: str, router: Router) -> str:
        """Why no request, or none for one of these names, would be answered; "" if all would."""
        try:
            await self.prober(CANARY)
        except asyncio.QueueFull as error:  # raised, since it holds for less than READY
            raise HTTPException(503, "too many requests wait; try again") from error
        except Exception as error:
            log.warning("the router does not decide: %r", error)
            return "the router does not decide; the log of the proxy says why"
        silent = await self.upstream.silent(names, serves, key, router)
        what = f"the upstream does not answer for {', '.join(silent)}, or as the base model does"
        return what if silent else ""

    def _admit_if_open(self, request: Request) -> None:
        """Lets in who needs no key; where there is none at all, no page of another site."""
        if self.api_key is None:
            admit(request, None, self.hosts)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        self._admit_if_open(request)
        return Response(generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def last_decisions(self, request: Request) -> Response:
        """GET /recent: the last decisions, newest first; no prompts."""
        admit(request, self.api_key, self.hosts)
        return as_json(list(self.recent))

    async def page(self, _: Request) -> Response:
        """GET /: a small page that shows the last decisions."""
        text = resources.files("router.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY})

    async def reload(self, request: Request) -> Response:
        """POST /admin/reload: loads the router anew; requests go on with the old one meanwhile."""
        admit(request, self.api_key, self.hosts)
        if self.load is None:
            raise HTTPException(409, "this server was started without a folder to reload")
        if self.renewing.locked():
            raise HTTPException(409, "not reloaded: it is being loaded already")
        try:
            changed = await self.renew()
        except InputError as error:
            raise HTTPException(409, f"not reloaded: {error}") from error
        count = len(self.router.variants)
        return as_json({"status": "reloaded", "variants": count, "changed": changed})

    async def renew(self) -> list[str]:
        """Puts a newly loaded router, with the busy frames of the old one, in its place.

        Returns:
            The names of variants that the old one lacked; if there are any, restart the server.
        """
        assert self.load is not None
        async with self.renewing:  # one at a time, since each loads a model
            new = await asyncio.to_thread(self.load)
            for frame in self.router.busy:  # so that decisions in these stay as they are
                if frame not in new.frames:
                    await asyncio.to_thread(new.calibrate, frame)
            changed = sorted(variants_of(new) - variants_of(self.router))
            log.info("the router was loaded anew; new variants: %s", ", ".join(changed) or "none")
            self.router = new
            self.upstream.asked.clear()
            self.tried = None, 0.0, ""
            return changed


def _takes(template: Template, body: Mapping[str, Any]) -> bool:
    """Whether a chat can be asked for in a template: it brings none, nor tools that would not be written."""
    knows = not body.get("tools") or "tools" in (template.source or "")
    return "messages" in body and not body.get("chat_template") and knows
