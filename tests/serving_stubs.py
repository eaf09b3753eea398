"""A router and a server that are none, for the tests of the proxy."""

import asyncio
import json
import socket
import threading
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router.api import Choice
from router.serving.proxy import Proxy


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(app, **how):
    """An application over HTTP, in a thread; yields its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", **how))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True  # a test that failed may have left a connection
        thread.join()


MODELS = ({"id": "the-base"}, {"id": "variant-0", "parent": "the-base"})
LLAMACPP = ({"id": "base.gguf", "owned_by": "llamacpp"},)


class Two:
    """A router of two variants: texts whose end has an x go to the first, all others to the base model."""

    def __init__(self):
        self.candidates, self.base_model = ["one", "two", "base"], "owner/base"
        self.variants = [
            SimpleNamespace(weights={"one": 1.0}, sha256="", canary=-0.5),
            SimpleNamespace(weights={}, sha256="", canary=-2.0),
        ]
        self.templates, self.wanted, self.frames, self.busy = {}, None, [], []
        self.batches = []

    def choose(self, texts):
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in texts]
        self.batches.append(texts)
        return [
            Choice(0, {"one": 0.9, "base": 0.1}, 2.0, False, True, {"one": 0.75, "two": 0.25})
            if "x" in text
            else Choice(1, {"base": 0.6, "one": 0.4}, 0.1, True, False, {})
            for text in texts
        ]


class Upstream:
    """What a server does, with a list of what reached it.

    Args:
        models: that it lists.
        loras: the names of llama.cpp's adapters.
    """

    def __init__(self, models=MODELS, loras=()):
        self.seen, self.closed, self.broken = [], 0, False
        self.listed, self.loras, self.unloaded, self.says = models, loras, set(), (-0.4, -2.0)
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/lora-adapters", self.adapters),
                Route("/v1/{path:path}", self.answer, methods=["GET", "POST"]),
            ]
        )

    async def models(self, _):
        return JSONResponse({"object": "list", "data": self.listed})

    async def adapters(self, _):
        found = [{"id": n, "path": f"/a/{name}.gguf", "scale": 0} for n, name in enumerate(self.loras)]
        return JSONResponse(found)

    async def answer(self, request):
        body = json.loads(await request.body() or b"{}")
        self.seen.append((request.url.path, body, dict(request.headers)))
        if self.broken:
            return JSONResponse({"error": "broken"}, 503)
        if body.get("model") in self.unloaded:  # in vLLM's words
            about = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError"}
            return JSONResponse({"error": about | {"param": "model", "code": 404}}, 404)
        if request.url.path == "/v1/chat/completions":
            return self.chat(body)
        if body.get("stream"):
            return StreamingResponse(self.chunks(), media_type="text/event-stream")
        adapted = body.get("model") == "variant-0" or any(one["scale"] for one in body.get("lora", ()))
        said = self.says[not adapted]  # the log-probability of a token
        said = {"token_logprobs": [said]} if body.get("logprobs") else None
        choice = {"text": body.get("prompt"), "logprobs": said}
        found = {"model": body.get("model"), "choices": [choice]}
        return Response(json.dumps(found), media_type="application/json")

    def chat(self, body):
        """Says how many messages came, as OpenAI would."""
        said = f"{len(body['messages'])} messages"
        one = {"id": "c", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            return JSONResponse(one | {"object": "chat.completion", "choices": [choice]})
        chunks = [
            one | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word}}]}
            for word in said.split()
        ]
        lines = [f"data: {part}\n\n" for part in (*map(json.dumps, chunks), "[DONE]")]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    async def chunks(self):
        try:
            for n in range(3):
                yield f"data: {n}\n\n".encode()
                await asyncio.sleep(0)
        finally:
            self.closed += 1


@asynccontextmanager
async def proxied(router=None, upstream=None, quiet=False, **how):
    """A proxy of a stub; yields a client of it, the upstream and the proxy.

    Args:
        quiet: the client gets a status of 500 as a server gives it, not the error.
    """
    upstream = upstream or Upstream()
    transport = how.pop("transport", None) or httpx.ASGITransport(upstream.app)
    proxy = Proxy(router or Two(), "http://upstream/v1", transport=transport, **how)
    app = httpx.ASGITransport(proxy.app, raise_app_exceptions=not quiet)
    async with (
        proxy._lifespan(proxy.app),
        httpx.AsyncClient(transport=app, base_url="http://proxy") as client,
    ):
        yield client, upstream, proxy


def completion(prompt, **more):
    return {"model": "auto", "prompt": prompt, **more}


def chat(*messages, **more):
    roles = ["user", "assistant"] * len(messages)
    listed = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return {"model": "auto", "messages": listed, **more}
