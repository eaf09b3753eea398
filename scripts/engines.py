"""What scripts/test_engines.sh asks of real servers: the answers of a run, or of PEFT, through the front."""

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
from router.queries.submission import COLUMNS, GENERATION, MULTIPLE_CHOICE, UNKNOWN, read_queries, write_table
from router.serving.names import read_adapters
from scripts.bench.score import read_texts

ASKED, AT_ONCE = 24, 12  # queries of data/test.csv, and how many of them at a time
CHOSEN = 24  # queries of multiple choice
TIE = 1e-3  # nats
PATIENCE = 300  # seconds until the server must be ready


def write_queries(work: Path) -> None:
    """Writes the first queries of data/test.csv that are answered with text, and some of both kinds."""
    asked = read_queries(Path("data/test.csv"))
    written = [query for query in asked if query.eval_type == GENERATION]
    chosen = [query for query in asked if query.eval_type == MULTIPLE_CHOICE]
    for name, part in (("queries", written[:ASKED]), ("mixed", [*written[-ASKED:], *chosen[:CHOSEN]])):
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
    """Waits until the front says that the server has every variant, or the proxy that it lives."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if 200 in (client.get(path).status_code for path in ("/ready", "/health/liveliness")):
                return
        except httpx.HTTPError:
            pass
        time.sleep(2)
    sys.exit("the server was not ready in time; see the logs beside the queries")


def check(work: Path, front: str) -> int:
    """Compares decisions and answers with those of the run; returns how many differ."""
    answers = read_texts(work / "output" / "queries.csv").set_index("id")["prediction"]
    variants = read_texts(work / "output" / "queries.routing.csv").set_index("id")["variant"]
    queries = read_queries(work / "queries.csv")
    headers = {"authorization": f"Bearer {os.environ.get('LITELLM_MASTER_KEY', '')}"}
    with httpx.Client(base_url=front, timeout=PATIENCE, headers=headers) as client:
        wait(client)

        def ask(text: str) -> dict[str, Any]:
            body = {"model": "auto", "prompt": text, "max_tokens": 24, "temperature": 0}
            found: dict[str, Any] = client.post("/v1/completions", json=body).json()
            return found

        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = list(pool.map(ask, [query.input for query in queries]))
        elsewhere = different = 0
        for query, found in zip(queries, told, strict=True):
            if "router" in found:  # the proxy does not tell
                model = found["router"]["model"]
                alone = not (work / "output" / "variants" / variants[query.id]).is_dir()  # the base model
                elsewhere += (
                    model.startswith("variant-") if alone else model != f"variant-{variants[query.id]}"
                )
            text = found["choices"][0]["text"].removeprefix(" ").strip() or UNKNOWN
            different += text != answers[query.id].strip()
        print(f"{front}: {len(queries)} queries: {elsewhere} routed elsewhere, {different} answers differ")
        first = {"model": "auto", "prompt": queries[0].input, "max_tokens": 8, "stream": True}
        with client.stream("POST", "/v1/completions", json=first) as stream:
            chunks = sum(line.startswith("data:") for line in stream.iter_lines())
            print(f"{front}: a stream of {chunks} chunks")
    return elsewhere + different + (chunks < 2)


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


def check_mixes(work: Path, front: str) -> int:
    """Compares llama.cpp's answers with PEFT's, with each query's own mix; returns how many differ."""
    router = Router.load(work / "output")
    queries = read_queries(work / "queries.csv")
    choices = router.choose([query.input for query in queries])
    with httpx.Client(base_url=front, timeout=PATIENCE) as client:
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


WRITES = {"queries": write_queries, "litellm": write_litellm, "gguf": write_gguf}
CHECKS = {"check": check, "within": check_within, "mixes": check_mixes}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=(*WRITES, *CHECKS))
    parser.add_argument("work", type=Path)
    parser.add_argument("server", nargs="?", default="http://127.0.0.1:8090", help="default: the front")
    args = parser.parse_args()
    if args.what in WRITES:
        WRITES[args.what](args.work)
    elif CHECKS[args.what](args.work, args.server):
        sys.exit("not as expected")


if __name__ == "__main__":
    main()
