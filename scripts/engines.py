"""What scripts/test_engines.sh asks of real servers, beside the answers of a router, of a run, or of PEFT."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize
from peft import PeftModel

from router.api import Router
from router.model.answer import answers, encode
from router.model.apply import active
from router.model.base import EMBEDDED, embedded_gguf, load_base
from router.pipeline.answering import answered_by_vllm
from router.pipeline.context import Context
from router.queries.submission import COLUMNS, GENERATION, MULTIPLE_CHOICE, Query, read_queries, write_table
from router.routing.variants import served
from router.serving.names import read_adapters
from scripts.bench.score import read_texts

ASKED, TALKS, AT_ONCE = 48, 12, 16  # prompts, conversations, and how many of them at a time
CHOSEN = 24  # queries of multiple choice
TIE = 1e-3  # nats
PATIENCE = 300  # seconds until the server must be ready


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
        rows = [(q.id, q.input, q.eval_type, list(q.choices) if q.choices else "") for q in part]
        write_table(work / f"{name}.csv", COLUMNS, rows)


def write_litellm(work: Path) -> None:
    """Writes the configuration of the LiteLLM proxy, as docs/serving.md has it."""
    listed = httpx.get("http://127.0.0.1:8000/v1/models").json()["data"]
    served = {"auto": listed[0]["id"], "base": listed[0]["id"]} | {one["id"]: one["id"] for one in listed[1:]}
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"text-completion-openai/{model}", "api_base": "http://127.0.0.1:8000/v1",
                "api_key": "none",
            },
        }
        for name, model in served.items()
    ]  # fmt: skip
    found = {"model_list": models, "litellm_settings": {"callbacks": "router.integrations.litellm.hook"}}
    (work / "litellm.yaml").write_text(json.dumps(found), "utf-8")  # JSON is YAML


def write_gguf(work: Path) -> None:
    """Writes the embedded base model as a GGUF file whose tensors are all in float32."""
    reader = GGUFReader(embedded_gguf())
    own = {"general.architecture", "general.file_type"}
    writer = GGUFWriter(work / "base.gguf", reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name not in own and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wait(client: httpx.Client) -> None:
    """Waits until the proxy says that the server has every variant, or the proxy that it lives."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if 200 in (client.get(path).status_code for path in ("/ready", "/health/liveliness", "/health")):
                return
        except httpx.HTTPError:
            pass
        time.sleep(2)
    sys.exit("the server was not ready in time; see the logs beside the queries")


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
    proxy = server.endswith("8091")  # LiteLLM's, which passes prompts alone, and does not tell
    queries = read_queries(work / "queries.csv") if proxy else _queries(work)
    expected = json.loads((work / "expected.json").read_text("utf-8"))[: len(queries)]
    headers = {"authorization": f"Bearer {os.environ.get('LITELLM_MASTER_KEY', '')}"}
    wrong = 0
    with httpx.Client(base_url=server, timeout=PATIENCE, headers=headers) as client:
        wait(client)
        for stream in (False, True):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                told = [pool.submit(asked, client, query, stream) for query in queries]
                if not proxy:
                    client.post(
                        f"{'/v1' if server.endswith('8000') else ''}/admin/reload"
                    ).raise_for_status()  # while they are answered
            found = [one.result() for one in told]
            elsewhere = different = 0
            for query, (name, text), (variant, answer) in zip(queries, found, expected, strict=True):
                elsewhere += not proxy and (
                    name != variant if variant else (name or "variant").startswith("variant")
                )
                if text.strip() != answer.strip():
                    print(f"query {query.id}, {name}: {text!r} in place of {answer!r}")
                    different += 1
            how = f"{server}{', streamed' if stream else ''}: {len(queries)} queries"
            print(f"{how}: {elsewhere} routed elsewhere, {different} answers differ")
            wrong += elsewhere + different
    return wrong


def check_within(work: Path, _: str) -> int:
    """Compares a run with one that vLLM has answered, and the scores of choices; how many answers differ."""
    here, there = (
        read_texts(work / one / "mixed.csv").set_index("id")["prediction"] for one in ("here", "within")
    )
    labels = read_texts(work / "here" / "mixed.routing.csv").set_index("id")["variant"]
    queries = read_queries(work / "mixed.csv")
    chosen = [query for query in queries if query.eval_type == MULTIPLE_CHOICE]
    flags = json.loads((work / "here" / "run.json").read_text("utf-8"))["flags"]
    base = load_base(flags["base_model"], dtype=flags["dtype"])
    rows = encode(base.tokenizer, [query.input for query in chosen])
    folders = [work / "here" / "variants" / labels[query.id] for query in chosen]
    paths = [folder if folder.is_dir() else None for folder in folders]
    served = answered_by_vllm(base, chosen, rows, paths, Context())
    apart, ties = 0.0, 0
    for query, ids, path, answered in zip(chosen, rows, paths, served, strict=True):
        with active(base, path, "merged") as model:
            (mine,) = answers(model, base.tokenizer, [ids], [query.choices])
        apart = max(apart, *(abs(a - b) for a, b in zip(mine.scores, answered.scores, strict=True)))
        best, next_best = sorted(mine.scores, reverse=True)[:2]
        ties += best - next_best < TIE
    different = sum(bool(here[query.id] != there[query.id]) for query in queries)
    print(
        f"a run with --engine vllm: {len(queries)} queries, {len(chosen)} of multiple choice: "
        f"{different} answers differ; scores within {apart:.1e}; {ties} near-ties (two choices within "
        f"{TIE:g})"
    )
    return different + int(apart > TIE)


def check_mixes(work: Path, proxy: str) -> int:
    """Compares llama.cpp's answers with PEFT's, with each query's own mix; returns how many differ."""
    router = Router.load(work / "output")
    queries = read_queries(work / "queries.csv")
    choices = router.choose([query.input for query in queries])
    with httpx.Client(base_url=proxy, timeout=PATIENCE) as client:
        wait(client)

        def ask(text: str) -> dict[str, Any]:
            body = {"model": "auto", "prompt": text, "max_tokens": 24, "temperature": 0, "logprobs": 1}
            found: dict[str, Any] = client.post("/v1/completions", json=body).json()["choices"][0]
            return found

        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = list(pool.map(ask, [query.input for query in queries]))
    flags = json.loads((work / "output" / "run.json").read_text("utf-8"))["flags"]
    base, folders = (
        load_base(flags["base_model"] or EMBEDDED, dtype="float32"),
        read_adapters(work / "output"),
    )
    first, *rest = sorted({name for choice in choices for name in choice.mix})
    peft: Any = PeftModel.from_pretrained(base.model, folders[first], first)
    for name in rest:
        peft.load_adapter(folders[name], name)
    different, apart = 0, 0.0
    for query, choice, found in zip(queries, choices, told, strict=True):
        mix = choice.mix
        if len(mix) > 1:
            peft.add_weighted_adapter(list(mix), list(mix.values()), "mix", combination_type="cat")
        if mix:
            peft.set_adapter("mix" if len(mix) > 1 else next(iter(mix)))
        with nullcontext() if mix else peft.disable_adapter():
            ids = torch.tensor([encode(base.tokenizer, [query.input])[0]])
            made = peft.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        if len(mix) > 1:
            peft.delete_adapter("mix")
        text = base.tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        best = float(made.logits[0][0].log_softmax(-1).max())
        apart = max(apart, abs(best - found["logprobs"]["content"][0]["logprob"]))
        different += text != found["text"]
    several = sum(len(choice.mix) > 1 for choice in choices)
    alone = sum(not choice.mix for choice in choices)
    print(
        f"llama.cpp: {len(queries)} queries, {several} with a mix of several adapters, {alone} with none: "
        f"{different} answers differ from PEFT's; first tokens' log-probabilities within {apart:.1e}"
    )
    return different


WRITES = {"queries": write_queries, "save": save_router, "litellm": write_litellm, "gguf": write_gguf}
CHECKS = {"check": check, "within": check_within, "mixes": check_mixes}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=(*WRITES, *CHECKS))
    parser.add_argument("work", type=Path)
    parser.add_argument("server", nargs="?", default="http://127.0.0.1:8090", help="default: the proxy")
    args = parser.parse_args()
    if args.what in WRITES:
        WRITES[args.what](args.work)
    elif CHECKS[args.what](args.work, args.server):
        sys.exit("not as expected")


if __name__ == "__main__":
    main()
