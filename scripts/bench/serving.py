"""What routing costs a service: `python -m scripts.bench.serving`, once scripts/test_engines.sh has run.

Asks its vLLM with the plugin, alone, and behind the proxy. Alone it is asked for the models that the plugin
chose. Writes the table of docs/serving.md.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import httpx
import psutil

from router.pipeline.served import served
from scripts import engines
from scripts.bench.markdown import header, insert, row
from scripts.bench.runner import timed
from scripts.bench.score import read_texts

WORK, PAGE = Path("build/engines").resolve(), Path("docs/serving.md")
AT_ONCE = {1: 24, 8: 48, 32: 96}  # requests at once -> in all
SERVED, FITS, WRITTEN, TOGETHER = 100, 2, 32, 16  # requests, those for adapters, tokens of each, at once


class Answered(NamedTuple):
    """What came of a request."""

    seconds: float  # until the first token
    variant: str | None  # that answered, as its server says, or that was asked for; None is the base model


def memory(processes: Sequence[psutil.Process]) -> float:
    """MiB of servers and all that they started; what several share counts once."""
    every = [one for process in processes for one in (process, *process.children(recursive=True))]
    return sum(float(one.memory_full_info().pss) for one in every) / (1 << 20)


def ask(client: httpx.Client, prompt: str, model: str, tokens: int) -> Answered:
    """One request for a completion of so many tokens, as a stream."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    start, seconds = time.perf_counter(), 0.0
    with client.stream("POST", "/v1/completions", json=body | {"prompt": prompt}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                seconds = seconds or time.perf_counter() - start
        name = answer.headers.get("x-router-model", model)
    return Answered(seconds, name if name.startswith("variant-") else None)


class Way(NamedTuple):
    """What was measured of one way to serve."""

    answers: dict[str, Answered]  # to prompts that were asked for a token each
    mixed: dict[str, Answered]  # to the mixed prompts
    rate: float  # tokens a second of those
    mib: float  # memory of its servers


def measured(
    address: str,
    servers: Sequence[psutil.Process],
    some: Mapping[int, Sequence[str]],
    mixed: Sequence[str],
    model: Callable[[str], str] = lambda prompt: "auto",
) -> Way:
    """Asks some prompts for a token each, so many at once; then mixed ones for WRITTEN tokens each."""
    client = httpx.Client(base_url=address, timeout=engines.PATIENCE)

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
    variants = json.loads((WORK / "router" / "router.json").read_text("utf-8"))["variants"]
    serves = {
        adapter: served(n, one["sha256"])
        for n, one in enumerate(variants)
        for adapter in one["weights"]
        if len(one["weights"]) == 1
    }
    fits = {prompt: adapter for prompt, adapter in prompts_of("data/eval").items() if adapter in serves}
    foreign = prompts_of("data/eval_foreign")
    labels, ours, theirs = foreign | fits, iter(fits), iter(foreign)
    some = {count: [*islice(ours, many // 2), *islice(theirs, many // 2)] for count, many in AT_ONCE.items()}
    mixed = [*islice(ours, FITS), *islice(theirs, SERVED - FITS)]

    def started(name: str, plugin: bool = False) -> AbstractContextManager[psutil.Process]:
        return engines.vllm(WORK, name, "--block-size", "32", plugin=plugin)

    with started("plugin", plugin=True) as server:
        plugin = measured(engines.SERVER, [server], some, mixed)
    chosen = {prompt: answer.variant for prompt, answer in (plugin.answers | plugin.mixed).items()}
    with started("alone") as server:
        base = httpx.get(f"{engines.SERVER}/v1/models").json()["data"][0]["id"]
        alone = measured(engines.SERVER, [server], some, mixed, lambda prompt: chosen.get(prompt) or base)
    # Each on a server of its own, since one keeps what it read.
    with started("behind") as server, engines.proxy(WORK, OMP_NUM_THREADS="2") as second:
        behind = measured(engines.PROXY, [server, second], some, mixed)
    ways = {"vLLM alone": alone, "with the plugin": plugin, "behind the proxy": behind}
    lines = header(["", *ways])
    for count, prompts in some.items():
        for kind, sent in (("base model", False), ("variant", True)):
            found = [[way.answers[prompt] for prompt in prompts] for way in ways.values()]
            times = [median(one.seconds for one in way if bool(one.variant) == sent) for way in found]
            cells = [f"{1e3 * time:.0f} ms ({time / times[0]:.2f}x)" for time in times]
            lines.append(row(f"first token of the {kind}, {count} at once", *cells))
    routed = sum(bool(answer.variant) for answer in plugin.mixed.values())
    rates = [f"{way.rate:.1f} ({way.rate / alone.rate:.2f}x)" for way in ways.values()]
    lines.append(row(f"tokens a second, {routed} of {SERVED} requests to variants", *rates))
    lines.append(row("memory", *(f"{way.mib:.0f} MiB ({way.mib - alone.mib:+.0f})" for way in ways.values())))
    for what, of in (("right variant", fits), ("foreign requests left to the base model", foreign)):
        asked = [
            {prompt: way.answers[prompt].variant for prompt in way.answers.keys() & of}
            for way in (plugin, behind)
        ]
        shares = [fmean(serves.get(labels[prompt]) == found[prompt] for prompt in found) for found in asked]
        lines.append(row(what, "", *(f"{share:.2f}" for share in shares)))
    print("\n".join(lines))
    insert(PAGE, "serving", lines)


if __name__ == "__main__":
    main()
