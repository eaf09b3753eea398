"""The command `proto-route serve` as a process: it serves, reloads, drains, and tells who has left."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import ROOT
from router import Router
from router.serving.command import main

httpx = pytest.importorskip("httpx", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")

from serving_stubs import free_port  # noqa: E402

TEXTS = [f"{word} number {n}" for n in range(4) for word in ("What is", "Say", "Bonjour")]


@pytest.fixture()
def upstream():
    """A stub server in a thread; yields its address, the slow prompts it was asked, and who has left."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def models(_):
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def answer(request):
        body = await request.json()
        if body["prompt"].startswith("Slow"):
            asked.append(body["prompt"])
            await asyncio.sleep(0.5)
        if body["prompt"].startswith("Endless"):
            if body.get("stream"):
                return StreamingResponse(endless(), media_type="text/event-stream")
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            left.append("whole")
        return JSONResponse({"model": body["model"]})

    async def endless():
        try:
            while True:
                yield b"data: 0\n\n"
                await asyncio.sleep(0.01)
        finally:
            left.append("stream")

    asked, left = [], []
    routes = [Route("/v1/models", models), Route("/v1/completions", answer, methods=["POST"])]
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}", asked, left
    server.should_exit = True
    thread.join()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_it_serves_reloads_drains_and_tells_that_a_client_has_left(
    upstream, tiny_base, tiny_library, tmp_path
):
    how = {"device": "cpu", "dtype": "float32"}
    upstream, asked, left = upstream
    router = Router.from_library(tiny_library, base_model=str(tiny_base), **how).fit(TEXTS)
    saved, port = router.save(tmp_path / "saved"), free_port()
    words = ["serve", "--router", saved, "--upstream", upstream, "--port", port, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "router", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert f"{len(router.variants)} variants" in process.stdout.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for text, choice in zip(TEXTS, router.choose(TEXTS), strict=True):
                answer = _post(client, text)
                made = router.variants[choice.variant].weights
                assert answer["model"] == (f"variant-{choice.variant}" if made else "tiny")
            router.fit(TEXTS[:1]).save(saved)  # one variant
            process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 30
            while _post(client, TEXTS[1])["model"] not in ("variant-0", "tiny") and time.monotonic() < until:
                time.sleep(0.1)
            assert _post(client, TEXTS[1])["model"] in ("variant-0", "tiny")
            body = {"model": "auto", "prompt": "Endless"}
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                assert next(answer.iter_raw()).startswith(b"data: 0")
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=1)
            _until(lambda: sorted(left) == ["stream", "whole"])
            with ThreadPoolExecutor() as pool:
                slow = pool.submit(_post, client, "Slow")
                _until(lambda: asked)
                process.send_signal(signal.SIGTERM)
                assert slow.result()["model"] in ("variant-0", "tiny")
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert "Traceback" not in errors and "What is number" not in errors


def _until(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def _post(client, text):
    for _ in range(100):  # until it listens
        try:
            return client.post("/v1/completions", json={"model": "auto", "prompt": text}).json()
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("nobody listens")


def test_what_cannot_start_says_why(capsys, tmp_path, monkeypatch):
    assert main(["--router", str(tmp_path), "--upstream", "localhost:8000"]) == 2
    assert "expected an address" in capsys.readouterr().err
    assert main(["--router", str(tmp_path), "--upstream", "http://127.0.0.1:1"]) == 2
    assert "found none" in capsys.readouterr().err
    monkeypatch.setattr("router.serving.command.find_spec", lambda name: None)
    assert main(["--router", str(tmp_path), "--upstream", "http://127.0.0.1:1"]) == 2
    assert "pip install 'proto-route[serve]'" in capsys.readouterr().err
