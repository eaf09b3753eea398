"""The proxy: what it passes on, to whom, and what it says in bad weather. The upstream is a small stub."""

import asyncio
import gzip
import json
import re

import httpx
import pytest
from serving_stubs import LLAMACPP, Two, Upstream, chat, completion, proxied
from starlette.responses import JSONResponse
from starlette.routing import Route

from helpers import ROOT
from router.api import Choice
from router.serving import prober as prober_module
from router.serving.command import key_of
from router.serving.text import prompt_of
from router.system.errors import InputError

pytestmark = pytest.mark.anyio


async def test_auto_is_answered_by_the_variant_others_pass():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    picture = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}], "n": 2}

    async with proxied() as (client, upstream, _):
        first = await client.post("/v1/completions", json=completion("x", temperature=0.5, logprobs=2))
        base = await client.post("/v1/completions", json=completion("y"))
        other = await client.post("/v1/completions", content=b'{"model": "theirs",  "prompt": "x"}')
        await client.post("/v1/chat/completions", json=picture | {"model": "auto"})
        assert [body for _, body, _ in upstream.seen] == [
            {"model": "variant-0", "prompt": "x", "temperature": 0.5, "logprobs": 2},
            {"model": "the-base", "prompt": "y"},
            {"model": "theirs", "prompt": "x"},
            picture | {"model": "variant-0"},
        ]
        decision = first.json()["router"]
        assert decision.pop("request_id") == first.headers["x-request-id"]
        assert decision == {
            "model": "variant-0", "weights": {"one": 0.9, "base": 0.1}, "margin": 2.0, "low_margin": False,
            "fits": True,
        }  # fmt: skip
        assert first.headers["x-router-model"] == "variant-0" and first.headers["x-router-fits"] == "true"
        assert json.loads(base.headers["x-router-weights"]) == {"base": 0.6, "one": 0.4}
        assert base.headers["x-router-fits"] == "false" and base.headers["x-router-margin"] == "0.1"
        assert "router" not in other.json() and "x-router-model" not in other.headers
        async with client.stream("POST", "/v1/completions", json=completion("x", stream=True)) as answer:
            assert answer.headers["x-router-model"] == "variant-0"
            chunks = [chunk async for chunk in answer.aiter_raw()]
        assert b"".join(chunks) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n" and upstream.closed == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/route"])
async def test_a_conversation_is_routed_by_what_the_user_says(path):
    async with proxied() as (client, upstream, _):
        models = []
        for body in (chat("x"), chat("x", "answer", "now y"), chat("y", "an x", "now x")):
            if path == "/v1/responses":
                body["input"] = body.pop("messages")
            answer = await client.post(path, json=body)
            if path == "/v1/route":  # the decision alone
                models.append(answer.json()["model"])
                assert upstream.seen == []
                continue
            models.append(answer.headers["x-router-model"])
            assert upstream.seen[-1][1]["model"] == models[-1]
        assert models == ["variant-0", "the-base", "variant-0"]


CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (chat("first", "answer", "last", "prefix"), ["first", "last"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url"},
          "x"], "type": None}]}, ["look\nx"]),
        ({"messages": [*chat("go")["messages"], {"role": "assistant", "content": None, "tool_calls": CALL},
          {"role": "tool", "content": "7", "tool_call_id": "c"}]}, ["go"]),
        ({"messages": [*chat("go")["messages"], {"role": "function", "name": "f", "content": "7"}]}, ["go"]),
        ({"messages": None, "input": "hello", "system": None, "instructions": "S"}, ["S", "hello"]),
        ({"messages": [*chat("go", "I call")["messages"],
          {"role": "user", "content": [{"type": "tool_result", "content": "7"}]}], "system": "S"},
         ["S", "go"]),
        ({"input": "hello", "instructions": "S"}, ["S", "hello"]),
        ({"messages": [{"role": "system", "content": ""}, *chat("hello")["messages"]]}, ["", "hello"]),
        ({"input": [*chat("hello")["messages"], {"type": "function_call_output", "output": "7"}]}, ["hello"]),
        ({"input": [{"type": "additional_tools", "role": "developer", "tools": CALL},
          {"type": "message", "role": "user", "content": "hello"}]}, ["hello"]),
    ],
)  # fmt: skip
def test_what_is_read_of_a_request(body, read):
    assert [message["content"] for message in prompt_of(body)] == read
    assert prompt_of({"prompt": "hi", "messages": None, "input": None}) == "hi"


async def test_odd_headers_and_names_pass_or_are_quoted():
    listed = Upstream(({"id": "模型"}, {"id": "variant-0", "parent": "模型"}))
    async with proxied(upstream=listed) as (client, upstream, _):
        headers = [(b"user-agent", "é".encode("latin-1")), (b"accept-encoding", b"br")]
        answer = await client.post("/v1/completions", json=completion("y"), headers=headers)
        assert answer.status_code == 200 and answer.json()["router"]["model"] == "模型"
        assert answer.headers["x-router-model"] == "%E6%A8%A1%E5%9E%8B"
        _, _, sent = upstream.seen[0]
        assert sent["user-agent"] == "é" and "br" not in sent["accept-encoding"]


WRONG = {
    "nested": (b"[" * 100_000, 400),
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "no prompt": (b'{"model": "auto"}', 400),
    "several": (b'{"model": "auto", "prompt": ["a", "b"]}', 400),
    "token ids": (b'{"model": "auto", "prompt": [[1, 2]]}', 400),
    "no message": (b'{"model": "auto", "messages": []}', 400),
    "compressed": (gzip.compress(b'{"model": "auto", "prompt": "x"}'), 415),
    "10 MB": (b'{"model": "auto", "prompt": "' + b"x" * 10_000_000 + b'"}', 413),
}


@pytest.mark.parametrize("kind", WRONG)
async def test_what_cannot_be_routed_does_not_reach_the_upstream(kind):
    content, status = WRONG[kind]
    headers = {"content-encoding": "gzip"} if kind == "compressed" else {}
    async with proxied() as (client, upstream, _):
        for path in ("/v1/completions", "/v1/route"):
            answer = await client.post(path, content=content, headers=headers)
            assert answer.status_code == status and answer.json()["error"]["message"]
        assert upstream.seen == []


@pytest.mark.parametrize("theirs", [None, "theirs"])
async def test_a_key_is_asked_for_and_not_passed_on(theirs):
    async with proxied(api_key="secret", upstream_key=theirs) as (client, upstream, _):
        for path in ("/v1/models", "/recent"):
            assert (await client.get(path)).status_code == 401
        for key, status in (("", 401), ("Bearer wrong", 401), ("Bearer secre", 401), ("bearer secret", 200)):
            headers = {"authorization": key}
            answer = await client.post("/v1/completions", json=completion("x"), headers=headers)
            assert answer.status_code == status
        for key, status in (("wrong", 401), ("secret", 200)):
            for more in ({}, {"authorization": "Basic dTpw"}):  # of a server before this one
                headers = {"x-api-key": key} | more
                answer = await client.post("/v1/messages", json=chat("x"), headers=headers)
                assert answer.status_code == status
        for _, _, sent in upstream.seen:
            assert sent.get("authorization") == (theirs and f"Bearer {theirs}") and "x-api-key" not in sent
        assert len(upstream.seen) == 3
        assert (await client.get("/health")).status_code == 200


async def test_the_upstreams_errors_come_back_with_their_status():
    async with proxied() as (client, upstream, _):
        assert (await client.post("/v1/completions", json=completion("x"))).status_code == 200
        upstream.unloaded, upstream.listed = {"variant-0"}, ({"id": "the-base"},)
        for more in ({}, {"stream": True}):
            answer = await client.post("/v1/completions", json=completion("x", **more))
            assert answer.status_code == 404 and answer.headers["x-router-model"] == "variant-0"
            assert answer.json()["error"]["message"] == "The model `variant-0` does not exist."
        assert (await client.post("/v1/completions", json=completion("y"))).json()["model"] == "the-base"
        ready = await client.get("/ready")
        assert ready.status_code == 503 and "variant-0" in ready.json()["error"]["message"]
        upstream.broken = True
        answer = await client.post("/v1/completions", json=completion("x"))
        assert answer.status_code == 503 and answer.json() == {"error": "broken"}


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ((-0.4, -2.0), 200),
        ((-1.9, -2.0), 503),
        ((-1.9, -1.0), 200),
        ((-1.0, -1.0), 503),
        ((-1.28, -2.04), 200),
    ],
)  # a variant and the base model; that of two is quantised, that of the last in another dtype
async def test_a_variant_that_is_served_as_the_base_model_is_not_ready(says, status):
    upstream = Upstream()
    upstream.says = says
    async with proxied(upstream=upstream) as (client, *_):
        answer = await client.get("/ready")
        assert answer.status_code == status and (status == 200 or "variant-0" in answer.text)


async def half(error):
    """An answer that begins and breaks off."""
    yield b"data: "
    raise error


class Mortal(httpx.ASGITransport):
    """Breaks off as many answers as there are errors, before or after their beginning; then lives."""

    def __init__(self, app, *errors):
        super().__init__(app)
        self.errors = list(errors)

    async def handle_async_request(self, request):
        if (request.method == "GET" and self.errors[1:]) or not self.errors:
            return await super().handle_async_request(request)
        error = self.errors.pop(0)
        if isinstance(error, (httpx.RemoteProtocolError, httpx.ConnectError)):
            raise error
        stream = b'"stream"' in await request.aread()
        kind = {"content-type": "text/event-stream"} if stream else {}
        return httpx.Response(200, headers=kind, content=half(error))


async def test_an_upstream_that_dies_comes_back_with_other_names():
    """Gone, killed before it answers, while it answers, too slow, killed in a stream, and started again."""
    upstream, gone, reset = Upstream(), httpx.ConnectError("no"), httpx.ReadError("reset")
    deaths = gone, httpx.RemoteProtocolError("disconnected"), reset, httpx.ReadTimeout("slow"), reset, gone

    async with proxied(upstream=upstream, transport=Mortal(upstream.app, *deaths)) as (client, upstream, _):
        for status in (502, 502, 502, 504):
            answer = await client.post("/v1/completions", json=completion("y"))
            assert answer.status_code == status and "upstream" in answer.json()["error"]["message"]
        with pytest.raises(httpx.ReadError):  # a server cuts the connection, so nobody takes it for whole
            await client.post("/v1/completions", json=completion("y", stream=True))
        assert (await client.get("/ready")).status_code == 502
        assert (await client.get("/health")).status_code == 200
        upstream.listed = ({"id": "renamed"}, {"id": "variant-0", "parent": "renamed"})
        assert (await client.post("/v1/completions", json=completion("y"))).json()["model"] == "renamed"


@pytest.mark.parametrize(
    ("listed", "fine"),
    [
        ({"id": "Owner/Base"}, True),
        ({"id": "another/base-AWQ"}, True),  # the same model, quantised by somebody
        ({"id": "another/model"}, False),
        ({"id": "mine", "root": "owner/model"}, False),
        ({"id": "another/base", "root": "/models/base"}, True),  # a folder says nothing
    ],
)
async def test_no_variant_is_asked_of_another_base_model(listed, fine):
    listing = Upstream((listed, {"id": "variant-0", "parent": listed["id"]}))
    async with proxied(upstream=listing) as (client, upstream, _):
        answer = await client.post("/v1/completions", json=completion("x"))
        ready = await client.get("/ready")
        assert (answer.status_code, ready.status_code) == ((200, 200) if fine else (502, 502))
        assert fine or "the router is of owner/base" in answer.json()["error"]["message"]
        assert fine or not upstream.seen
        other = await client.post("/v1/completions", json={"model": "theirs", "prompt": "x"})
        assert other.status_code == 200


@pytest.mark.parametrize(
    ("adapters", "scales"),
    [
        (("two", "thr%20ee", "one"), [{0: 0.25, 1: 0, 2: 0.75}, {0: 0, 1: 0, 2: 0}]),
        (("variant-0",), [{0: 1.0}, {0: 0.0}]),  # those of a saved router
        (("one",), []),
    ],
)
async def test_llamacpp_gets_the_requests_own_mix_of_its_adapters(adapters, scales):
    async with proxied(upstream=Upstream(LLAMACPP, adapters)) as (client, upstream, _):
        first = await client.post("/v1/completions", json=completion("x"))
        if not scales:  # it lacks an adapter
            assert first.status_code == 502 and "variant-0" in first.json()["error"]["message"]
            assert (await client.get("/ready")).status_code == 503 and upstream.seen == []
            return
        await client.post("/v1/chat/completions", json=chat("y"))
        found = [{one["id"]: one["scale"] for one in body["lora"]} for _, body, _ in upstream.seen]
        assert found == scales and first.json()["router"]["model"] == "variant-0"
        upstream.seen.clear()
        assert (await client.get("/ready")).status_code == 200
        used = [{one["id"] for one in body["lora"] if one["scale"]} for _, body, _ in upstream.seen]
        assert {0} in used and used.count(set()) == 1 and all(len(one) < 2 for one in used)  # each alone


async def test_three_hundred_clients_some_of_whom_leave_and_reloads():
    routers = [Two() for _ in range(4)]
    loads = iter(routers[1:])
    async with proxied(routers[0], load=lambda: next(loads)) as (client, upstream, proxy):

        async def ask(n):
            await asyncio.sleep(n / 3000)
            prompt, model = f"{'x' if n % 3 else 'y'} {n}", "variant-0" if n % 3 else "the-base"
            body = completion(prompt, stream=n % 7 == 1)
            request = asyncio.create_task(client.post("/v1/completions", json=body))
            if n % 5 == 0:
                await asyncio.sleep(0.001)
                request.cancel()
                return None
            answer = await request
            assert answer.headers["x-router-model"] == model
            if not body["stream"]:
                assert answer.json()["choices"][0]["text"] == prompt and answer.json()["model"] == model
            return answer.status_code

        async def reload():
            for _ in routers[1:]:
                await asyncio.sleep(0.02)
                assert (await client.post("/admin/reload")).status_code == 200

        codes, _ = await asyncio.gather(asyncio.gather(*map(ask, range(300))), reload())
        assert codes.count(200) == 240 and codes.count(None) == 60
        assert proxy.router is routers[-1]
        assert sum(len(router.batches) for router in routers) < 120  # far fewer passes than requests
        asked = [body for _, body, _ in upstream.seen]
        assert all((body["model"] == "variant-0") == ("x" in body["prompt"]) for body in asked)


async def test_a_queue_that_is_full_says_when_to_try_again(monkeypatch):
    monkeypatch.setattr(prober_module, "MOST", 1)

    async with proxied(queue=4) as (client, *_):
        asked = [client.post("/v1/completions", json=completion(f"x{n}")) for n in range(20)]
        answers = await asyncio.gather(*asked)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}

    async with proxied(queue=1) as (client, _, proxy):
        proxy.prober._queue.put_nowait(("x", asyncio.get_running_loop().create_future()))
        full = await client.get("/ready")
        assert full.status_code == 503 and "wait" in full.json()["error"]["message"]
        assert (await client.get("/ready")).status_code == 200  # the moment after


async def test_a_reload_takes_the_new_router():
    new = Two()
    new.choose = lambda texts: [Choice(1, {"base": 1.0}, 1.0, False, False, {}) for _ in texts]
    new.variants[0].sha256, new.frames, calibrated = "0a1b2c3d4e", ["kept"], []
    new.calibrate, old = calibrated.append, Two()
    old.frames, old.busy = ["idle", "busy", "kept"], ["busy", "kept"]

    async with proxied(old, load=lambda: new) as (client, upstream, proxy):
        await client.post("/v1/chat/completions", json=chat("x"))
        told = {"status": "reloaded", "variants": 2, "changed": ["variant-0-0a1b2c3d"]}
        assert (await client.post("/admin/reload")).json() == told
        assert proxy.router is new and calibrated == ["busy"]
        await client.post("/v1/chat/completions", json=chat("x"))
        assert [body["model"] for _, body, _ in upstream.seen] == ["variant-0", "the-base"]
        async with proxy.renewing:
            assert (await client.post("/admin/reload")).status_code == 409

    async with proxied() as (client, *_):
        assert (await client.post("/admin/reload")).status_code == 409


@pytest.mark.parametrize(
    ("served", "fits"), [({}, False), ({"models": LLAMACPP, "loras": ["one", "two"]}, True)]
)
async def test_an_adapter_that_no_variant_has_is_counted_or_mixed_by_the_server(served, fits):
    router = Two()
    router.choose = lambda texts: [Choice(1, {"two": 0.9, "base": 0.1}, 2.0, False, False, {"two": 1.0})]

    async with proxied(router, Upstream(**served)) as (client, *_):
        answer = await client.post("/v1/completions", json=completion("x"))
        alone = await client.post("/v1/route", json={"prompt": "x"})
        assert alone.json()["fits"] == answer.json()["router"]["fits"] == fits
        assert ('router_unserved_total{adapter="two"} 1.0' in (await client.get("/metrics")).text) != fits


async def test_metrics_and_the_last_decisions_hold_no_prompt():
    documented = re.search(r"  (.*vector.*)", (ROOT / "docs" / "serving.md").read_text("utf-8"))[1]
    (pattern,) = re.findall(r'router_requests_total\{variant!~"(.+?)"\}', documented)

    async with proxied() as (client, *_):
        for prompt in ("secret x", "secret x too", "y"):
            await client.post("/v1/completions", json=completion(prompt))
        text = (await client.get("/metrics")).text
        counts = dict(re.findall(r'^router_requests_total\{variant="(.+)"\} (.+)$', text, re.M))
        assert counts == {"variant-0": "2.0", "the-base": "1.0"}
        assert [name for name in counts if not re.fullmatch(pattern, name)] == ["the-base"]
        assert 'router_seconds_count{stage="probe"} 3.0' in text and "router_queue 0.0" in text
        recent = (await client.get("/recent")).json()
        assert [one["model"] for one in recent] == ["the-base", "variant-0", "variant-0"]
        assert "secret" not in text + json.dumps(recent)
        assert "What was routed where" in (await client.get("/")).text


async def test_a_clients_cookies_are_its_own_and_arrive():
    def answer(request):
        told = JSONResponse({"cookie": request.headers.get("cookie")})
        told.set_cookie("session", "of-alice")
        told.set_cookie("other", "b")
        return told

    upstream = Upstream()
    upstream.app.routes.insert(0, Route("/v1/completions", answer, methods=["POST"]))

    async with proxied(upstream=upstream) as (client, *_):
        first = await client.post("/v1/completions", json=completion("x"))
        given = [value.split(";")[0] for value in first.headers.get_list("set-cookie")]
        assert given == ["session=of-alice", "other=b"]
        client.cookies.clear()
        second = await client.post("/v1/completions", json=completion("x"))
        assert second.json()["cookie"] is None
        own = await client.post("/v1/completions", json=completion("x"), headers={"cookie": "session=of-bob"})
        assert own.json()["cookie"] == "session=of-bob"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://proxy"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example"}, 403),
    ],
)
async def test_a_page_of_another_site_reaches_nothing_without_a_key(headers, status):
    async with proxied(hosts=("proxy",)) as (client, upstream, _):
        for method, path in (
            ("POST", "/v1/completions"), ("GET", "/recent"), ("POST", "/v1/route"), ("GET", "/metrics"),
            ("GET", "/ready"),
        ):  # fmt: skip
            answer = await client.request(method, path, json=completion("x"), headers=headers)
            assert answer.status_code == status
        assert bool(upstream.seen) == (status == 200)
    with_key = headers | {"authorization": "Bearer k"}  # which no page of another site can guess

    async with proxied(api_key="k", hosts=("proxy",)) as (client, *_):
        assert (await client.get("/recent", headers=with_key)).status_code == 200


async def test_the_clients_key_goes_to_the_upstreams_lists_too():
    class Asking(Upstream):
        async def models(self, request):
            if request.headers.get("authorization") != "Bearer theirs":
                return JSONResponse({"error": "no key"}, 401)
            return await super().models(request)

    async with proxied(upstream=Asking()) as (client, *_):
        known = {"headers": {"authorization": "Bearer theirs"}}
        for path in ("/v1/models", "/ready"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, **known)).status_code == 200
        assert (await client.post("/v1/completions", json=completion("x"))).status_code == 401
        assert (await client.post("/v1/completions", json=completion("y"), **known)).status_code == 200
    async with proxied(upstream=Asking(), upstream_key="wrong") as (client, *_):  # no fault of the client's
        assert (await client.post("/v1/completions", json=completion("x"))).status_code == 502


@pytest.mark.parametrize("value", ["schl\u00fcssel", "a\nb", "\x00"])
def test_a_key_that_no_header_can_hold_is_not_shown(value, monkeypatch):
    monkeypatch.setattr("router.serving.command.os.environ", {"PROTO_ROUTE_API_KEY": value})
    with pytest.raises(InputError) as caught:
        key_of("PROTO_ROUTE_API_KEY")
    assert value not in str(caught.value)
    monkeypatch.setattr("router.serving.command.os.environ", {"PROTO_ROUTE_API_KEY": " secret\n"})
    assert key_of("PROTO_ROUTE_API_KEY") == "secret" and key_of("ANOTHER") is None
