"""A server that speaks OpenAI's protocol answers queries, with the variants as its LoRA adapters.

It is sent token ids, so prompts are cut and tokenised as everywhere else. Choices are scored by the
log-probabilities of a prompt that is echoed, which vLLM gives; servers that do not can only generate.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from merge.folders import WEIGHTS_FILE
from router.errors import ServerError
from router.files import check_shape, sha256_of
from router.keys import key_of
from router.model.answer import FAILED, Answer, Scoring, endings, likeliest, warn
from router.routing.variants import served
from router.submission import GENERATION, Query

log = logging.getLogger(__name__)

AT_ONCE = 16  # requests
TRIES = 5  # of a request, while the server fails or is busy
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
PATIENCE = 600.0  # seconds without a byte from the server
OURS = "mix-"  # how the names of variants begin that a run loads
GOES_ON = "the same command goes on where it was"


def answer(
    upstream: str,
    tokenizer: Any,
    queries: Sequence[Query],
    rows: Sequence[Sequence[int]],
    variants: Sequence[Path | None],
    *,
    scoring: Scoring = "full",
    max_new_tokens: int = 64,
    progress: Callable[[int], object] = lambda done: None,
    journal: MutableMapping[Query, Answer] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> list[Answer]:
    """Answers queries in order, several at a time.

    A query that the server refuses has no answer (`Answer.failed`), and a warning names it. The environment
    variable PROTO_ROUTE_UPSTREAM_KEY holds the key that the server asks for, if it does.

    Args:
        upstream: the server's address.
        rows: token ids of each query's prompt.
        variants: the folder of each query's variant, which the server can read; None for the base model.
        progress: called after each query with the tokens of its prompt.
        journal: a query that is in it is not answered again; any other is added to it.
        transport: in place of the network, for tests.

    Raises:
        ServerError: the server cannot be reached, fails again and again, wants another key, has not the
            variants and cannot load them, has lost them, or cannot score choices.
    """
    known: MutableMapping[Query, Answer] = {} if journal is None else journal
    secret = key_of("PROTO_ROUTE_UPSTREAM_KEY")
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    with (
        httpx.Client(
            base_url=upstream, headers=headers, transport=transport,
            timeout=httpx.Timeout(PATIENCE, connect=10.0),
        ) as client,
        _loaded(client, variants) as names,
    ):  # fmt: skip

        def ask(n: int) -> Answer:
            query, row, name = queries[n], list(rows[n]), names[variants[n]]
            try:
                if query.eval_type == GENERATION:
                    return Answer(_generated(client, name, row, max_new_tokens))
                tails = endings(tokenizer, query.choices)
                return likeliest(_scored(client, name, row, tails, 0 if scoring == "full" else 1))
            except _RefusedError as error:
                warn(query, f"the server refused it ({error})")
                return FAILED

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            asked = {pool.submit(ask, n): n for n in range(len(queries)) if queries[n] not in known}
            progress(sum(map(len, rows)) - sum(len(rows[n]) for n in asked.values()))
            for done in as_completed(asked):
                n = asked[done]
                known.setdefault(queries[n], done.result())
                progress(len(rows[n]))
        finally:
            pool.shutdown(cancel_futures=True)
    return [known[query] for query in queries]


def _generated(client: httpx.Client, name: str, row: list[int], max_new_tokens: int) -> str:
    """The greedy continuation of a prompt, without one leading blank."""
    body = {"model": name, "prompt": row, "max_tokens": max_new_tokens, "temperature": 0}
    return str(_choices(client, body, {"text": str})[0]["text"]).removeprefix(" ")


def _scored(
    client: httpx.Client, name: str, row: list[int], tails: list[list[int]], left_out: int
) -> tuple[float, ...]:
    """The log-probability of each tail after a prompt, in nats, without its first `left_out` tokens."""
    prompts = [[*row, *tail] for tail in tails]
    body = {
        "model": name, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0
    }  # fmt: skip
    shape = {"logprobs?": {"token_logprobs?": list}}
    found = [choice.get("logprobs") or {} for choice in _choices(client, body, shape)]
    each = [one.get("token_logprobs") or [] for one in found]
    sound = [  # the first token of a prompt has none
        len(one) == len(prompt) and all(isinstance(value, (int, float)) for value in one[len(row) :])
        for one, prompt in zip(each, prompts, strict=False)
    ]
    if not all(sound) or len(each) != len(prompts):
        raise ServerError(
            "--engine openai: expected a log-probability for each token of an echoed prompt, got "
            f"{sum(map(len, each))} for {sum(map(len, prompts))}; this server cannot score choices; with one "
            f"that can, {GOES_ON}"
        )
    return tuple(float(sum(one[len(row) + left_out :])) for one in each)


def _choices(client: httpx.Client, body: dict[str, Any], shape: Any) -> list[dict[str, Any]]:
    """The completions of a request, at least one and each of this shape, in the order of its prompts."""
    response = _sent(client, "POST", "/v1/completions", body)
    if response.status_code in (401, 403, 404):  # 404 if it was started anew, without what was loaded
        raise _unfit(response, f"to complete with the model {body['model']}")
    if response.is_error:
        raise _RefusedError(f"{response.status_code}: {response.text[:300]}")
    try:
        found = response.json()
        check_shape(found, {"choices": [{"index": int, **shape}]})
        if not found["choices"]:
            raise ValueError("none")
        return sorted(found["choices"], key=lambda choice: int(choice["index"]))
    except ValueError as error:
        raise _unfit(response, "completions") from error


class _RefusedError(Exception):
    """The server refuses one request for what is in it."""


def _unfit(response: httpx.Response, expected: str, advice: str = "see to the server") -> ServerError:
    """What to do about a server that is not as the run needs it; the run's journal stays."""
    if response.status_code in (401, 403):
        advice = "set PROTO_ROUTE_UPSTREAM_KEY to the server's key"
    text = " ".join(response.text.split())[:300]
    return ServerError(
        f"--upstream {response.url}: expected {expected}, got {response.status_code}: {text}; {advice}, then "
        f"{GOES_ON}"
    )


def _sent(client: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    """The response, after further tries while the server is busy, fails, or is not there."""
    for attempt in range(TRIES):
        try:
            response = client.request(method, path, json=body)
            if response.status_code != 429 and response.status_code < 500:
                return response
            reason = f"{response.status_code}: {' '.join(response.text.split())[:300]}"
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}"
        if attempt + 1 < TRIES:
            time.sleep(PAUSE * 2**attempt)
    raise ServerError(
        f"--upstream {client.base_url}: expected an answer at {path}, got none in {TRIES} tries ({reason}); "
        f"when the server is well, {GOES_ON}"
    )


@contextmanager
def _loaded(client: httpx.Client, variants: Sequence[Path | None]) -> Iterator[dict[Path | None, str]]:
    """The server's names of the base model (None) and of each variant, which it loads if it can.

    No two runs use a name, so that none unloads what another one needs.
    """
    response = _sent(client, "GET", "/v1/models")
    try:
        listed: dict[str, dict[str, Any]] = {one["id"]: one for one in response.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _unfit(response, "a list of models") from error
    bases = [name for name, one in listed.items() if not one.get("parent")]
    if not bases:
        raise _unfit(response, "a base model in the list of models")
    names: dict[Path | None, str] = {None: bases[0]}
    paths = [path for path in dict.fromkeys(variants) if path]
    for name in _left(listed, {path.resolve().parent.parent for path in paths}):
        _unload(client, name)
    loaded: list[str] = []
    own = f"{OURS}{secrets.token_hex(6)}"
    try:
        for path in paths:
            name = f"{own}-{path.name}"
            body = {"lora_name": name, "lora_path": str(path.resolve())}
            response = _sent(client, "POST", "/v1/load_lora_adapter", body)
            if response.is_success:
                loaded.append(name)
                names[path] = name
            elif response.status_code in (404, 405) and _has(listed, served(int(path.name)), path):
                names[path] = served(int(path.name))
            else:
                raise _unfit(
                    response,
                    f"to load {path.name}",
                    "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and a --max-lora-rank that is high "
                    "enough, or serve the variants of an earlier run with the same flags and queries",
                )
        yield names
    finally:
        for name in loaded:
            _unload(client, name)


def _unload(client: httpx.Client, name: str) -> None:
    try:
        client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    except httpx.HTTPError:
        log.warning("the server still has the adapter %s, which could not be unloaded", name)


def _left(listed: dict[str, dict[str, Any]], outputs: Collection[Path]) -> list[str]:
    """The names of what killed runs in these output folders loaded: their folders of variants are gone."""
    roots = {name: Path(str(one.get("root") or "")) for name, one in listed.items() if name.startswith(OURS)}
    return [name for name, root in roots.items() if root.parent.parent in outputs and not root.exists()]


def _has(listed: dict[str, dict[str, Any]], name: str, variant: Path) -> bool:
    """Whether a server lists a variant and, where its folder can be read, that it is the same one."""
    if name not in listed:
        return False
    weights = Path(str(listed[name].get("root") or "")) / WEIGHTS_FILE
    return not weights.is_file() or sha256_of(weights) == sha256_of(variant / WEIGHTS_FILE)
