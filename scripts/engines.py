"""What scripts/test_engines.sh asks of real servers, beside the answers of a router or of a run."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from router.api import Router
from router.pipeline.served import served
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, Query, read_queries
from scripts.bench.runner import write_prompts
from scripts.bench.score import read_texts

ASKED, TALKS, AT_ONCE = 48, 12, 16  # prompts, conversations, and how many of them at a time
CHOSEN = 24  # queries of multiple choice
PATIENCE = 300  # seconds until a server must be ready, or answer
SERVER, PROXY, LITELLM = (f"http://127.0.0.1:{port}" for port in (8000, 8090, 8091))
KEY = "sk-of-these-servers"  # that LiteLLM asks for


@contextmanager
def started(
    work: Path, name: str, command: Sequence[str], ready: str, **environment: str
) -> Iterator[psutil.Process]:
    """A server, until the block ends; it logs into WORK/NAME.log.

    Args:
        command: whose program stands in WORK, or anywhere.
        ready: the address that answers once it can be asked.
    """
    here = os.environ | {
        "PATH": f"{work / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd()),
        "LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_V2_MODEL_RUNNER": "0", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    program, *words = command
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen([work / program, *words], env=here | environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and process.poll() is None:
            try:
                if httpx.get(ready, timeout=PATIENCE).is_success:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(1)
        else:
            sys.exit(f"{name}: did not start; see {log.name}")
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def vllm(work: Path, name: str, *flags: str, plugin: bool) -> AbstractContextManager[psutil.Process]:
    """vLLM with the variants of the saved router, with or without the plugin that decides."""
    environment = {"PROTO_ROUTE": str(work / "router"), "VLLM_PLUGINS": "proto_route" if plugin else ""}
    words = "--host 127.0.0.1 --port 8000 --enforce-eager --max-model-len 1024".split()
    return started(work, name, ["router/serve.sh", *words, *flags], f"{SERVER}/health", **environment)


def proxy(work: Path, **environment: str) -> AbstractContextManager[psutil.Process]:
    """The proxy in front of it, ready once the server has every variant."""
    words = ["serve", "--router", str(work / "router"), "--upstream", SERVER, "--port", "8090"]
    command = [sys.executable, "-m", "router", *words]
    return started(work, "proxy", command, f"{PROXY}/ready", **environment)


def write_queries(work: Path) -> None:
    """Writes prompts that are answered with text, some of both kinds, and the longest conversations."""
    talks = sorted(
        Path("data/chat.jsonl").read_text("utf-8").splitlines(), key=lambda line: -line.count("role")
    )
    (work / "talks.jsonl").write_text("\n".join(talks[:TALKS]) + "\n", "utf-8")
    asked = read_queries(Path("data/test.csv"))
    written = [query for query in asked if query.eval_type == GENERATION]
    chosen = [query for query in asked if query.eval_type == MULTIPLE_CHOICE]
    for name, part in (("queries", written[:ASKED]), ("mixed", [*written[-CHOSEN:], *chosen[:CHOSEN]])):
        write_prompts(work / f"{name}.csv", part)


def litellm(work: Path) -> AbstractContextManager[psutil.Process]:
    """The LiteLLM proxy in front of vLLM, configured as docs/serving.md has it."""
    listed = httpx.get(f"{SERVER}/v1/models").json()["data"]
    served = {"auto": listed[0]["id"], "base": listed[0]["id"]} | {one["id"]: one["id"] for one in listed[1:]}
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"text-completion-openai/{model}", "api_base": f"{SERVER}/v1", "api_key": "none",
            },
        }
        for name, model in served.items()
    ]  # fmt: skip
    found = {"model_list": models, "litellm_settings": {"callbacks": ["router.integrations.litellm.hook"]}}
    (work / "litellm.yaml").write_text(json.dumps(found), "utf-8")  # JSON is YAML
    words = ["litellm/bin/litellm", "--config", str(work / "litellm.yaml")]
    words += ["--host", "127.0.0.1", "--port", "8091"]
    ready, router = f"{LITELLM}/health/liveliness", str(work / "router")
    return started(work, "litellm", words, ready, PROTO_ROUTE_ROUTER=router)


def _queries(work: Path) -> list[Query]:
    return [*read_queries(work / "queries.csv"), *read_queries(work / "talks.jsonl")]


def save_router(work: Path) -> None:
    """Saves the router of a run, and what it answers: for each query a variant's name, and a text."""
    router = Router.load(Router.load(work / "output").save(work / "router"))
    answers, labels = router.answered(_queries(work))
    variants = [router.variants[label] for label in labels]
    names = [served(n, made.sha256) if made.weights else "" for n, made in zip(labels, variants, strict=True)]
    found = [[name, answer.text] for name, answer in zip(names, answers, strict=True)]
    (work / "expected.json").write_text(json.dumps(found), "utf-8")


def asked(client: httpx.Client, query: Query, stream: bool) -> tuple[str | None, str]:
    """The name of what answered a query for `auto`, None where nobody says it, and the text."""
    body: dict[str, Any] = {"model": "auto", "max_tokens": 24, "temperature": 0, "stream": stream}
    talks = bool(query.messages)
    body |= {"messages": query.conversation} if talks else {"prompt": query.input}
    path = "/v1/chat/completions" if talks else "/v1/completions"
    with client.stream("POST", path, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines()]
        parts = [json.loads(line) for line in lines if line.startswith("{")]
    choices = [choice for part in parts for choice in part["choices"]]
    if talks:
        choices = [choice["delta" if stream else "message"] for choice in choices]
    text = "".join(choice.get("content" if talks else "text") or "" for choice in choices)
    return answer.headers.get("x-router-model"), text


def check(work: Path, server: str) -> int:
    """Compares decisions and answers with those of the router, streamed and not; returns how many differ."""
    tells = server != LITELLM  # whose proxy passes prompts alone, and does not say what answered
    queries = _queries(work) if tells else read_queries(work / "queries.csv")
    expected = json.loads((work / "expected.json").read_text("utf-8"))[: len(queries)]
    reload = "/v1/admin/reload" if server == SERVER else "/admin/reload"
    wrong = 0
    with httpx.Client(
        base_url=server, timeout=PATIENCE, headers={"authorization": f"Bearer {KEY}"}
    ) as client:
        for stream in (False, True):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                told = [pool.submit(asked, client, query, stream) for query in queries]
                if tells:
                    client.post(reload).raise_for_status()  # while they are answered
            found = [one.result() for one in told]
            elsewhere = different = 0
            for query, (name, text), (variant, answer) in zip(queries, found, expected, strict=True):
                elsewhere += tells and (
                    name != variant if variant else (name or "variant").startswith("variant")
                )
                if text.strip() != answer.strip():
                    print(f"query {query.id}, {name}: {text!r} in place of {answer!r}")
                    different += 1
            how = f"{server}{', streamed' if stream else ''}: {len(queries)} queries"
            print(f"{how}: {elsewhere} routed elsewhere, {different} answers differ")
            wrong += elsewhere + different
    return wrong


def check_within(work: Path) -> int:
    """Compares a run with one that vLLM has answered; returns how many answers differ."""
    here, there = (read_texts(work / one / "mixed.csv") for one in ("here", "within"))
    different = int((here["prediction"] != there["prediction"]).sum())
    print(f"a run with --engine vllm: {len(here)} queries: {different} answers differ")
    return different


def check_servers(work: Path) -> int:
    """Checks vLLM with the plugin, the proxy and LiteLLM's; returns how many answers differ."""
    with vllm(work, "vllm", plugin=True):
        wrong = check(work, SERVER)
        with proxy(work):
            wrong += check(work, PROXY)
        with litellm(work):
            wrong += check(work, LITELLM)
    return wrong


STEPS = {
    "queries": write_queries, "save": save_router, "servers": check_servers, "within": check_within,
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    if STEPS[args.step](args.work.resolve()):
        sys.exit("not as expected")


if __name__ == "__main__":
    main()
