"""How adapters respond to generic text, and what they do at its end: what the gate compares with.

The text ships with the package. What is measured depends on the base model and on the adapter alone, so
it is kept on disk, adapter by adapter, under a name made from their contents: a library that was seen before
costs nothing, and one new adapter costs one adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.library.adapters import Adapter
from router.model.answer import encode
from router.model.base import Base
from router.model.passes import Last, truncated
from router.routing.gate import Trials
from router.routing.probe import input_means, last_of, probe
from router.routing.prototypes import FORMAT as PROTOTYPES
from router.routing.prototypes import ModulePrototypes, of_some
from router.routing.store import content, load, save
from router.routing.trial import trial

FORMAT = 2  # raise it when what is measured changes
# Trials need fewer texts than responses, of which there is one at every module: every fourth. Each costs
# a pass of its own for every adapter.
EVERY = 4


def generic_prompts() -> list[str]:
    """The texts against which responses are calibrated."""
    prompts: list[str] = json.loads(files("router.routing").joinpath("generic.json").read_text("utf-8"))
    return prompts


class Calibration:
    """What generic text does to one base model and its adapters.

    Args:
        base: the base model.
        limit: most tokens of a prompt; None keeps all.
    """

    def __init__(self, base: Base, limit: int | None = None) -> None:
        self.base = base
        self.rows = truncated(encode(base.tokenizer, generic_prompts(), limit))
        self.pad, model = base.tokenizer.pad_token_id, base.model
        what = [
            FORMAT,
            PROTOTYPES,
            base.sha256,
            str(model.dtype),
            model.device.type,
            torch.__version__,
            self.rows,
        ]
        text = json.dumps(what) + model.config.to_json_string()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = f"calibration/{name}"

    def _file(self, adapter: Adapter, what: str) -> str:
        return f"{self.folder}/{content(adapter)}.{what}"

    def means(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The mean input of each module, (d_in,) float32."""
        known = load(f"{self.folder}/means") or {}
        if missing := [module for module in modules if module not in known]:
            known |= input_means(self.base.model, self.rows, self.pad, missing)
            save(f"{self.folder}/means", known)
        return {module: known[module].to(self.base.model.device) for module in modules}

    def responses(
        self,
        adapters: Sequence[Adapter],
        protos: Mapping[str, ModulePrototypes],
        means: Mapping[str, Tensor],
    ) -> NDArray[np.float32]:
        """The adapters' responses, (generic prompts, adapters, modules); NaN without a prototype.

        Args:
            protos: the adapters' prototypes in the base model's dtype and on its device; their order of
                modules is that of the responses.
            means: what to centre with, by module.
        """
        out = np.full((len(self.rows), len(adapters), len(protos)), np.nan, dtype=np.float32)
        known = [load(self._file(adapter, "responses")) for adapter in adapters]
        new = [n for n, found in enumerate(known) if found is None]
        if new:
            theirs = of_some(protos, new, len(adapters))
            found = probe(
                self.base.model, self.rows, self.pad, theirs, means, len(new), "calibrate"
            ).responses
            for k, n in enumerate(new):
                known[n] = {
                    module: torch.from_numpy(found[:, k, m].copy())
                    for m, module in enumerate(theirs)
                    if not np.isnan(found[0, k, m])
                }
                save(self._file(adapters[n], "responses"), known[n] or {})
        place = {module: m for m, module in enumerate(protos)}
        for n, responses in enumerate(known):
            for module, values in (responses or {}).items():
                out[:, n, place[module]] = values.numpy()
        return out

    def trials(self, adapters: Sequence[Adapter], shortlist: NDArray[np.bool_]) -> Trials:
        """Trials on every fourth generic prompt of the adapters that any query wants; NaN for the others.

        Args:
            shortlist: (queries, adapters).
        """
        rows = self.rows[::EVERY]
        effect, confidence = np.full((2, len(rows), len(adapters)), np.nan)
        new = []
        for n in np.flatnonzero(shortlist.any(0)).tolist():
            if kept := load(self._file(adapters[n], "trials")):
                effect[:, n], confidence[:, n] = kept["effect"].numpy(), kept["confidence"].numpy()
            else:
                new.append(n)
        if new:
            everywhere = np.ones((len(rows), len(new)), dtype=bool)
            tried = [adapters[n] for n in new]
            found = trial(self.base, tried, rows, self._last, everywhere, "calibrate")
            effect[:, new], confidence[:, new] = found.effect, found.confidence
            for n in new:
                values = {"effect": effect[:, n], "confidence": confidence[:, n]}
                kept = {key: torch.from_numpy(value.copy()) for key, value in values.items()}
                save(self._file(adapters[n], "trials"), kept)
        return Trials(effect, confidence, self._base_confidence)

    @cached_property
    def _last(self) -> Last:
        """The base model at the end of every fourth generic prompt."""
        return last_of(self.base.model, self.rows[::EVERY], self.pad)

    @cached_property
    def _base_confidence(self) -> NDArray[np.float64]:
        known = load(f"{self.folder}/base")
        if known is None:
            known = {"confidence": self._last.confidence.double().cpu()}
            save(f"{self.folder}/base", known)
        return known["confidence"].numpy()
