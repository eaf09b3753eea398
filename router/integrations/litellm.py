"""A pre-call hook for the LiteLLM proxy: requests for the model `auto` go on under a variant's name.

The proxy's configuration names it as a callback, `router.integrations.litellm.hook`, and lists the variants
under the names that `export` gives them, and the base model as `base`. The environment variable
PROTO_ROUTE_ROUTER names the folder of a saved router or of a finished run.
"""

import asyncio
import os
from typing import Any

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

from router.api import Choice, Router
from router.constants import BASE_COLUMN
from router.pipeline.served import served_names
from router.serving.names import AUTO
from router.serving.prober import Prober
from router.serving.text import prompt_of
from router.system.errors import InputError

FOLDER = "PROTO_ROUTE_ROUTER"
WAITING = 1024  # requests that may wait for their decision
ROUTED = ("completion", "responses", "messages")  # how LiteLLM's names of what is routed end


class AutoModel(CustomLogger):  # type: ignore[misc]
    """Names the variant that answers a request for the model `auto`; other requests pass untouched.

    Args:
        router: decides; None loads the one that PROTO_ROUTE_ROUTER names, with the first request.
    """

    def __init__(self, router: Router | None = None) -> None:
        super().__init__()
        self.router = router
        self._prober: Prober | None = None
        self._starting = asyncio.Lock()

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """LiteLLM calls it before each request; the model's name in `data` is replaced.

        Raises:
            HTTPException: 400 for a request without one text, 429 where too many wait, 500 without a router.
        """
        if data.get("model") != AUTO:
            return data
        if not call_type.endswith(ROUTED):
            raise HTTPException(
                400, f"model {AUTO}: expected a completion, a chat or a response, got {call_type}"
            )
        try:
            prober = await self._started()
        except InputError as error:
            raise HTTPException(500, f"{FOLDER}: {error}") from error
        try:
            choice: Choice = await prober(prompt_of(data))
        except InputError as error:  # no text, or none that the base model's template takes
            raise HTTPException(400, str(error)) from error
        except asyncio.QueueFull as error:
            raise HTTPException(429, "too many requests wait; try again", {"retry-after": "1"}) from error
        assert self.router is not None and choice.variant is not None  # or it would not be served
        return data | {"model": served_names(self.router.variants)[choice.variant] or BASE_COLUMN}

    async def _started(self) -> Prober:
        async with self._starting:
            if self._prober is None:
                if self.router is None:
                    folder = os.environ.get(FOLDER)
                    if not folder:
                        raise InputError("expected the folder of a router in the environment, found none")
                    self.router = await asyncio.to_thread(Router.load, folder)
                if not self.router.variants:
                    raise InputError("expected a router with variants; decide them with Router.fit")
                self._prober = Prober(self.router.choose, WAITING)
        return self._prober


hook = AutoModel()
