"""A decision as clients see it: the doors that are routed, and the fields and headers that tell of it."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.exceptions import HTTPException

from router.api import Choice
from router.serving.names import AUTO

CHATS = "/v1/chat/completions"
ROUTED = ("/v1/completions", CHATS, "/v1/responses", "/v1/messages")


def not_routed(path: str) -> HTTPException:
    """The error for the model `auto` at a door that does not route."""
    return HTTPException(400, f"model {AUTO}: expected a POST to {' or '.join(ROUTED)}, got {path}")


def described(choice: Choice, name: str) -> dict[str, Any]:
    """A decision for a person or a program, with the name of the model that answers."""
    return {
        "model": name, "weights": {key: round(w, 4) for key, w in choice.weights.items()},
        "margin": round(choice.margin, 3), "low_margin": choice.low_margin, "fits": choice.fits,
    }  # fmt: skip


def headers_of(decision: Mapping[str, Any]) -> dict[str, str]:
    """A decision, as `described` has it, as headers, and the number of the request if that is known."""
    number = {"x-request-id": decision["request_id"]} if "request_id" in decision else {}
    return number | {
        "x-router-model": quote(decision["model"], safe="/:@ "),
        "x-router-weights": json.dumps(decision["weights"]),
        "x-router-margin": str(decision["margin"]),
        "x-router-fits": str(decision["fits"]).lower(),
    }
