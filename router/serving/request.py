"""A client's request: how it is read, when it is refused, and in which words. Knows no router."""

import asyncio
import hmac
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from router.system.errors import InputError

GONE = 499  # the status of a request whose client has left, which nobody sees


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON values; NaN and half characters stay what they are, unlike in Starlette's."""
    return Response(json.dumps(content), status, headers, "application/json")


def as_error(_: Request, error: Exception) -> Response:
    """OpenAI's error object; an InputError is the request's fault."""
    status, message, headers = 500, "the proxy failed; its log says why", None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, InputError):
        status, message = 400, str(error)
    return refusal(status, message, headers)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as OpenAI's servers write it, of a status and a message."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return as_json({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def admit(request: Request, api_key: str | None, hosts: Collection[str] | None) -> None:
    """Lets a request in that brings the key, or where none is asked for, that no page of another site sent.

    Args:
        hosts: names that this server has where it asks for no key; None is any.

    Raises:
        HTTPException: 401 or 403, it is not let in.
    """
    if api_key is not None:
        bearer = re.sub(r"(?i)^bearer ", "", request.headers.get("authorization", ""))
        given = bearer, request.headers.get("x-api-key", "")  # as Anthropic's clients say it
        if not any(hmac.compare_digest(one.encode(), api_key.encode()) for one in given):
            raise HTTPException(401, "authorization: expected the API key of this server as a bearer token")
        return
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != host
    if foreign or request.headers.get("sec-fetch-site") == "cross-site":
        raise HTTPException(403, "origin: expected no page of another site; have that site's server ask")
    name = re.sub(r":\d*$", "", host.lower()).strip("[]")  # without the port
    if hosts is not None and name not in hosts:
        raise HTTPException(403, f"host: expected {' or '.join(sorted(hosts))}, since no key is asked for")


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """The body, refused as soon as it is too long or takes too long.

    Raises:
        HTTPException: 413, 408, or GONE.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise HTTPException(413, f"expected a body of at most {most} bytes, got a longer one")
    except TimeoutError as error:
        late = f"expected the whole request within {seconds:g} seconds"
        raise HTTPException(408, late, {"connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(GONE, "the client has left") from error
    return bytes(body)


def object_of(request: Request, body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        HTTPException: 400, it is none; 415, it is compressed, so that nobody here sees which model it names.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPException(415, f"content-encoding: expected none, got {encoding}; send it as it is")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"expected JSON, got something else ({error})") from error
    if not isinstance(value, dict):
        raise HTTPException(400, f"expected a JSON object, got a {type(value).__name__}")
    return value


async def left(request: Request) -> None:
    """Ends when the client of a request, whose body has been read, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
