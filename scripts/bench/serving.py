"""What the front adds to a request, and whether it decides as a run does: `python -m scripts.bench.serving`.

Writes the table of docs/serving.md. The upstream answers at once, in the same process. The base model is the
embedded one in float32, and the library the committed one.
"""

from __future__ import annotations

import asyncio
import json
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
from router.queries.submission import read_queries
from router.serving.front import Front
from scripts.bench.markdown import header, insert, row
from scripts.bench.score import read_texts

QUERIES = Path("data/test.csv")
TOKENS, TURNS, AT_ONCE = 60, 41, 200
PAGE = Path("docs/serving.md")


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


async def _ask(client: httpx.AsyncClient, text: str, model: str = "auto") -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": text})


def latency(router: Router) -> tuple[float, float]:
    """What the front adds to a request of 60 tokens and a pass of the base model over it, CPU seconds.

    A request that is routed, one that is passed on and the pass take turns, each turn with its own prompt.
    """
    base = load_base(EMBEDDED, "cpu", "float32")
    rows = encode(base.tokenizer, [query.input for query in read_queries(QUERIES)], None)
    cut = [str(base.tokenizer.decode(ids[:TOKENS])) for ids in rows if len(ids) > TOKENS][: TURNS + 1]

    async def spent(work: Awaitable[Any]) -> float:
        start = time.process_time()
        await work
        return time.process_time() - start

    async def read(text: str) -> None:
        with torch.inference_mode():
            forward(base.model, *pad_left(encode(base.tokenizer, [text]), 0, base.model.device))

    async def work(client: httpx.AsyncClient) -> list[tuple[float, float]]:
        turns = []
        for text in cut:
            routed, passed = await spent(_ask(client, text)), await spent(_ask(client, text, "variant-0"))
            turns.append((routed - passed, await spent(read(text))))
        return turns[1:]

    added, plain = zip(*asyncio.run(_with_front(router, work)), strict=True)
    return median(added), median(plain)


def decisions(router: Router, expected: dict[str, str]) -> tuple[int, int]:
    """How many concurrent requests get another's answer or none, and how many another variant than the run.

    Args:
        expected: the variant that the run gave to each text.
    """
    names = [f"variant-{n}" if variant.weights else "base" for n, variant in enumerate(router.variants)]

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        texts, found = list(expected), list[httpx.Response]()
        for start in range(0, len(texts), AT_ONCE):
            found += await asyncio.gather(*(_ask(client, text) for text in texts[start : start + AT_ONCE]))
        return found

    answers = [answer.json() for answer in asyncio.run(_with_front(router, work))]
    lost = sum(
        not body.get("choices") or body["choices"][0]["text"] != text
        for text, body in zip(expected, answers, strict=True)
    )
    elsewhere = sum(
        body.get("model") != names[int(variant)]
        for variant, body in zip(expected.values(), answers, strict=True)
    )
    return lost, elsewhere


def main() -> None:
    """Measures, prints and writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "proto_route", "--dataset_filepaths", str(QUERIES), "--dtype", "float32", "--quiet"]
        if run([*words, "--device", "cpu", "--max_gen_len", "1", "--output_folder", folder]):
            sys.exit("the run failed")
        router = Router.load(folder, device="cpu")
        variants = read_texts(Path(folder) / f"{QUERIES.stem}.routing.csv").set_index("id")["variant"]
    expected = {query.input: str(variants[query.id]) for query in read_queries(QUERIES)}
    (lost, elsewhere), (added, plain) = decisions(router, expected), latency(router)
    lines = header(["what", "target", "measured", ""], texts=4)
    for what, target, measured, met in (
        (f"{len(expected)} decisions, {AT_ONCE} at once in float32", "those of the run",
         f"{elsewhere} differ", not elsewhere),
        (f"{AT_ONCE} concurrent requests", "none lost or mixed up", f"{lost} are", not lost),
        (f"added to one request of {TOKENS} tokens", "at most 1.2x one pass of the base model",
         f"{added / plain:.2f}x ({1e3 * added:.0f} and {1e3 * plain:.0f} ms of CPU)", added <= 1.2 * plain),
    ):  # fmt: skip
        lines.append(row(what, target, measured, "met" if met else "missed"))
    print("\n".join(lines))
    insert(PAGE, "serving", lines)


if __name__ == "__main__":
    main()
