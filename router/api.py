"""Routing from Python: `from router import Router`. The command line does the same with files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from router.constants import BASE_COLUMN
from router.methods import load_method
from router.pipeline import Routed
from router.settings import Settings
from router.submission import GENERATION, MULTIPLE_CHOICE, Query


class Router:
    """A loaded library of adapters and its base model, ready to route queries."""

    def __init__(self, method: Routed) -> None:
        self._method = method

    @classmethod
    def from_library(
        cls,
        *adapters: str | Path,
        base_model: str | None = None,
        method: str = "proto_route",
        **settings: Any,
    ) -> Router:
        """Loads adapters and the base model that they belong to.

        Args:
            adapters: folders, folders of folders, names in data/library or hub ids (`ID[@REVISION]`);
                without any, data/library is loaded.
            base_model: `embedded`, a folder or a hub id; None takes the one that the adapters name.
            method: a routed method, by name.
            settings: any other field of `router.settings.Settings`, with the command line's defaults.

        Raises:
            InputError: an adapter or the base model is missing, broken or does not fit.
            ValueError: the method does not route.
        """
        found = load_method(method)(method)
        if not isinstance(found, Routed):
            raise ValueError(f"method {method}: expected one that routes, this one only merges")
        if adapters:
            settings["adapters"] = tuple(map(str, adapters))
        found.settings = Settings(base_model=base_model, **settings)
        found.merge()
        return cls(found)

    @property
    def candidates(self) -> list[str]:
        """The adapters' names and, last, `base`."""
        return [*(adapter.name for adapter in self._method.adapters), BASE_COLUMN]

    def route(self, texts: Sequence[str]) -> pd.DataFrame:
        """The weights of each text, which sum to 1: a row per text, a column per candidate."""
        queries = _queries(texts, None)
        routing = self._method.route(queries, self._method.encoded(queries))
        return pd.DataFrame(routing.weights, columns=self.candidates)

    def answer(self, texts: Sequence[str], choices: Sequence[Sequence[str]] | None = None) -> list[str]:
        """Answers texts, in order: with generated text or, given choices, with the likeliest of them.

        Variants are written to a temporary folder; `python -m router.main` keeps them.

        Args:
            choices: the choices of each text, at least one each.

        Returns:
            The answers; `unknown` where the model's output was not finite or a text did not fit into memory.
        """
        with tempfile.TemporaryDirectory() as folder:
            answers = self._method.answer(_queries(texts, choices), Path(folder)).answers
        if choices is None:
            return [answer.text for answer in answers]
        return [
            answer.text if answer.failed else options[int(answer.text)]
            for options, answer in zip(choices, answers, strict=True)
        ]


def _queries(texts: Sequence[str], choices: Sequence[Sequence[str]] | None) -> list[Query]:
    if isinstance(texts, str):
        raise ValueError("expected a list of texts, got one text; put it into a list")
    if not texts:
        raise ValueError("expected at least one text, got none")
    if choices is None:
        return [Query(str(n), text, GENERATION) for n, text in enumerate(texts)]
    if len(choices) != len(texts) or not all(choices) or any(isinstance(one, str) for one in choices):
        raise ValueError("expected for each text a list of at least one choice")
    pairs = zip(texts, choices, strict=True)
    return [Query(str(n), text, MULTIPLE_CHOICE, tuple(options)) for n, (text, options) in enumerate(pairs)]
