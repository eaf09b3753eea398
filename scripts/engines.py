"""What scripts/test_engines.sh asks of a real server: the answers of the run, through the front."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from router.submission import COLUMNS, GENERATION, UNKNOWN, read_queries, write_table
from scripts.bench.score import read_texts

ASKED, AT_ONCE = 24, 12  # queries of data/test.csv, and how many of them at a time
PATIENCE = 300  # seconds until the server must be ready


def write_queries(path: Path) -> None:
    """Writes the first queries of data/test.csv that are answered with text."""
    found = [query for query in read_queries(Path("data/test.csv")) if query.eval_type == GENERATION]
    write_table(path, COLUMNS, [(q.id, q.input, q.eval_type, "") for q in found[:ASKED]])


def wait(client: httpx.Client) -> None:
    """Waits until the front says that the server has every variant."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(2)
    sys.exit("the server was not ready in time; see vllm.log and front.log")


def check(work: Path, front: str) -> int:
    """Compares decisions and answers with those of the run; returns how many differ."""
    answers = read_texts(work / "output" / "queries.csv").set_index("id")["prediction"]
    variants = read_texts(work / "output" / "queries.routing.csv").set_index("id")["variant"]
    queries = read_queries(work / "queries.csv")
    with httpx.Client(base_url=front, timeout=PATIENCE) as client:
        wait(client)

        def ask(text: str) -> dict[str, Any]:
            body = {"model": "auto", "prompt": text, "max_tokens": 24, "temperature": 0}
            found: dict[str, Any] = client.post("/v1/completions", json=body).json()
            return found

        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = list(pool.map(ask, [query.input for query in queries]))
        elsewhere = different = 0
        for query, found in zip(queries, told, strict=True):
            model = found["router"]["model"]
            alone = not (work / "output" / "variants" / variants[query.id]).is_dir()  # the base model
            elsewhere += model.startswith("variant-") if alone else model != f"variant-{variants[query.id]}"
            text = found["choices"][0]["text"].removeprefix(" ").strip() or UNKNOWN
            different += text != answers[query.id].strip()
        print(f"{len(queries)} queries: {elsewhere} routed elsewhere, {different} answers differ")
        first = {"model": "auto", "prompt": queries[0].input, "max_tokens": 8, "stream": True}
        with client.stream("POST", "/v1/completions", json=first) as stream:
            chunks = sum(line.startswith("data:") for line in stream.iter_lines())
            print(f"a stream of {chunks} chunks from {stream.headers['x-router-model']}")
    return elsewhere + different + (chunks < 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("queries", "check"))
    parser.add_argument("path", type=Path)
    parser.add_argument("front", nargs="?", default="http://127.0.0.1:8090")
    args = parser.parse_args()
    if args.what == "queries":
        write_queries(args.path)
    elif check(args.path, args.front):
        sys.exit("not as the run answered")


if __name__ == "__main__":
    main()
