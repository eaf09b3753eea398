"""The server behind the proxy: what it serves, and how requests reach it. It decides nothing."""

import asyncio
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx
from starlette.exceptions import HTTPException

from router.api import Router
from router.constants import CANARY
from router.library.adapters import model_of
from router.pipeline.served import served_names, stray
from router.system.files import is_folder

PATIENCE = 60.0  # seconds that a canary may take
KEPT = 3.0  # seconds of an idle connection: less than vLLM keeps it, or it is cut as it is used
KEYS = 1000  # clients' keys with which the server has been asked what it serves
HUB_ID = r"[\w.-]+/[\w.-]+"
# Headers of one connection (RFC 9110, section 7.6.1), and the length, which is counted anew.
HOP = {
    b"connection", b"content-length", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
Headers = list[tuple[bytes, bytes]]


class Serves(NamedTuple):
    """The models that the server serves.

    Attributes:
        names: of its models, as it lists them at /v1/models.
        base: its name of the base model; None where it lists none.
        loras: llama.cpp's adapters and their ids; None where the model's name chooses a variant.
    """

    names: set[str]
    base: str | None
    loras: dict[str, int] | None

    def scales(self, mix: Mapping[str, float]) -> list[dict[str, Any]]:
        """A mix of adapters as llama.cpp takes it.

        All are named, since a request that names none may meet the cache of another's adapters.
        """
        return [{"id": n, "scale": mix.get(name, 0.0)} for name, n in (self.loras or {}).items()]

    def needed(self, router: Router) -> tuple[set[str], set[str]]:
        """The models, or of llama.cpp the adapters, that answer for a router; and those that are missing."""
        ours = variants_of(router)
        if self.loras is None:
            return ours | ({self.base} if self.base else set()), ours - self.names
        if not ours <= self.loras.keys():  # it mixes the adapters themselves
            ours = set(router.candidates[:-1])
        return ours, ours - self.loras.keys()


def variants_of(router: Router) -> set[str]:
    """The names of the variants that a server has to have."""
    return {name for name in served_names(router.variants) if name}


def end_to_end(headers: Iterable[tuple[bytes, bytes]], less: Collection[bytes]) -> Headers:
    """Headers that pass through a proxy, without `less`, their names in small letters."""
    pairs = [(key.lower(), value) for key, value in headers]
    named = {one.strip() for key, value in pairs if key == b"connection" for one in value.lower().split(b",")}
    return [(key, value) for key, value in pairs if key not in HOP | named and key not in less]


def _bearing(key: str) -> dict[str, str]:
    return {"authorization": key} if key else {}


class Upstream:
    """A client of one server. A key is the whole header `authorization`, "" for none.

    Args:
        timeout: seconds without a byte.
        transport: in place of the network, for tests.
        theirs: whether keys are the clients', who hear then that one is refused.

    Attributes:
        asked: what it serves, by key; to be cleared when that may have changed.

    Raises:
        HTTPException: 502 or 504, by every method, where it is away, too slow or not as expected; 401 or 403
            where it refuses a client's key.
    """

    def __init__(
        self, address: str, timeout: float, transport: httpx.AsyncBaseTransport | None, theirs: bool
    ) -> None:  # fmt: skip
        self.theirs = theirs
        nobody = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # no client gets another one's cookies
        self.client = httpx.AsyncClient(
            base_url=address.rstrip("/").removesuffix("/v1"), cookies=nobody, transport=transport,
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEPT),
        )  # fmt: skip
        self.asked: dict[str, asyncio.Future[Serves]] = {}

    async def known(self, key: str, router: Router) -> Serves:
        """The models that it served when it was first asked with a key."""
        if key not in self.asked:
            if len(self.asked) >= KEYS:
                self.asked.clear()
            task = self.asked[key] = asyncio.ensure_future(self.ask(key, router))
            task.add_done_callback(partial(self._done, key))
        return await asyncio.shield(self.asked[key])  # others may wait for it when this client leaves

    def _done(self, key: str, task: asyncio.Future[Serves]) -> None:
        if task.cancelled() or task.exception():
            self.asked.pop(key, None)

    async def ask(self, key: str, router: Router) -> Serves:
        """The models that it serves now; refuses a server of a hub's base model that is not the router's."""
        base = router.base_model
        ours = variants_of(router)
        listed = (await self.models(key))["data"]
        # An adapter has a parent; the base model has none.
        bases = [one for one in listed if one["id"] not in ours and not one.get("parent")]
        theirs = str(bases[0].get("root") or bases[0]["id"]) if bases else ""
        on_hub = all(re.fullmatch(HUB_ID, one) for one in (theirs, base)) and not is_folder(base)
        if on_hub and model_of(theirs) != model_of(base):
            raise HTTPException(
                502, f"the upstream serves {theirs}, the router is of {base}; see --base_model"
            )
        loras = None
        if bases and bases[0].get("owned_by") == "llamacpp":
            adapters = await self._fetched("/lora-adapters", key)
            try:
                loras = {unquote(PurePath(one["path"]).stem): int(one["id"]) for one in adapters}
            except (KeyError, TypeError, ValueError) as error:
                raise HTTPException(
                    502, "expected the upstream's adapters as llama.cpp lists them"
                ) from error
        return Serves({one["id"] for one in listed}, bases[0]["id"] if bases else None, loras)

    async def models(self, key: str) -> dict[str, Any]:
        """Its answer at /v1/models, in which each model has an `id`."""
        models: dict[str, Any] = await self._fetched("/v1/models", key)
        try:
            if not all(isinstance(one["id"], str) for one in models["data"]):
                raise ValueError("a model without a name")
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPException(502, "expected the upstream's models as OpenAI lists them") from error
        return models

    async def _fetched(self, path: str, key: str) -> Any:
        """The JSON values that it answers to a GET."""
        try:
            response = await self.client.get(path, headers=_bearing(key))
            response.raise_for_status()
            return response.json()
        except httpx.TransportError as error:
            raise self.away(error) from error
        except httpx.HTTPStatusError as error:  # its text has the upstream's address
            status = error.response.status_code
            raise HTTPException(
                status if self.theirs and status in (401, 403) else 502,
                f"the upstream answered {status} at {path}",
            ) from error
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            raise HTTPException(502, f"the upstream does not answer as expected at {path}") from error

    async def send(self, method: str, target: str, headers: Headers, content: bytes) -> httpx.Response:
        """Its answer, of which the body is yet to come.

        Raises:
            HTTPException: also 414, the address is none that can be asked for.
        """
        try:
            request = self.client.build_request(method, target, content=content, headers=headers)
        except httpx.InvalidURL as error:
            raise HTTPException(414, f"expected a shorter path, or another one ({error})") from error
        try:
            return await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self.away(error) from error

    def away(self, error: httpx.HTTPError, what: str = "cannot be reached") -> HTTPException:
        """The error for the client, where the server is not there; it may come back with other adapters."""
        self.asked.clear()
        if isinstance(error, httpx.TimeoutException):
            return HTTPException(504, f"the upstream did not answer in time ({type(error).__name__})")
        return HTTPException(502, f"the upstream {what} ({type(error).__name__})")

    async def silent(self, names: Iterable[str], serves: Serves, key: str, router: Router) -> list[str]:
        """Which of these models, or of llama.cpp's adapters, do not answer a canary with one token.

        One of the router's variants that answers as the base model does, does not either.
        """
        numbers = {name: n for n, name in enumerate(served_names(router.variants)) if name}

        async def says(name: str) -> float | None:
            """The log-probability of its token, NaN if it tells none; None if it does not answer."""
            body = {"model": name, "prompt": CANARY, "max_tokens": 1, "temperature": 0, "logprobs": 1}
            if serves.loras is not None:
                body |= {"model": serves.base, "lora": serves.scales({name: 1.0})}
            try:
                response = await self.client.post(
                    "/v1/completions", json=body, headers=_bearing(key), timeout=PATIENCE
                )
                one, *_ = response.json()["choices"]
                if not (response.is_success and isinstance(one["text"], str)):
                    return None
                return float(((one.get("logprobs") or {}).get("token_logprobs") or [math.nan])[0])
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return None

        asked = sorted({*names, *filter(None, [serves.base])})
        said = dict(zip(asked, await asyncio.gather(*map(says, asked)), strict=True))
        told = {numbers[name]: value for name, value in said.items() if name in numbers and value is not None}
        wrong = stray(router.variants, told, said.get(serves.base or ""))
        return [name for name in asked if said[name] is None or numbers.get(name) in wrong]
