"""The hook of the LiteLLM proxy, with stand-ins for what it imports of the proxy."""

import asyncio
import importlib
import sys

import pytest
from serving_stubs import Two

from helpers import stand_in
from router.system.errors import InputError


@pytest.fixture()
def plug(monkeypatch):
    """The module, with stand-ins for what it imports of LiteLLM and FastAPI."""

    class CustomLogger:
        pass

    class HTTPException(Exception):
        def __init__(self, status_code, detail=None, headers=None):
            super().__init__(detail)
            self.status_code = status_code

    logger = {"CustomLogger": CustomLogger}
    stand_in(monkeypatch, litellm={}, litellm__integrations={}, fastapi={"HTTPException": HTTPException})
    stand_in(monkeypatch, litellm__integrations__custom_logger=logger)
    monkeypatch.delitem(sys.modules, "router.integrations.litellm", raising=False)
    yield importlib.import_module("router.integrations.litellm")
    sys.modules.pop("router.integrations.litellm", None)


def ask(hook, *bodies, kind="completion"):
    async def together():
        return await asyncio.gather(
            *(hook.async_pre_call_hook(None, None, body, kind) for body in bodies), return_exceptions=True
        )

    return asyncio.run(together())


def test_auto_becomes_the_variant_and_other_names_pass(plug):
    router = Two()
    chat = {"model": "auto", "messages": [{"role": "user", "content": "an x"}], "stream": True}
    other = {"model": "gpt", "prompt": "an x"}
    first, second, third, error = ask(
        plug.AutoModel(router), chat, {"model": "auto", "prompt": "none"}, other,
        {"model": "auto", "prompt": [1, 2]},
    )  # fmt: skip
    assert first == chat | {"model": "variant-0"} and second["model"] == "base" and third == other
    assert router.batches == [["an x", "none"]]  # in one pass
    assert error.status_code == 400
    for kind in ("aembedding", "moderation", "aspeech"):
        (error,) = ask(plug.AutoModel(router), {"model": "auto", "input": "an x"}, kind=kind)
        assert error.status_code == 400 and kind in str(error)
    (found,) = ask(plug.AutoModel(router), {"model": "auto", "input": "an x"}, kind="aresponses")
    assert found["model"] == "variant-0"
    router.choose = lambda prompts: (_ for _ in ()).throw(InputError("the chat template does not take it"))
    (error,) = ask(plug.AutoModel(router), chat)
    assert error.status_code == 400 and "template" in str(error)


def test_the_router_is_the_one_that_the_environment_names(plug, monkeypatch):
    monkeypatch.setenv("PROTO_ROUTE_ROUTER", "some/folder")
    loaded = []
    monkeypatch.setattr(plug.Router, "load", lambda folder: loaded.append(folder) or Two())
    hook = plug.AutoModel()
    assert not loaded  # importing a module loads no model
    found = ask(hook, *({"model": "auto", "prompt": "x"} for _ in range(5)))
    assert [one["model"] for one in found] == ["variant-0"] * 5 and loaded == ["some/folder"]


def test_without_a_router_the_proxy_says_so(plug, monkeypatch):
    monkeypatch.delenv("PROTO_ROUTE_ROUTER", raising=False)
    empty = Two()
    empty.variants = []
    for hook in (plug.AutoModel(), plug.AutoModel(empty)):
        (error,) = ask(hook, {"model": "auto", "prompt": "x"})
        assert error.status_code == 500 and "PROTO_ROUTE_ROUTER" in str(error)
