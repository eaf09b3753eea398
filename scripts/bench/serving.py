"""What routing costs a service: `python -m scripts.bench.serving`, once scripts/test_engines.sh has run.

Asks its vLLM with the plugin, alone, and behind the proxy. Alone it is asked for the models that the plugin
chose. Writes the table of docs/serving.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import httpx
import psutil

from scripts.bench.markdown import header, insert, row
from scripts.bench.runner import timed
from scripts.bench.score import read_texts
from scripts.engines import PATIENCE, PROXY, SERVER, proxy, vllm

WORK, PAGE = Path("build/engines").resolve(), Path("docs/serving.md")
AT_ONCE = {1: 24, 8: 48, 32: 96}  # requests at once -> in all
SERVED, FITS, WRITTEN, TOGETHER = 100, 2, 32, 16  # requests, those for adapters, tokens of each, at once


class Answered(NamedTuple):
    """What came of a request.

    Attributes:
        seconds: until the first token.
        model: that the router named; None where none did.
        adapter: with the most weight.
    """

    seconds: float
    model: str | None
    adapter: str | None


def memory(processes: Sequence[psutil.Process]) -> float:
    """MiB of servers and all that they started; what several share counts once."""
    every = [one for process in processes for one in (process, *process.children(recursive=True))]
    return sum(float(one.memory_full_info().pss) for one in every) / (1 << 20)


def ask(client: httpx.Client, prompt: str, model: str, tokens: int) -> Answered:
    """One request for a completion of so many tokens, as a stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    start, seconds = time.perf_counter(), 0.0
    with client.stream("POST", "/v1/completions", json=body | {"stream": True, "ignore_eos": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                seconds = seconds or time.perf_counter() - start
        weights = json.loads(answer.headers.get("x-router-weights", "{}"))
    return Answered(
        seconds, answer.headers.get("x-router-model"), max(weights, key=weights.get, default=None)
    )


class Way(NamedTuple):
    """What was measured of one way to serve.

    Attributes:
        answers: to prompts that were asked for a token each.
        mixed: answers to the mixed prompts.
        rate: tokens a second of those.
        mib: memory of its servers.
    """

    answers: dict[str, Answered]
    mixed: dict[str, Answered]
    rate: float
    mib: float


def measured(
    address: str,
    servers: Sequence[psutil.Process],
    some: Mapping[int, Sequence[str]],
    mixed: Sequence[str],
    model: Callable[[str], str] = lambda prompt: "auto",
) -> Way:
    """Asks some prompts for a token each, so many at once; then mixed ones for WRITTEN tokens each."""
    client = httpx.Client(base_url=address, timeout=PATIENCE)

    def asked(at_once: int, prompts: Sequence[str], tokens: int) -> dict[str, Answered]:
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(lambda prompt: ask(client, prompt, model(prompt), tokens), prompts)
            return dict(zip(prompts, found, strict=True))

    asked(TOGETHER, [f"{n}?" for n in range(TOGETHER)], 1)  # what comes first is slow
    answers: dict[str, Answered] = {}
    for count, prompts in some.items():
        answers |= asked(count, prompts, 1)
    seconds, written = timed(lambda: asked(TOGETHER, mixed, WRITTEN))
    return Way(answers, written, WRITTEN * len(mixed) / seconds, memory(servers))


def prompts_of(folder: str) -> dict[str, str]:
    """Prompts of labelled files, in turn from each, with the adapter that each is for."""
    tables = [read_texts(file) for file in sorted(Path(folder).glob("*.csv"))]
    files = [list(zip(table["input"], table["adapter"], strict=True)) for table in tables]
    return dict(pair for turn in zip(*files, strict=False) for pair in turn)


def main() -> None:
    """Measures, and writes the table."""
    fits, foreign = prompts_of("data/eval"), prompts_of("data/eval_foreign")
    labels, ours, theirs = foreign | fits, iter(fits), iter(foreign)
    some = {count: [*islice(ours, many // 2), *islice(theirs, many // 2)] for count, many in AT_ONCE.items()}
    mixed = [*islice(ours, FITS), *islice(theirs, SERVED - FITS)]
    blocks = "--block-size", "32"
    with vllm(WORK, "plugin", *blocks, plugin=True) as server:
        plugin = measured(SERVER, [server], some, mixed)
    chosen = {prompt: answer.model or "" for prompt, answer in plugin.answers.items()}
    with vllm(WORK, "alone", *blocks, plugin=False) as server:
        base = httpx.get(f"{SERVER}/v1/models").json()["data"][0]["id"]
        models = chosen | {prompt: answer.model or base for prompt, answer in plugin.mixed.items()}
        alone = measured(SERVER, [server], some, mixed, lambda prompt: models.get(prompt, base))
        with proxy(WORK, OMP_NUM_THREADS="2") as second:
            behind = measured(PROXY, [server, second], some, mixed)
    ways = alone, plugin, behind
    lines = header(["", "vLLM alone", "with the plugin", "behind the proxy"])
    for count, prompts in some.items():
        for kind, sent in (("base model", False), ("variant", True)):
            which = [prompt for prompt in prompts if chosen[prompt].startswith("variant-") == sent]
            times = [median(way.answers[prompt].seconds for prompt in which) for way in ways]
            cells = [f"{1e3 * time:.0f} ms ({time / times[0]:.2f}x)" for time in times]
            lines.append(row(f"first token of the {kind}, {count} at once", *cells))
    rates = [f"{way.rate:.1f} ({way.rate / alone.rate:.2f}x)" for way in ways]
    routed = sum((answer.model or "").startswith("variant-") for answer in plugin.mixed.values())
    lines.append(row(f"tokens a second, {routed} of {SERVED} requests to variants", *rates))
    lines.append(row("memory", *(f"{way.mib:.0f} MiB ({way.mib - alone.mib:+.0f})" for way in ways)))
    for what, of in (("right adapter", fits), ("foreign requests left to the base model", foreign)):
        shares = [
            fmean(way.answers[prompt].adapter == labels[prompt] for prompt in chosen if prompt in of)
            for way in (plugin, behind)
        ]
        lines.append(row(what, "", *(f"{share:.2f}" for share in shares)))
    print("\n".join(lines))
    insert(PAGE, "serving", lines)


if __name__ == "__main__":
    main()
