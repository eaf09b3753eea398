"""Chats through the proxy, by OpenAI's own client: a conversation of five turns, streamed and not."""

import re
import time

import httpx
import pytest
from serving_stubs import Upstream, chat, proxied, serving

from helpers import PLAIN
from router.api import Router
from router.model.template import Template
from router.pipeline.reading import SHARED
from router.pipeline.served import served
from router.serving.export import vllm
from router.serving.names import read_served
from router.serving.proxy import Proxy

USER = ("What is number 1", "Say number 2", "Bonjour number 3", "thanks", "Say number 4")


@pytest.fixture()
def saved(chat_router, tmp_path):
    """Saves a router of USER's messages, and loads it."""

    def made():
        fitted = chat_router(false_positive_rate=0.9).fit([chat(text)["messages"] for text in USER])
        return Router.load(fitted.save(tmp_path / "saved"), device="cpu")

    return made


@pytest.fixture()
def router(saved):
    return saved()


@pytest.fixture()
def client(router):
    import openai  # which takes long, so not where tests are collected

    with (
        serving(Upstream([{"id": "tiny", "object": "model"}]).app) as upstream,
        serving(Proxy(router, upstream).app) as proxy,
        openai.OpenAI(base_url=f"{proxy}/v1", api_key="none") as made,
    ):
        yield made


def test_a_conversation_of_five_turns_is_routed_as_in_python(client, router):
    messages = [{"role": "system", "content": "Be kind."}]
    for text in USER:
        messages.append({"role": "user", "content": text})
        (choice,) = router.choose([messages])
        made = router.variants[choice.variant]
        expected = served(choice.variant, made.sha256) if made.weights else "tiny"
        answer = client.chat.completions.create(model="auto", messages=messages)
        assert answer.model == expected and answer.choices[0].message.content == f"{len(messages)} messages"
        stream = client.chat.completions.create(model="auto", messages=messages, stream=True)
        told = [(chunk.model, chunk.choices[0].delta.content) for chunk in stream]
        assert told == [(expected, str(len(messages))), (expected, "messages")]
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})


def test_a_system_message_of_many_requests_is_calibrated_beside_them(client, router):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say number 2"}]
    before = router.frames
    for _ in range(SHARED):
        client.chat.completions.create(model="auto", messages=talk)
    for _ in range(1000):
        if len(router.frames) > len(before):
            break
        time.sleep(0.02)
    (new,) = set(router.frames) - set(before)
    assert "Be brief." in new.before
    client.chat.completions.create(model="auto", messages=talk)
    metrics = httpx.get(str(client.base_url.join("/metrics"))).text
    counts = dict(re.findall(r'^router_frames_total\{frame="(.+)"\} (.+)$', metrics, re.M))
    assert counts[new.name] == "1.0" and sum(map(float, counts.values())) == SHARED + 1
    assert "brief" not in metrics


@pytest.mark.anyio
async def test_a_variant_that_brings_a_template_is_asked_in_it(saved, tiny_library, tmp_path):
    other = PLAIN.replace("assistant: ", "them> ")
    for folder in tiny_library.iterdir():
        (folder / "chat_template.jinja").write_text(other)
    router = saved()
    fits = next(text for text in USER if router.choose([chat(text)["messages"]])[0].fits)
    names = [served(n, of.sha256) for n, of in enumerate(router.variants) if of.weights]
    listed = Upstream([{"id": "the-base"}, *({"id": name} for name in names)])
    async with proxied(router, listed) as (client, upstream, _):
        for path, body, given in (
            ("/v1/chat/completions", chat(fits), other),
            ("/v1/responses", {"model": "auto", "input": fits}, None),
            ("/v1/chat/completions", chat(fits, model="other"), None),
            ("/v1/chat/completions", chat(fits, tools=[{}]), None),  # which the template does not write
            ("/v1/chat/completions", chat(fits, chat_template="mine"), "mine"),
        ):
            await client.post(path, json=body)
            assert upstream.seen[-1][1].get("chat_template") == given
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        router.templates = dict.fromkeys(router.templates, Template(router.tokenizer, refusing + other))
        (own,), system = chat(fits)["messages"], {"role": "system", "content": "Be kind."}
        for messages, given in (
            ([system, own], False),
            ([own], True),
            ([{"type": "function_call"}, own], False),
        ):
            await client.post("/v1/chat/completions", json={"model": "auto", "messages": messages})
            assert bool(upstream.seen[-1][1].get("chat_template")) == given
        router._method.template = Template(router.tokenizer, refusing + PLAIN)
        told = await client.post("/v1/chat/completions", json={"model": "auto", "messages": [system, own]})
        assert told.status_code == 400 and "no system" in told.json()["error"]["message"]
    assert "--trust-request-chat-template" in vllm(read_served(tmp_path / "saved"))
