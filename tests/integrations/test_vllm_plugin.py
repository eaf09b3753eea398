"""The plugin in vLLM's server, with a stub of the engine that reads prompts with a model of our own."""

import asyncio
import json
import shutil
from contextlib import asynccontextmanager
from enum import Enum
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from helpers import CHAT, PLAIN, PROMPTS, edit_json, stand_in
from router.integrations.vllm import FOLDER, ROUTED, Auto, _is_plain, check
from router.integrations.vllm_worker import MARKED
from router.pipeline.saved import ABOUT
from router.pipeline.served import served
from router.system.errors import InputError

pytestmark = pytest.mark.anyio
TEXTS = PROMPTS[:3]
TALK = [
    *CHAT,
    {"role": "assistant", "content": "Again."},
    {"role": "user", "content": "And now the other one"},
]


Kind = Enum("Kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])


class Params(SimpleNamespace):
    n, skip_reading_prefix_cache, output_kind = 1, None, Kind.DELTA


class Engine:
    """Writes the tokens 0, 1 and 2 to a prompt, and says what of a router was read."""

    def __init__(self, router):
        self.router, self.asked, self.read, self.left, self.broken = router, [], {}, 0, ""
        self.written, self.forgets = 0, False  # answers as the base model, whatever adapter is asked for
        self.quantised = 0.0  # nats that all answers lose
        parallel = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")}
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(**parallel),
            lora_config=SimpleNamespace(max_loras=9, max_cpu_loras=18),
            model_config=SimpleNamespace(enforce_eager=True, quantization=None), speculative_config=None,
            device_config=SimpleNamespace(device_type="cpu"),
        )  # fmt: skip

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
        self.asked.append((request_id, lora_request and lora_request.lora_name, sampling_params))
        self.prompt = ids = prompt["prompt_token_ids"]
        if getattr(sampling_params, "logprobs", None):
            asked = lora_request and not self.forgets  # else the last, which is the base model
            variant = self.router.variants[int(lora_request.lora_name.split("-")[1]) if asked else -1]
            told = {
                1: SimpleNamespace(logprob=variant.canary - self.quantised),
                2: SimpleNamespace(logprob=-99),
            }
            yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[told])])
            return
        try:
            for n in range(3):
                await asyncio.sleep(0)
                if marked := MARKED.search(request_id):
                    assert sampling_params.skip_reading_prefix_cache
                    fitted = self.router._proto.fits[self.router.frames[int(marked[2])]]
                    base = self.router._base
                    probed = fitted.probe(base.model, [ids], base.tokenizer.pad_token_id, None)
                    raw = np.append(probed.responses.ravel(), probed.confidence).astype(np.float32)
                    self.read[marked[0]] = raw.tobytes()
                self.written += 1
                if n == 2 or sampling_params.output_kind != Kind.FINAL_ONLY:
                    yield SimpleNamespace(text=str(n), finished=n == 2)
        finally:
            self.left += 1

    async def collective_rpc(self, method, timeout=None, args=()):
        if method == "proto_route_load":
            return [self.broken]
        if self.broken:
            raise RuntimeError(self.broken)
        return [self.read.pop(args[0], b"")]


class Models:
    def __init__(self):
        self.base_model_paths, self.lora_requests = [SimpleNamespace(name="the-base")], {}

    async def load_lora_adapter(self, asked):
        assert asked.lora_path.endswith(f"variants/{asked.lora_name.split('-')[1]}")
        self.lora_requests[asked.lora_name] = asked
        return "loaded"

    async def unload_lora_adapter(self, asked):
        del self.lora_requests[asked.lora_name]
        return "unloaded"


@pytest.fixture()
def started(saved, tiny_base, monkeypatch):
    """A server whose doors ask the engine; yields a client, the engine and the plugin."""
    loras = dict.fromkeys(("LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"), SimpleNamespace)
    stand_in(
        monkeypatch,
        vllm={"SamplingParams": Params},
        vllm__entrypoints__openai__models__protocol={"BaseModelPath": SimpleNamespace},
        vllm__entrypoints__serve__lora__protocol=loras,
    )
    monkeypatch.setenv(FOLDER, str(saved._folder))

    @asynccontextmanager
    async def run():
        engine, plugin = Engine(saved), Auto(CollectorRegistry())

        async def answer(request):
            body = await request.json()
            text = body.get("prompt") or saved._method.template.text(body["messages"])
            ids = saved._base.tokenizer(text)["input_ids"]
            how = {key: Kind(of) if key == "output_kind" else of for key, of in body.get("how", {}).items()}
            found = engine.generate({"prompt_token_ids": ids}, Params(**how), "cmpl-1")
            if body.get("stream"):
                return StreamingResponse(one.text async for one in found)
            return JSONResponse([int(one.text) async for one in found])

        app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in ROUTED])
        app.add_api_route = lambda path, to, methods: app.add_route(path, to, methods)
        plugin.attach_router(app)

        state = SimpleNamespace(openai_serving_models=Models())
        await plugin.init_state(engine, state, SimpleNamespace(model=str(tiny_base), revision=None))
        engine.asked.clear()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
            yield client, engine, plugin

    return run


def body(text, **more):
    words = {"prompt": text} if isinstance(text, str) else {"messages": text}
    return {"model": "auto", **words, **more}


def door(text):
    return ROUTED[0] if isinstance(text, str) else ROUTED[1]


def named(router, text):
    """What answers a text, by a router with a base model of its own."""
    (choice,) = router.choose([text])
    variant = router.variants[choice.variant]
    return served(choice.variant, variant.sha256) if variant.weights else "the-base"


@pytest.mark.parametrize("stream", [False, True])
async def test_each_is_answered_as_the_router_decides(started, saved, stream):
    texts = [*TEXTS, CHAT, TALK, "x" * 300, "?", "Say: no"]
    expected = [named(saved, text) for text in texts]
    assert len(set(expected)) > 1 and "the-base" in expected
    async with started() as (client, engine, plugin):
        asked = (client.post(door(text), json=body(text, stream=stream)) for text in texts)
        answers = await asyncio.gather(*asked)
        assert [answer.headers["x-router-model"] for answer in answers] == expected
        assert {answer.text for answer in answers} == {"012" if stream else "[0,1,2]"}
        assert engine.left == len(engine.asked) and not plugin.library.read
        weights = json.loads(answers[0].headers["x-router-weights"])
        assert sum(weights.values()) == pytest.approx(1, abs=0.02)


async def test_prompts_with_the_same_ends_do_not_take_what_was_read_of_each_other(started, saved):
    ends = "".join(f"{n}, " for n in range(80))
    texts = [f"{ends}{middle * 200}{ends}" for middle in "abcdefgh"]
    expected = [named(saved, text) for text in texts]
    async with started() as (client, _, plugin):
        answers = await asyncio.gather(*(client.post(ROUTED[0], json=body(text)) for text in texts))
        assert [answer.headers.get("x-router-model") for answer in answers] == expected
        assert not plugin.library.read and not plugin.library.wanted and not plugin.failed._value.get()


async def test_a_prompt_that_no_adapter_fits_is_asked_once(started, saved):
    alone = next(text for text in (f"{n} and ?" for n in range(50)) if named(saved, text) == "the-base")
    sent = next(text for text in TEXTS if named(saved, text) != "the-base")
    async with started() as (client, engine, _):
        await client.post(ROUTED[0], json=body(alone))
        ((first, lora, params),) = engine.asked
        assert MARKED.search(first) and lora is None and params.skip_reading_prefix_cache
        await client.post(ROUTED[0], json=body(sent))
        (_, before, _), (again, lora, params) = engine.asked[1:]
        assert before is None and lora == named(saved, sent)
        assert again == "cmpl-1-variant" and params.skip_reading_prefix_cache is None
        engine.asked.clear()
        await client.post(ROUTED[0], json=body(sent))
        await client.post(ROUTED[0], json=body(alone))
        assert [lora for _, lora, _ in engine.asked] == [named(saved, sent), None]


async def test_who_waits_for_a_whole_answer_gets_the_last_output_alone(started, saved):
    """And a base model whose answer nobody wants stops after its first token."""
    texts = ["x" * 300, *TEXTS, TALK, *(f"{n} and ?" for n in range(5))]
    async with started() as (client, engine, _):
        stopped = 0
        for text in texts:
            engine.written = 0
            asked = body(text, how={"output_kind": Kind.FINAL_ONLY.value})
            assert (await client.post(door(text), json=asked)).json() == [2]
            if len(engine.asked) == 2 and MARKED.search(engine.asked[0][0]) and engine.asked[1][1]:
                assert engine.written < 6
                stopped += 1
            engine.asked.clear()
        assert stopped


async def test_a_variant_that_brings_a_template_is_asked_in_it(started, saved):
    sent = next(text for text in TEXTS if named(saved, [{"role": "user", "content": text}]) != "the-base")
    number = int(named(saved, [{"role": "user", "content": sent}]).split("-")[1])
    template = PLAIN.replace("assistant: ", "them> ")
    (saved._folder / "variants" / str(number) / "chat_template.jinja").write_text(template)
    async with started() as (client, engine, _):
        others = ({"tools": [{}]}, {"chat_template_kwargs": {"x": 1}}, {"add_generation_prompt": False})
        for more, end in (({}, "them> "), *((more, "assistant: ") for more in others)):
            await client.post(ROUTED[1], json=body([{"role": "user", "content": sent}], **more))
            text = saved._base.tokenizer.decode(engine.prompt)
            assert text == f"user: {sent}\n{end}" and engine.asked[-1][1]
    image = {"role": "user", "content": [{"type": "text", "text": sent}, {"type": "image_url"}]}
    assert not _is_plain({"messages": [image]}) and _is_plain({"messages": TALK})


async def test_where_routing_fails_the_base_model_answers(started, monkeypatch):
    async with started() as (client, engine, plugin):
        engine.broken = "no memory"
        answer = await client.post(ROUTED[0], json=body(TEXTS[0]))
        assert answer.json() == [0, 1, 2] and "x-router-model" not in answer.headers
        assert engine.asked[0][1] is None and plugin.failed._value.get() == 1
        engine.broken, take, taken = "", plugin._take, []

        async def first_fails(*how):
            taken.append(how)
            if len(taken) == 1:
                raise RuntimeError
            await asyncio.sleep(0.05)
            await take(*how)

        monkeypatch.setattr(plugin, "_take", first_fails)
        await client.post(ROUTED[1], json=body(TALK))
        await asyncio.sleep(0.1)  # what was read on would be kept by now
        assert plugin.failed._value.get() == 2 and len(taken) == 2 and not plugin.library.read
        engine.asked[1:] = []
        monkeypatch.setattr(plugin.library.router, "unread", lambda text: 1 / 0)
        assert (await client.post(ROUTED[0], json=body(TEXTS[1]))).json() == [0, 1, 2]
        assert plugin.failed._value.get() == 3 and len(engine.asked) == 2


async def test_other_models_and_doors(started):
    async with started() as (client, engine, _):
        other = await client.post(ROUTED[0], json=body(TEXTS[0]) | {"model": "the-base"})
        assert other.json() == [0, 1, 2] and engine.asked[0][0] == "cmpl-1"
        for path, sent in (("/v1/embeddings", body("x")), (ROUTED[0], body("") | {"prompt": ["a", "b"]})):
            refused = await client.post(path, json=sent)
            assert refused.status_code == 400 and "auto" in refused.json()["error"]["message"]
        assert len(engine.asked) == 1
        await client.post(ROUTED[0], json=body(TEXTS[0], how={"n": 2}))  # several, not read themselves
        assert {bool(MARKED.search(name)) for name, _, _ in engine.asked[1:3]} == {True, False}


async def test_a_reload_takes_what_lies_there_or_leaves_all_as_it_was(started, saved):
    async with started() as (client, engine, plugin):
        old = plugin.library
        told = await client.post("/v1/admin/reload")
        assert told.json() == {"status": "reloaded", "variants": len(saved.variants)}
        assert plugin.library is not old
        engine.broken = "it does not fit"
        refused = await client.post("/v1/admin/reload")
        assert refused.status_code == 409 and "it does not fit" in refused.text
        engine.broken, engine.forgets = "", True
        assert (await client.post("/v1/admin/reload")).status_code == 409
        engine.quantised = 1.0
        assert (await client.post("/v1/admin/reload")).status_code == 409
        engine.forgets = False
        assert (await client.post("/v1/admin/reload")).status_code == 200
        async with plugin.renewing:
            assert (await client.post("/v1/admin/reload")).status_code == 409


def test_a_base_model_that_vllm_quantises_is_where_vllm_has_it(saved, tiny_base, tmp_path):
    plugin, elsewhere = Auto(CollectorRegistry()), shutil.copytree(saved._folder, tmp_path / "copied")
    edit_json(elsewhere / ABOUT, base=str(tmp_path / "gone"))
    plugin.engine = Engine(saved)
    plugin.engine.vllm_config.model_config.quantization = "fp8"
    for plugin.folder, path in ((elsewhere, tiny_base), (saved._folder, tmp_path / "saved so, as AWQ")):
        plugin.args = SimpleNamespace(model=str(path), revision=None)
        assert plugin._router().candidates == saved.candidates


async def test_any_number_of_routers_come_one_after_the_other(started, saved, monkeypatch):
    """With the room that `export` asks for, also after one that failed, and one that was there before."""
    async with started() as (client, engine, plugin):
        count, loaded = len(plugin.library.loras), plugin.loads
        room = SimpleNamespace(max_loras=count + 1, max_cpu_loras=2 * (count + 1))
        monkeypatch.setattr(engine.vllm_config, "lora_config", room)
        monkeypatch.setattr(engine.vllm_config.device_config, "device_type", "cuda")
        for generation, broken in (("a", ""), ("b", ""), ("a", ""), ("c", "full"), ("d", ""), ("e", "")):
            names = [f"variant-{n}-{generation}" if v.weights else None for n, v in enumerate(saved.variants)]
            monkeypatch.setattr("router.integrations.vllm.served_names", lambda _, names=names: names)
            engine.broken = broken
            told = await client.post("/v1/admin/reload")
            assert told.status_code == (409 if broken else 200), told.text
            if not broken:
                assert {lora.lora_name for lora in plugin.library.loras.values()} == {*names} - {None}
                assert {*names} - {None} <= plugin.models.lora_requests.keys()
        assert plugin.loads == loaded + 5 * count  # of a, b, c, d and e


@pytest.mark.parametrize(
    ("part", "field", "value", "flag"),
    [
        ("model_config", "enforce_eager", False, "--enforce-eager"),
        ("parallel_config", "tensor_parallel_size", 2, "device"),
        (None, "speculative_config", object(), "speculative"),
        (None, "lora_config", None, "--enable-lora"),
    ],
)
def test_a_vllm_in_which_prompts_cannot_be_read_is_refused(saved, part, field, value, flag):
    config = Engine(saved).vllm_config
    check(config)
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(InputError, match=flag):
        check(config)


async def test_what_is_missing_at_the_start_is_said(started, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="saved router"):
        await started().__aenter__()
    monkeypatch.delenv(FOLDER)
    with pytest.raises(InputError, match=FOLDER):
        await started().__aenter__()
