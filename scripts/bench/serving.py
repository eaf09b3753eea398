"""What the front adds to a request, and whether it decides as a run does; the table of docs/serving.md.

The upstream is one that answers at once, in the same process. The base model is the embedded one in float32,
and the library the committed one. `python -m scripts.bench.serving` writes the table.
"""

from __future__ import annotations

import asyncio
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from router.api import Router
from router.main import main as run
from router.model.answer import encode, pad_left
from router.model.base import EMBEDDED, load_base
from router.model.passes import forward
from router.serving.front import Front
from router.submission import read_queries
from scripts.bench.markdown import header, insert, row

QUERIES = Path("data/test.csv")
TOKENS, TURNS, AT_ONCE = 60, 41, 200
DOCS = Path("docs/serving.md")


def upstream() -> Starlette:
    """A server that answers at once with the name of the model that it was asked for."""

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "base"}]})

    async def complete(request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        return JSONResponse({"model": body["model"], "choices": [{"text": body["prompt"]}]})

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
    )


async def _with_front(router: Router, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    front = Front(router, "http://upstream", transport=httpx.ASGITransport(upstream()))
    async with (
        front._lifespan(front.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://front") as client,
    ):
        return await work(client)


def latency(router: Router) -> dict[str, float]:
    """Seconds of CPU for one request of 60 tokens: routed, passed on as it is, and a pass of the base model.

    They take turns, and each turn has a prompt of its own. By the clock, what else runs on the cores would
    count; a request that is alone waits for nothing else.
    """
    base = load_base(EMBEDDED, "cpu", "float32")
    texts = [query.input for query in read_queries(QUERIES)]
    cut = [
        str(base.tokenizer.decode(ids[:TOKENS])) for ids in encode(base.tokenizer, texts) if len(ids) > TOKENS
    ]
    rows = [encode(base.tokenizer, [text])[0] for text in cut[: TURNS + 1]]

    def read(ids: list[int]) -> None:
        with torch.inference_mode():
            forward(base.model, *pad_left([ids], 0, base.model.device))

    async def work(client: httpx.AsyncClient) -> list[list[float]]:
        turns = []
        for text, ids in zip(cut, rows, strict=False):
            turn = []
            for model in ("auto", "variant-0"):
                start = time.process_time()
                answer = await client.post("/v1/completions", json={"model": model, "prompt": text})
                turn.append(time.process_time() - start)
                assert answer.status_code == 200
            start = time.process_time()
            read(ids)
            turns.append([*turn, time.process_time() - start])
        return turns[1:]

    routed, passed, plain = zip(*asyncio.run(_with_front(router, work)), strict=True)
    added = [one - other for one, other in zip(routed, passed, strict=True)]
    return {
        "routed": median(routed), "passed": median(passed), "prefill": median(plain),
        "ratio": median(a / p for a, p in zip(added, plain, strict=True)), "tokens": median(map(len, rows)),
    }  # fmt: skip


def decisions(router: Router, expected: dict[str, str]) -> tuple[int, int, int]:
    """How many concurrent requests are lost, answered by another's variant, or not as the run decided.

    Args:
        expected: the variant that the run gave to each text.
    """
    names = [f"variant-{n}" if variant.weights else "base" for n, variant in enumerate(router.variants)]

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        async def ask(text: str) -> httpx.Response:
            return await client.post("/v1/completions", json={"model": "auto", "prompt": text})

        found: list[httpx.Response] = []
        texts = list(expected)
        for start in range(0, len(texts), AT_ONCE):
            found += await asyncio.gather(*map(ask, texts[start : start + AT_ONCE]))
        return found

    answers = asyncio.run(_with_front(router, work))
    lost = sum(answer.status_code != 200 for answer in answers)
    bodies = [answer.json() for answer in answers]
    pairs = list(zip(expected.items(), bodies, strict=True))
    swapped = sum(
        body["choices"][0]["text"] != text or body["model"] != body["router"]["model"]
        for (text, _), body in pairs
    )
    elsewhere = sum(body["model"] != names[int(variant)] for (_, variant), body in pairs)
    return lost, swapped, elsewhere


def resident(code: str) -> int:
    """The memory of a process that has imported the front and run some lines, MiB.

    Not its peak, which a new process takes over from the one that starts it.
    """
    lines = f"import psutil, router.serving.front\n{code}\nprint(psutil.Process().memory_info().rss >> 20)"
    return int(subprocess.run([sys.executable, "-c", lines], capture_output=True, check=True).stdout)


def main() -> None:
    """Measures, prints and writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "proto_route", "--dataset_filepaths", str(QUERIES), "--dtype", "float32", "--quiet"]
        if run([*words, "--device", "cpu", "--max_gen_len", "1", "--output_folder", folder]):
            sys.exit("the run failed")
        router = Router.load(folder, device="cpu")
        with (Path(folder) / f"{QUERIES.stem}.routing.csv").open(encoding="utf-8", newline="") as file:
            mine = resident(f"r = router.api.Router.load({folder!r}); r.choose(['Hello'] * 64)")
            variants = {line["id"]: line["variant"] for line in csv.DictReader(file)}
    expected = {query.input: variants[query.id] for query in read_queries(QUERIES)}
    lost, swapped, elsewhere = decisions(router, expected)
    took, bare = latency(router), resident("")

    def verdict(met: bool) -> str:
        return "met" if met else "missed"

    lines = [
        *header(["what", "target", "measured", ""], texts=4),
        row(
            f"decision equal to the run's, {len(expected)} queries", "100 % in float32",
            f"{len(expected) - elsewhere} of {len(expected)}", verdict(not elsewhere),
        ),
        row(
            f"added latency, one request of {took['tokens']:.0f} tokens", "at most 1.2x one pass of the base",
            f"{took['ratio']:.2f}x ({1e3 * (took['routed'] - took['passed']):.0f} ms of CPU; a pass takes "
            f"{1e3 * took['prefill']:.0f} ms)", verdict(took["ratio"] <= 1.2),
        ),
        *(
            row(f"gate alone, {adapters} adapters", f"under {limit} ms a query", "[scale.md](scale.md)", "")
            for adapters, limit in (("1,000", 1), ("10,000", 4))
        ),
        row(
            f"{AT_ONCE} concurrent requests", "none lost, none with another's variant",
            f"{lost} lost, {swapped} with another's", verdict(not lost + swapped),
        ),
        row(
            "memory without a copy of the base", "under 300 MB",
            f"not built: {mine} MiB with the copy of the base, {bare} MiB before anything is loaded",
            "missed",
        ),
    ]  # fmt: skip
    print("\n".join(lines))
    insert(DOCS, "serving", lines)


if __name__ == "__main__":
    main()
