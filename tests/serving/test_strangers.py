"""What odd and hostile clients and servers send to the proxy: an error object, and nobody else is harmed."""

import asyncio
import json
import socket
import time

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving_stubs import Two, Upstream, chat, completion, proxied, serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from router.cli import main as cli
from router.serving import command, tracing
from router.serving.proxy import Proxy
from router.system.errors import InputError

pytestmark = pytest.mark.anyio


def is_error(answer, *statuses):
    """Whether an answer is OpenAI's error object."""
    about = answer.json()["error"]
    assert answer.status_code in statuses and about["code"] == answer.status_code
    return about.keys() == {"message", "type", "code"}


@pytest.mark.parametrize("hosts", [("proxy", "::1"), None])
async def test_broken_addresses_in_headers(hosts):
    async with proxied(hosts=hosts) as (client, *_):
        for headers in ({"origin": "http://["}, {"host": "["}):
            for path in ("/v1/completions", "/v1/route", "/v1/models", "/none"):
                answer = await client.post(path, json=completion("x"), headers=headers)
                assert answer.status_code < 500
                assert hosts is None or is_error(answer, 403, 404, 405)
        for host in ("proxy", "PROXY:80", "[::1]:8080", "[::1]"):
            assert (await client.get("/recent", headers={"host": host})).status_code == 200


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000  # Pythons from 3.12 on read a thousand


def answering(path, *content):
    """An upstream that answers so at a path."""
    upstream = Upstream()
    upstream.app.routes.insert(0, Route(path, lambda _: Response(*content), methods=["GET", "POST"]))
    return upstream


async def test_an_upstream_that_answers_nested_json():
    nested = answering("/v1/completions", DEEP, 200, None, "application/json")
    async with proxied(upstream=nested) as (client, *_):
        answer = await client.post("/v1/completions", json=completion("x"))
        assert answer.status_code == 200 and answer.content == DEEP  # as it came
    listed = b'{"data": [{"id": "the-base", "a": ' + DEEP + b"}]}"
    async with proxied(upstream=answering("/v1/models", listed)) as (client, *_):
        assert is_error(await client.get("/v1/models"), 502)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions/", "/v1//completions", "/v1/embeddings", "/v1/rerank", "/v1/chat/completions/",
        "/v1/completions%2f", "/v1/responses/x", "/v1/Completions",
    ],
)  # fmt: skip
async def test_auto_is_never_passed_on_unrouted(path):
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nauto\r\n--b--\r\n'
    upstream = Upstream()
    upstream.app.routes[-1] = Route("/v1/{path:path}", lambda _: JSONResponse({}), methods=["GET", "POST"])
    async with proxied(upstream=upstream) as (client, *_):
        body = json.dumps(chat("x") | completion("x")).encode()
        for method, content, encoding in (
            ("POST", body, "identity"), ("GET", body, "identity"), ("POST", form, "identity"),
            ("POST", body.decode().encode("utf-16"), "identity"), ("POST", body, "br"),
            ("POST", body[:-1] + b', "a": ' + b"[" * 9999 + b"]" * 9999 + b"}", "identity"),
        ):  # fmt: skip
            headers = {"content-encoding": encoding}
            assert is_error(await client.request(method, path, content=content, headers=headers), 400, 415)
        assert upstream.seen == []
        for content in (b"", b"no JSON", b"[1]", b'{"model": "theirs"}'):
            assert (await client.post(path, content=content)).status_code != 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/completions", 405), ("OPTIONS", "/v1/models", 405), ("BREW", "/v1/completions", 405),
        ("GET", "/none", 404), ("POST", "//v1/completions", 404), ("GET", "/health/", 404),
        ("GET", "/v1/route/../../x", 404), ("PATCH", "/", 405),
        # Out of /v1.
        ("GET", "/v1/../flush_cache", 404), ("GET", "/v1/%2e%2e/flush_cache", 404),
        ("GET", "/v1/a/%2E./b", 404), ("GET", "/v1/..%2fflush_cache", 404),
    ],
)  # fmt: skip
async def test_odd_methods_and_paths_get_an_error_object(method, path, status):
    async with proxied() as (client, upstream, _):
        url = httpx.URL("http://proxy").copy_with(raw_path=path.encode())
        assert is_error(await client.request(method, url), status) and upstream.seen == []
        auto = (await client.get("/v1/models/auto")).json()  # a model like others
        listed = (await client.get("/v1/models")).json()["data"]
        assert listed[0] == auto and [one["id"] for one in listed] == ["auto", "the-base", "variant-0"]


async def test_a_redirect_leads_to_the_proxy():
    upstream = Upstream()

    async def moved(request):  # as vLLM does for a slash at the end
        there = request.url.replace(path=request.url.path.rstrip("/"), scheme=request.query_params["scheme"])
        return RedirectResponse(there.replace(query=""))

    upstream.app.routes.insert(0, Route("/v1/completions/", moved, methods=["POST"]))
    async with proxied(upstream=upstream) as (client, *_):
        for scheme in ("http", "https"):
            where = f"/v1/completions/?scheme={scheme}"
            found = await client.post(where, json={"model": "theirs", "prompt": "x"})
            assert found.status_code == 307 and found.headers["location"] == "/v1/completions"


async def test_headers_of_one_connection_are_not_forwarded():
    upstream = Upstream()
    hop = {
        "connection": "x-mine, close", "x-mine": "1", "keep-alive": "timeout=5", "te": "x", "trailer": "x",
        "upgrade": "h2c", "proxy-authorization": "Basic c2VjcmV0", "proxy-connection": "close",
    }  # fmt: skip

    own = {"proxy-authenticate": "Basic", "date": "then", "server": "theirs"}  # uvicorn writes the last two

    async def answer(request):
        upstream.seen.append((request.url.path, {}, dict(request.headers)))
        back = hop | own | {"x-theirs": "yes"}
        return JSONResponse({"choices": []}, headers=back)

    upstream.app.routes.insert(0, Route("/v1/{path:path}", answer, methods=["POST"]))

    async with proxied(upstream=upstream) as (client, *_):
        for body in (completion("x"), {"model": "theirs", "prompt": "x"}):
            found = await client.post("/v1/completions", json=body, headers=hop | {"x-ours": "yes"})
            sent = upstream.seen[-1][2]
            assert sent.pop("connection", "keep-alive") == "keep-alive"  # httpx's own
            assert not sent.keys() & hop.keys() and sent["x-ours"] == "yes"
            assert not found.headers.keys() & (hop | own).keys()
            assert found.headers["x-theirs"] == "yes"


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 100\r\n\r\n"


def guarded(seconds, **how):
    """A proxy of a stub, behind the guard of the command, in a thread."""
    app = Proxy(Two(), "http://upstream", transport=httpx.ASGITransport(Upstream().app), **how).app
    return serving(app, http=command.impatient(seconds))


def told(address, *parts):
    """What is answered to the parts of a request, until the connection is closed."""
    url, found = httpx.URL(address), b""
    with socket.create_connection((url.host, url.port), timeout=20) as one:
        for part in parts:
            one.sendall(part)
            time.sleep(0.1)
        while more := one.recv(4096):
            found += more
    return found


@pytest.mark.parametrize("parts", [(), (HEAD[:30],), (HEAD, b'{"model": '), (HEAD[:9], HEAD[9:], b"x")])
def test_half_a_request_is_cut_at_the_time_limit(parts):
    with guarded(0.5, timeout=0.5) as address:
        start = time.monotonic()
        assert (b" 408 " in told(address, *parts)) == (b"".join(parts)[: len(HEAD)] == HEAD)
        assert 0.4 < time.monotonic() - start < 5
        assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize(
    "text", [b"nonsense\r\n\r\n", b"GET /a b HTTP/1.1\r\n\r\n", HEAD.replace(b"100", b"-5")]
)
def test_what_is_no_http_gets_an_error_object(text):
    with guarded(5) as address:
        head, _, body = told(address, text).partition(b"\r\n\r\n")
    assert b" 400 " in head and f"content-length: {len(body)}".encode() in head.lower()
    assert json.loads(body)["error"]["code"] == 400


def test_a_kept_connection_is_not_cut_while_it_is_used():
    with guarded(0.3) as address, httpx.Client(base_url=address) as client:
        for _ in range(8):
            assert client.post("/v1/completions", json=completion("x")).json()["model"] == "variant-0"
            time.sleep(0.1)


async def test_one_clients_prompt_fails_alone():
    class Odd(Two):
        def choose(self, texts):
            for word, error in (("odd", InputError), ("boom", RuntimeError)):
                if any(word in text for text in texts):
                    self.failed += 1
                    raise error("expected another text")
            return super().choose(texts)

    router = Odd()
    router.failed = 0
    async with proxied(router, quiet=True) as (client, *_):

        async def ask(n):
            prompt = f"x {n}" + {7: " odd", 9: " boom"}.get(n, "")
            return await client.post("/v1/completions", json=completion(prompt))

        answers = await asyncio.gather(*map(ask, range(60)))
        codes = [answer.status_code for answer in answers]
        assert codes[7] == 400 and codes[9] == 500 and codes.count(200) == 58
        assert is_error(answers[7], 400) and is_error(answers[9], 500)
        assert router.failed + len(router.batches) < 30  # passes
        for n, answer in enumerate(answers):
            assert n in (7, 9) or answer.json()["choices"][0]["text"] == f"x {n}"


async def test_ready_asks_the_router_and_each_variant(monkeypatch):
    upstream = Upstream(({"id": "the-base"}, {"id": "variant-0"}, {"id": "variant-1"}))
    router = Two()
    router.variants[1].weights = {"two": 1.0}

    async with proxied(router, upstream) as (client, *_):
        assert (await client.get("/ready")).status_code == 200
        assert {body["model"] for _, body, _ in upstream.seen} == {"the-base", "variant-0", "variant-1"}
        assert {body["max_tokens"] for _, body, _ in upstream.seen} == {1}
        for _ in range(5):
            await client.get("/ready")
        assert len(upstream.seen) == 3 and len(router.batches) == 1  # not again so soon
        monkeypatch.setattr("router.serving.proxy.READY", 0.0)
        upstream.unloaded = {"variant-1"}
        answer = await client.get("/ready")
        assert is_error(answer, 503) and "variant-1" in answer.json()["error"]["message"]
        assert "variant-0" not in answer.json()["error"]["message"]
        upstream.unloaded = set()
        assert (await client.get("/ready")).status_code == 200

        def gone(texts):
            raise FileNotFoundError("the adapters are gone")

        router.choose = gone
        assert is_error(await client.get("/ready"), 503)


@pytest.mark.parametrize("prompts", [False, True])
async def test_decisions_are_written_a_line_each(prompts, tmp_path, monkeypatch, caplog):
    def written(path):
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    caplog.set_level("INFO", "router.serving.proxy")
    monkeypatch.setattr(command, "FILE_SIZE", 1000)
    file = tmp_path / "decisions.jsonl"
    handler = command.decisions_to(file)
    async with proxied(decisions=handler, log_prompts=prompts) as (client, upstream, _):
        known = {"x-request-id": "mine"}
        body = json.dumps(completion("secret x\n\ud83d"))  # half a character
        first = await client.post("/v1/completions", content=body, headers=known)
        second = await client.post("/v1/completions", json=completion("y"))
        await client.post("/v1/completions", json={"model": "theirs", "prompt": "x"})
        assert first.headers["x-request-id"] == upstream.seen[0][2]["x-request-id"] == "mine"
        lines = written(file)
        assert [line["request_id"] for line in lines] == ["mine", second.headers["x-request-id"]]
        assert abs(lines[0].pop("time") - time.time()) < 60
        text = {"prompt": "secret x\n\ud83d"} if prompts else {}
        assert lines[0] == text | {
            "request_id": "mine", "variant": "variant-0", "weights": {"one": 0.9, "base": 0.1}, "margin": 2.0,
            "fits": True,
        }  # fmt: skip
        assert ("secret" in caplog.text) == prompts
        for n in range(40):
            await client.post("/v1/completions", json=completion(f"x {n}"))
    handler.close()
    files = list(tmp_path.iterdir())  # rotated by size
    assert len(files) > 2 and all(one.stat().st_size <= 1000 and written(one) for one in files)


async def test_a_decision_is_a_span_between_client_and_server(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing.tracer() is None
    posted, spans = [], InMemorySpanExporter()

    async def take(request):
        posted.append((request.url.path, await request.body()))
        return Response(b"", media_type="application/x-protobuf")

    with serving(Starlette(routes=[Route("/{path:path}", take, methods=["POST"])])) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        tracer = tracing.tracer()
        tracer.span_processor.add_span_processor(SimpleSpanProcessor(spans))
        trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        async with proxied(tracer=tracer) as (client, upstream, _):
            headers = {"traceparent": f"00-{trace_id}-{parent}-01", "x-request-id": "mine"}
            for body in (completion("x"), {"model": "theirs", "prompt": "x"}):
                await client.post("/v1/completions", json=body, headers=headers)
    ((path, sent),) = posted
    assert path == "/v1/traces" and b"router.margin" in sent and b"proto-route" in sent
    (span,) = spans.get_finished_spans()
    _, number, own, _ = upstream.seen[0][2]["traceparent"].split("-")
    assert (number, int(own, 16)) == (trace_id, span.context.span_id)
    assert span.parent.span_id == int(parent, 16) and 0 < span.end_time - span.start_time < 60e9
    assert upstream.seen[1][2]["traceparent"] == headers["traceparent"]  # what passes is left alone
    assert dict(span.attributes) == {
        "gen_ai.request.model": "auto", "gen_ai.response.model": "variant-0", "router.margin": 2.0,
        "router.fits": True, "router.low_margin": False, "router.request_id": "mine",
    }  # fmt: skip


@pytest.mark.parametrize(("host", "key", "warns"), [
    ("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False),
])  # fmt: skip
def test_a_front_for_all_without_a_key_warns(host, key, warns, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("PROTO_ROUTE_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("PROTO_ROUTE_API_KEY", key)
    words = ["--router", tmp_path, "--upstream", "http://127.0.0.1:1", "--host", host, "--port", 0]
    assert cli(["serve", *map(str, words)]) == 2  # there is no router
    assert ("PROTO_ROUTE_API_KEY" in caplog.text) == warns


@pytest.mark.parametrize(
    "flag", ["--port=-1", "--queue=0", "--max_body=x", "--timeout=nan", "--decisions=/proc/none/file"]
)
def test_flags_out_of_range_are_refused(flag, capsys):
    words = ["--router", "r", "--upstream", "http://127.0.0.1:1", flag]
    try:
        code = cli(["serve", *words])
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 2 and flag.split("=")[0] in capsys.readouterr().err
