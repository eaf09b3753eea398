"""Chats through the front, by OpenAI's own client: a conversation of five turns, streamed and not."""

import json

import pytest

pytest.importorskip("httpx", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

from serving_stubs import serving  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from router.api import Router  # noqa: E402
from router.routing.variants import served  # noqa: E402
from router.serving.front import Front  # noqa: E402

USER = ("What is number 1", "Say number 2", "Bonjour number 3", "thanks", "Say number 4")


@pytest.fixture()
def router(chat_router, tmp_path):
    made = chat_router(false_alarm=0.9)
    return Router.load(
        made.fit([[{"role": "user", "content": text}] for text in USER]).save(tmp_path / "saved")
    )


@pytest.fixture()
def client(router):
    async def models(_):
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def answer(request):
        body = await request.json()
        said = {"role": "assistant", "content": f"{len(body['messages'])} messages"}
        one = {"id": "c", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": said, "finish_reason": "stop"}
            return JSONResponse(one | {"object": "chat.completion", "choices": [choice]})

        async def chunks():
            for word in said["content"].split():
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                chunk = one | {"object": "chat.completion.chunk", "choices": [choice]}
                yield f"data: {json.dumps(chunk)}\n\n".encode()
            yield b"data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", answer, methods=["POST"])]
    with (
        serving(Starlette(routes=routes)) as upstream,
        serving(Front(router, upstream).app) as front,
        openai.OpenAI(base_url=f"{front}/v1", api_key="none") as made,
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


@pytest.mark.parametrize(
    "messages", [[], [{"role": "system", "content": "x"}], [{"role": "bot", "content": "x"}]]
)
def test_what_is_no_conversation_is_a_bad_request(client, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="auto", messages=messages)
