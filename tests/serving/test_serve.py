"""The command `proto-route serve` as a process: it serves, reloads, drains, and tells who has left."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from serving_stubs import Upstream, free_port, serving
from starlette.responses import StreamingResponse

from helpers import ROOT
from router.cli import main as cli
from router.pipeline.served import served


def main(words):
    return cli(["serve", *words])


TEXTS = [f"{word} number {n}" for n in range(4) for word in ("What is", "Say", "Bonjour")]
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


class Waiting(Upstream):
    """Answers "Slow" late and "Endless" never, and lists the clients that left."""

    def __init__(self):
        super().__init__(({"id": "tiny"},))
        self.left = []

    async def answer(self, request):
        body = await request.json()
        if body["prompt"] == "Endless":
            if body.get("stream"):
                return StreamingResponse(self.endless(), media_type="text/event-stream")
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.left.append("Endless")
        answer = await super().answer(request)
        await asyncio.sleep(0.5 * (body["prompt"] == "Slow"))
        return answer

    async def endless(self):
        try:
            while True:
                yield b"data: 0\n\n"
                await asyncio.sleep(0.01)
        finally:
            self.left.append("stream")


@pytest.fixture()
def router(router_of):
    """A router of several variants for TEXTS."""
    return router_of(false_positive_rate=0.9).fit(TEXTS)


@contextmanager
def started(saved, upstream, *flags):
    """The command as a process; yields it, a client, and what it wrote to its log once it has ended."""
    port = free_port()
    words = ["serve", "--router", saved, "--upstream", upstream, "--port", port, "--device", "cpu", *flags]
    log = []
    with tempfile.TemporaryFile("w+") as errors, httpx.Client(timeout=30) as client:
        process = subprocess.Popen(
            [sys.executable, "-m", "router", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            stderr=errors,
        )  # fmt: skip
        client.base_url = f"http://127.0.0.1:{port}"
        try:
            assert " variants" in process.stdout.readline()
            _until(lambda: _listens(client))
            yield process, client, log
        finally:
            process.kill()
            process.communicate()
            errors.seek(0)
            log += errors.read().splitlines()


@posix
def test_it_serves_reloads_drains_and_tells_who_left(router, tmp_path):
    saved, upstream = router.save(tmp_path / "saved"), Waiting()
    body = {"model": "auto", "prompt": "Endless"}
    decisions = tmp_path / "decisions.jsonl"
    flags = "--timeout", 4, "--decisions", decisions
    with (
        serving(upstream.app) as address,
        started(saved, address, *flags) as (process, client, log),
        socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as half,
    ):
        half.sendall(b"POST /v1/")
        assert [_post(client, text)["model"] for text in TEXTS] == _names(router, TEXTS)
        router.fit(TEXTS[:1]).save(saved)  # one variant
        process.send_signal(signal.SIGHUP)
        _until(lambda: _post(client, TEXTS[1])["model"] in _names(router, TEXTS[1:2]))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=1)
        _until(lambda: upstream.left == ["Endless"])
        assert half.recv(1) == b""  # cut at the time limit
        assert len(decisions.read_text().splitlines()) >= len(TEXTS)
        with (
            ThreadPoolExecutor() as pool,
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer,
        ):
            chunks = answer.iter_raw()  # held, else httpx closes the connection
            assert next(chunks).startswith(b"data: 0")
            slow = pool.submit(_post, client, "Slow")
            _until(lambda: upstream.seen[-1][1]["prompt"] == "Slow")
            process.send_signal(signal.SIGTERM)
            assert slow.result()["model"].partition("-")[0] in ("variant", "tiny")
            assert process.wait(20) in (0, -signal.SIGTERM)  # an open stream does not hold it up
        _until(lambda: upstream.left == ["Endless", "stream"])
    assert not any("Traceback" in line or "What is number" in line for line in log)
    assert any("loaded anew; new variants: " in line for line in log)


@posix
def test_ctrl_c_ends_it_as_a_signal_does(router, tmp_path):
    with started(router.save(tmp_path / "saved"), "http://127.0.0.1:1") as (process, *_):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT  # Python's end aborts where a thread is in torch


def _names(router, texts):
    made = [(choice.variant, router.variants[choice.variant]) for choice in router.choose(texts)]
    return [served(number, one.sha256) if one.weights else "tiny" for number, one in made]


def _until(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def _listens(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def _post(client, text):
    return client.post("/v1/completions", json={"model": "auto", "prompt": text}).json()


def test_what_cannot_start_says_why(capsys, router, tmp_path, monkeypatch):
    def refused(saved, upstream, *flags):
        assert main(["--router", str(saved), "--upstream", upstream, "--device", "cpu", *flags]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    saved, nobody = router.save(tmp_path / "saved"), "http://127.0.0.1:1"
    assert "--upstream" in refused(saved, "localhost:8000")
    for upstream in (nobody, "http://[::1]:1"):
        assert str(tmp_path / "none") in refused(tmp_path / "none", upstream, "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert refused(saved, nobody, "--port", port).startswith(f"error: --port {port}: ")
    assert "--host not an address" in refused(saved, nobody, "--port", port, "--host", "not an address")
    monkeypatch.setattr("router.serving.command.find_spec", lambda name: None)
    assert "proto-route[serve]" in refused(saved, nobody)
