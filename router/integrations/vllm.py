"""The model `auto` inside vLLM: no proxy, and no second copy of the base model.

An entry point of `vllm.endpoint_plugins`. PROTO_ROUTE names the folder of a saved router; its variants are
the server's LoRA adapters. A request for `auto` starts on the base model, which reads the prompt anyway. The
worker's half (vllm_worker.py) turns that reading into responses, and the gate decides. If no adapter fits,
the request goes on. Else it is stopped, and asked again of a variant. Where this code fails, the base model
answers.
"""

import asyncio
import logging
import os
from collections import Counter as Counts
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from router.api import Prompt, Router
from router.constants import CANARY
from router.integrations.vllm_worker import mark
from router.model.answer import Rows, encode
from router.model.base import embedded_folder
from router.model.frames import Frame
from router.model.template import Template
from router.pipeline.fitted import Fitted
from router.pipeline.saved import ABOUT, Saved
from router.pipeline.served import served_names, stray
from router.pipeline.state import FILE
from router.queries.conversation import checked
from router.routing.probe import Probed
from router.routing.variants import VARIANTS
from router.serving.decision import CHATS, ROUTED, described, headers_of, not_routed
from router.serving.names import AUTO
from router.serving.request import admit, as_error, as_json, object_of
from router.serving.text import prompt_of
from router.system.errors import InputError

log = logging.getLogger("vllm.proto_route")  # vLLM shows its own loggers alone
FOLDER = "PROTO_ROUTE"
# What else decides how vLLM writes a chat, beside its messages.
WRITTEN_BY = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message")
PATIENCE = 60.0  # seconds until the base model answers because the gate has not
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
Part = tuple[Frame, tuple[int, ...]]  # what the engine reads: tokens, and the frame that they are compared in


@dataclass
class Asked:
    """A request for the model `auto`.

    Attributes:
        messages: of a chat that can be written in another template.
        given: the prompt as vLLM made it.
        decided: whether it is known what answers.
        lora: vLLM's adapter that answers; None for the base model.
        anew: the prompt in the template that the adapter was trained in, if it is another than the router's.
        headers: that tell the client.
    """

    prompt: Prompt
    messages: Any = None
    given: Any = None
    decided: bool = False
    lora: Any = None
    anew: Any = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


ASKED: ContextVar[Asked | None] = ContextVar("proto_route_asked", default=None)


class Library:
    """A router, and what the engine has of it.

    Args:
        router: without weights of the base model.
        version: of its prototypes in the workers; a stranger who knew it could have prompts read.
        loras: vLLM's adapters by the number of the variant.
    """

    def __init__(self, router: Router, version: str, loras: dict[int, Any]) -> None:
        self.router, self.version, self.loras = router, version, loras
        self.frames = {frame: number for number, frame in enumerate(router.frames)}
        self.read: dict[Part, tuple[Any, float]] = {}  # responses and confidence, until the gate has them
        self.wanted = Counts[Part]()  # by how many requests, whose long prompts may be read alike
        router.read_by(self._probed)

    def _probed(self, fitted: Fitted, rows: Rows) -> Probed:
        """The engine's measurements of prompts, as `Fitted.probe` has them."""
        measured = [self.read[fitted.framing.frame, tuple(row)] for row in rows]
        confidence = np.array([confidence for _, confidence in measured], np.float32)
        return Probed(np.stack([responses for responses, _ in measured]), confidence)

    def drop(self, parts: Sequence[Part]) -> None:
        """Forgets what a request no longer needs, unless another does."""
        self.wanted.subtract(parts)
        for part in parts:
            if not self.wanted[part]:
                del self.wanted[part]
                self.read.pop(part, None)


def check(config: Any) -> None:
    """Refuses a vLLM in which prompts cannot be read.

    Raises:
        InputError: it is one.
    """
    parallel = config.parallel_config
    sizes = [getattr(parallel, f"{kind}_parallel_size") for kind in ("tensor", "pipeline", "data")]
    sizes.append(getattr(parallel, "_api_process_count", 1))
    if config.lora_config is None:
        raise InputError(
            "expected vLLM with --enable-lora, since variants are adapters; see serve.sh of the router"
        )
    if not config.model_config.enforce_eager:
        raise InputError("expected vLLM with --enforce-eager, since a compiled graph runs no hooks")
    if max(sizes) > 1 or config.speculative_config is not None:
        raise InputError(
            "expected vLLM on one device, with one API server and without speculative decoding, since a "
            "prompt is read in one worker; `proto-route serve` stands before any other"
        )


class Auto:
    """The plugin that vLLM loads: the doors, and the engine's method `generate` behind them."""

    name = "proto_route"
    required_tasks = ("generate",)

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "router_requests", "Routed requests by variant.", ["variant"], registry=registry
        )
        self.failed = Counter(
            "router_failed", "Requests of which the gate has not decided.", registry=registry
        )
        self.renewing = asyncio.Lock()

    def attach_router(self, app: Any) -> None:
        """Adds the doors, behind vLLM's own check of keys."""
        app.add_middleware(Door)
        app.add_api_route("/v1/admin/reload", self.reload, methods=["POST"])

    async def init_state(self, engine: Any, state: Any, args: Any) -> None:
        """Loads the router that PROTO_ROUTE names, and puts `generate` in the place of the engine's.

        Raises:
            InputError: there is none, it does not fit what vLLM serves, or vLLM runs in a way in which
                prompts cannot be read.
        """
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        if not (folder := os.environ.get(FOLDER)):
            raise InputError(
                f"{FOLDER}: expected the folder of a saved router in the environment, found none"
            )
        check(engine.vllm_config)
        self.folder, self.engine, self.args = Path(folder), engine, args
        self.models, self.plain = state.openai_serving_models, engine.generate
        self.base: str = self.models.base_model_paths[0].name
        self.made = set[str]()  # names of the variants of all libraries that were loaded
        self.loads = len(self.models.lora_requests)  # how many adapters vLLM has read so far
        self.library = await self._loaded()
        self.models.base_model_paths.append(BaseModelPath(name=AUTO, model_path=args.model))
        engine.generate = self.generate

    async def _loaded(self) -> Library:
        """The router in its folder, with its prototypes in the workers and its variants in the engine."""
        if not (self.folder / ABOUT).is_file():
            raise InputError(f"{self.folder}: expected a saved router; a run makes one by Router.save")
        sha256 = Saved.read(self.folder).files[FILE]  # which `load` compares with the file, and so do workers
        router = await asyncio.to_thread(self._router)
        version = uuid4().hex
        loras = await self._loras(router)
        file = str(self.folder.resolve()), sha256, version
        for wrong in filter(None, await self.engine.collective_rpc("proto_route_load", args=file)):
            raise InputError(wrong)
        return Library(router, version, loras)

    def _router(self) -> Router:
        """The router without weights of the base model, which the engine has."""
        args = self.args
        quantised = self.engine.vllm_config.model_config.quantization
        if quantised:
            log.warning("the base model is quantised (%s), which the router's was not", quantised)
        model = f"{args.model}@{args.revision}" if args.revision else args.model
        model = None if Path(args.model) == embedded_folder() else model
        try:
            return Router.load(self.folder, model, device="meta")
        except InputError:
            if not quantised:  # else it may have been saved so, with other weights
                raise
            return Router.load(self.folder, device="meta")

    async def _loras(self, router: Router) -> dict[int, Any]:
        """vLLM's adapters by the number of the variant; those that it was not started with are loaded."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        known = self.models.lora_requests
        names = {n: name for n, name in enumerate(served_names(router.variants)) if name}
        await self._unload({*names.values()})
        new = len(names.values() - known.keys())
        config, loads, many = self.engine.vllm_config, self.loads + new, len(known) + new
        if config.device_config.device_type == "cpu" and config.lora_config.max_loras <= loads:
            raise InputError(
                f"--max-loras: expected more than {loads}, one for each adapter that was loaded and "
                f"one to spare, since vLLM on a CPU mixes them up else; got {config.lora_config.max_loras}; "
                "restart"
            )
        if many > (room := config.lora_config.max_cpu_loras or config.lora_config.max_loras):
            raise InputError(
                f"--max-cpu-loras: expected at least {many}, since vLLM reads an adapter that it has put "
                f"away from a folder that may have changed; got {room}"
            )
        self.loads = loads
        self.made |= {*names.values()}
        for number, name in names.items():
            if name not in known:
                path = str((self.folder / VARIANTS / str(number)).resolve())
                said = await self.models.load_lora_adapter(
                    LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
                )
                if not isinstance(said, str):
                    raise InputError(f"{path}: vLLM does not load it: {said.error.message}")
        loras = {number: known[name] for number, name in names.items()}
        base, *said = await asyncio.gather(*(self._said(router, lora) for lora in (None, *loras.values())))
        if wrong := stray(router.variants, dict(zip(loras, said, strict=True)), base):
            raise InputError(
                f"{names[wrong[0]]}: expected vLLM to answer with it, but it answers as the base model does"
            )
        return loras

    async def _unload(self, wanted: set[str]) -> None:
        """Drops variants that were loaded here and that neither this library has nor the next one."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        now = {lora.lora_name for lora in self.library.loras.values()} if self.made else wanted
        for name in self.made & self.models.lora_requests.keys() - now - wanted:
            said = await self.models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
            if not isinstance(said, str):
                log.warning("%s: vLLM does not unload it: %s", name, said.error.message)

    async def _said(self, router: Router, lora: Any) -> float:
        """The log-probability of the likeliest token after CANARY, by a variant or the base model."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)
        prompt = {"prompt_token_ids": encode(router.tokenizer, [CANARY])[0]}
        async for out in self.plain(prompt, how, uuid4().hex, lora_request=lora):
            (logprobs,) = out.outputs[0].logprobs
        return max(float(one.logprob) for one in logprobs.values())

    async def reload(self, request: Request) -> Response:
        """POST /v1/admin/reload: loads the router anew; requests that have begun end with the old one."""
        try:
            admit(request, None, None)
            if self.renewing.locked():
                raise InputError("it is being loaded already")
            async with self.renewing:
                self.library = await self._loaded()
        except HTTPException as error:
            return as_error(request, error)
        except InputError as error:
            return as_error(request, HTTPException(409, f"not reloaded: {error}"))
        return as_json({"status": "reloaded", "variants": len(self.library.router.variants)})

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **how: Any) -> AsyncIterator[Any]:
        """In the place of the engine's method of this name: requests for `auto` are decided."""
        asked = ASKED.get()
        if asked is not None and asked.decided:  # once more, with the result of a tool
            how |= {"lora_request": asked.lora}
        elif asked is not None:
            asked.given = prompt
            return self._routed(asked, prompt, sampling_params, request_id, how)
        outputs: AsyncIterator[Any] = self.plain(prompt, sampling_params, request_id, **how)
        return outputs

    async def _routed(
        self, asked: Asked, prompt: Any, params: Any, request_id: str, how: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Starts with the base model; goes on with it, or anew with a variant."""
        library = self.library
        if not (unread := await self._unread(asked, library)):  # it was read lately
            await self._decide(asked, library, [])
            how |= {"lora_request": asked.lora}
            async for out in self.plain(asked.anew or prompt, params, request_id, **how):
                yield out
            return
        begun = copy(params)
        kinds = type(params.output_kind)
        whole = params.output_kind == kinds.FINAL_ONLY
        given = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if itself := len(unread) == 1 and params.n == 1 and unread[0][1] == tuple(given or ()):
            begun.skip_reading_prefix_cache = True  # what comes from there, no hook sees
            if whole:  # a first output says that the prompt was read
                begun.output_kind = kinds.CUMULATIVE
        name = self._mark(library, unread[0]) if itself else request_id
        library.wanted.update(unread)
        async with aclosing(self.plain(prompt, begun, name, **how)) as answer:
            first = asyncio.ensure_future(anext(answer))
            try:
                if itself:
                    await asyncio.wait([first])
                    reading = [self._take(library, unread[0], name)]
                else:
                    reading = [self._read(library, part, prompt) for part in unread]
                await self._decide(asked, library, reading)
                if asked.lora is None:
                    if not (whole and itself) or (await first).finished:
                        yield await first
                    async for out in answer:
                        if not (whole and itself) or out.finished:
                            yield out
                    return
            finally:
                first.cancel()
                await asyncio.wait([first])
                library.drop(unread)
        how |= {"lora_request": asked.lora}
        async for out in self.plain(asked.anew or prompt, params, f"{request_id}-variant", **how):
            yield out

    async def _unread(self, asked: Asked, library: Library) -> list[Part]:
        """The texts that the engine has to read of a request; none where that is unknown."""
        try:
            parts = await asyncio.to_thread(library.router.unread, asked.prompt)
            if strange := {frame for frame, _ in parts} - library.frames.keys():
                raise LookupError(f"no generic text was read in {strange}, which is no frame of the router")
            return parts
        except Exception:
            log.exception("the base model answers, since a prompt could not be taken apart")
            return []

    async def _read(self, library: Library, part: Part, prompt: Any) -> None:
        """Has the engine read a text that is no prompt itself, such as one message of a conversation."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        name = self._mark(library, part)
        async for _ in self.plain(_tokens(part[1], prompt), how, name):
            pass
        await self._take(library, part, name)

    @staticmethod
    def _mark(library: Library, part: Part) -> str:
        return mark(library.version, library.frames[part[0]], uuid4().hex)

    async def _take(self, library: Library, part: Part, name: str) -> None:
        """Keeps what a worker made of a prompt, see `vllm_worker.Prompt.responses`."""
        (raw,) = await self.engine.collective_rpc("proto_route_take", args=(name,))
        if not raw:
            raise ValueError("the engine did not read the prompt whole")
        values = np.frombuffer(raw, np.float32)
        n_adapters = len(library.router.candidates) - 1
        library.read[part] = values[:-1].reshape(n_adapters, -1, 2), float(values[-1])

    async def _decide(
        self, asked: Asked, library: Library, reading: Sequence[Coroutine[Any, Any, None]]
    ) -> None:
        """Has the gate decide once all is read; where that fails, the base model answers."""
        try:
            async with asyncio.timeout(PATIENCE):
                async with asyncio.TaskGroup() as group:  # where one fails, the others end
                    for one in reading:
                        group.create_task(one)
                (choice,) = await asyncio.to_thread(library.router.choose, [asked.prompt])
                lora = library.loras.get(choice.variant or 0)
                if lora and (template := library.router.templates.get(choice.variant or 0)):
                    asked.anew = await asyncio.to_thread(_written, asked, template)
            asked.lora = lora
            name = lora.lora_name if lora else self.base
            headers = headers_of(described(choice, name))
            asked.headers = [(key.encode(), value.encode()) for key, value in headers.items()]
            self.requests.labels(name).inc()
        except Exception:
            self.failed.inc()
            log.exception("the base model answers, since the gate has not decided")
        finally:
            asked.decided = True


def _tokens(ids: Sequence[int], prompt: Any) -> dict[str, Any]:
    """A prompt of tokens, which shares its part of the cache with another one."""
    salt = (
        {"cache_salt": prompt["cache_salt"]} if isinstance(prompt, Mapping) and "cache_salt" in prompt else {}
    )
    return {"prompt_token_ids": list(ids), **salt}


def _is_plain(body: Mapping[str, Any]) -> bool:
    """Whether a chat is text, and its messages alone say how it is written."""
    if any(map(body.get, WRITTEN_BY)) or not body.get("add_generation_prompt", True):
        return False
    try:
        return bool(checked(body.get("messages")))
    except InputError:
        return False


def _written(asked: Asked, template: Template) -> dict[str, Any] | None:
    """A chat as the variant that answers it was trained to be asked; None where its template refuses it."""
    ids = template.tried(checked(asked.messages, ends=False)) if asked.messages else None
    return _tokens(ids, asked.given) if ids else None


class Door:
    """Middleware: a request for the model `auto` is kept where `generate` finds it, and its answer tells."""

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One request."""
        kind = dict(scope.get("headers", ())).get(b"content-type", b"")
        if scope["type"] != "http" or scope["method"] != "POST" or b"json" not in kind.lower():
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            raw = await request.body()
        except ClientDisconnect:
            return
        read: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

        async def again() -> Message:
            return read.pop() if read else await receive()

        try:
            asked = self._asked(request, raw) if AUTO.encode() in raw else None
        except (HTTPException, InputError) as error:
            await as_error(request, error)(scope, again, send)
            return
        if asked is None:
            await self.app(scope, again, send)
            return
        held: list[Message] = []  # the answer, until its headers are known or it ends

        async def tell(message: Message) -> None:
            held.append(message)
            ends = message["type"] == "http.response.body" and not message.get("more_body")
            if (asked.decided and message["type"] != "http.response.start") or ends:
                if held[0]["type"] == "http.response.start":
                    held[0] = {**held[0], "headers": [*held[0].get("headers", ()), *asked.headers]}
                waiting, held[:] = list(held), []
                for one in waiting:
                    await send(one)

        token = ASKED.set(asked)
        try:
            await self.app(scope, again, tell)
        finally:
            ASKED.reset(token)

    @staticmethod
    def _asked(request: Request, raw: bytes) -> Asked | None:
        """A request for `auto`; None for another one. What cannot be routed is an error of status 400."""
        try:
            body = object_of(request, raw)
        except HTTPException:  # vLLM says what is wrong with it
            return None
        if body.get("model") != AUTO:
            return None
        root = request.scope.get("root_path", "")
        if (path := request.scope["path"].removeprefix(root)) not in ROUTED:
            raise not_routed(path)
        return Asked(prompt_of(body), body["messages"] if path == CHATS and _is_plain(body) else None)
